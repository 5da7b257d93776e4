"""How long does a reader wait while two layers are being filled in the background over the same slow link?

    python -m perf.fills [--links wan far] [--reads 100] [--size 300]

An image of two layers that do not compress, behind a shaped link. Both are filled from the mount on; a reader takes
files of the second one, in any order, that lie behind what the fill has come to: a few in a row, and then one after a
pause in which the fills have had the whole link. Prints a JSON line for each link, with the machine. Exits with 1 when
the 99th percentile of the reads is above two round trips and their own transfer. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import tarfile
import time
from pathlib import Path
from typing import Any

from perf import lazy_image, machine
from perf.shaper import Shaper
from perf.start import drop_caches, scratch
from tests.helpers import real

LINKS = {"wan": (0.020, 200.0), "far": (0.100, 50.0)}  # seconds of a round trip, 10**6 bits a second
ROUND_TRIPS = 2  # promised beside the transfer
_SIZE = 640 << 10  # bytes of a file: two do not fit into one frame
_APART = 2  # one file in so many is read: of neighbours in order a reader is sent the next ones, which shares the link
_GAP = 0.2  # seconds between two reads in a row at most
_EACH = 8  # reads, before which one there is a pause
_PAUSE = 1.5  # seconds; after one without readers the fills take the whole link
_SETTLED = 3.0  # seconds after the mount
# With erofs the kernel reads ahead over the ends of files, and what it wants then shares the link with the read itself.
_SETTINGS = {"LAZYFS_DRIVER": "fuse"}
_STEP = 1 << 20  # bytes


def _noise(chance: random.Random, size: int) -> bytes:
    """Return random bytes, in steps: `randbytes` counts bits, and not beyond an int."""
    return b"".join(chance.randbytes(min(_STEP, size - at)) for at in range(0, size, _STEP))


def layer(path: Path, name: str, size: int, files: int) -> None:
    """Write a tar of one large file and, behind it, `files` small ones; nothing of it compresses."""
    chance = random.Random(name)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for member_name, member_size in [(name, size), *((f"read/{number:04}", _SIZE) for number in range(files))]:
            member = tarfile.TarInfo(member_name)
            member.size = member_size
            archive.addfile(member, io.BytesIO(_noise(chance, member_size)))


def timed(path: Path) -> float:
    """Return the seconds of one read of a whole file."""
    began = time.monotonic()
    file = os.open(path, os.O_RDONLY)
    try:
        if len(os.pread(file, _SIZE, 0)) != _SIZE:
            raise SystemExit(f"{path} is too short")
    finally:
        os.close(file)
    return time.monotonic() - began


def reads(tree: Path, count: int) -> list[float]:
    """Return the seconds of each read."""
    chance = random.Random(count)
    numbers = [_APART * number for number in range(count)]
    chance.shuffle(numbers)
    took = []
    for place, number in enumerate(numbers):
        time.sleep(_PAUSE if place % _EACH == 0 else chance.uniform(0, _GAP))
        took.append(timed(tree / "read" / f"{number:04}"))
    return took


def read_over(directory: Path, port: int, link: str, count: int, *, fills: bool) -> tuple[list[float], float]:
    """Mount the image over one link and read, while it is filled or not. Return sorted seconds, and the link's use."""
    rtt, mbit = LINKS[link]
    with Shaper(("127.0.0.1", port), rtt=rtt, mbit=mbit) as shaper:
        image = f"docker://127.0.0.1:{shaper.port}/fills:lazy"
        root = directory / f"store-{link}-{fills}"
        drop_caches()
        with lazy_image.mounted(directory, root, image, _SETTINGS | ({} if fills else lazy_image.ONLY_DEMAND)) as tree:
            time.sleep(_SETTLED)
            before, began = shaper.traffic(), time.monotonic()
            took = sorted(reads(tree, count))
            used = shaper.traffic().since(before).down * 8 / (mbit * 1e6) / (time.monotonic() - began)
            (mount,) = lazy_image.status(directory, root)["mounts"]
            if any(each["complete"] for each in mount["layers"]):
                raise SystemExit("a fill ended before the reads did: ask for a larger --size or fewer --reads")
    return took, used


def measure(directory: Path, port: int, link: str, count: int) -> dict[str, Any]:
    """Read beside the fills, and alone; return what is printed."""
    rtt, mbit = LINKS[link]
    alone, _ = read_over(directory, port, link, count, fills=False)
    took, used = read_over(directory, port, link, count, fills=True)
    p99 = max(0, int(count * 0.99) - 1)
    return {
        "what": "fills",
        "link": link,
        "rtt_ms": rtt * 1000,
        "mbit": mbit,
        "reads": count,
        "p50_ms": round(statistics.median(took) * 1000, 1),
        "p99_ms": round(took[p99] * 1000, 1),
        "max_ms": round(took[-1] * 1000, 1),
        "promised_ms": round((ROUND_TRIPS * rtt + _SIZE * 8 / (mbit * 1e6)) * 1000, 1),
        "alone_p50_ms": round(statistics.median(alone) * 1000, 1),
        "alone_p99_ms": round(alone[p99] * 1000, 1),
        "link_used": round(used, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="How long a reader waits while two layers are filled.")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--reads", type=int, default=100)
    parser.add_argument("--size", type=int, default=300, help="MB of each layer")
    args = parser.parse_args()
    missed = False
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        tars = [directory / "first.tar", directory / "second.tar"]
        layer(tars[0], "first", args.size * 1_000_000, 0)
        layer(tars[1], "second", args.size * 1_000_000, _APART * args.reads)
        layout = lazy_image.make(directory, *tars)
        for tar in tars:
            tar.unlink()
        real.copy_image(layout, registry.image("fills", "lazy"))
        for link in args.links:
            found = measure(directory, registry.port, link, args.reads)
            missed |= found["p99_ms"] > found["promised_ms"]
            print(json.dumps({**found, **machine.facts()}), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
