"""How long do reads wait when a mirror dies, hangs, drips or lies under a mount?

    python -m perf.mirrors [--files 200] [--latency-ms 5]

A registry with two mirrors in this process. The fault begins after the mount; then one reader opens and reads files one
after another, each cold, each of one frame, and compares their digests. Prints one JSON line for each fault of the
first mirror, of both, and of none. Exits with 1 when a byte was wrong or a read waited for longer than is promised.
Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
from pathlib import Path
from typing import Any

from lazyfs.registry.mirrored import DELAY
from perf import machine
from perf.start import scratch
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.mirrors import Mirrors
from tests.helpers.tars import file, tar_of

SIZE = 32 << 10  # bytes of a file
SLACK = 1.0  # seconds that a read may take beside what bad mirrors cost it
FAULTS: dict[str, dict[str, Any]] = {
    "fine": {},
    "refuses": {"kind": Fault.REFUSE},
    "dies in mid-read": {"kind": Fault.RESET, "at": 8 << 10},
    "black hole": {"kind": Fault.BLACK_HOLE},
    "drips": {"kind": Fault.DRIP, "rate": 2000},
    "lies": {"kind": Fault.FLIP},
}
# Opens, reads and hashes each file; prints [milliseconds, sha256] for each.
READER = """
import hashlib, time
out = []
for name in sorted(os.listdir(a[0])):
    began = time.monotonic()
    with open(os.path.join(a[0], name), "rb", buffering=0) as source:
        data = source.readall()
    out.append([name, (time.monotonic() - began) * 1000, hashlib.sha256(data).hexdigest()])
print(json.dumps(out))
"""


def contents(count: int) -> dict[str, bytes]:
    return {f"f{number:04}": random.Random(number).randbytes(SIZE) for number in range(count)}


def make_layer(files: dict[str, bytes]) -> LayerBlob:
    """Return a layer with a frame for each file: each read is a request of its own."""
    return zstd_chunked_layer(tar_of(*(file(name, data) for name, data in files.items())), frame_size=0)


def measure(
    place: Path, fault: str, bad: int, files: dict[str, bytes], blob: LayerBlob, latency: float
) -> dict[str, Any]:
    """Return the delays of one reader while `bad` mirrors have the fault."""
    with Mirrors(place) as mirrors:
        image = mirrors.add_image("image", "latest", [blob])
        for registry in mirrors.all:
            registry.latency = latency
        with Node(place, CERTS_DIR=str(mirrors.certs_dir), READ_TIMEOUT="60", ANSWER_TIMEOUT="30") as node:
            tree = node.mount(image)
            for mirror in mirrors.mirrors[:bad]:
                spoil(mirror, image.layers[0], fault)
            read = node.python(READER, tree, timeout=300)
            sources = node.status()["sources"]
    took = sorted(each[1] for each in read)
    wrong = [name for name, _, digest in read if digest != hashlib.sha256(files[name]).hexdigest()]
    return {
        "fault": fault,
        "bad_mirrors": bad,
        "reads": len(read),
        "wrong": len(wrong),
        "p50_ms": round(statistics.median(took), 2),
        "p99_ms": round(took[int(len(took) * 0.99) - 1], 2),
        "max_ms": round(took[-1], 1),
        "slower_than_100ms": sum(each > 100 for each in took),
        "promised_ms": round((bad * DELAY + SLACK) * 1000),
        "states": [sources.get(registry.host, {}).get("state", "not asked") for registry in mirrors.all],
    }


def spoil(mirror: FakeRegistry, digest: str, fault: str) -> None:
    if FAULTS[fault]:
        mirror.fault(path=f"/blobs/{digest}", **FAULTS[fault])


def main() -> int:
    parser = argparse.ArgumentParser(description="Delays of reads while mirrors fail.")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--latency-ms", type=float, default=5.0)
    args = parser.parse_args()
    files = contents(args.files)
    blob = make_layer(files)
    kept = True
    with scratch() as directory:
        for fault, words in FAULTS.items():
            for bad in (1, 2) if words else (0,):
                place = directory / f"{fault.replace(' ', '-')}-{bad}"
                place.mkdir()
                found = measure(place, fault, bad, files, blob, args.latency_ms / 1000)
                print(json.dumps(found), flush=True)
                kept = kept and not found["wrong"] and found["max_ms"] <= found["promised_ms"]
    print(json.dumps({"kept": kept, **machine.facts()}))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
