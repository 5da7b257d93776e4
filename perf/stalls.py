"""How long does a start with a trace wait for bytes, beside what it is promised?

    python -m perf.stalls [--workloads nginx] [--links wan far] [--pairs 3]

`lazyfs record` starts the workload on a store that is empty, behind a shaped link, and the node learns from it. Then it
starts it on stores that have nothing but this trace, and records again. Stall: the time in which at least one reader
waited for a chunk that was not there. Promised: at most the transfer of the demanded bytes and two round trips. Prints
a JSON line for each workload and link, with the machine. Exits with 1 when a start failed or the median misses the
promise. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs import digest as digests
from lazyfs.cli import waterfall
from lazyfs.errors import LazyfsError
from lazyfs.format import trace as traces
from lazyfs.format.table import NO_FRAME, LayerTable
from lazyfs.format.trace import Trace
from perf import limit, runs, startup_images
from perf.limit import Link
from perf.pairs import spread
from perf.runs import Results, in_turn, road
from perf.start import StartFailed, lazyfs, lazyfs_env, until_gone
from perf.startup_node import Scene, forget
from perf.workloads import Answer, Line, Workload
from tests.helpers import real

ROUND_TRIPS = 2  # promised beside the transfer
_PATIENCE = 600  # seconds for a start
_LONGEST = 5  # files told
_FAILURES = (StartFailed, LazyfsError, real.ToolFailed, AssertionError, OSError, subprocess.SubprocessError)


@dataclass(frozen=True, slots=True)
class Demanded:
    """What readers of a start wanted: uncompressed bytes of its chunks; what these are compressed; their frames."""

    size: int
    compressed: int  # the chunks' share of their frames
    frames: int  # whole frames: a chunk comes with its frame


@dataclass(frozen=True, slots=True)
class Recorded:
    """One start, as its trace tells, and what it demanded."""

    trace: Trace
    demanded: Demanded

    @property
    def stall(self) -> float:
        """Seconds in which some reader waited."""
        return waterfall.summarise(self.trace, 0).stalled_by_clock

    def promise(self, link: Link, *, whole: bool = False) -> float:
        """Return the longest stall that is promised on a link, seconds; `whole`: were whole frames counted."""
        size = self.demanded.frames if whole else self.demanded.compressed
        return size * 8 / (link.mbit * 1e6) + ROUND_TRIPS * link.rtt


def demanded(trace: Trace, tables: list[LayerTable | None]) -> Demanded:
    """Return what a trace's reads are in the image's layers, base first (None: a layer without table). Pure."""
    size = frames = 0
    compressed = 0.0
    seen: set[tuple[int, int]] = set()
    for read in trace.reads:
        size += read.size
        table = tables[read.layer]
        row = None if table is None else table.find(read.path)
        if table is None or row is None:
            continue
        for place in table.places(table.inode(row), read.offset, read.size):
            frame = table.chunk_frame[place.chunk]
            if frame == NO_FRAME:
                continue
            extent = table.frame_blob_end[frame] - table.frame_blob_offset[frame]
            inside = sum(table.chunk_size[chunk] for chunk in table.frame_chunks(frame))
            compressed += extent * table.chunk_size[place.chunk] / max(1, inside)
            if (read.layer, frame) not in seen:
                seen.add((read.layer, frame))
                frames += extent
    return Demanded(size, round(compressed), frames)


def record(scene: Scene, store: Path) -> Recorded:
    """Start the workload with a store, as cold as it is, and return its trace. Raise StartFailed, LazyfsError."""
    workload, port = scene.workload, real.free_port()
    out = store.with_suffix(".trace")
    ready = {Answer: f"port:{port}", Line: f"line:{getattr(workload.ready, 'text', '')}"}.get(type(workload.ready))
    words = [word.replace("{port}", str(port)) for word in workload.command]
    wish = ["--ready-when", ready] if ready else []
    image = f"docker://{scene.reference(lazy=True)}"
    forget(scene)
    done = subprocess.run(
        [*lazyfs(store, "record", *wish, "-o", str(out), image), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        env=lazyfs_env(scene.directory),
    )
    if done.returncode:
        raise StartFailed(f"lazyfs record {workload.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    until_gone(store)  # it writes what it learned
    trace = traces.decode(out.read_bytes())
    tables = [_table(store, digest) for digest in trace.layers]
    return Recorded(trace, demanded(trace, tables))


def _table(store: Path, digest: str) -> LayerTable | None:
    path = store / "layers/sha256" / digests.hex_of(digest) / "table"
    return LayerTable(path) if path.exists() else None


def measure(scene: Scene, link: Link, pairs: int, results: Results) -> None:
    """Measure a workload on a link and add its line."""
    base = scene.directory / link.name.replace("/", "-")
    base.mkdir()
    first = record(scene, base / "first")
    found = []
    for number in range(pairs):
        store = base / f"s{number}"
        store.mkdir(mode=0o700)
        shutil.copytree(base / "first/traces", store / "traces", ignore=shutil.ignore_patterns("records"))
        if not any((store / "traces").iterdir()):
            raise StartFailed(f"{scene.workload.name}: the node kept no trace of its first start")
        found.append(record(scene, store))
        shutil.rmtree(store)
    shutil.rmtree(base / "first")
    facts = summarise(found, first, link)
    results.bad = results.bad or facts["by_promise"] > 1.0
    results.add("stalls", workload=scene.workload.name, link=link.name, rtt_s=link.rtt, mbit=link.mbit, **facts)


def summarise(found: list[Recorded], first: Recorded, link: Link) -> dict[str, Any]:
    """Return medians of starts with a trace, beside the start that it was learned from."""
    ratios = [one.stall / one.promise(link) for one in found]
    middle = sorted(found, key=lambda one: one.stall)[len(found) // 2]
    told = waterfall.summarise(middle.trace, _LONGEST).to_json()
    return {
        "starts": len(found),
        "stall": spread([one.stall for one in found]),
        "promised_s": round(statistics.median(one.promise(link) for one in found), 3),
        "by_promise": round(statistics.median(ratios), 3),
        "by_promise_of_frames": round(statistics.median(one.stall / one.promise(link, whole=True) for one in found), 3),
        "ready": spread([one.trace.ready for one in found]),
        "reads": told["chunks"],
        "waited_for": sum(read.waited > 0 for read in middle.trace.reads),
        "demanded_bytes": middle.demanded.size,
        "demanded_compressed": middle.demanded.compressed,
        "demanded_frames": middle.demanded.frames,
        "requests": told["requests"],
        "longest": told["longest"],
        "without_trace": {
            "stall_s": round(first.stall, 3),
            "ready_s": round(first.trace.ready, 3),
            "by_promise": round(first.stall / first.promise(link), 3),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="How long a start with a trace waits for bytes.")
    runs.add_workloads(parser, ["nginx"])
    parser.add_argument("--links", nargs="+", default=["wan", "far"], metavar="LINK",
                        help="lan, wan, far, or 20ms/200Mbit")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="starts with the trace on each link")
    runs.add_cache(parser)
    args = parser.parse_args()
    if os.geteuid() != 0 or args.pairs < 1:
        parser.error("run it as root, with one start at least")
    try:
        chosen, links = runs.named(args.workloads), [limit.parse_link(text) for text in args.links]
    except ValueError as error:
        parser.error(str(error))
    if not all(link.mbit for link in links):
        parser.error("a link without a bandwidth promises nothing")
    results = Results(sys.stdout)

    def one(workload: Workload, directory: Path) -> None:
        image, _ = startup_images.prepare(args.cache, workload)
        with startup_images.registry(args.cache, directory / "r") as registry:
            for link in links:
                with road(link, registry) as way:
                    measure(Scene(directory, args.cache, workload, image, way, {}), link, args.pairs, results)

    in_turn(chosen, results, _FAILURES, one)
    return 1 if results.bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
