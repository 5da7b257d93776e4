"""Do many containers of one image that start at once on a node that never saw it cost what one costs?

    python -m perf.crowd [--workloads python nginx] [--count 20] [--link wan] [--runs 1]

Real containerd with CRI and runc behind a shaped link, each container in a pod of its own, all started at the same
moment; beside them one alone, each on a fresh node: with the node's defaults, and with nothing fetched but what is
wanted for the start. And the same crowd on overlayfs with everything warm: what this machine's processors allow at
all. Prints JSON lines: bytes over the link, when the last one was ready, whose processor seconds went into it, and the
machine in each of them. Exits with 1 when a start failed, or when the crowd's bytes are more than 1.05 times those of
one; lateness is told with what limits it. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf import limit, processors, runs, startup_images
from perf.limit import Link
from perf.processors import Look
from perf.runs import Results, in_turn, road
from perf.start import StartFailed
from perf.startup_node import DEADLINE, Node, Scene, fresh
from perf.workloads import Workload
from tests.helpers import real
from tests.helpers.cri import CriFailed

MOST_BYTES = 1.05  # × one's
MOST_LATE = 2.0  # × one alone, as far as the processors allow
_WHOLE = 300.0  # seconds for the background to complete the image
_LOOK = 0.2  # seconds between looks at that
_BUSY = 0.25  # idle share below which the processors are what limits
_FULL = 0.7  # of the time on the link beyond which the link is
_FAILURES = (StartFailed, CriFailed, real.ToolFailed, AssertionError, OSError, threading.BrokenBarrierError)
MODES: dict[str, dict[str, str]] = {"default": {}, "wanted": {"BACKGROUND": "0"}}


@dataclass(frozen=True, slots=True)
class Crowd:
    """Containers that started together. Seconds from the pull's beginning; bytes over the link; processor seconds."""

    pulled: float
    ready: tuple[float, ...]  # of each, in order
    moved: int  # until the last was ready
    moved_in_all: int  # and until nothing more was to come
    connections: int
    used: dict[str, float]
    busy: float
    stolen: float
    idle: float  # share

    @property
    def last(self) -> float:
        return self.ready[-1]

    def facts(self) -> dict[str, Any]:
        """Return it for a line of results."""
        return {
            "pull_s": round(self.pulled, 3),
            "first_s": round(self.ready[0], 3),
            "median_s": round(statistics.median(self.ready), 3),
            "last_s": round(self.last, 3),
            "moved_until_ready": self.moved,
            "moved": self.moved_in_all,
            "connections": self.connections,
            "cpu_s": {name: round(seconds, 2) for name, seconds in self.used.items()},
            "cpu_busy_s": round(self.busy, 2),
            "cpu_stolen_s": round(self.stolen, 2),
            "idle_share": round(self.idle, 2),
        }


def together(scene: Scene, node: Node, registry: int, image: str, count: int, *, pull: bool = True) -> Crowd:
    """Start `count` containers at once, as a kubelet does: the image is pulled once. Raise StartFailed."""
    members = [_member(node, number) for number in range(count)]
    gate = threading.Barrier(count)
    before, began = processors.look(), time.monotonic()
    bytes_before, connections_before = scene.road.moved()
    if pull:
        node.cri.pull(image, timeout=DEADLINE)
    pulled = time.monotonic() - began

    def one(member: Node) -> float:
        gate.wait(60)
        member.run(image, pull=False)
        return time.monotonic() - began

    with ThreadPoolExecutor(count) as threads:
        ready = tuple(sorted(threads.map(one, members)))
    moved, connections = scene.road.moved()
    after = processors.look()
    if pull and node.snapshotter == "lazyfs":
        _until_quiet(node)
    return Crowd(
        pulled,
        ready,
        moved - bytes_before,
        scene.road.moved()[0] - bytes_before,
        connections - connections_before,
        _by_whom(node, registry, before, after),
        processors.busy_seconds(before, after),
        processors.stolen_seconds(before, after),
        processors.idle_share(before, after),
    )


def _member(node: Node, number: int) -> Node:
    """Return the node with another pod: a shim starts the containers of its pod one after another."""
    member = copy.copy(node)
    if number:
        member.pod = node.cri.run_pod(f"p{number}")
    return member


def _by_whom(node: Node, registry: int, before: Look, after: Look) -> dict[str, float]:
    shims = [pid for pid, words in real.processes_with(os.fsencode(node.address)) if "containerd-shim" in words]
    daemons = node.daemons()
    plugin = [node.plugin.pid] if node.plugin else []
    containerd = [node.containerd.pid] if node.containerd else []

    def used(pids: list[int]) -> float:
        return processors.used_seconds(before, after, pids)

    found = {
        "lazyfsd": used([*daemons, *processors.below(after, daemons)]),
        "snapshotter": used(plugin),
        "containerd": used(containerd),
        "shims_and_runc": used(shims),  # and containers that have ended
        "containers": used(list(processors.below(after, shims))),
        "registry": used([registry]),
        "measuring": used([os.getpid()]),  # this script with its shaper
    }
    others = processors.busy_seconds(before, after) - sum(found.values())
    return {**found, "others": max(0.0, others)}  # on a quiet machine the kernel alone, and runc's short lives


