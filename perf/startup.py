"""When does a service answer on a node that never saw its image? lazyfs beside full pulls, and beside what is possible.

    python -m perf.startup --quick                    one workload, under a minute: measured ÷ limit last
    python -m perf.startup --workloads nginx jar --links wan far --pairs 5 --out FILE

Real containerd with CRI and runc, a fresh node for each start, images of Debian packages that are made the first time
and kept (--cache). Each pair starts all modes in another order. Prints JSON lines: each start, and for each workload
and link medians, spread, ratios with their 95 % bound, and the limit; the machine and the date in each of them. Exits
with 1 when a start failed or a promise is missed: without its full pulls a workload has no summary. Method:
perf/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf import limit, runs, startup_images, startup_modes, workloads
from perf.limit import Limit, Link
from perf.pairs import shuffled, spread, upper_bound
from perf.runs import Results, in_turn, road
from perf.start import StartFailed, scratch
from perf.startup_images import Image
from perf.startup_modes import COLD, CONVERTED, FULL, FULL_WARM, FULLS, OURS, TRACE
from perf.startup_node import Scene, Start
from perf.workloads import Workload
from tests.helpers import real

_FAILURES = (StartFailed, real.ToolFailed, AssertionError, OSError)
_SLOW = ("wan", "far")  # the links of the promises that are made in limits


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `snapshotters`: others of containerd's, and their sockets where they are proxies."""

    workloads: list[Workload]
    links: list[Link]
    modes: list[str]
    pairs: int
    cache: Path
    proxies: dict[str, Path]


def measure(plan: Plan, results: Results) -> None:
    """Measure all workloads over all links. One that fails is told and passed over."""

    def one(workload: Workload, directory: Path) -> None:
        began = time.monotonic()
        image, made = startup_images.prepare(plan.cache, workload)
        if made:
            results.add("image", image=image.name, made_in_s=round(time.monotonic() - began, 1))
        with startup_images.registry(plan.cache, directory / "r") as registry:
            _measure_workload(plan, results, directory, registry, workload, image)

    in_turn(plan.workloads, results, _FAILURES, one)


def _measure_workload(
    plan: Plan, results: Results, directory: Path, registry: real.DockerRegistry, workload: Workload, image: Image
) -> None:
    traces = directory / "traces"
    with road(limit.parse_link("loopback"), registry) as near:
        scene = Scene(directory, plan.cache, workload, image, near, plan.proxies)
        pages = limit.touched(scene)
        hops = limit.probe(scene.reference(lazy=True))
    for link in plan.links:
        with road(link, registry) as way:
            scene = replace(scene, road=way)
            modes = list(plan.modes)
            if TRACE in modes and not traces.exists():
                try:
                    startup_modes.record(scene, traces)
                except _FAILURES as error:
                    results.failed(error, workload=workload.name, link=link.name, mode=TRACE)
                    modes.remove(TRACE)
            found = _rounds(plan.pairs, modes, results, scene, link, traces)
        if found.get(FULL_WARM):
            warm = statistics.median(start.without_pull for start in found[FULL_WARM])
            summary = summarise(found, Limit(link, hops, pages, warm))
            missed = broken(workload, link, summary)
            results.bad = results.bad or bool(missed)
            results.add(
                "startup",
                workload=workload.name,
                link=link.name,
                rtt_s=link.rtt,
                mbit=link.mbit,
                source_bytes=image.source_bytes,
                lazy_bytes=image.lazy_bytes,
                pairs=plan.pairs,
                **summary,
                missed=missed,
            )


def _rounds(
    pairs: int, modes: list[str], results: Results, scene: Scene, link: Link, traces: Path
) -> dict[str, list[Start]]:
    """Return the starts of each mode, in order of the rounds. A mode that fails is left out of the rounds behind."""
    visits = startup_modes.visits(modes)
    found: dict[str, list[Start]] = {}
    for number, order in enumerate(shuffled(list(visits), pairs)):
        for visit in order:
            if visit not in visits:
                continue
            try:
                starts = visits[visit](scene, traces)
            except _FAILURES as error:
                results.failed(error, workload=scene.workload.name, link=link.name, mode=visit)
                del visits[visit]
                for mode in startup_modes.PAIRS.get(visit, (visit,)):
                    found.pop(mode, None)
                continue
            for mode, start in starts.items():
                found.setdefault(mode, []).append(start)
                where = {"workload": scene.workload.name, "link": link.name, "mode": mode, "pair": number}
                results.add("start", **where, **phases(start), moved=start.moved, connections=start.connections)
    return found


def phases(start: Start) -> dict[str, float]:
    """Return the seconds of a start."""
    seconds = {"pull_s": start.pull, "create_s": start.create, "start_s": start.start, "ready_s": start.ready}
    return {name: round(value, 3) for name, value in {**seconds, "total_s": start.total}.items()}


