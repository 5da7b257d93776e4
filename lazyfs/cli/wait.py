"""lazyfs wait: return when images are whole on this node."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common
from lazyfs.cli.output import Output, count
from lazyfs.errors import ImageIncomplete, LazyfsError, ManifestMissing
from lazyfs.units import format_size, parse_duration

if TYPE_CHECKING:
    from lazyfs.config import Settings

_LOOK = 0.5  # seconds between two looks
_UNKNOWN = 3.0  # seconds that an image may be unknown to the node
_JOBS = 16  # images looked at side by side
_EPILOG = """\
examples:
  lazyfs run docker://localhost:5000/app:1 & lazyfs wait docker://localhost:5000/app:1
  lazyfs wait --timeout 10m docker.io/library/nginx:1 docker.io/library/redis:7

It asks for nothing and hurries nothing: the background work of a mount, a container or `lazyfs fetch` brings the bytes.
Afterwards the images start without their registry. Where nobody fetches what is missing, it says so at once.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("wait", epilog=_EPILOG)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=common.IMAGE_HELP)
    parser.add_argument(
        "--timeout", metavar="SPAN", type=parse_duration, help="give up after this time (90, 10m, 2h), exit status 5"
    )
    common.add_platform(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Wait for the images. Blocking. Return the exit code; raise LazyfsError for the only image's failure."""
    from lazyfs.cli.fetch import tell
    from lazyfs.cli.side_by_side import side_by_side

    settings = common.settings(args)
    images = list(dict.fromkeys(args.images))
    names = [common.daemon_image(argparse.Namespace(**{**vars(args), "image": image})) for image in images]
    works = [
        partial(_wait, settings, image, name, args.platform, args.timeout, out)
        for image, name in zip(images, names, strict=True)
    ]
    results = side_by_side(works, _JOBS)
    if len(images) == 1 and isinstance(results[0], LazyfsError):
        raise results[0]
    return tell(images, results, out, _say)


def _wait(
    settings: Settings, image: str, name: str, platform: str | None, timeout: float | None, out: Output
) -> dict[str, Any]:
    """Return an image's state once it is whole. Raise ImageIncomplete when nothing brings the rest, or not in time."""
    from lazyfs.cli.fetch import Shown
    from lazyfs.cli.node_daemon import open_node_daemon

    began = since = time.monotonic()
    before = -1
    with out.progress(image) as bar, open_node_daemon(settings) as daemon:
        shown = Shown(bar)
        while True:
            try:
                state = daemon.call("image_state", image=name, platform=platform)
            except ManifestMissing:  # whoever was started just before us may be about to ask for it
                if time.monotonic() - began >= _UNKNOWN:
                    raise
                time.sleep(_LOOK)
                continue
            if state["whole"]:
                return state
            shown(state["present"], max(state["full"], 1))
            now = time.monotonic()
            if state["present"] != before or state["preparing"]:
                since, before = now, state["present"]
            why = ""
            if not state["coming"]:
                why = "and nobody fetches it"
            elif timeout is not None and now - began >= timeout:
                why = f"and {timeout:.0f} s are over"
            elif settings.read_timeout and now - since >= settings.read_timeout:
                why = f"and nothing has come for {settings.read_timeout:.0f} s"
            if why:
                missing = f"{count(len(state['missing']))} of {state['layers']} not done"
                lacks = format_size(max(0, state["full"] - state["present"]))
                hint = "lazyfs fetch it" if not state["coming"] else "lazyfs status tells of the registry's errors"
                raise ImageIncomplete("", f"{image} is not whole, {why}: {missing}, {lacks} to come", hint=hint)
            time.sleep(_LOOK)


def _say(image: str, state: dict[str, Any]) -> str:
    return f"{image} is whole on this node: {count(state['layers'])}, {format_size(state['full'])}"
