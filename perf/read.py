"""How fast is a cold sequential read through a lazy mount, beside a pull of the same blob by hand? Is a warm one free?

    python -m perf.read [--pairs 5] [--size 256]

Prints one JSON line a run and one with the medians. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import tarfile
import time
from pathlib import Path

from perf import lazy_image, machine
from perf.lazy_image import ONLY_DEMAND
from perf.start import drop_caches, scratch
from tests.helpers import real

ASKING = ("lookup", "getattr", "read")  # FUSE requests that a warm read or stat must not cause


def binary_data(path: Path, size: int) -> None:
    """Write a tar with one file, /data, of `size` bytes: this machine's programs and libraries one after another."""
    content = bytearray()
    for top in ("/usr/lib", "/usr/bin", "/usr/libexec", "/opt"):
        for directory, names, files in os.walk(top):
            names.sort()
            for name in sorted(files):
                source = Path(directory, name)
                wanted = (".so" in name or top == "/usr/bin") and source.is_file() and not source.is_symlink()
                if wanted and len(content) < size:
                    content += source.read_bytes()
    if len(content) < size:
        raise SystemExit(f"this machine has only {len(content)} bytes of programs: ask for a smaller --size")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("data")
        member.size = size
        archive.addfile(member, io.BytesIO(memoryview(content)[:size]))


def by_hand(url: str, target: Path) -> float:
    """Return the seconds of curl, zstd, a file and a digest for the whole blob."""
    began = time.monotonic()
    line = 'set -e; curl -sS --fail --noproxy "*" "$1" | zstd -dqc | tee "$2" | openssl dgst -sha256 >/dev/null'
    subprocess.run(["/bin/sh", "-c", line, "sh", url, str(target)], check=True, timeout=600)
    return time.monotonic() - began


def read_all(path: Path) -> tuple[float, int]:
    """Return the seconds and the bytes of one sequential read in pieces of 1 MiB."""
    began, size = time.monotonic(), 0
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as source:
        while got := source.readinto(buffer):
            size += got
    return time.monotonic() - began, size


def asked(directory: Path, root: Path) -> dict[str, int]:
    """Return the FUSE requests counted so far, those that a warm file must not cause."""
    counters = lazy_image.status(directory, root)["fuse"]
    return {name: int(count) for name, count in counters.items() if name.lower() in ASKING}


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}


def lazily(directory: Path, root: Path, image: str, size: int) -> dict[str, object]:
    """Return one cold read's seconds, a warm one's, and what the warm read and a warm stat asked of the daemon."""
    with lazy_image.mounted(directory, root, image, ONLY_DEMAND) as tree:
        cold, got = read_all(tree / "data")
        if got != size:
            raise SystemExit(f"read {got} bytes, not {size}")
        before = asked(directory, root)
        warm, _ = read_all(tree / "data")
        after_read = asked(directory, root)
        for _ in range(1000):
            os.stat(tree / "data")
        after_stat = asked(directory, root)
        moved = lazy_image.status(directory, root)["bytes"]
    return {
        "cold_s": round(cold, 4),
        "warm_s": round(warm, 4),
        "warm_read_asked": grown(before, after_read),
        "warm_stat_asked": grown(after_read, after_stat),
        "bytes": moved,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Cold and warm sequential reads of one big file.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="MB of the file")
    args = parser.parse_args()
    size = args.size * 1_000_000
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        binary_data(directory / "data.tar", size)
        layout = lazy_image.make(directory, directory / "data.tar")
        (directory / "data.tar").unlink()
        reference = registry.image("read", "lazy")
        real.copy_image(layout, reference)
        blob = lazy_image.layers(directory / "lazy")[0]
        url = f"http://{registry.host}/v2/read/blobs/{blob['digest']}"
        hex_digest = blob["digest"][7:]
        stored = next(registry.log.parent.glob(f"blobs/**/{hex_digest}/data"))
        colds, hands, warms, broken = [], [], [], False
        for pair in range(args.pairs):
            drop_caches()
            stored.read_bytes()  # both sides find the registry's own file in memory
            hand = by_hand(url, directory / "by-hand")
            (directory / "by-hand").unlink()
            drop_caches()
            stored.read_bytes()
            run = lazily(directory, directory / f"s{pair}", reference, size)
            colds.append(float(str(run["cold_s"])))
            warms.append(float(str(run["warm_s"])))
            hands.append(hand)
            broken = broken or bool(run["warm_read_asked"] or run["warm_stat_asked"])
            print(json.dumps({"what": "read", "pair": pair, "by_hand_s": round(hand, 4), **run}), flush=True)
        cold, hand, warm = (statistics.median(values) for values in (colds, hands, warms))
        print(
            json.dumps(
                {
                    "what": "read, medians",
                    "size": size,
                    "blob_size": blob["size"],
                    "cold_MB_s": round(size / cold / 1e6, 1),
                    "by_hand_MB_s": round(size / hand / 1e6, 1),
                    "cold_by_hand_ratio": round(cold / hand, 3),
                    "warm_MB_s": round(size / warm / 1e6, 1),
                    **machine.facts(),
                }
            )
        )
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
