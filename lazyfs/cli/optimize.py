"""lazyfs optimize: attach what starts of an image read to the image in its registry, for every node that starts it."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common
from lazyfs.cli.output import Output, count
from lazyfs.errors import TraceInvalid, UsageError
from lazyfs.limits import LISTING_TIMEOUT
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.format.trace import Trace
    from lazyfs.reference import Reference
    from lazyfs.registry.repository import Repository
    from lazyfs.registry.resolve import ResolvedImage

_LEARNED = "what this node learned"
_DESCRIPTION = """\
Attach what starts of IMAGE read, and in which order, to the image in its registry. Nodes that start it then fetch that
first. The image stays as it is: nothing of it is pushed again, and its digest is the same. The trace is an artifact
that refers to the image's manifest.

Without TRACE it is what this node has learned from its own starts. What the registry has already is merged in."""
_EPILOG = """\
examples:
  lazyfs optimize registry.example:5000/app:1 app.trace
  lazyfs optimize --dry-run registry.example:5000/app:1      # with what this node learned
  lazyfs optimize --platform linux/arm64 registry.example:5000/app:1 arm.trace second.trace
  lazyfs optimize --json oci:images:tool tool.trace
"""


@dataclass(frozen=True, slots=True)
class _Given:
    """A trace and where it comes from, in words."""

    source: str
    trace: Trace


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("optimize", description=_DESCRIPTION, epilog=_EPILOG)
    common.add_image(parser)
    parser.add_argument("traces", metavar="TRACE", nargs="*", help="files of lazyfs record")
    parser.add_argument("--dry-run", action="store_true", help="say what would be attached, and attach nothing")
    common.add_usual(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Attach the traces. Blocking. Raise LazyfsError; nothing is pushed then, or nothing refers to the image yet."""
    from lazyfs import reference
    from lazyfs.cli.trace_file import read_trace

    image = reference.parse(args.image)
    if image.transport not in ("docker", "oci"):
        raise UsageError(
            f"nothing can be attached to an image in {image.transport}:", hint="name it in a registry, or in oci:DIR"
        )
    settings = common.settings(args)
    given = [_Given(name, read_trace(name)) for name in dict.fromkeys(args.traces)]
    with common.opened(args, image, settings) as repository:
        return _optimize(args, out, settings, repository, image, given)


def _optimize(
    args: argparse.Namespace,
    out: Output,
    settings: Settings,
    repository: Repository,
    image: Reference,
    given: list[_Given],
) -> int:
    from lazyfs import oci
    from lazyfs.format.trace import encode, fitting, merged, stripped
    from lazyfs.registry import traces
    from lazyfs.registry.resolve import resolve_image

    found = resolve_image(repository, image, args.platform)
    given = given or [_learned(settings, found)]
    for one in given:
        _check(one, found)
    layers = _layers(found)
    subject = oci.Descriptor(found.media_type, found.digest, len(found.manifest.raw))
    deadline = time.monotonic() + LISTING_TIMEOUT
    known = traces.find(repository, found.digest, deadline, layers=layers, subject=subject)
    ours = merged(one.trace for one in given)
    # Ours first: whoever may push there could fill a trace with what nobody reads.
    union = merged([one.trace for one in given] + ([known] if known else []))
    assert union is not None  # there is at least one
    whole = fitting(stripped(union), ours)
    new = _chunks(whole) - (_chunks(known) if known else set())
    entry = None
    if new and not args.dry_run:
        entry = traces.attach(repository, subject, whole)
    report = {
        "image": str(image),
        "platform": found.platform,
        "manifest_digest": found.digest,
        "traces": [{"source": one.source, **_facts(one.trace)} for one in given],
        "known": len(known.reads) if known else 0,  # reads that the registry told of before
        "new": len(new),
        "reads": len(whole.reads),
        "left_out": len(union.reads) - len(whole.reads),
        "size": len(encode(whole)),
        "artifact": entry.digest if entry else None,
        "inline": entry is not None and traces.INLINE in entry.annotations,
        "dry_run": args.dry_run,
    }
    out.json(report)
    _say(out, report)
    return 0


def _say(out: Output, report: dict[str, Any]) -> None:
    for one in report["traces"]:
        out.line(
            f"{one['source']}: {count(one['reads'], 'read')} of {count(one['files'], 'file')}, "
            f"{format_size(one['bytes'])}" + (f", ready after {one['ready']:.1f} s" if one["ready"] else "")
        )
    out.line(f"the registry has {count(report['known'], 'read')}; new: {report['new']}")
    if report["left_out"]:
        out.note(f"the last {count(report['left_out'], 'read')} are left out: a trace has a bound")
    where = f"{report['image']} ({report['manifest_digest']})"
    if not report["new"]:
        out.line(f"nothing is new, so nothing is attached to {where}")
    elif report["dry_run"]:
        out.line(f"would attach {count(report['reads'], 'read')}, {format_size(report['size'])}, to {where}")
    else:
        how = "inline" if report["inline"] else "as a blob"
        out.line(
            f"{report['artifact']}  {count(report['reads'], 'read')}, {format_size(report['size'])} {how}, {where}"
        )


def _learned(settings: Settings, found: ResolvedImage) -> _Given:
    """Return what this node has learned of the image's starts. Raise UsageError."""
    from lazyfs.chunks.trace_files import TraceFiles

    trace = TraceFiles(settings.root).load(found.digest)
    if trace is None:
        raise UsageError(
            f"this node has learned nothing of {found.digest}, and no TRACE is given",
            hint=f"lazyfs record {found.reference}",
        )
    return _Given(_LEARNED, trace)


def _check(one: _Given, found: ResolvedImage) -> None:
    """Raise UsageError for a trace of another image, TraceInvalid for one without reads or with other layers."""
    if one.trace.manifest != found.digest:
        raise UsageError(
            f"{one.source} is a trace of {one.trace.manifest}, but {found.reference} is {found.digest} for "
            f"{found.platform}",
            hint="record that image, or name the trace's with @sha256:… or --platform",
        )
    if one.trace.layers != _layers(found):
        raise TraceInvalid(f"{one.source} tells of other layers than {found.digest} has")
    if not one.trace.reads:
        raise TraceInvalid(f"{one.source} tells of no read")


def _layers(found: ResolvedImage) -> tuple[str, ...]:
    return tuple(layer.digest for layer in found.manifest.layers)


def _chunks(trace: Trace) -> set[tuple[int, bytes, int]]:
    return {(read.layer, read.path, read.offset) for read in trace.reads}


def _facts(trace: Trace) -> dict[str, Any]:
    from lazyfs.format.trace import paths

    size = sum(read.size for read in trace.reads)
    return {"reads": len(trace.reads), "files": len(paths(trace)), "bytes": size, "ready": trace.ready}
