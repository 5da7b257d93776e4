"""Do readers notice that lazyfsd is killed, or upgraded?

    python -m perf.kills [--kills 500] [--upgrades 50]

Fifteen readers (held files, opened ones, O_DIRECT, mmap, names) over the driver fuse, the driver erofs and an overlay
that is written to, and a container of `lazyfs run`; the kernel's caches are dropped all the while. Every byte is
compared, those of the container by itself, with digests that it is given. After each kill the next one waits until a
daemon serves again, and up to half a second more. Prints JSON lines: what failed, the wait around each kill, of the
reader that waits longest and of the median one (median, 95th percentile and worst of all kills), the memory of holder
and standby; the machine. Exits with 1 when a read failed or was wrong, the container compared nothing, the median
reader's median is above 20 ms, or the worst wait above 2 s. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perf import machine
from perf.start import scratch
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.small_image import make_layout, make_tree
from tests.helpers.takeover import KINDS, Held, Reading, contents, held, readers
from tests.helpers.tars import file, tar_of

MEDIAN, WORST = 0.020, 2.0  # seconds, promised
_PAUSE = 0.005  # seconds between two reads of one reader: two cores do not become the measure
_AFTER = 0.5  # seconds after a daemon serves again in which a long read counts as its fault
_WARM = 1.0  # seconds: what a standby takes to be forked, and some
_ON_EROFS = tuple(kind for kind in KINDS if kind != "direct")
# What a container compares, again and again, with the digests that it is given. It says how often all were right, not
# each time: nobody reads the pipe before its end.
_COMPARED = ("usr/bin/id", "usr/bin/stat", "etc/passwd")
_EACH = 20  # times
_LOOP = f"""n=0
while sleep 0.01; do
    echo "$1" | sha256sum -c --quiet 2>&1 || {{ echo not; continue; }}
    n=$((n + 1))
    [ $((n % {_EACH})) != 0 ] || echo right
done"""


Span = tuple[float, float]  # monotonic seconds: before the daemon was ended, once the next one served


def rounds(daemon: Held, count: int, how: Callable[[], object]) -> list[Span]:
    """End the daemon `count` times; return when."""
    rng, spans = random.Random(count), []
    for _ in range(count):
        time.sleep(_WARM + rng.random() / 2)
        began = time.monotonic()
        how()
        spans.append((began, time.monotonic()))
    time.sleep(_WARM)
    return spans


def stalls(spans: list[Span], readings: list[Reading]) -> tuple[list[float], list[float]]:
    """Return, of each span and the half second behind it, the longest read, and the median of the readers' longest."""
    longest, middle = [], []
    for began, ended in spans:
        each = [
            max((took for at, took in one.slow if at < ended + _AFTER and at + took > began), default=0.0)
            for one in readings
        ]
        longest.append(max(each))
        middle.append(statistics.median(each))
    return longest, middle


