"""What do names cost in an image that nobody looked at yet, beside the local disk? And an image that only lies there?

    python -m perf.cold [--pairs 5] [--files 10000] [--driver erofs]

Walks with an lstat each over a tree of small files beside a Debian system: an overlay over the lazy mount, and one over
the tree unpacked on disk. Prints one JSON line a pair and one with the medians. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from perf import debian, lazy_image, machine
from perf.memory import daemon_of, many_files, walk
from perf.start import drop_caches, scratch
from tests.helpers import real

GOAL = 3.0  # times what the local disk takes
_IDLE = 20.0  # seconds


def cold_walk(tree: Path) -> tuple[float, int]:
    """Return the seconds and the names of a walk, with nothing in memory."""
    drop_caches()
    names, took = walk(tree)
    return took, names


def never_seen(directory: Path, pair: int, reference: str, settings: dict[str, str]) -> tuple[float, int]:
    """Mount an image with a store of its own, and walk it."""
    with (
        lazy_image.mounted(directory, directory / f"s{pair}", reference, settings) as tree,
        lazy_image.overlay(tree, directory / f"over-{pair}") as root,
    ):
        return cold_walk(root)


def idle_cpu(directory: Path, root: Path) -> float:
    """Return the processor seconds that the daemon takes for a second in which nobody asks anything."""
    pid = daemon_of(directory, root)
    time.sleep(1)  # the status that was just asked for is over
    before, began = machine.cpu_seconds(pid), time.monotonic()
    time.sleep(_IDLE)
    return (machine.cpu_seconds(pid) - before) / (time.monotonic() - began)


def wait_until_complete(directory: Path, root: Path) -> None:
    """Return once all layers are in the store. Give up after two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        (mount,) = lazy_image.status(directory, root)["mounts"]
        if all(layer["complete"] and layer["verified"] for layer in mount["layers"]):
            return
        time.sleep(0.5)
    raise SystemExit("the image did not become complete")


def main() -> int:
    parser = argparse.ArgumentParser(description="Cold names beside the local disk; the daemon's idle processor time.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--files", type=int, default=10_000, help="small files beside the Debian system")
    parser.add_argument("--driver", choices=("erofs", "fuse"), default="erofs")
    args = parser.parse_args()
    settings = lazy_image.ONLY_DEMAND | {"LAZYFS_DRIVER": args.driver}
    ours, theirs = [], []
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        many_files(directory / "many.tar", args.files)
        tars = debian.rootfs_tar(), directory / "many.tar"
        reference = registry.image("cold", "lazy")
        real.copy_image(lazy_image.make(directory, *tars), reference)
        plain = lazy_image.unpack(directory / "plain-tree", *tars)
        for pair in range(args.pairs):
            for mine in (True, False) if pair % 2 else (False, True):
                if mine:
                    took, names = never_seen(directory, pair, reference, settings)
                    ours.append(took)
                else:
                    with lazy_image.overlay(plain, directory / f"over-plain-{pair}") as root:
                        theirs.append(cold_walk(root)[0])
            line = {"lazy_s": round(ours[-1], 4), "native_s": round(theirs[-1], 4), "names": names}
            print(json.dumps({"what": "cold walk", "pair": pair, **line}), flush=True)
        complete = {"LAZYFS_DRIVER": args.driver}
        root = directory / "s-idle"
        with lazy_image.mounted(directory, root, reference, complete):
            wait_until_complete(directory, root)
            idle = idle_cpu(directory, root)
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    summary = {
        "what": "cold, medians",
        "driver": args.driver,
        "names": names,
        "walk_lazy_s": round(statistics.median(ours), 4),
        "walk_native_s": round(statistics.median(theirs), 4),
        "walk_ratio": round(ratio, 3),
        "idle_cpu_share": round(idle, 5),
    }
    print(json.dumps({**summary, **machine.facts()}))
    return 1 if ratio > GOAL and args.driver == "erofs" else 0


if __name__ == "__main__":
    raise SystemExit(main())
