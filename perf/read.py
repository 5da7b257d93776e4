"""How fast is a cold sequential read through a lazy mount, beside a pull of the same blob by hand? Is a warm one free?

And what is on the disk but not in memory: how fast is that, beside a plain file?

    python -m perf.read [--pairs 5] [--size 256] [--driver erofs]

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
from collections import Counter
from pathlib import Path
from typing import Any

from lazyfs.control_client import Daemon
from perf import lazy_image, machine
from perf.lazy_image import ONLY_DEMAND
from perf.locked import locked
from perf.start import drop_caches, scratch
from tests.helpers import real

STORED_GOAL = 700e6  # bytes a second that are on the disk and not in memory
_PASSES = 5  # reads from the disk, each beside one of the plain file
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


def asked(daemon: Daemon) -> Counter[str]:
    """Return the FUSE requests counted so far, those that a warm file must not cause."""
    counters = daemon.call("status")["fuse"]
    return Counter({name: int(count) for name, count in counters.items() if name.lower() in ASKING})


def lazily(directory: Path, root: Path, image: str, plain: Path, size: int, driver: str) -> dict[str, Any]:
    """Return the seconds of a cold read, a warm one, one from the store and one of a plain file beside it (medians);
    what the warm read and a warm stat asked of the daemon, and its processor time for a GB cold and from the store.
    """
    settings = ONLY_DEMAND | {"LAZYFS_DRIVER": driver}
    with (
        lazy_image.mounted(directory, root, image, settings) as tree,
        lazy_image.daemon(directory, root) as daemon,
    ):
        pid = daemon.call("status")["daemon"]["pid"]
        began = machine.cpu_seconds(pid)
        cold, got = read_all(tree / "data")
        cold_cpu = machine.cpu_seconds(pid) - began
        if got != size:
            raise SystemExit(f"read {got} bytes, not {size}")
        with locked(tree):
            before = asked(daemon)
            warm, _ = read_all(tree / "data")
            after_read = asked(daemon)
            for _ in range(1000):
                os.stat(tree / "data")
            after_stat = asked(daemon)
        moved = daemon.call("status")["bytes"]
        natives, stored, stored_cpu = [], [], []
        for _ in range(_PASSES):
            drop_caches()
            natives.append(read_all(plain)[0])
            drop_caches()
            began = machine.cpu_seconds(pid)
            stored.append(read_all(tree / "data")[0])
            stored_cpu.append(machine.cpu_seconds(pid) - began)
        if daemon.call("status")["bytes"]["from_registry"] != moved["from_registry"]:
            raise SystemExit("the store did not have all that was read")
    return {
        "cold_s": round(cold, 4),
        "warm_s": round(warm, 4),
        "stored_s": round(statistics.median(stored), 4),
        "native_s": round(statistics.median(natives), 4),
        "cold_cpu_s_per_GB": round(cold_cpu / size * 1e9, 2),
        "stored_cpu_s_per_GB": round(statistics.median(stored_cpu) / size * 1e9, 2),
        "warm_read_asked": dict(after_read - before),
        "warm_stat_asked": dict(after_stat - after_read),
        "bytes": moved,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Cold and warm sequential reads of one big file.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="MB of the file")
    parser.add_argument("--driver", choices=("erofs", "fuse"), default="erofs")
    args = parser.parse_args()
    size = args.size * 1_000_000
    hands, runs = [], []
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
        for pair in range(args.pairs):
            drop_caches()
            stored.read_bytes()  # both sides find the registry's own file in memory
            hands.append(by_hand(url, directory / "by-hand"))
            drop_caches()
            stored.read_bytes()
            runs.append(lazily(directory, directory / f"s{pair}", reference, directory / "by-hand", size, args.driver))
            (directory / "by-hand").unlink()
            told = {"by_hand_s": round(hands[-1], 4), **runs[-1]}
            print(json.dumps({"what": "read", "pair": pair, **told}), flush=True)
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name.endswith(("_s", "_GB"))}
    hand = statistics.median(hands)
    broken = any(run["warm_read_asked"] or run["warm_stat_asked"] for run in runs)
    missed = ["warm reads ask nothing"] if broken else []
    if middle["cold_s"] > hand:
        missed.append("cold as fast as by hand")
    if size / middle["stored_s"] < STORED_GOAL:
        missed.append("from the store")
    print(
        json.dumps(
            {
                "what": "read, medians",
                "driver": args.driver,
                "size": size,
                "blob_size": blob["size"],
                "cold_MB_s": round(size / middle["cold_s"] / 1e6, 1),
                "by_hand_MB_s": round(size / hand / 1e6, 1),
                "cold_by_hand_ratio": round(middle["cold_s"] / hand, 3),
                "warm_MB_s": round(size / middle["warm_s"] / 1e6, 1),
                "stored_MB_s": round(size / middle["stored_s"] / 1e6, 1),
                "native_MB_s": round(size / middle["native_s"] / 1e6, 1),
                "cold_cpu_s_per_GB": middle["cold_cpu_s_per_GB"],
                "stored_cpu_s_per_GB": middle["stored_cpu_s_per_GB"],
                "missed": missed,
                **machine.facts(),
            }
        )
    )
    return 1 if broken or (missed and args.driver == "erofs") else 0


if __name__ == "__main__":
    raise SystemExit(main())
