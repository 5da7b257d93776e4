"""`lazyfs trace show`: the waterfall of a recorded start, as text, as a page, or as JSON."""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import Output
from lazyfs.errors import UsageError
from lazyfs.limits import MAX_READS

if TYPE_CHECKING:
    from lazyfs.cli.waterfall import Summary
    from lazyfs.format.trace import Trace

_EPILOG = """\
examples:
  lazyfs trace show start.trace
  lazyfs trace show --html start.html start.trace
  lazyfs trace show --all start.trace | less -S
  lazyfs trace show --json start.trace | jq .summary

A line a file in the order in which the start wanted them, then its requests; # is time in which nothing came on.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("trace", epilog=_EPILOG)
    inner = parser.add_subparsers(dest="action", metavar="COMMAND", help="show")
    show = inner.add_parser("show", description="Draw what a recorded start read, what was fetched, where it waited.")
    show.add_argument("file", metavar="FILE", help="a trace")
    show.add_argument("--html", metavar="OUT", help="write one page for a browser, which needs nothing else")
    show.add_argument("--force", action="store_true", help="replace OUT where it is a file already")
    show.add_argument("--files", metavar="N", type=_count, default=10, help="list N files that stalled longest (10)")
    show.add_argument("--all", action="store_true", help="a line for each file and request, however many there are")
    common.add_json(show)
    show.set_defaults(run=run)
    parser.set_defaults(run=_none)


def _none(args: argparse.Namespace, out: Output) -> int:
    raise UsageError("trace wants a command", hint="lazyfs trace show FILE")


def run(args: argparse.Namespace, out: Output) -> int:
    """Draw a trace. Blocking (two files). Raise UsageError, TraceInvalid, StoreBroken."""
    from lazyfs.cli import waterfall
    from lazyfs.cli.trace_file import check_place, read_trace, write_trace

    place = check_place(args.html, force=args.force) if args.html is not None else None
    trace = read_trace(args.file)
    summary = waterfall.summarise(trace, args.files)
    if place is not None:
        from lazyfs.cli.waterfall_html import page

        write_trace(place, page(trace, summary).encode(), force=args.force)
        out.line(f"the start's waterfall is in {args.html}")
    elif not out.is_json:
        from lazyfs.cli.waterfall_text import lines

        for line in lines(trace, summary, shutil.get_terminal_size((80, 24)).columns, args.all):
            out.line(line)
    if out.is_json:
        out.json({**document(trace, summary), "html": args.html})
    return exit_codes.OK


def document(trace: Trace, summary: Summary) -> dict[str, Any]:
    """Return what `--json` prints of a trace. What is no UTF-8 in a path is lone surrogates, as in Python."""
    from lazyfs.cli.waterfall import priority

    return {
        "manifest": trace.manifest,
        "layers": list(trace.layers),
        "command": list(trace.command),
        "ready": trace.ready,
        "reads": [
            {
                "path": read.path.decode("utf-8", "surrogateescape"),
                "layer": read.layer,
                "offset": read.offset,
                "size": read.size,
                "at": read.at,
                "waited": read.waited,
            }
            for read in trace.reads
        ],
        "requests": [
            {
                "layer": one.layer,
                "blob_offset": one.blob_offset,
                "size": one.size,
                "priority": priority(one),
                "began": one.began,
                "first": one.first,
                "ended": one.ended,
            }
            for one in trace.requests
        ],
        "summary": summary.to_json(),
    }


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= MAX_READS):
        raise UsageError(f"{text[:40]!r} is no number of files", hint=f"write one from 0 to {MAX_READS}")
    return int(text)
