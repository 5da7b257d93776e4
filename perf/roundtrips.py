"""How many requests, one after another, until an image's root is mounted?

    python -m perf.roundtrips [--latency-ms 200] [--layers 7]

A registry in this process answers each request after a fixed time, so a chain of dependent requests shows as starts at
least that far apart. Bearer authentication with an anonymous token, as the public registries have it. Exits with 1 when
the chain is longer than challenge, token, manifest, and then everything else at once. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

from perf import lazy_image, machine
from perf.lazy_image import ONLY_DEMAND
from perf.start import scratch
from tests.helpers import real
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.registry_faults import Request

PROMISED = 4  # challenge, token, manifest, then the config and all tails side by side


def small_tar(path: Path, number: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        content = f"layer {number}\n".encode() * 1000
        member = tarfile.TarInfo(f"file-{number}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def longest_chain(requests: list[Request], latency: float) -> int:
    """Return how many of the requests came one after the other: each began when the one before had been answered."""
    length, answered = 0, float("-inf")
    for request in sorted(requests, key=lambda each: each.started):
        if request.started >= answered:
            length, answered = length + 1, request.started + latency * 0.95
    return length


def serve(registry: FakeRegistry, layout: Path) -> str:
    """Put the only image of an OCI layout into the registry and return its reference."""
    index = json.loads((layout / "index.json").read_text())
    descriptor: dict[str, Any] = index["manifests"][0]
    for blob in (layout / "blobs" / "sha256").iterdir():
        registry.add_blob(blob.read_bytes())
    raw = (layout / "blobs" / "sha256" / descriptor["digest"][7:]).read_bytes()
    registry.add_manifest("trips", "lazy", descriptor["mediaType"], raw)
    return f"docker://{registry.host}/trips:lazy"


def main() -> int:
    parser = argparse.ArgumentParser(description="Sequential requests until the root is mounted.")
    parser.add_argument("--latency-ms", type=float, default=200.0)
    parser.add_argument("--layers", type=int, default=7)
    args = parser.parse_args()
    latency = args.latency_ms / 1000
    with scratch() as directory:
        tars = [directory / f"{number}.tar" for number in range(args.layers)]
        for number, tar in enumerate(tars):
            small_tar(tar, number)
        source = real.build_layout(directory / "plain", "plain", tars)
        lazy_image.command(directory, directory / "c", {}, "convert", source, f"oci:{directory / 'lazy'}:lazy")
        with FakeRegistry(auth="bearer", anonymous=True, latency=latency) as registry:
            image = serve(registry, directory / "lazy")
            root, began = directory / "s", time.monotonic()
            with lazy_image.mounted(directory, root, image, ONLY_DEMAND):
                seconds = time.monotonic() - began
                cold = list(registry.requests)
            registry.clear_log()
            began = time.monotonic()
            with lazy_image.mounted(directory, root, image, ONLY_DEMAND):
                seconds_again = time.monotonic() - began
                again = list(registry.requests)
    chain = longest_chain(cold, latency)
    print(
        json.dumps(
            {
                "what": "round trips",
                "layers": args.layers,
                "latency_s": latency,
                "requests": len(cold),
                "in_sequence": chain,
                "mount_s": round(seconds, 3),
                "log": [f"{each.method} {each.path.split('?')[0]} {each.range} {each.status}" for each in cold],
                "again_requests": len(again),
                "again_in_sequence": longest_chain(again, latency),
                "again_mount_s": round(seconds_again, 3),
                **machine.facts(),
            }
        )
    )
    return 0 if chain <= PROMISED else 1


if __name__ == "__main__":
    raise SystemExit(main())
