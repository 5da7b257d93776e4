"""`lazyfs why`: of each layer of an image, whether it is lazy, and if not why, and what can be done about it."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import count
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.cli.image_facts import ImageFacts, LayerFacts
    from lazyfs.cli.output import Output

_EPILOG = """\
examples:
  lazyfs why registry.example:5000/app:1
  lazyfs why sha256:4d5f0c         the images whose manifest's digest begins so
  lazyfs why --json registry.example:5000/app:1 | jq '.images[].layers[] | select(.state == "fallback") | .reason'

It asks this node alone: the snapshotter's records, the store and the daemon, whichever are there; no registry."""

_STATES = {
    "lazy": "lazy",
    "small": "fetched in full because it is small",
    "full": "fetched in full",
    "fallback": "downloaded in the ordinary way",
    "unknown": "not known why",
}
_SHOWN = 8  # snapshots that are named


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "why",
        description="Tell of each layer of an image that was pulled or mounted here if it is lazy, or why it is not.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "image", metavar="IMAGE|DIGEST", help="a reference, or the digest of a manifest, whole or its first hex digits"
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print what is known. Blocking. Raise ManifestMissing when that is nothing, or another LazyfsError."""
    from lazyfs.cli import image_facts

    settings = common.settings(args)
    sources = image_facts.look(settings, out)
    with contextlib.ExitStack() as stack:
        if sources.records is not None:
            stack.callback(sources.records.close)
        found = image_facts.gather(args.image, sources)
    for number, image in enumerate(found):
        if number:
            out.line()
        for line in lines(image, time.time()):
            out.line(line)
    out.json({"images": [image.to_json() for image in found]})
    return exit_codes.OK


def lines(image: ImageFacts, now: float) -> Iterator[str]:
    """Yield the lines for people. `now`: seconds since the epoch."""
    states = Counter(layer.state for layer in image.layers)
    told = ", ".join(f"{states[state]} {text}" for state, text in _STATES.items() if states[state])
    yield f"{image.image}: {count(len(image.layers))}" + (f", {told}" if told else "")
    if image.manifest_digest:
        yield f"  manifest {image.manifest_digest}"
    for layer in image.layers:
        yield from _layer_lines(layer, now)
    yield from _use_lines(image)
    for advice in dict.fromkeys(layer.advice for layer in image.layers if layer.advice):
        yield f"  to do: {advice}"


def _layer_lines(layer: LayerFacts, now: float) -> Iterator[str]:
    from lazyfs.cli.status import duration

    state = _STATES[layer.state]
    if layer.quarantine:
        state = f"QUARANTINED: {layer.quarantine}"
    parts = [state + (f": {layer.reason}" if layer.reason and not layer.quarantine else "")]
    if layer.complete:
        parts.append("all of it here")
    elif layer.state != "fallback" or layer.present:
        parts.append(f"{format_size(layer.present)}{f' of {format_size(layer.full)}' if layer.full else ''} here")
    if layer.verified:
        parts.append("checked whole")
    elif layer.state == "lazy" and not layer.quarantine:
        parts.append("not checked whole yet")
    if layer.decided:
        parts.append(f"decided {duration(max(0.0, now - layer.decided))} ago")
    yield f"  {layer.digest[:19]}  {format_size(layer.size) if layer.size else '?':>9}  {', '.join(parts)}"


def _use_lines(image: ImageFacts) -> Iterator[str]:
    if image.snapshots:
        yield f"  {count(len(image.snapshots), 'snapshot')} of its layers, {_named('used by', image.users)}"
    if image.chains:
        yield f"  shown by the daemon: {count(len(image.chains), 'chain')}"
    if image.mounts:
        yield f"  {_named('mounted on', image.mounts)}"


def _named(what: str, names: list[str]) -> str:
    if not names:
        return f"{what} nobody"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}"
