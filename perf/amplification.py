"""How much more is fetched than is read, and how fast is a cold sequential read, for each read-ahead of the kernel?

    python -m perf.amplification [--rounds 3] [--read-ahead 128 512 1024 4096] [--size 128]

The erofs driver only. Prints one JSON line a setting and round, and one with the medians. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perf import debian, lazy_image, machine
from perf.read import binary_data, read_all
from perf.resident import PAGE, regular_files, resident_bytes
from perf.start import drop_caches, scratch
from tests.helpers import real

_BDI = Path("/sys/class/bdi")
_READS = 200  # of a page each
_FILES = 300
_SMALL = 64 << 10  # bytes of the largest small file
_START = (
    'python3 -c "import argparse, pickle, random, subprocess, tempfile, traceback" && dpkg --list >/dev/null'
    " && perl -MPOSIX -e 1"
)


class Scene:
    """Where images are mounted, each time with a store of its own, so that nothing of them was ever here."""

    def __init__(self, directory: Path, large: str, system: str) -> None:
        self._directory = directory
        self.large, self.system = large, system
        self._count = 0

    @contextlib.contextmanager
    def mounted(self, image: str, read_ahead: int) -> Iterator[Path]:
        """Mount an image, with `read_ahead` KiB."""
        self._count += 1
        settings = lazy_image.ONLY_DEMAND | {"LAZYFS_DRIVER": "erofs"}
        before = _devices()
        with lazy_image.mounted(self._directory, self._root, image, settings) as tree:
            for name in _devices() - before:
                (_BDI / name / "read_ahead_kb").write_text(str(read_ahead))
            drop_caches()
            yield tree

    @property
    def _root(self) -> Path:
        return self._directory / f"s{self._count}"

    def fetched(self) -> dict[str, int]:
        """Return the bytes that came for the mount of this moment: over the network, and unpacked."""
        layers = [layer for mount in self._status()["mounts"] for layer in mount["layers"]]
        return {
            "network": sum(layer["bytes"]["demand"] for layer in layers),
            "unpacked": sum(layer["present"] for layer in layers),
        }

    def _status(self) -> dict[str, Any]:
        return lazy_image.status(self._directory, self._root)


def _devices() -> frozenset[str]:
    return frozenset(name for name in os.listdir(_BDI) if name.startswith("erofs-"))


def read_pages(tree: Path) -> None:
    """Read pages here and there of the large file."""
    source = random.Random(1)
    with (tree / "data").open("rb", buffering=0) as handle:
        last = os.fstat(handle.fileno()).st_size // PAGE - 1
        for _ in range(_READS):
            os.pread(handle.fileno(), PAGE, source.randrange(last) * PAGE)


def read_files(tree: Path) -> None:
    """Read small files here and there."""
    small = [path for path in regular_files(tree) if path.stat().st_size <= _SMALL]
    for path in random.Random(1).sample(small, _FILES):
        path.read_bytes()


def start(tree: Path) -> None:
    """Start a few programs."""
    subprocess.run(["chroot", tree, "sh", "-c", _START], check=True, capture_output=True, timeout=120)


TRACES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "random pages": ("large", read_pages),
    "random small files": ("system", read_files),
    "a start": ("system", start),
}


def trace(scene: Scene, what: str, read_ahead: int) -> dict[str, int]:
    """Return what is in memory after a trace, and what came for it. Bytes."""
    image, run = TRACES[what]
    with scene.mounted(getattr(scene, image), read_ahead) as tree:
        run(tree)
        return {"in_memory": resident_bytes(regular_files(tree)), **scene.fetched()}


def sequential(scene: Scene, read_ahead: int) -> float:
    """Return the MB/s of a cold sequential read of the large file."""
    with scene.mounted(scene.large, read_ahead) as tree:
        took, size = read_all(tree / "data")
        return size / took / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description="Bytes fetched for bytes read, by the kernel's read-ahead.")
    parser.add_argument("--rounds", type=int, default=3, help="of the sequential read")
    parser.add_argument("--read-ahead", type=int, nargs="+", default=[128, 512, 1024, 4096], help="KiB")
    parser.add_argument("--size", type=int, default=128, help="MB of the large file")
    args = parser.parse_args()
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        binary_data(directory / "data.tar", args.size * 1_000_000)
        images = {"large": directory / "data.tar", "system": debian.rootfs_tar()}
        for name, tar in images.items():
            real.copy_image(lazy_image.make(directory, tar, name=name), registry.image(name, "lazy"))
        scene = Scene(directory, *(registry.image(name, "lazy") for name in images))
        touched = {what: trace(scene, what, 0)["in_memory"] for what in TRACES}  # nothing is read ahead
        print(json.dumps({"what": "touched", **touched}), flush=True)
        speeds: dict[int, list[float]] = {read_ahead: [] for read_ahead in args.read_ahead}
        for _ in range(args.rounds):
            for read_ahead, found in speeds.items():
                found.append(sequential(scene, read_ahead))
        table = {}
        for read_ahead in args.read_ahead:
            line: dict[str, Any] = {"sequential_MB_s": round(statistics.median(speeds[read_ahead]), 1)}
            for what in TRACES:
                sizes = trace(scene, what, read_ahead)
                line[what] = {name: round(size / touched[what], 2) for name, size in sizes.items()}
            table[read_ahead] = line
            print(json.dumps({"what": "amplification", "read_ahead_KiB": read_ahead, **line}), flush=True)
    summary = {"what": "amplification, all", "bytes_touched": touched, "by_read_ahead_KiB": table}
    print(json.dumps({**summary, **machine.facts()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
