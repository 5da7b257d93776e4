"""A start's waterfall as one HTML page that needs nothing else: no script, no request, light or dark as the reader is.

Pure. The page's policy lets a browser run and fetch nothing, so that a path which got past the escaping would do
nothing either. Zooming is a choice of widths in the style sheet; tooltips are the picture's own titles.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape

from lazyfs.cli import waterfall
from lazyfs.cli.output import count
from lazyfs.cli.waterfall import Row, Span, Summary, seconds
from lazyfs.cli.waterfall_text import figures, fitted, ticks
from lazyfs.format.trace import Trace

ROWS = 2000  # of files, and of requests: what a browser shows without a pause
_HEIGHT = 18  # pixels of a row; the style sheet says so, too
_BAR = 10  # pixels of a bar in it
_LABEL = 60  # characters of a label
_TITLE = 1000  # characters of a path in a tooltip
_TICKS = 10
_LABELLED = 0.94  # of the axis: no room for a time behind
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --paper: #ffffff; --faint: #d8dde6; --hover: #eef2f8;
  --wait: #c62f3b; --there: #4a7d4f; --demand: #c77700; --prefetch: #2b6cb0; --background: #8a8f99; --mixed: #7b4fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe4ec; --paper: #14181f; --faint: #343b47; --hover: #222934;
  --wait: #ff6b72; --there: #7fc486; --demand: #f5a742; --prefetch: #63a8f0; --background: #8f96a3;
  --mixed: #b48ef0; } }
body { margin: 1.5rem; background: var(--paper); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin-top: 1.5rem; }
p { margin: .2rem 0; }
code, .names, td.path { font-family: ui-monospace, monospace; font-size: 12px; overflow-wrap: anywhere; }
td { padding: 0 1rem 0 0; vertical-align: top; } td.figure { text-align: right; white-space: nowrap; }
.chart { display: grid; grid-template-columns: fit-content(30rem) minmax(0, 1fr); margin-top: .5rem; }
.names { overflow: hidden; } .scroll { overflow-x: auto; }
.names div { height: 18px; line-height: 18px; padding-right: .75rem; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; unicode-bidi: isolate; }
.names .title, svg .title { font-weight: bold; }
svg { display: block; width: 100%; } svg text { fill: var(--ink); font-size: 11px; }
#z4:checked ~ .chart svg { width: 400%; } #z16:checked ~ .chart svg { width: 1600%; }
#z64:checked ~ .chart svg { width: 6400%; }
.axis { stroke: var(--faint); } .ready { stroke: var(--ink); stroke-dasharray: 4 3; }
.row .back { fill: transparent; } .row:hover .back { fill: var(--hover); }
.file { --bar: var(--wait); } .demand { --bar: var(--demand); } .prefetch { --bar: var(--prefetch); }
.background, .other { --bar: var(--background); } .mixed { --bar: var(--mixed); }
.wait, .flow { fill: var(--bar); stroke: var(--bar); } .row:not(.file) .wait { opacity: .4; }
svg .there { fill: var(--there); }
.key { display: inline-block; width: 12px; height: 10px; margin: 0 .3rem 0 1rem; }
.key { background: var(--bar); } .key.here { background: var(--there); width: 3px; }
"""
_KEYS = (
    ("file", "a file waits for bytes"), ("here", "demanded, was there"), ("demand", "request on demand"),
    ("prefetch", "prefetch"), ("background", "background"), ("mixed", "several of these"),
)  # fmt: skip


def page(trace: Trace, summary: Summary) -> str:
    """Return the page of a start; a few megabytes for the largest trace. `summary`: of the same trace."""
    return "".join(_parts(trace, summary))


def _parts(trace: Trace, summary: Summary) -> Iterator[str]:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>start of {_text(trace.manifest[:19])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Start of {_text(trace.manifest)}</h1>\n<p>{count(len(trace.layers))}</p>\n"
    )
    if trace.command:
        yield f"<p>command <code>{_text(waterfall.command(trace))}</code></p>\n"
    yield from (f"<p>{_text(figure)}</p>\n" for figure in figures(summary))
    yield from _longest(summary)
    files, requests = waterfall.file_rows(trace, ROWS), waterfall.request_rows(trace, ROWS)
    yield "<h2>Waterfall</h2>\n<p><span>"
    yield from (f'<span class="key {name}"></span>{text}' for name, text in _KEYS)
    yield "</span></p>\n<p>The pale part of a request is the time to its first byte; dashed: ready.</p>\n"
    if len(files) < summary.files or len(requests) + waterfall.later_requests(trace) < len(trace.requests):
        yield "<p>Several files or requests are one line where little was waited for.</p>\n"
    if later := waterfall.later_requests(trace):
        yield f"<p>Not drawn: {count(later, 'request')} that began afterwards.</p>\n"
    yield from _chart(files, requests, waterfall.drawn_until(trace), trace.ready)
    yield "</body>\n</html>\n"


