"""Draw what perf.startup measured, and the waterfall of one start, each as PNG and SVG.

    python -m perf.plot RESULTS.jsonl --out DIR                  bars of all modes, a picture a link
    python -m perf.plot RESULTS.jsonl --trace FILE --out DIR     and one start: requests, chunks and stalls against time

RESULTS.jsonl is what `perf.startup --out` wrote: of several runs the last one of each workload and link counts. FILE is
a trace, as `lazyfs record` writes it. Needs matplotlib (`pip install 'lazyfs[perf]'`). The same input gives the same
bytes with the same matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lazyfs.cli import waterfall
from lazyfs.cli.trace_file import read_trace
from lazyfs.errors import LazyfsError
from lazyfs.format.trace import Trace

PHASES = ("pull", "create", "start", "ready")
_PHASE_COLOURS = dict(zip(PHASES, ("#4878a8", "#7fb5d5", "#f0b356", "#c9553d"), strict=True))
_COLOURS = {"demand": "#c77700", "prefetch": "#2b6cb0", "background": "#8a8f99", "other": "#8a8f99"}
_STALL, _THERE, _LIMIT = "#c62f3b", "#4a7d4f", "#111111"
STYLE = {
    "svg.hashsalt": "lazyfs",  # else names of an SVG's parts are random
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "text.parse_math": False,  # a name with a dollar sign is no formula
}
_COLUMNS = 3  # panels beside each other
_DRAWN = 2000  # marks; of more an SVG holds a picture, that it stays small


class ResultsInvalid(Exception):
    """The file is not what perf.startup writes."""


@dataclass(frozen=True, slots=True)
class Bar:
    """The median start of one mode; seconds."""

    mode: str
    phases: tuple[float, float, float, float]
    least: float  # in all
    greatest: float


@dataclass(frozen=True, slots=True)
class Panel:
    """All modes of a workload over a link. `limit`: seconds."""

    workload: str
    bars: tuple[Bar, ...]
    limit: float


@dataclass(frozen=True, slots=True)
class LinkResults:
    """What was measured over one link, in words what it is, and on which machine."""

    link: str
    words: str
    machine: str
    panels: tuple[Panel, ...]


def read_results(lines: Iterable[str]) -> list[LinkResults]:
    """Return the results by link, in the order in which workloads and links appear first. Raise ResultsInvalid."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line) if line.strip() else {}
            if one.get("what") == "startup":
                found.setdefault(one["link"], {})[one["workload"]] = {**one, "panel": _panel(one)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsInvalid(f"line {number} is none of perf.startup: {type(error).__name__} {error}") from None
    if not found:
        raise ResultsInvalid(
            "there is no summary in it: perf.startup writes one when all rounds of a workload are over"
        )
    return [
        LinkResults(link, _link_words(last), _machine_words(last), tuple(one["panel"] for one in by_workload.values()))
        for link, by_workload in found.items()
        for last in [list(by_workload.values())[-1]]
    ]


def _panel(summary: dict[str, Any]) -> Panel:
    bars = []
    for mode, found in summary["modes"].items():
        pull, create, start, ready = (float(found[f"{phase}_s"]) for phase in PHASES)
        spread = found["total"]
        bars.append(Bar(mode, (pull, create, start, ready), float(spread["least"]), float(spread["greatest"])))
    return Panel(str(summary["workload"]), tuple(bars), float(summary["limit"]["seconds"]))


def _link_words(summary: dict[str, Any]) -> str:
    if not summary.get("mbit"):
        return str(summary["link"])
    return f"{summary['link']}: {summary['rtt_s'] * 1000:g} ms, {summary['mbit']:g} Mbit/s"


def _machine_words(summary: dict[str, Any]) -> str:
    cores, memory = summary.get("cores", "?"), int(summary.get("memory", 0)) / 1e9
    return f"{summary.get('cpu', '?')}, {cores} cores, {memory:.0f} GB, Linux {summary.get('kernel', '?')}"


# -- bars


def draw_bars(results: LinkResults) -> Any:
    """Return the figure of one link: a panel a workload, a bar a mode, its phases on top of each other."""
    columns = min(_COLUMNS, len(results.panels))
    rows = -(-len(results.panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, panel in zip(axes, results.panels, strict=False):
        _draw_panel(ax, panel)
    for ax in axes[len(results.panels) :]:
        ax.set_axis_off()
    keys = [Patch(color=colour, label=phase) for phase, colour in _PHASE_COLOURS.items()]
    keys.append(Line2D([], [], color=_LIMIT, linestyle="--", linewidth=1, label="limit"))
    figure.suptitle(f"Until ready, median seconds — {results.words}")
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, title=results.machine)
    return figure


def _draw_panel(ax: Any, panel: Panel) -> None:
    places = range(len(panel.bars))
    for place, bar in zip(places, panel.bars, strict=True):
        left = 0.0
        for phase, value in zip(PHASES, bar.phases, strict=True):
            ax.barh(place, value, left=left, height=0.65, color=_PHASE_COLOURS[phase])
            left += value
        # Least and greatest are of all starts in whole, the phases medians of their own: these needn't add up to it.
        ax.hlines(place, bar.least, bar.greatest, color="#333333", linewidth=1)
        ax.text(max(left, bar.greatest), place, f" {left:.2f}", va="center", zorder=3)
    ax.axvline(panel.limit, color=_LIMIT, linestyle="--", linewidth=1)
    longest = max([panel.limit, *(max(sum(bar.phases), bar.greatest) for bar in panel.bars)])
    ax.set_xlim(0, longest * 1.15 or 1)
    ax.set_yticks(list(places), [bar.mode for bar in panel.bars])
    ax.invert_yaxis()
    ax.set_title(f"{panel.workload} (limit {panel.limit:.2f} s)", loc="left")


# -- one start


def draw_start(trace: Trace) -> Any:
    """Return the figure of one start: requests, chunks in the order of demand with their stalls, and bytes by time."""
    end = waterfall.drawn_until(trace) or 1.0
    figure = Figure(figsize=(9, 8), layout="constrained")
    requests_ax, chunks_ax, bytes_ax = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    requests = sorted((one for one in trace.requests if one.began <= end), key=lambda one: one.began)
    for name in dict.fromkeys(map(waterfall.priority, requests)):
        mine = [(row, one) for row, one in enumerate(requests) if waterfall.priority(one) == name]
        awaited = [(row, one.began, max(one.began, one.first)) for row, one in mine]
        coming = [(row, max(one.began, one.first), max(one.began, one.first, one.ended)) for row, one in mine]
        _segments(requests_ax, awaited, end, _COLOURS[name], 0.4, None)
        _segments(requests_ax, coming, end, _COLOURS[name], 1.0, name)
    _segments(
        chunks_ax,
        [(row, read.at, read.at + read.waited) for row, read in enumerate(trace.reads) if read.waited > 0],
        end,
        _STALL,
        1.0,
        "waited for",
    )
    there = [(read.at, row) for row, read in enumerate(trace.reads) if read.waited <= 0]
    points = [at for at, _ in there], [row for _, row in there]
    chunks_ax.scatter(*points, s=4, color=_THERE, label="was there", rasterized=len(there) > _DRAWN)
    _steps(bytes_ax, [(read.at, read.size) for read in trace.reads], end, _STALL, "demanded (unpacked)")
    _steps(bytes_ax, [(max(one.began, one.ended), one.size) for one in requests], end, _COLOURS["prefetch"], "fetched")
    for ax, words, rows in (
        (requests_ax, "requests", len(requests)),
        (chunks_ax, "chunks, in order of demand", len(trace.reads)),
        (bytes_ax, "MB", 0),
    ):
        if rows:
            ax.set_ylim(rows, -1)
        if trace.ready:
            ax.axvline(trace.ready, color=_LIMIT, linestyle="--", linewidth=1)
        ax.set_ylabel(words)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper left" if ax is bytes_ax else "lower left")
    bytes_ax.set_xlim(0, end * 1.02)
    bytes_ax.set_xlabel("seconds; dashed: ready; a request is pale until its first byte")
    found = waterfall.summarise(trace, 0)
    figure.suptitle(
        f"Start of {trace.manifest[:19]}…: ready after {waterfall.seconds(trace.ready)}, "
        f"stalled {waterfall.seconds(found.stalled_by_clock)}"
    )
    return figure


def _segments(
    ax: Any, rows: Sequence[tuple[int, float, float]], end: float, colour: str, alpha: float, label: str | None
) -> None:
    """Draw a line a row from one time to another, and of those without length as much as can be seen."""
    if not rows:
        return
    lines = [[(begin, row), (max(min(stop, end), begin + end / 500), row)] for row, begin, stop in rows]
    width = min(5.0, max(0.8, 200 / (rows[-1][0] + 1)))  # points
    how = {"capstyle": "butt", "rasterized": len(lines) > _DRAWN, "label": label}
    ax.add_collection(LineCollection(lines, colors=colour, alpha=alpha, linewidths=width, **how))


def _steps(ax: Any, pairs: Sequence[tuple[float, int]], end: float, colour: str, label: str) -> None:
    """Draw how bytes add up."""
    times, sums = [0.0], [0.0]
    for at, size in sorted(pairs):
        if at <= end:
            times.append(at)
            sums.append(sums[-1] + size / 1e6)
    ax.step([*times, end], [*sums, sums[-1]], where="post", color=colour, label=label)


def save(figure: Any, directory: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG without date and version. Blocking. Return their paths. Raise OSError."""
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw what perf.startup measured.")
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="what perf.startup --out wrote")
    parser.add_argument("--trace", metavar="FILE", help="draw this start, too")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where the pictures go (.)")
    args = parser.parse_args()
    written: list[Path] = []
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with args.results.open(encoding="utf-8") as lines, matplotlib.rc_context(STYLE):
            for results in read_results(lines):
                name = re.sub(r"[^A-Za-z0-9]+", "-", results.link).strip("-")
                written += save(draw_bars(results), args.out, f"startup-{name}")
            if args.trace is not None:
                written += save(draw_start(read_trace(args.trace)), args.out, "start")
    except (OSError, UnicodeDecodeError, ResultsInvalid, LazyfsError) as error:
        parser.exit(1, f"plot: {error}\n")
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
