"""lazyfs record: start a container once, and keep what its start read as a trace."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common
from lazyfs.cli import run as running
from lazyfs.cli.output import Output, count
from lazyfs.errors import UsageError
from lazyfs.limits import LONGEST_START, READY_PATIENCE
from lazyfs.units import format_size, parse_duration

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.format.trace import Trace

_DESCRIPTION = """\
Start a container as `lazyfs run` does, and keep what its start read, in which order, and where it waited, as a trace:
until it is ready, when the container is stopped. `lazyfs optimize` attaches the trace to the image, `lazyfs convert
--prefetch` lays layers out in its order, `lazyfs trace show` draws it."""
_EPILOG = """\
examples:
  lazyfs record --ready-when port:8000 registry.example:5000/app:1
  lazyfs record --cold --ready-when 'line:ready to accept' -o db.trace registry.example:5000/postgres:16
  lazyfs record registry.example:5000/python:3.12 python3 -c 'import json'

Without --ready-when the start is over when the command ends, or after 30 s. What the container says goes to stderr.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "record",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        usage="lazyfs record [options] IMAGE [COMMAND [ARGUMENT…]]",
    )
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", help="the trace (default: NAME.trace in this directory)")
    add("--force", action="store_true", help="replace FILE where it is there already")
    add(
        "--ready-when",
        metavar="WHAT",
        help="line:TEXT (it writes a line with TEXT), port:N (localhost accepts), or time:SPAN",
    )
    add("--timeout", metavar="SPAN", type=_patience, help="give up when it is not ready after so long (default: 5m)")
    add("--cold", action="store_true", help="with a store of its own, which is empty and goes at the end")
    common.add_json(parser)
    running.add_container(parser)
    parser.set_defaults(run=run, tty=False, interactive=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """Record a start. Blocking. Raise LazyfsError; then no file is written."""
    from lazyfs import reference
    from lazyfs.cli.recording import UNTIL_END, Ready, Recording, parse_ready
    from lazyfs.cli.trace_file import check_place, read_trace, write_trace
    from lazyfs.container import runtime
    from lazyfs.format.trace import encode

    name = args.output if args.output is not None else _default_name(reference.parse(args.image))
    place = check_place(name, force=args.force)
    ready = parse_ready(args.ready_when) if args.ready_when is not None else Ready(span=UNTIL_END, ends=True)
    if ready.port and args.network == "none":
        raise UsageError("a container with --network none has no port that could be waited for")
    patience = READY_PATIENCE if args.timeout is None else args.timeout
    if ready.span > patience and not ready.ends:
        raise UsageError(f"--timeout {patience:g} is over before --ready-when {args.ready_when}")
    recording = Recording(ready, patience)
    options = running.container_options(args)
    runtime_path = runtime.find(args.runtime)
    with _store(args, out) as settings:
        running.run_container(args, out, settings, options, runtime_path, recording)
        running.sweep_leftovers(settings)
        assert recording.answer is not None  # finish() raises when there is none
        trace = read_trace(recording.answer["path"])
    if not trace.reads:
        raise UsageError(
            "nothing was read that this node did not have in memory, so there is nothing to learn",
            hint="--cold records it on an empty store",
        )
    write_trace(place, encode(trace), force=args.force)
    _say(args, out, name, recording.manifest_digest, trace)
    return 0


def _say(args: argparse.Namespace, out: Output, name: str, manifest_digest: str, trace: Trace) -> None:
    from lazyfs import reference
    from lazyfs.format.trace import paths

    stalls = [read.waited for read in trace.reads if read.waited]
    report = {
        "file": name,
        "image": args.image,
        "manifest_digest": manifest_digest,
        "ready": trace.ready,
        "reads": len(trace.reads),
        "files": len(paths(trace)),
        "bytes": sum(read.size for read in trace.reads),
        "requests": len(trace.requests),
        "stalls": len(stalls),
        "stalled": round(sum(stalls), 3),
        "cold": args.cold,
    }
    out.json(report)
    out.line(
        f"{name}: ready after {trace.ready:.1f} s; {count(len(trace.reads), 'read')} of "
        f"{count(len(paths(trace)), 'file')}, {format_size(sum(read.size for read in trace.reads))}; "
        f"{count(len(stalls), 'stall')} of {sum(stalls):.1f} s together"
    )
    to_registry = reference.parse(args.image).transport in ("docker", "oci")
    out.note(f"next: lazyfs {f'optimize {args.image}' if to_registry else 'convert --prefetch'} {name}")


def _default_name(image: Any) -> str:
    """Return the file for an image's trace: its repository's last word, or its archive's or layout's name."""
    last = (image.repository or image.path or image.tag).rstrip("/").rpartition("/")[2]
    word = "".join(c if c.isalnum() or c in "._-" else "-" for c in last).lstrip(".-")
    return f"{word or 'image'}.trace"


def _patience(text: str) -> float:
    seconds = parse_duration(text)
    if not 0 < seconds < LONGEST_START:
        raise UsageError(f"--timeout can't be {text!r}", hint="write 90s, 10m or 2h")
    return seconds


@contextlib.contextmanager
def _store(args: argparse.Namespace, out: Output) -> Iterator[Settings]:
    """Yield the settings in force, with `--cold` those of a store of its own that is gone afterwards."""
    settings = common.settings(args)
    if not args.cold:
        yield settings
        return
    from lazyfs.cli.cold_store import cold_store

    with cold_store(settings, out) as cold:
        yield cold