def _until_quiet(node: Node) -> None:
    """Wait until no more bytes will come: all layers are whole, or nothing is fetched in the background."""
    whole = node.settings.get("BACKGROUND") != "0"
    deadline, last = time.monotonic() + _WHOLE, -1
    while True:
        status = node.status()
        found = [layer for mount in status["mounts"] for layer in mount["layers"]]
        if whole and found and all(layer["verified"] and layer["complete"] for layer in found):
            return
        came = sum(int(status["bytes"][name]) for name in ("demand", "prefetch", "background"))
        if not whole and came == last:
            return
        if time.monotonic() > deadline:
            raise StartFailed(f"bytes of the image still come after {_WHOLE:.0f} s: {node.words()}")
        last = came
        time.sleep(_LOOK)


def measure(scene: Scene, registry: int, link: Link, count: int, runs: int, results: Results) -> None:
    """Measure one workload and add its lines."""
    for mode, settings in MODES.items():
        pairs = []
        for number in range(runs):
            found = {}
            for size in (1, count) if number % 2 == 0 else (count, 1):
                with fresh(scene, "lazyfs", None, **settings) as node:
                    found[size] = together(scene, node, registry, scene.reference(lazy=True), size)
            pairs.append((found[1], found[count]))
        alone, all_of_them = _median(pairs, 0), _median(pairs, 1)
        ratio = all_of_them.moved_in_all / alone.moved_in_all
        late = statistics.median(crowd.last / one.last for one, crowd in pairs)
        missed = [f"{ratio:.3f} of one's bytes, not {MOST_BYTES}"] if ratio > MOST_BYTES else []
        results.bad = results.bad or bool(missed)
        results.add(
            "crowd",
            workload=scene.workload.name,
            link=link.name,
            rtt_s=link.rtt,
            mbit=link.mbit,
            mode=mode,
            count=count,
            runs=runs,
            alone=alone.facts(),
            crowd=all_of_them.facts(),
            bytes_ratio=round(ratio, 3),
            late_ratio=round(late, 2),
            late=late > MOST_LATE,
            limited_by=limited_by(all_of_them, link),
            missed=missed,
        )


def allowed(scene: Scene, registry: int, count: int, results: Results) -> None:
    """Add a line about the same crowd on overlayfs, with all bytes on the disk and in memory."""
    image = scene.reference(lazy=False)
    with fresh(scene, "overlayfs") as node:
        node.cri.pull(image, timeout=DEADLINE)
        node.run(image, pull=False)
        node.clear_containers()
        alone = together(scene, node, registry, image, 1, pull=False)
        node.clear_containers()
        for pod in node.cri.pods():
            if node.pod is not None and pod != node.pod.id:
                node.cri.remove_pod(pod)
        crowd = together(scene, node, registry, image, count, pull=False)
    results.add(
        "crowd-overlayfs-warm",
        workload=scene.workload.name,
        count=count,
        alone=alone.facts(),
        crowd=crowd.facts(),
        late_ratio=round(crowd.last / alone.last, 2),
    )


def limited_by(crowd: Crowd, link: Link) -> str:
    """Return in words what a crowd waited for most."""
    processors_words = f"{crowd.busy:.1f} processor seconds in {crowd.last:.1f} s, {crowd.idle:.0%} idle"
    if crowd.idle < _BUSY:
        return f"the processors: {processors_words}"
    if link.mbit and crowd.moved * 8 / (link.mbit * 1e6) > _FULL * crowd.last:
        return f"the link: {crowd.moved} bytes in {crowd.last:.1f} s"
    return f"neither alone: {processors_words}, {crowd.moved} bytes"


def _median(pairs: list[tuple[Crowd, Crowd]], side: int) -> Crowd:
    found = sorted((pair[side] for pair in pairs), key=lambda one: one.last)
    return found[len(found) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description="Many containers of one image at once, on a node that never saw it.")
    runs.add_workloads(parser, ["python", "nginx"])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--link", default="wan", help="lan, wan, far, or 20ms/200Mbit")
    runs.add_cache(parser)
    args = parser.parse_args()
    if os.geteuid() != 0 or args.count < 1 or args.runs < 1:
        parser.error("run it as root, with one container and one run at least")
    try:
        chosen, link = runs.named(args.workloads), limit.parse_link(args.link)
    except ValueError as error:
        parser.error(str(error))
    results = Results(sys.stdout)

    def one(workload: Workload, directory: Path) -> None:
        image, _ = startup_images.prepare(args.cache, workload)
        with startup_images.registry(args.cache, directory / "r") as registry, road(link, registry) as way:
            scene = Scene(directory, args.cache, workload, image, way, {})
            measure(scene, registry.pid, link, args.count, args.runs, results)
            allowed(scene, registry.pid, args.count, results)

    in_turn(chosen, results, _FAILURES, one)
    return 1 if results.bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
