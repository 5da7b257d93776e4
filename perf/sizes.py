"""How large converted layers are, beside what gzip -6 and zstd -3 make of the whole tar, over five real images.

    python -m perf.sizes [TAR …]

Without arguments five Debian systems are made by mmdebstrap the first time (a few minutes, network, 1.5 GB of disk).
Prints one JSON object a line: an image and form each, then the machine. Exits with 1 when a layer is larger than
promised: eStargz 8 % over gzip -6, podman's form 28 % and zstd-chunked 10 % over zstd -3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from indexer.compress import Compressors
from indexer.layer import LayerOptions, convert_layer
from indexer.options import LEVELS, OutputForm
from lazyfs.limits import IN_FLIGHT
from perf.debian import system_tar
from perf.machine import facts

IMAGES = {
    "minbase": "",
    "python3": "python3",
    "nginx": "nginx",
    "postgresql": "postgresql",
    "openjdk": "openjdk-17-jre-headless",
}
REFERENCES = {"gzip -6": ("gzip", "-6", "-n", "-c"), "zstd -3": ("zstd", "-3", "-q", "-c")}
PROMISED = {
    OutputForm.ZSTD_CHUNKED: ("zstd -3", 1.10),
    OutputForm.ESTARGZ: ("gzip -6", 1.08),
    OutputForm.PODMAN: ("zstd -3", 1.28),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", type=Path, nargs="*", metavar="TAR")
    args = parser.parse_args()
    kept = True
    tars = {path.stem: path for path in args.tars} or {name: system_tar(name, wish) for name, wish in IMAGES.items()}
    for name, tar in tars.items():
        whole = {what: compressed_size(command, tar) for what, command in REFERENCES.items()}
        for form, (reference, most) in PROMISED.items():
            line = converted(tar, form)
            line |= {"image": name, "tar": tar.stat().st_size, "beside": reference, "reference": whole[reference]}
            line["ratio"] = round(line["size"] / whole[reference], 4)
            kept = kept and line["ratio"] <= most
            print(json.dumps(line), flush=True)
    print(json.dumps({"what": "machine", **facts()}), flush=True)
    return 0 if kept else 1


def converted(tar: Path, form: OutputForm) -> dict[str, Any]:
    """Convert one tar as a layer at the form's default level. Blocks for seconds."""
    began, level = time.monotonic(), LEVELS[form][2]
    with Compressors(level, os.cpu_count() or 1, form) as compressors, Path(os.devnull).open("wb") as nowhere:
        result = convert_layer(blocks(tar), nowhere, compressors, IN_FLIGHT, LayerOptions(form))
    seconds = round(time.monotonic() - began, 2)
    return {"form": form.value, "level": level, "size": result.size, "names": result.entries, "seconds": seconds}


def blocks(tar: Path) -> Iterator[bytes]:
    with tar.open("rb") as source:
        while block := source.read(1 << 20):
            yield block


def compressed_size(command: tuple[str, ...], tar: Path) -> int:
    """Return the bytes that a standard tool makes of the tar."""
    size = 0
    with subprocess.Popen([*command, str(tar)], stdout=subprocess.PIPE) as process:
        out = process.stdout
        assert out is not None
        while block := out.read(1 << 20):
            size += len(block)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    return size


if __name__ == "__main__":
    raise SystemExit(main())
