"""A start's waterfall as lines of text, each as wide as the terminal at most. Pure.

Bars are plain ASCII, since a log or a serial line has to show them, too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from lazyfs.cli import waterfall
from lazyfs.cli.output import count
from lazyfs.cli.waterfall import Row, Summary, seconds
from lazyfs.format.trace import Trace
from lazyfs.units import format_size

FILES, REQUESTS = 40, 24  # rows, unless everything was asked for
MIN_WIDTH, MAX_WIDTH = 40, 400  # columns; less shows nothing, more is no terminal
_LABEL = 44  # columns of a label at most
_TIME = 10  # columns of a time behind a bar
_TICK = 9  # columns from one time on the axis to the next, at least
_LEGEND = (
    "# waits for bytes",
    ". demanded, was there",
    "- request sent",
    "= its bytes come",
    "| ready",
    "D demand, P prefetch, B background",
)


def lines(trace: Trace, summary: Summary, width: int, everything: bool = False) -> Iterator[str]:
    """Yield the summary, the waterfall and the files that waited longest. `width`: columns, held to what is sensible.

    `everything`: a row for each file and request, not only for those that took long.
    """
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    for line in _lines(trace, summary, width, everything):
        yield fitted(line, width) if columns(line) > width else line


def figures(summary: Summary) -> Iterator[str]:
    """Yield the figures of a start as sentences without an end."""
    yield f"ready after {seconds(summary.ready)}"
    yield (
        f"{count(summary.files, 'file')}, {count(summary.chunks, 'chunk')}, {format_size(summary.demanded)} demanded; "
        f"stalled {seconds(summary.stalled_by_clock)} by the clock, {seconds(summary.stalled)} added up"
    )
    told = [f"{many} {name} ({format_size(size)})" for name, (many, size) in summary.requests.items()]
    yield f"requests: {', '.join(told) or 'none recorded'}"


def fitted(text: str, width: int) -> str:
    """Return `text` without so much of its beginning that it has at most `width` characters and columns."""
    if len(text) <= width and columns(text) <= width:
        return text
    left = width - 1
    place = len(text)
    while place and left >= max(1, columns(text[place - 1])):
        place -= 1
        left -= max(1, columns(text[place]))
    return "…" + text[place:]


def _lines(trace: Trace, summary: Summary, width: int, everything: bool) -> Iterator[str]:
    yield from _wrapped(f"start of {trace.manifest[:19]}…, {count(len(trace.layers))}", width)
    if trace.command:
        yield f"command {waterfall.command(trace)}"[:width]
    for figure in figures(summary):
        yield from _wrapped(figure, width)
    end = waterfall.drawn_until(trace)
    files = waterfall.file_rows(trace, len(trace.reads) if everything else FILES)
    requests = waterfall.request_rows(trace, len(trace.requests) if everything else REQUESTS)
    if files or requests:
        longest = max(columns(row.head + row.name) for row in (*files, *requests))
        label = min(longest, _LABEL, width * 2 // 5)
        bar = width - label - _TIME - 1
        yield ""
        yield " " * (label + 1) + _axis(end, bar)
        for row in files:
            yield _row(row, label, bar, end, trace.ready)
        if requests:
            yield ""
        for row in requests:
            yield _row(row, label, bar, end, trace.ready)
        yield ""
        yield from _wrapped(_LEGEND, width)
    if len(files) < summary.files or len(requests) + waterfall.later_requests(trace) < len(trace.requests):
        yield from _wrapped("Several files or requests are one line where little was waited for: see --all", width)
    if later := waterfall.later_requests(trace):
        yield from _wrapped(f"not drawn: {count(later, 'request')} that began afterwards", width)
    if summary.longest:
        yield ""
        yield "files that stalled longest"
    for file in summary.longest:
        told = f"{seconds(file.waited):>{_TIME}}  {file.stalls} of {count(len(file.reads), 'chunk')}  "
        yield told + fitted(waterfall.harmless(file.path), max(1, width - len(told)))


def _row(row: Row, label: int, bar: int, end: float, ready: float) -> str:
    text = row.head + fitted(row.name, max(1, label - len(row.head)))
    if columns(text) > label:
        text = text[: label - 1] + "…"
    text += " " * (label - columns(text))
    return f"{text} {_bar(row, bar, end, ready)}{seconds(row.took) if row.took else '':>{_TIME}}".rstrip()


def _bar(row: Row, width: int, end: float, ready: float) -> str:
    cells = [" "] * width
    if ready:
        cells[_column(ready, width, end)] = "|"
    for mark in row.marks:
        cells[_column(mark, width, end)] = "."
    for spans, letter in ((row.flows, "="), (row.waits, "#" if row.kind == "file" else "-")):
        for begin, stop in spans:
            first, last = _column(begin, width, end), _column(stop, width, end)
            cells[first : last + 1] = letter * (last + 1 - first)
    return "".join(cells)


def _column(at: float, width: int, end: float) -> int:
    return min(width - 1, int(at / end * width)) if end else 0


def _axis(end: float, width: int) -> str:
    text = ""
    for at in ticks(end, max(1, width // _TICK)):
        longer = text.ljust(_column(at, width, end)) + f"{at:g} s"
        if len(longer) > width:
            break  # half a number would be another one
        text = longer + " "
    return text.rstrip()


def ticks(end: float, most: int) -> list[float]:
    """Return at most `most` + 1 round times from 0 to `end` in equal steps."""
    if end <= 0:
        return [0.0]
    step = 0.001
    while True:
        for factor in (1, 2, 5):
            if end / (step * factor) <= most:
                return [number * step * factor for number in range(int(end / (step * factor)) + 1)]
        step *= 10


def _wrapped(parts: str | Sequence[str], width: int) -> Iterator[str]:
    """Yield a text in lines, broken between its words, or `parts` in lines, broken between them."""
    gap = " " if isinstance(parts, str) else "   "
    line = ""
    for part in parts.split() if isinstance(parts, str) else parts:
        if line and len(line) + len(gap) + len(part) > width:
            yield line
            line = "  " + part
        else:
            line += (gap if line else "") + part
    yield line


def columns(text: str) -> int:
    """Return the columns that a terminal takes for a text."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