@contextlib.contextmanager
def dropping_caches() -> Iterator[None]:
    """Drop pages, names and attributes of the whole machine, twice a second."""
    over = threading.Event()

    def drop() -> None:
        while not over.wait(0.5):
            Path("/proc/sys/vm/drop_caches").write_text("3")

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def memory(daemon: Held) -> dict[str, int]:
    """Return bytes that holder, serving daemon, standby and the template of both have for themselves alone."""
    found = {"holder": daemon.process.pid, "daemon": daemon.pid(), "standby": daemon.standby()}
    found["template"] = next(pid for pid in daemon.node.processes() if pid not in found.values())
    return {name: _private(pid) for name, pid in found.items()}


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def measure(place: Path, kills: int, upgrades: int) -> list[dict[str, Any]]:
    """Return the results of both; see the module."""
    with FakeRegistry() as registry, Node(place) as node, held(node) as daemon, contextlib.ExitStack() as stack:
        files = zstd_chunked_layer(tar_of(*(file(name, data) for name, data in contents().items())))
        image = add(registry, "image", files)
        tree = place / "tree"
        make_tree(tree)
        program = shutil.which("sha256sum")
        assert program is not None
        shutil.copy2(os.path.realpath(program), tree / "usr/bin/sha256sum")  # needs the C library alone, which is there
        layout = make_layout(tree, place / "layout", {})
        trees = {
            "fuse": (node.mount(image, "--driver", "fuse"), (*KINDS, "held", "opened")),
            "erofs": (node.mount(image, "--driver", "erofs"), _ON_EROFS),
            "overlay": (node.mount(image, "--rw"), _ON_EROFS),
        }
        command = ("sh", "-c", _LOOP, "sh", digests(tree))
        container = node.spawn(node.words("run", "--network", "none", layout, *command))
        stack.callback(container.wait, 60)
        stack.callback(container.terminate)
        out = []
        for what, count, how in (("kills", kills, daemon.kill), ("upgrades", upgrades, _upgrade(node))):
            with contextlib.ExitStack() as reading:
                results = [
                    reading.enter_context(readers(node, where, kinds, pause=_PAUSE)) for where, kinds in trees.values()
                ]
                with dropping_caches():
                    spans = rounds(daemon, count, how)
            out.append(_told(what, spans, [one for result in results for one in result]))
        assert container.poll() is None, "the container has ended"
        container.terminate()
        said, failed = container.communicate(timeout=60)
        out.append({"what": "container", **judged(said.decode()), "words": failed.decode()[:500]})
        out.append({"what": "memory", "bytes": memory(daemon)})
        for where, _ in trees.values():
            node.umount(where)
        return out


def digests(tree: Path) -> str:
    """Return what `sha256sum -c` wants to know of the files that a container compares, which are below `tree`."""
    found = ((hashlib.sha256((tree / name).read_bytes()).hexdigest(), name) for name in _COMPARED)
    return "\n".join(f"{digest}  /{name}" for digest, name in found)


def judged(said: str) -> dict[str, int]:
    """Return how often a container has found all files right, how many were wrong, and in how many rounds any failed.

    A round fails too where a program can't be read. `compared` leaves out up to the last 19 rounds.
    """
    lines = said.splitlines()
    return {
        "compared": lines.count("right") * _EACH,
        "wrong": sum(line.endswith(": FAILED") for line in lines),
        "failed": lines.count("not"),
    }


def _upgrade(node: Node) -> Callable[[], None]:
    def run() -> None:
        done = node.lazyfs("upgrade")
        assert done.returncode == 0, done.stderr

    return run


def _told(what: str, spans: list[Span], readings: list[Reading]) -> dict[str, Any]:
    longest, middle = stalls(spans, readings)
    return {
        "what": what,
        "count": len(spans),
        "readers": len(readings),
        "reads": sum(reading.count for reading in readings),
        "wrong": [word for reading in readings for word in reading.wrong],
        "longest_wait_ms": _spread(longest),
        "readers_median_ms": _spread(middle),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    found = sorted(seconds) or [0.0]
    picked = {"median": statistics.median(found), "p95": found[int(len(found) * 0.95) - 1], "worst": found[-1]}
    return {name: round(value * 1000, 1) for name, value in picked.items()}


def main() -> int:
    """Print the results; return 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--upgrades", type=int, default=50)
    args = parser.parse_args()
    with scratch() as place:
        results = measure(place, args.kills, args.upgrades)
    good = True
    for result in results:
        print(json.dumps(result | machine.facts()), flush=True)
        good &= not result.get("wrong") and not result.get("failed") and result.get("compared") != 0
        if "longest_wait_ms" in result:
            good &= result["readers_median_ms"]["median"] <= MEDIAN * 1000
            good &= result["longest_wait_ms"]["worst"] <= WORST * 1000
    return 0 if good else 1


if __name__ == "__main__":
    os.environ.setdefault("LAZYFS_TEST_SESSION", "perf")
    sys.exit(main())