def _longest(summary: Summary) -> Iterator[str]:
    if not summary.longest:
        return
    yield "<h2>Files that stalled longest</h2>\n<table>\n"
    for file in summary.longest:
        yield (
            f'<tr><td class="figure">{seconds(file.waited)}</td>'
            f'<td class="figure">{file.stalls} of {count(len(file.reads), "chunk")}</td>'
            f'<td class="path">{_text(waterfall.harmless(file.path))}</td></tr>\n'
        )
    yield "</table>\n"


def _chart(files: Sequence[Row], requests: Sequence[Row], end: float, ready: float) -> Iterator[str]:
    for name, text in ((1, "1 ×"), (4, "4 ×"), (16, "16 ×"), (64, "64 ×")):
        checked = " checked" if name == 1 else ""
        yield f'<input type="radio" name="zoom" id="z{name}"{checked}><label for="z{name}">{text}</label>\n'
    sections = [(title, rows) for title, rows in (("files", files), ("requests", requests)) if rows]
    yield '<div class="chart">\n<div class="names">\n'
    for title, rows in sections:
        yield f'<div class="title">{title}</div>\n'
        for row in rows:
            label = row.head + fitted(row.name, max(1, _LABEL - len(row.head)))
            yield f"<div>{_text(label)}</div>\n"
    height = sum(1 + len(rows) for _, rows in sections) * _HEIGHT
    yield f'</div>\n<div class="scroll"><svg height="{height}" role="img" aria-label="waterfall">\n'
    for at in ticks(end, _TICKS):
        yield _line("axis", at, end, height)
    top = 0
    for _, rows in sections:
        for at in (at for at in ticks(end, _TICKS) if at <= end * _LABELLED):
            yield f'<text x="{_percent(at, end)}" dx="3" y="{top + 13}">{at:g} s</text>\n'
        top += _HEIGHT
        for row in rows:
            yield from _row(row, top, end)
            top += _HEIGHT
    if ready:
        yield _line("ready", ready, end, height)
    yield "</svg></div>\n</div>\n"


def _row(row: Row, top: int, end: float) -> Iterator[str]:
    took = f", {seconds(row.took)}" if row.took else ""
    title = f"{row.head}{fitted(row.name, _TITLE)}: {row.detail}{took}"
    yield f'<g class="row {row.kind or "mixed"}"><title>{_text(title)}</title>'
    yield f'<rect class="back" x="0" y="{top}" width="100%" height="{_HEIGHT}"/>'
    y = top + (_HEIGHT - _BAR) // 2
    for at in dict.fromkeys(_percent(mark, end) for mark in row.marks):
        yield f'<rect class="there" x="{at}" y="{y}" width="2" height="{_BAR}"/>'
    for kind, spans in (("flow", row.flows), ("wait", row.waits)):
        for span in spans:
            yield _bar(kind, span, y, end)
    yield "</g>\n"


def _bar(kind: str, span: Span, y: int, end: float) -> str:
    begin, stop = min(span[0], end), min(span[1], end)
    width = f"{max(0.02, (stop - begin) / end * 100):.3f}%" if end else "2"  # one that nobody sees would be a lie
    return f'<rect class="{kind}" x="{_percent(begin, end)}" y="{y}" width="{width}" height="{_BAR}"/>'


def _line(kind: str, at: float, end: float, height: int) -> str:
    x = _percent(at, end)
    return f'<line class="{kind}" x1="{x}" x2="{x}" y1="0" y2="{height}"/>\n'


def _percent(at: float, end: float) -> str:
    return f"{min(at, end) / end * 100:.3f}%" if end else "0"


def _text(text: str) -> str:
    return escape(text, quote=True)
