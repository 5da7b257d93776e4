"""What does an image of many files cost: the daemon's memory after a whole walk, and a mount from its tables?

    python -m perf.memory [--files 100000]

Prints JSON lines. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import tarfile
import time
from pathlib import Path

from lazyfs import config, control_client
from perf import lazy_image, machine
from perf.lazy_image import ONLY_DEMAND
from perf.start import drop_caches, scratch, until_gone
from tests.helpers import real

A_DIRECTORY = 100  # files


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


def mount_again(directory: Path, root: Path, reference: str) -> tuple[list[float], list[float]]:
    """Return the seconds of mounts from the tables: the daemon's own, and those of whole `lazyfs mount` commands.

    The daemon is up and has let go of the image, so each mount opens and checks its tables anew.
    """
    calls, commands = [], []
    lingering = {**ONLY_DEMAND, "LAZYFS_DAEMON_LINGER": "20"}
    tree = str(directory / "tree")
    for _ in range(4):
        began = time.monotonic()
        lazy_image.command(directory, root, lingering, "mount", reference, tree)
        commands.append(time.monotonic() - began)
        lazy_image.command(directory, root, lingering, "umount", tree)
    settings = dataclasses.replace(config.load({"root": str(root)}), run=directory / "u")
    with control_client.open_daemon(settings, start=False) as daemon:
        for _ in range(5):
            began = time.monotonic()
            answer = daemon.call("mount_image", image=reference, lease=True)
            calls.append(time.monotonic() - began)
            daemon.call("release", mount=answer["mount"])
        daemon.call("stop")
    until_gone(root)
    return calls, commands[1:]  # the first one starts the daemon


def daemon_of(directory: Path, root: Path) -> int:
    return int(lazy_image.status(directory, root)["daemon"]["pid"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and mount time of an image with many files.")
    parser.add_argument("--files", type=int, default=100_000)
    args = parser.parse_args()
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        many_files(directory / "many.tar", args.files)
        layout = lazy_image.make(directory, directory / "many.tar")
        reference = registry.image("many", "lazy")
        real.copy_image(layout, reference)
        root, tree = directory / "s", directory / "tree"
        drop_caches()
        began = time.monotonic()
        with lazy_image.mounted(directory, root, reference, ONLY_DEMAND):
            first_mount = time.monotonic() - began
            pid = daemon_of(directory, root)
            idle = anonymous(pid)
            names, first_walk = walk(tree)
            _, second_walk = walk(tree)
            walked = anonymous(pid)
        from_tables, whole_command = mount_again(directory, root, reference)
        print(
            json.dumps(
                {
                    "what": "memory",
                    "files": args.files,
                    "names_walked": names,
                    "anonymous_idle": idle,
                    "anonymous_walked": walked,
                    "first_mount_s": round(first_mount, 3),
                    "mount_from_tables_s": [round(seconds, 3) for seconds in from_tables],
                    "mount_command_from_tables_s": [round(seconds, 3) for seconds in whole_command],
                    "first_walk_us_a_name": round(first_walk / names * 1e6, 1),
                    "second_walk_us_a_name": round(second_walk / names * 1e6, 1),
                    **machine.facts(),
                }
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
