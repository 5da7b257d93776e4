"""How long from an image that the node never saw to a pod's service that answers, and how many bytes until then?

    python -m perf.pods [--rtt-ms 20] [--mbit 200] [--runs 3] [python nginx postgres]

Real containerd with CRI, its own overlayfs snapshotter and lazyfs in turn, on fresh nodes, behind a shaped link:
PullImage, CreateContainer, StartContainer, until python has printed, nginx has answered HTTP, postgres has made its
database and answered a query. The converted image for both. Exits with 1 when lazyfs is not the faster one in the
median, or fetches a third of the image or more before the answer. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from perf import machine
from perf.shaper import Shaper
from perf.start import scratch
from tests.helpers import real, service_images
from tests.helpers.daemon import until
from tests.helpers.pods import PodNode
from tests.system.test_snapshotter_pods import START


@dataclass(frozen=True, slots=True)
class Started:
    """One start. Seconds for the pull and until the answer, both from the beginning; bytes over the link by then."""

    pulled: float
    answered: float
    moved: int
    wanted: int  # demand and prefetch, as lazyfs counts them; 0 for overlayfs


def start(place: Path, name: str, snapshotter: str, link: Shaper, pause: str) -> Started:
    """Start one service on a fresh node."""
    image = f"127.0.0.1:{link.port}/{name}:lazy"
    place.mkdir()
    with PodNode(place, pause, snapshotter=snapshotter, BACKGROUND="1") as node:
        node.trust(f"127.0.0.1:{link.port}")
        pod = node.cri.run_pod("one")
        before, began = link.traffic(), time.monotonic()
        node.cri.pull(image)
        pulled = time.monotonic() - began
        until(START[name](node, pod, image), f"{name} answers", 300)
        answered = time.monotonic() - began
        moved = link.traffic().since(before).down
        return Started(pulled, answered, moved, node.fetched() if snapshotter == "lazyfs" else 0)


def measure(directory: Path, name: str, runs: int, rtt: float, mbit: float) -> dict[str, object]:
    """Return the medians of interleaved pairs."""
    found: dict[str, list[Started]] = {"overlayfs": [], "lazyfs": []}
    with real.docker_registry(directory / f"registry-{name}", service_images.build(directory)) as registry:
        pause = service_images.ServiceImages(registry, {}, directory).pause
        with Shaper(("127.0.0.1", registry.port), rtt=rtt, mbit=mbit) as link:
            for run in range(runs):
                for snapshotter, starts in found.items():
                    starts.append(start(directory / f"{name[:2]}{snapshotter[0]}{run}", name, snapshotter, link, pause))
    size = service_images.sizes(directory)[name]
    lazy, full = (found[one] for one in ("lazyfs", "overlayfs"))
    answered = {one: statistics.median(start.answered for start in starts) for one, starts in found.items()}
    return {
        "what": "pod",
        "service": name,
        "image_bytes": size,
        "rtt_s": rtt,
        "mbit": mbit,
        "lazyfs_pulled_s": round(statistics.median(one.pulled for one in lazy), 2),
        "lazyfs_answered_s": round(answered["lazyfs"], 2),
        "overlayfs_pulled_s": round(statistics.median(one.pulled for one in full), 2),
        "overlayfs_answered_s": round(answered["overlayfs"], 2),
        "ratios": [round(b.answered / a.answered, 2) for a, b in zip(lazy, full, strict=True)],
        "wanted_share": round(statistics.median(one.wanted for one in lazy) / size, 3),
        "moved_share": round(statistics.median(one.moved for one in lazy) / size, 3),
        "runs": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="From an image never seen to a service that answers, by CRI.")
    parser.add_argument("services", nargs="*", default=list(service_images.PACKAGES))
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--mbit", type=float, default=200.0)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    missed = False
    with scratch() as directory:
        for name in args.services:
            one = measure(directory, name, args.runs, args.rtt_ms / 1000, args.mbit)
            print(json.dumps({**one, **machine.facts()}), flush=True)
            slower = float(str(one["lazyfs_answered_s"])) >= float(str(one["overlayfs_answered_s"]))
            missed = missed or slower or float(str(one["wanted_share"])) >= 1 / 3
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
