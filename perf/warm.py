"""What does a warm image cost beside the local disk? Overlays over the same tree: lazily mounted, and unpacked on disk.

    python -m perf.warm [--pairs 5] [--driver erofs]

Prints one JSON line a pair and one with the medians and ratios. Method: perf/README.md. Needs root and a disk that
overlayfs takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from perf import debian, lazy_image, machine
from perf.start import drop_caches, scratch
from tests.helpers import real

_ONLY_DEMAND = {"LAZYFS_BACKGROUND": "0", "LAZYFS_PREFETCH": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
_PRELUDE = """
import os, random, stat, subprocess, sys, time
root = sys.argv[1]
files = []
for path, _, names in os.walk(root):
    for name in names:
        found = os.lstat(os.path.join(path, name))
        if stat.S_ISREG(found.st_mode):
            files.append((os.path.join(path, name), found.st_size))
files.sort()
small = [path for path, size in files if size <= 65536]
large = [(path, size) for path, size in files if size > 1 << 20]
def read(path):
    fd = os.open(path, os.O_RDONLY)
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)
began = time.perf_counter()
"""
_END = "print(time.perf_counter() - began)\n"
_WALK = """
todo = [root]
while todo:
    with os.scandir(todo.pop()) as found:
        for entry in found:
            os.lstat(entry.path)
            if entry.is_dir(follow_symlinks=False):
                todo.append(entry.path)
"""
_SMALL = "for path in small: read(path)\n"
_RANDOM = """
order = random.Random(1)
opened = [(os.open(path, os.O_RDONLY), size) for path, size in large]
for _ in range(20000):
    fd, size = order.choice(opened)
    os.pread(fd, 4096, order.randrange(size - 4096))
"""
_FOUR = """
for number in range(4):
    if not os.fork():
        for path in small[number:] + small[:number]: read(path)
        for path, _ in large: read(path)
        os._exit(0)
for _ in range(4): os.wait()
"""
_IMPORT = """
for _ in range(5):
    line = "import argparse, pickle, random, subprocess, tempfile, traceback"
    subprocess.run(["chroot", root, "python3", "-c", line], check=True)
"""
OPERATIONS = {
    "walk and lstat": _WALK,
    "open and read of small files": _SMALL,
    "sequential reads": "for path, _ in large: read(path)\n",
    "random reads of 4 KiB": _RANDOM,
    "python3 -c import": _IMPORT,
    "four readers": _FOUR,
}


def seconds(what: str, root: Path) -> float:
    """Run one operation over a tree in a process of its own; return what it took, without the process's start."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PRELUDE + OPERATIONS[what] + _END, str(root)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return float(done.stdout)


@contextlib.contextmanager
def overlay(lower: Path, directory: Path) -> Iterator[Path]:
    """Show an overlay over `lower`, as a container has it."""
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={directory}/upper,workdir={directory}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, directory / "merged"], check=True)
    try:
        yield directory / "merged"
    finally:
        subprocess.run(["umount", directory / "merged"], check=True)


def calls(directory: Path, root: Path) -> dict[str, int]:
    """Return the FUSE requests that the daemon has had."""
    return dict(lazy_image.status(directory, root)["fuse"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Warm reads and names beside the local disk.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--driver", choices=("erofs", "fuse"), default="erofs")
    args = parser.parse_args()
    tar = debian.rootfs_tar()
    settings = _ONLY_DEMAND | {"LAZYFS_DRIVER": args.driver}
    with scratch() as directory, real.docker_registry(directory / "r") as registry, contextlib.ExitStack() as stack:
        reference = registry.image("warm", "lazy")
        real.copy_image(lazy_image.make(directory, tar), reference)
        plain = directory / "plain-tree"
        plain.mkdir()
        subprocess.run(["tar", "-xpf", tar, "-C", plain, "--exclude=./dev/*"], check=True)
        store = directory / "s"
        tree = stack.enter_context(lazy_image.mounted(directory, store, reference, settings))
        lazy = stack.enter_context(overlay(tree, directory / "over-lazy"))
        native = stack.enter_context(overlay(plain, directory / "over-plain"))
        drop_caches()
        for what in OPERATIONS:
            cold = seconds(what, lazy), seconds(what, native)  # from here on all is warm
            print(json.dumps({"what": what, "first_lazy_s": round(cold[0], 4), "first_native_s": round(cold[1], 4)}))
        took: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in OPERATIONS}
        before = calls(directory, store)
        for pair in range(args.pairs):
            for what, (ours, theirs) in took.items():
                for mine in (True, False) if pair % 2 else (False, True):
                    (ours if mine else theirs).append(seconds(what, lazy if mine else native))
            line = {what: round(ours[-1] / theirs[-1], 3) for what, (ours, theirs) in took.items()}
            after = calls(directory, store)
            asked = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
            print(json.dumps({"what": "warm, lazy to native", "pair": pair, **line, "asked": asked}), flush=True)
        medians = {
            what: {
                "lazy_s": round(statistics.median(ours), 4),
                "native_s": round(statistics.median(theirs), 4),
                "ratio": round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 3),
            }
            for what, (ours, theirs) in took.items()
        }
        told = {"what": "warm, medians", "driver": args.driver, **medians, "asked_of_the_daemon": asked}
        print(json.dumps({**told, **machine.facts()}))
    return 1 if asked and args.driver == "erofs" else 0


if __name__ == "__main__":
    os.umask(0o022)
    raise SystemExit(main())
