"""What does a warm image cost beside the local disk? Overlays over the same tree: lazily mounted, and unpacked on disk.

    python -m perf.warm [--pairs 7] [--driver erofs] [--git-files 20000]

Prints one JSON line a pair and one with the medians and ratios. Method: perf/README.md. Needs root, git, and a disk
that overlayfs takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lazyfs.control_client import Daemon
from perf import debian, git_tree, lazy_image, machine
from perf.locked import locked
from perf.start import drop_caches, scratch
from tests.helpers import real

GOAL = 1.1  # times what the local disk takes
_PRELUDE = """
import os, random, stat, subprocess, sys, time
root = sys.argv[1]
files = []
for path, directories, names in os.walk(root):
    if path == root:
        directories.remove("srv")  # the project there has its own command
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
_SMALL = """
for _ in range(3):
    for path in small: read(path)
"""
_SEQUENTIAL = """
for _ in range(20):  # one pass takes 10 ms, and a virtual machine's processor is away for as long now and then
    for path, _ in large: read(path)
"""
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
_GIT = f"""
words = {git_tree.STATUS_WORDS} + [root + "/{git_tree.PLACE}", "status", "--porcelain"]
found = subprocess.run(words, check=True, capture_output=True).stdout
assert not found, found[:200]
"""
OPERATIONS = {
    "walk and lstat": _WALK,
    "open and read of small files": _SMALL,
    "sequential reads": _SEQUENTIAL,
    "random reads of 4 KiB": _RANDOM,
    "python3 -c import": _IMPORT,
    "git status": _GIT,
    "four readers": _FOUR,
}


def seconds(what: str, root: Path) -> float:
    """Run one operation over a tree in a process of its own; return what it took, without the process's start."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PRELUDE + OPERATIONS[what] + _END, str(root)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return float(done.stdout)


def calls(daemon: Daemon) -> Counter[str]:
    """Return the FUSE requests that the daemon has had."""
    return Counter(daemon.call("status")["fuse"])


@contextlib.contextmanager
def warmed(lazy: Path, native: Path) -> Iterator[None]:
    """Drop all pages, have each operation read what it reads, and hold that in memory.

    Anew for each pair: where in a virtual machine's memory a file's pages come to lie makes reads of it up to a fifth
    faster or slower, and stays so as long as they are there.
    """
    drop_caches()
    with contextlib.ExitStack() as stack:
        for root in (lazy, native):
            git_tree.refresh(root)
        for what in OPERATIONS:
            for root in (lazy, native):
                seconds(what, root)
        for root in (lazy, native):  # a project's own files are not read when it is warm
            read = [path for path in root.iterdir() if path.name != "srv"]
            stack.enter_context(locked(*read, root / git_tree.PLACE / ".git"))
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Warm reads and names beside the local disk.")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--driver", choices=("erofs", "fuse"), default="erofs")
    parser.add_argument("--git-files", type=int, default=20_000)
    args = parser.parse_args()
    settings = lazy_image.ONLY_DEMAND | {"LAZYFS_DRIVER": args.driver}
    took: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in OPERATIONS}
    asked: dict[str, Counter[str]] = {what: Counter() for what in OPERATIONS}
    with scratch() as directory, real.docker_registry(directory / "r") as registry, contextlib.ExitStack() as stack:
        git_tree.make(directory / "git.tar", directory / "git", args.git_files)
        shutil.rmtree(directory / "git")
        tars = debian.rootfs_tar(), directory / "git.tar"
        reference = registry.image("warm", "lazy")
        real.copy_image(lazy_image.make(directory, *tars), reference)
        plain = lazy_image.unpack(directory / "plain-tree", *tars)
        store = directory / "s"
        tree = stack.enter_context(lazy_image.mounted(directory, store, reference, settings))
        lazy = stack.enter_context(lazy_image.overlay(tree, directory / "over-lazy"))
        native = stack.enter_context(lazy_image.overlay(plain, directory / "over-plain"))
        daemon = stack.enter_context(lazy_image.daemon(directory, store))
        dropped = 0
        for pair in range(args.pairs):
            with warmed(lazy, native):
                before_all = machine.caches_dropped()
                for what, (ours, theirs) in took.items():
                    before = calls(daemon)
                    for mine in (True, False) if pair % 2 else (False, True):
                        (ours if mine else theirs).append(seconds(what, lazy if mine else native))
                    asked[what] += calls(daemon) - before
                dropped += machine.caches_dropped() - before_all
            line = {what: round(ours[-1] / theirs[-1], 3) for what, (ours, theirs) in took.items()}
            told = {what: dict(count) for what, count in asked.items() if count}
            print(json.dumps({"what": "warm, lazy to native", "pair": pair, **line, "asked": told}), flush=True)
    medians = {
        what: {
            "lazy_s": round(statistics.median(ours), 4),
            "native_s": round(statistics.median(theirs), 4),
            "ratio": round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 3),
        }
        for what, (ours, theirs) in took.items()
    }
    slow = [what for what, found in medians.items() if found["ratio"] > GOAL]
    summary = {"what": "warm, medians", "driver": args.driver, **medians, "asked_of_the_daemon": told, "slower": slow}
    print(json.dumps({**summary, "caches_dropped_by_others": dropped, **machine.facts()}))
    return 1 if (told or slow) and args.driver == "erofs" else 0


if __name__ == "__main__":
    os.umask(0o022)
    raise SystemExit(main())
