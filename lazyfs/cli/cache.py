"""lazyfs cache: what the store holds, and its operator's ways to change that."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import Output, count
from lazyfs.errors import UsageError
from lazyfs.units import format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from lazyfs.cli.stock_access import StockCaller
    from lazyfs.config import Settings

_EPILOG = """\
examples:
  lazyfs cache ls --layers
  lazyfs cache rm docker://localhost:5000/debian:base
  lazyfs cache prune --older 30d
  lazyfs cache prune --to 5GiB
  lazyfs cache verify

`lazyfs cache COMMAND --help` shows the options of each. A running daemon does the work on its own store; without one
the command holds the store meanwhile. Nothing mounted disappears: what it needs is fetched again.
"""
_NAMES_HELP = "an image's reference, or the digest of an image or a layer, whole or its first hex digits"
_WIDTH = 56  # columns of an image's name before the others are moved


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("cache", epilog=_EPILOG)
    inner = parser.add_subparsers(dest="action", metavar="COMMAND", help="ls, rm, prune, verify or unpin")
    ls = inner.add_parser("ls", description="List the images on this node: how much of each is here, what keeps it.")
    ls.add_argument("--layers", action="store_true", help="list the layers, too")
    ls.set_defaults(run=_ls)
    rm = inner.add_parser("rm", description="Remove images or layers, pinned or not; what other images need stays.")
    rm.add_argument("names", metavar="IMAGE|DIGEST", nargs="+", help=_NAMES_HELP)
    rm.add_argument("--force", action="store_true", help="drop the bytes of mounted ones, too: they are fetched again")
    rm.set_defaults(run=_rm)
    prune = inner.add_parser(
        "prune",
        description="Remove layers that no image refers to; with an option also those used least recently. "
        "What is pinned or mounted stays.",
    )
    group = prune.add_mutually_exclusive_group()
    group.add_argument("--to", metavar="SIZE", type=parse_size, help="until the store takes at most SIZE")
    group.add_argument("--older", metavar="AGE", type=parse_duration, help="what was not used for AGE: 12h, 30d, 2w")
    group.add_argument("--all", action="store_true", help="everything")
    prune.set_defaults(run=_prune)
    verify = inner.add_parser("verify", description="Hash every byte that is here; what is damaged is dropped.")
    verify.add_argument("names", metavar="IMAGE|DIGEST", nargs="*", help=_NAMES_HELP)
    verify.set_defaults(run=_verify)
    unpin = inner.add_parser("unpin", description="Release the pins of lazyfs fetch --pin. Nothing is removed.")
    unpin.add_argument("names", metavar="IMAGE|DIGEST", nargs="+", help=_NAMES_HELP)
    unpin.set_defaults(run=_unpin)
    for each in (ls, rm, prune, verify, unpin):
        common.add_json(each)
    parser.set_defaults(run=_none)


def _none(args: argparse.Namespace, out: Output) -> int:
    raise UsageError("cache wants a command", hint="lazyfs cache ls, rm, prune, verify or unpin")


# -- ls


def _ls(args: argparse.Namespace, out: Output) -> int:
    settings = common.settings(args)
    if not _exists(settings):
        found: dict[str, Any] = {"images": [], "layers": [], "size": 0, "bound": settings.store_size}
    else:
        from lazyfs.cli.stock_access import open_stock

        with open_stock(settings) as stock:
            images, facts = pages(stock, "images")
            layers, _ = pages(stock, "layers")
        found = {"images": images, "layers": layers, "size": facts.get("size", 0), "bound": facts.get("bound", 0)}
    found = {"root": str(settings.root), **found}
    found["images"] = sorted(found["images"], key=lambda image: (-image["last_use"], image["digest"]))
    found["layers"] = sorted(found["layers"], key=lambda layer: (-layer["last_use"], layer["digest"]))
    for line in _lines(found, layers=args.layers, now=time.time()):
        out.line(line)
    out.json(found)
    return exit_codes.OK


def _exists(settings: Settings) -> bool:
    return (settings.root / "catalog.db").exists()


def pages(stock: StockCaller, what: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return all rows of a list that comes in pages, and the last answer."""
    rows: list[dict[str, Any]] = []
    while True:
        answer = stock.call(f"cache_{what}", after=rows[-1]["digest"] if rows else "")
        rows += answer[what]
        if not answer["more"] or not answer[what]:
            return rows, answer


def _lines(found: dict[str, Any], *, layers: bool, now: float) -> Iterator[str]:
    for image in found["images"]:
        names = image["references"] or [image["digest"]]
        yield from names[:-1]
        state = [
            "complete" if image["complete"] else f"{_share(image)} here",
            *(["pinned"] if image["pinned"] else []),
            *(["verified"] if image["verified"] else []),
            *([f"mounted on {', '.join(image['mounts'])}"] if image["mounts"] else []),
            *([] if image["known"] else ["its manifest or config is not here"]),
        ]
        used = f"used {_ago(now, image['last_use'])}" if image["last_use"] else "not used yet"
        yield (
            f"{names[-1]:<{_WIDTH}} {image['digest'][7:19]}  {format_size(image['size']):>9} "
            f"in {count(len(image['layers']))}, {', '.join(state)}, {used}"
        )
    if layers and found["layers"]:
        yield ""
        for layer in found["layers"]:
            yield _layer_line(layer, found["images"], now)
    if found["images"] or found["layers"]:
        yield ""
    yield (
        f"{found['root']}: {count(len(found['images']), 'image')}, {count(len(found['layers']))}, "
        f"{format_size(found['size'])} of at most {format_size(found['bound'])}"
    )


