"""lazyfs fetch: have images whole on this node, or whole in containerd."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes, pull
from lazyfs.cli.output import Output, count
from lazyfs.errors import LazyfsError, UsageError
from lazyfs.limits import MAX_IMAGE_LIST
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.cli.output import Progress
    from lazyfs.config import Settings

_JOBS = 3
_EPILOG = """\
examples:
  lazyfs fetch docker://localhost:5000/debian:base
  lazyfs fetch --pin --file images.txt            # what a new node is to have
  lazyfs fetch --json oci:images:tool
  lazyfs fetch --content --namespace k8s.io docker.io/library/nginx:1   # so that containerd can push and export it

Every byte is in the store and checked when it returns; such an image starts without its registry, by tag too. LIST has
one reference a line; what follows # is a comment. Where one image fails the others go on; the exit status is then that
of the first that failed.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("fetch", epilog=_EPILOG)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help=common.IMAGE_HELP)
    parser.add_argument("--file", metavar="LIST", help="fetch the images listed in this file, too; -: standard input")
    parser.add_argument(
        "--pin", action="store_true", help="keep them whatever the store's bound says, until lazyfs cache unpin or rm"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=_JOBS, help=f"images at a time (default {_JOBS})"
    )  # fmt: skip
    parser.add_argument(
        "--content", action="store_true", help="fill containerd's content store with what it lacks of these images"
    )
    parser.add_argument(
        "--all-platforms", action="store_true", help="with --content: all that the images' indexes name"
    )
    pull.add_containerd(parser)
    common.add_pull(parser)
    common.add_usual(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Fetch the images. Blocking. Return the exit code; raise LazyfsError for the only image's failure."""
    from lazyfs.cli.side_by_side import side_by_side

    settings = common.settings(args)
    images = list(dict.fromkeys([*args.images, *(_listed(args.file) if args.file else [])]))
    if not images:
        raise UsageError("no image is named", hint="lazyfs fetch IMAGE…, or --file LIST")
    if args.jobs < 1:
        raise UsageError("--jobs is at least 1")
    works = _content_works(args, settings, images, out) if args.content else _works(args, settings, images, out)
    results = side_by_side(works, args.jobs)
    if len(images) == 1 and isinstance(results[0], LazyfsError):
        raise results[0]
    return tell(images, results, out, _say_content if args.content else _say)


def _works(
    args: argparse.Namespace, settings: Settings, images: list[str], out: Output
) -> list[Callable[[], dict[str, Any]]]:
    if args.all_platforms:
        raise UsageError("--all-platforms goes with --content only", hint="a node is of one platform")
    access = common.access(args, settings).to_json()
    when = common.pull(args, settings)
    calls = [_call(args, image, access, when) for image in images]  # all are looked at before the first one is fetched
    return [partial(_fetch, settings, image, call, out) for image, call in zip(images, calls, strict=True)]


def _content_works(
    args: argparse.Namespace, settings: Settings, images: list[str], out: Output
) -> list[Callable[[], dict[str, Any]]]:
    from lazyfs.containerd.client import check_packages

    check_packages()
    from lazyfs.cli.fetch_content import fetch_content

    if args.pin or args.pull is not None:
        raise UsageError(
            f"--content and {'--pin' if args.pin else '--pull and --offline'} exclude each other",
            hint="--content is about containerd's content store, not about lazyfs's own",
        )
    for image in images:
        _check(image, "")
    return [partial(fetch_content, args, settings, image, out) for image in images]


def _listed(name: str) -> list[str]:
    """Return the references in a list. Raise UsageError."""
    try:
        if name == "-":
            raw = sys.stdin.buffer.read(MAX_IMAGE_LIST + 1)
        else:
            with open(name, "rb") as handle:
                raw = handle.read(MAX_IMAGE_LIST + 1)
        text = raw.decode()
    except OSError as error:
        raise UsageError(f"the list {name} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the list {name} is not UTF-8 text") from None
    if len(raw) > MAX_IMAGE_LIST:
        raise UsageError(f"the list {name} is longer than {format_size(MAX_IMAGE_LIST)}")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        image = line.strip()
        if "#" in image:  # behind a blank only: a directory's name may have one
            head, _, _ = f" {image}".partition(" #")
            image = head.strip()
        if image:
            _check(image, f"line {number} of {name}: ")
            found.append(image)
    return found


def _check(image: str, where: str) -> None:
    from lazyfs import reference
    from lazyfs.errors import ReferenceInvalid

    try:
        reference.parse(image)
    except ReferenceInvalid as error:
        raise UsageError(f"{where}{error.message}", hint=error.hint) from None


def _call(args: argparse.Namespace, image: str, access: dict[str, Any], pull: str | None) -> dict[str, Any]:
    _check(image, "")
    return {
        "image": common.daemon_image(argparse.Namespace(**{**vars(args), "image": image})),
        "platform": args.platform,
        "plain_http": args.plain_http,
        "access": access,
        "pull": pull,
        "pin": args.pin,
    }


def _fetch(settings: Settings, image: str, call: dict[str, Any], out: Output) -> dict[str, Any]:
    from lazyfs.cli.node_daemon import open_node_daemon

    with out.progress(image) as bar, open_node_daemon(settings) as daemon:
        return daemon.call("fetch_image", on_event=out.note, on_progress=Shown(bar), **call)


class Shown:
    """Shows how far something is on a bar: `done` of `total` bytes. Thread-safe."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            self._bar.total = total
            self._bar.advance(max(0, done - self._bar.done))


def _say(image: str, result: dict[str, Any]) -> str:
    return (
        f"{image} is whole on this node{' and pinned' if result.get('pinned') else ''}: "
        f"{count(int(result.get('layers') or 0))}, {format_size(int(result.get('stored') or 0))}, "
        f"{format_size(int(result.get('fetched') or 0))} of it fetched now"
    )


def _say_content(image: str, result: dict[str, Any]) -> str:
    return (
        f"{image} is whole in containerd (namespace {result['namespace']}): {count(result['blobs'], 'blob')}, "
        f"{format_size(result['size'])}, {format_size(result['fetched'])} of it fetched now"
    )


def tell(
    images: list[str],
    results: list[dict[str, Any] | LazyfsError],
    out: Output,
    say: Callable[[str, dict[str, Any]], str],
) -> int:
    """Say what became of each image, by `say` where it went well. Return the exit code: of the first that failed."""
    told: list[dict[str, Any]] = []
    code = exit_codes.OK
    failed = 0
    for image, result in zip(images, results, strict=True):
        if isinstance(result, LazyfsError):
            failed += 1
            code = code or exit_codes.code_of(result)
            out.error(f"{image}: {result}")
            error = {"class": type(result).__name__, "message": result.message, "hint": result.hint}
            told.append({"image": image, "ok": False, "error": {**error, "exit_code": exit_codes.code_of(result)}})
            continue
        for note in result.get("notes") or ():
            out.note(f"{image}: {note}")
        out.line(say(image, result))
        told.append({"image": image, "ok": True, **result})
    if len(images) > 1:
        out.line(f"{len(images) - failed} of {count(len(images), 'image')} whole")
    out.json({"images": told, "failed": failed})
    return code
