"""How long converting takes and what it costs, against compressing and hashing the same tar with standard tools.

    python -m perf.convert TAR [--runs N] [--dir SCRATCH]

The reference is `zstd -3 -T0` of the tar and then `openssl dgst -sha256` of it. Runs alternate, so that what else
happens on the machine meets both. Prints one JSON object a line: the machine, each run, and a summary with the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lazyfs import digest as digests
from lazyfs import oci
from perf.machine import facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", type=Path, metavar="TAR")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--dir", type=Path, default=None, metavar="SCRATCH", help="where layouts and output go")
    args = parser.parse_args()
    say({"what": "machine", **facts()})
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        return measure(args.tar, Path(scratch), args.runs)


def measure(tar: Path, scratch: Path, runs: int) -> int:
    """Alternate the two, then compare sizes. Blocks for about ten seconds a run."""
    layout = scratch / "source"
    make_layout(tar, layout)
    times: dict[str, list[float]] = {"convert": [], "reference": []}
    peaks: list[int] = []
    size = 0
    for run in range(runs):
        seconds = reference(tar, scratch / "reference.zst")
        times["reference"].append(seconds)
        say({"what": "reference", "run": run, "seconds": round(seconds, 3)})
        destination = scratch / "converted"
        shutil.rmtree(destination, ignore_errors=True)
        seconds, peak, report = convert(layout, destination, scratch)
        times["convert"].append(seconds)
        peaks.append(peak)
        size = report["size"]
        say({"what": "convert", "run": run, "seconds": round(seconds, 3), "peak_rss": peak, "size": size})
    pairs = [ours / theirs for ours, theirs in zip(times["convert"], times["reference"], strict=True)]
    zstd_size, gzip_size = (scratch / "reference.zst").stat().st_size, gzipped_size(tar)
    say(
        {
            "what": "summary",
            "tar": tar.stat().st_size,
            "convert": round(statistics.median(times["convert"]), 3),
            "reference": round(statistics.median(times["reference"]), 3),
            "ratio_of_pairs": round(statistics.median(pairs), 3),
            "ratio_best": round(min(times["convert"]) / min(times["reference"]), 3),
            "peak_rss": max(peaks),
            "size": size,
            "of_zstd_3": round(size / zstd_size, 4),
            "of_gzip_6": round(size / gzip_size, 4),
        }
    )
    return 0


def reference(tar: Path, out: Path) -> float:
    """Return the seconds that the standard tools take."""
    began = time.monotonic()
    subprocess.run(["zstd", "-q", "-f", "-3", "-T0", str(tar), "-o", str(out)], check=True, timeout=3600)
    subprocess.run(["openssl", "dgst", "-sha256", str(tar)], check=True, timeout=3600, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def convert(layout: Path, destination: Path, scratch: Path) -> tuple[float, int, dict[str, Any]]:
    """Return seconds, the process's peak memory in bytes, and the report of one `lazyfs convert`."""
    report = scratch / "report.json"
    command = ["-m", "lazyfs", "convert", "--force", "--json", f"oci:{layout}:base", f"oci:{destination}:lazy"]
    began = time.monotonic()
    with report.open("wb") as out:
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1)]
        child = os.posix_spawn(sys.executable, [sys.executable, *command], os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"lazyfs convert failed with status {status}")
    return seconds, usage.ru_maxrss * 1024, json.loads(report.read_text())


def make_layout(tar: Path, layout: Path) -> None:
    """Make an OCI layout with one image of one plain tar layer, the tar itself."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    digest = subprocess.run(
        ["openssl", "dgst", "-sha256", "-r", str(tar)], check=True, capture_output=True, timeout=600
    )
    diff_id = "sha256:" + digest.stdout.split()[0].decode().removeprefix("*")
    shutil.copyfile(tar, blobs / diff_id[7:])
    layer = oci.Descriptor(oci.OCI_LAYER, diff_id, tar.stat().st_size)

    def put(document: dict[str, Any], media_type: str) -> oci.Descriptor:
        raw = oci.canonical_json(document)
        (blobs / digests.hex_of(digests.of(raw))).write_bytes(raw)
        return oci.Descriptor(media_type, digests.of(raw), len(raw))

    machine = oci.host_platform().split("/")
    rootfs = {"type": "layers", "diff_ids": [diff_id]}
    config = put({"os": machine[0], "architecture": machine[1], "rootfs": rootfs}, oci.OCI_CONFIG)
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [layer.to_json()],
    }
    manifest = put(document, oci.OCI_MANIFEST).to_json()
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "base"}
    (layout / "index.json").write_bytes(oci.canonical_json({"schemaVersion": 2, "manifests": [manifest]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def gzipped_size(tar: Path) -> int:
    """Return the bytes that `gzip -6` makes of the tar."""
    with subprocess.Popen(["gzip", "-6", "-c", str(tar)], stdout=subprocess.PIPE) as process:
        out = process.stdout
        assert out is not None
        size = 0
        while block := out.read(1 << 20):
            size += len(block)
        return size


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