def _layer_line(layer: dict[str, Any], images: list[dict[str, Any]], now: float) -> str:
    owners = sum(layer["digest"] in image["layers"] for image in images)
    state = [
        "complete" if layer["complete"] else f"{_share(layer)} here",
        *(["pinned"] if layer["pinned"] else []),
        *(["verified"] if layer["verified"] else []),
        *(["in use"] if layer["used"] else []),
        *([f"QUARANTINED: {layer['quarantine']}"] if layer["quarantine"] else []),
        f"in {count(owners, 'image')}" if owners else "in no image",
    ]
    used = f"used {_ago(now, layer['last_use'])}" if layer["last_use"] else "not used yet"
    return f"{layer['digest'][:19]}  {format_size(layer['disk']):>9} on disk, {', '.join(state)}, {used}"


def _share(facts: dict[str, Any]) -> str:
    """Return how much is here as a percentage that never claims more than there is."""
    return f"{min(99, int(100 * facts['present'] / facts['full'])) if facts['full'] else 0} %"


def _ago(now: float, then: int) -> str:
    from lazyfs.cli.status import duration

    return f"{duration(max(0.0, now - then))} ago"


# -- rm, prune, unpin


def _rm(args: argparse.Namespace, out: Output) -> int:
    from lazyfs.cli.stock_access import open_stock

    with open_stock(common.settings(args)) as stock:
        done = stock.call("cache_remove", names=args.names, force=args.force)
    _tell_cleared(done, out)
    return exit_codes.OK


def _prune(args: argparse.Namespace, out: Output) -> int:
    from lazyfs.cli.stock_access import open_stock

    settings = common.settings(args)
    if not _exists(settings):
        out.line(f"there is no store at {settings.root}")
        out.json({"freed": 0, "layers": [], "images": [], "size": 0})
        return exit_codes.OK
    with open_stock(settings) as stock:
        done = stock.call("cache_prune", size=args.to, age=args.older, everything=args.all)
    _tell_cleared(done, out)
    if args.to is not None and done["size"] > args.to:
        out.warn(f"{format_size(done['size'])} stay: what is left is pinned or in use")
    return exit_codes.OK


def _tell_cleared(done: dict[str, Any], out: Output) -> None:
    for digest, reason in done["kept"].items():
        out.note(f"layer {digest[:19]}… stays: {reason}")
    for digest in done["dropped"]:
        out.note(f"layer {digest[:19]}… is in use: its bytes are fetched again when read, if its registry may be asked")
    out.line(
        f"{format_size(done['freed'])} freed: {count(len(done['layers']))} removed, "
        f"{count(len(done['images']), 'image')} forgotten; the store takes {format_size(done['size'])}"
    )
    out.json(done)


def _unpin(args: argparse.Namespace, out: Output) -> int:
    from lazyfs.cli.stock_access import open_stock

    with open_stock(common.settings(args)) as stock:
        done = stock.call("cache_unpin", names=args.names)
    out.line(f"{count(len(done['images']), 'image')} unpinned")
    out.json(done)
    return exit_codes.OK


# -- verify


def _verify(args: argparse.Namespace, out: Output) -> int:
    settings = common.settings(args)
    if not _exists(settings) and not args.names:
        out.line(f"there is no store at {settings.root}")
        out.json({"clean": True, "layers": 0, "chunks": 0, "bytes": 0})
        return exit_codes.OK
    from lazyfs.cli.stock_access import open_stock

    with open_stock(settings) as stock, out.progress("verifying") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.advance(max(0, done - bar.done))

        found = stock.call("cache_verify", names=args.names, on_progress=show)
    for digest, chunks in found["damaged"].items():
        out.warn(f"layer {digest}: {count(chunks, 'chunk')} damaged and dropped, to be fetched again")
    for digest in found["tables"]:
        out.warn(f"layer {digest}: its table is damaged and dropped, to be made again at the next mount")
    for digest in found["documents"]:
        out.warn(f"document {digest} was damaged and is dropped, to be fetched again")
    for digest, reason in found["skipped"].items():
        out.warn(f"layer {digest} was not looked at: {reason}")
    verdict = "all as promised" if found["clean"] else "DAMAGED, see above"
    out.line(
        f"{count(found['layers'])}, {count(found['chunks'], 'chunk')}, {format_size(found['bytes'])} hashed: {verdict}"
    )
    out.json(found)
    return exit_codes.OK if found["clean"] else exit_codes.VERIFICATION
