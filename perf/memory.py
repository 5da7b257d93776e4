"""What does an image of many files cost: its first mount, one from its tables, and the daemon's memory after a walk?

    python -m perf.memory [--files 10000 500000] [--driver erofs]

Prints one JSON line for each size. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import tarfile
import time
from pathlib import Path
from typing import Any

from lazyfs.control_client import Daemon
from perf import lazy_image, machine
from perf.lazy_image import ONLY_DEMAND
from perf.start import drop_caches, scratch
from tests.helpers import real

A_DIRECTORY = 100  # files
_MEMORY = 100_000_000  # anonymous bytes that the daemon may have
_FIRST = 0.3, 6.0  # seconds of a first mount, of 10,000 and of 500,000 files
_FROM_TABLES = 0.05  # seconds
_RUNS = 3  # first mounts, and new daemons; the median counts


def many_files(path: Path, count: int) -> None:
    """Write a tar of `count` small files, a hundred to a directory, with names as long as real ones."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(count):
            if number % A_DIRECTORY == 0:
                folder = tarfile.TarInfo(f"share/package-{number // A_DIRECTORY:05}")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(folder)
            content = f"the content of file number {number}\n".encode()
            member = tarfile.TarInfo(f"{folder.name}/some-source-file-{number:06}.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def anonymous(pid: int) -> int:
    """Return the bytes of anonymous memory of a process, its own alone."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel has no Anonymous in smaps_rollup")


def walk(tree: Path) -> tuple[int, float]:
    """Return the names found by a walk with an lstat each, and its seconds."""
    began, count, pending = time.monotonic(), 0, [str(tree)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                os.lstat(entry.path)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return count, time.monotonic() - began


def daemon_of(directory: Path, root: Path) -> int:
    return int(lazy_image.status(directory, root)["daemon"]["pid"])


def mount_call(daemon: Daemon, reference: str) -> tuple[float, str]:
    """Return the seconds of the daemon's own part of a mount, and its name."""
    began = time.monotonic()
    answer = daemon.call("mount_image", image=reference, lease=True)
    return time.monotonic() - began, answer["mount"]


def pinned(daemon: Daemon, reference: str) -> str:
    """Return the reference of an image by its digest: a mount of what is known asks no registry."""
    answer = daemon.call("mount_image", image=reference, lease=True)
    daemon.call("release", mount=answer["mount"])
    name, _, _ = reference.rpartition(":")
    return f"{name}@{answer['manifest_digest']}"


def phases(root: Path, began: float, known: set[Path]) -> dict[str, float]:
    """Return when each file of a new image was ready, in seconds behind `began` (of time.time): what took how long."""
    found: dict[str, float] = {}
    for path in kept(root) - known:
        kind = "image" if path.suffix == ".erofs" else "tree" if path.parent.name == "trees" else path.name
        found[kind] = max(found.get(kind, 0.0), round(path.stat().st_mtime - began, 3))
    return found


def kept(root: Path) -> set[Path]:
    """Return the files that a store keeps of images beside their bytes."""
    return {*root.glob("layers/sha256/*/toc"), *root.glob("layers/sha256/*/table"), *root.glob("trees/*")}


def goal(files: int) -> float:
    """Return the seconds that a first mount may take beyond the network: promised for 10,000 and 500,000 files."""
    return _FIRST[0] + (_FIRST[1] - _FIRST[0]) * max(0, files - 10_000) / 490_000


def first_mount(directory: Path, tiny: str, reference: str, settings: dict[str, str]) -> float:
    """Return the seconds of a first mount, in a store and a daemon that had to do with `tiny` only."""
    root = directory / "first"
    drop_caches()
    with lazy_image.mounted(directory, root, tiny, settings), lazy_image.daemon(directory, root) as daemon:
        took, mount = mount_call(daemon, reference)
        daemon.call("release", mount=mount)
    shutil.rmtree(root)
    return took


def measure(directory: Path, tiny: str, reference: str, driver: str) -> dict[str, Any]:
    """Return the figures of one image, in a store and a daemon of their own that had to do with `tiny` only."""
    root, tree = directory / "s", directory / "many"
    settings = ONLY_DEMAND | {"LAZYFS_DRIVER": driver}
    firsts = [first_mount(directory, tiny, reference, settings) for _ in range(_RUNS - 1)]
    calls, anew, commands = [], [], []
    tree.mkdir(exist_ok=True)
    drop_caches()
    with lazy_image.mounted(directory, root, tiny, settings), lazy_image.daemon(directory, root) as daemon:
        there, began = kept(root), time.time()
        first, mount = mount_call(daemon, reference)
        ready = phases(root, began, there)
        daemon.call("release", mount=mount)
        known = pinned(daemon, reference)
        for _ in range(5):  # the daemon has let go of the image, so each mount opens its tables anew
            took, mount = mount_call(daemon, known)
            calls.append(took)
            daemon.call("release", mount=mount)
        for _ in range(3):
            began = time.monotonic()
            lazy_image.command(directory, root, settings, "mount", reference, str(tree))
            commands.append(time.monotonic() - began)
            lazy_image.command(directory, root, settings, "umount", str(tree))
        lazy_image.command(directory, root, settings, "mount", reference, str(tree))
        pid = daemon_of(directory, root)
        idle = anonymous(pid)
        names, first_walk = walk(tree)
        _, second_walk = walk(tree)
        walked = anonymous(pid)
        lazy_image.command(directory, root, settings, "umount", str(tree))
    for _ in range(_RUNS):
        with lazy_image.mounted(directory, root, tiny, settings), lazy_image.daemon(directory, root) as daemon:
            took, mount = mount_call(daemon, known)  # a daemon that knows nothing checks what it needs once
            anew.append(took)
            daemon.call("release", mount=mount)
    shutil.rmtree(root)
    return {
        "names_walked": names,
        "anonymous_idle": idle,
        "anonymous_walked": walked,
        "first_mount_s": [round(seconds, 3) for seconds in (*firsts, first)],
        "ready_after_s": ready,
        "mount_from_tables_s": [round(seconds, 3) for seconds in calls],
        "mount_from_tables_in_a_new_daemon_s": [round(seconds, 3) for seconds in anew],
        "mount_command_from_tables_s": [round(seconds, 3) for seconds in commands],
        "first_walk_us_a_name": round(first_walk / names * 1e6, 1),
        "second_walk_us_a_name": round(second_walk / names * 1e6, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and mount time of an image with many files.")
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 500_000])
    parser.add_argument("--driver", choices=("erofs", "fuse"), default="erofs")
    args = parser.parse_args()
    missed = False
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        images = {}
        for count in (10, *args.files):
            many_files(directory / "many.tar", count)
            images[count] = registry.image(f"many-{count}", "lazy")
            real.copy_image(lazy_image.make(directory, directory / "many.tar", name=f"lazy-{count}"), images[count])
        for count in args.files:
            found = measure(directory, images[10], images[count], args.driver)
            misses = []
            if found["anonymous_walked"] > _MEMORY:
                misses.append("memory")
            if statistics.median(found["first_mount_s"]) > goal(count):
                misses.append("first mount")
            for name in ("mount_from_tables_s", "mount_from_tables_in_a_new_daemon_s"):
                if statistics.median(found[name]) > _FROM_TABLES:
                    misses.append(name)
            missed = missed or bool(misses)
            told = {"what": "memory", "driver": args.driver, "files": count, **found, "missed": misses}
            print(json.dumps({**told, **machine.facts()}), flush=True)
    return 1 if missed and args.driver == "erofs" else 0


if __name__ == "__main__":
    raise SystemExit(main())