def summarise(found: dict[str, list[Start]], bound: Limit) -> dict[str, Any]:
    """Return medians and spread by mode, and ratios: to the faster full pull of the same round, and to the limit."""
    modes: dict[str, Any] = {}
    for mode, starts in found.items():
        each = [phases(start) for start in starts]
        modes[mode] = {
            **{name: round(statistics.median(one[name] for one in each), 3) for name in each[0]},
            "total": spread([start.total for start in starts]),
            "moved": round(statistics.median(start.moved for start in starts)),
        }
        if mode not in FULLS:
            fulls = [[start.total for start in found[full]] for full in (FULL, CONVERTED) if full in found]
            ratios = [one.total / min(pulls) for one, pulls in zip(starts, zip(*fulls, strict=False), strict=False)]
            modes[mode]["by_full_pull"] = round(statistics.median(ratios), 3)
            modes[mode]["by_full_pull_95"] = round(upper_bound(ratios), 3)
            modes[mode]["by_limit"] = round(modes[mode]["total_s"] / bound.seconds, 2)
    return {"modes": modes, "limit": bound.facts()}


def broken(workload: Workload, link: Link, summary: dict[str, Any]) -> list[str]:
    """Return the promises that a summary misses, in words."""
    found = []
    for mode, most in ((TRACE, 1.5), (COLD, 2.5)):
        one = summary["modes"].get(mode)
        if one is None:
            continue
        if link.name in _SLOW and one["by_limit"] > most:
            found.append(f"{mode}: {one['by_limit']} × limit, not {most}")
        if mode == TRACE and workload.service and one["by_full_pull"] > 1 / 3:
            found.append(f"{mode}: {one['by_full_pull']} of the full pull, not a third")
        if mode == COLD and one["by_full_pull_95"] > 1.03:
            found.append(f"{mode}: up to {one['by_full_pull_95']} of the full pull, not 1.03")
    return found


def offered(directory: Path) -> list[str]:
    """Return the snapshotters that this machine's containerd offers."""
    with real.containerd(directory / "c") as running:
        lines = [line.split() for line in running.ctr("plugins", "ls").splitlines()]
    return [words[1] for words in lines if len(words) > 2 and "snapshotter" in words[0] and words[-1] == "ok"]


def plan_of(args: argparse.Namespace) -> Plan:
    """Return what the command line asks for. Raise ValueError in words for a user."""
    if args.quick:
        args.workloads, args.links, args.modes, args.pairs = ["python"], ["wan"], [FULL, COLD, TRACE], args.pairs or 1
    chosen = runs.named(args.workloads)
    proxies = {name: Path(path) for name, _, path in (each.partition("=") for each in args.proxy)}
    others = [name for name in (*args.modes, *args.snapshotter, *proxies) if name not in (*FULLS, *OURS)]
    if asked := [name for name in others if name not in proxies]:
        with scratch() as directory:
            there = offered(directory)
        if missing := [name for name in asked if name not in there]:
            words = f"containerd offers no snapshotter {', '.join(missing)}, but {', '.join(there)}"
            raise ValueError(f"{words}; tell a proxy's socket by --proxy NAME=SOCKET")
    return Plan(
        workloads=chosen,
        links=[limit.parse_link(text) for text in args.links],
        modes=list(dict.fromkeys([FULL, *(mode for mode in args.modes if mode in (CONVERTED, *OURS)), *others])),
        pairs=max(1, args.pairs or 5),
        cache=args.cache,
        proxies=proxies,
    )


def quick_words(summary: dict[str, Any], seconds: float) -> str:
    """Return the last line of a quick run, which took `seconds`: measured ÷ limit."""
    bound = summary["limit"]
    hops = ", ".join(name if count == 1 else f"{count} {name}" for name, count in bound["hops"].items() if count)
    parts = [f"{mode} {one['total_s']:.2f} s = {one['by_limit']:.2f}" for mode, one in summary["modes"].items()
             if "by_limit" in one]  # fmt: skip
    made = (
        f"{bound['round_trips']} round trips ({hops}) {bound['round_trips_s']:.2f} s, "
        f"pages {bound['transfer_s']:.2f} s, overlayfs warm {bound['overlayfs_warm_s']:.2f} s"
    )
    full = f"full pull {summary['modes'][FULL]['total_s']:.2f} s"
    limits = f"limit {bound['seconds']:.2f} s ({made})"
    return f"{full}; {limits}; measured ÷ limit: {', '.join(parts)}; it took {seconds:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description="From an image never seen to a workload that is ready.")
    parser.add_argument("--quick", action="store_true", help="one workload on one link, in a minute")
    runs.add_workloads(parser, list(workloads.BY_NAME))
    parser.add_argument("--links", nargs="+", default=["lan", "wan", "far", "loopback"], metavar="LINK",
                        help="lan, wan, far, loopback, or 20ms/200Mbit")  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=[FULL, CONVERTED, *OURS], metavar="MODE",
                        help=f"{', '.join(OURS)}; a full pull is always among them")  # fmt: skip
    parser.add_argument(
        "--snapshotter", action="append", default=[], metavar="NAME", help="another one of containerd's"
    )
    parser.add_argument(
        "--proxy", action="append", default=[], metavar="NAME=SOCKET", help="another one, by its socket"
    )
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="rounds of all modes (5; with --quick 1)")
    runs.add_cache(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the JSON lines to it; else they are printed")
    args = parser.parse_args()
    began = time.monotonic()
    if os.geteuid() != 0:
        parser.error("it starts containers and drops caches: run it as root")
    try:
        plan = plan_of(args)
    except ValueError as error:
        parser.error(str(error))
    with args.out.open("a") if args.out else contextlib.nullcontext(sys.stdout) as out:
        results = Results(out)
        measure(plan, results)
    if args.quick and results.last.get("what") == "startup":
        print(quick_words(results.last, time.monotonic() - began), flush=True)
    return 1 if results.bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
