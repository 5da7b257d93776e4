"""What does containerd wait for when a lazy image is pulled: Prepare of its layers, and of a container on them?

    python -m perf.prepare [--latency-ms 50] [--layers 1 10] [--runs 5]

A registry in this process answers each request after a fixed time. A client in a process of its own, so that neither
waits for the other's interpreter, speaks to lazyfs-snapshotter's socket as containerd does while it pulls: Prepare for
each layer from the base up, until ALREADY_EXISTS, then Prepare of a container's snapshot. Fresh store for each run; the
daemon runs already and has shown another image, as on a node (the first image of a daemon's life is told beside it).
Exits with 1 when Prepare takes 50 ms or more beyond its round trips, or ten layers cost more round trips in sequence
than one. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from lazyfs import oci
from perf import lazy_image, machine
from perf.roundtrips import longest_chain, serve, small_tar
from perf.start import lazyfs_env, scratch
from tests.helpers import real
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.snapshotter import Client, Refused

PROMISED = 0.050  # seconds beyond the round trips
_PREFIX = "containerd.io/snapshot/cri."


@dataclass(frozen=True, slots=True)
class Asked:
    """A layer that is asked for."""

    chain_id: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Pulled:
    """One pull. Seconds: the first Prepare, all of them, the container's; and requests one after another."""

    first: float
    layers: float
    container: float
    in_sequence: int


@dataclass(frozen=True, slots=True)
class Node:
    """A running snapshotter: its socket, and the process that asks it."""

    socket: Path
    asker: ProcessPoolExecutor


@contextmanager
def node(directory: Path, name: str) -> Iterator[Node]:
    """Start a snapshotter with a store of its own, and wait for its daemon."""
    root, run = directory / name, directory / f"{name}.run"
    words = [sys.executable, "-m", "snapshotter.server", "--root", str(root), "--run", str(run)]
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=lazyfs_env(directory) | {"LAZYFS_BACKGROUND": "0"}
        )
    text = directory / f"{name}.log"
    try:
        until(lambda: b"connected to lazyfsd" in text.read_bytes(), "the snapshotter has its daemon")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as asker:
            yield Node(run / "snapshotter" / "snapshotter.sock", asker)
    finally:
        process.terminate()
        process.wait(30)
        real.end_below(root)
        real.unmount_below(directory)


def pull(
    at: Node,
    registry: FakeRegistry,
    image: str,
    manifest: oci.Manifest,
    diff_ids: tuple[str, ...],
    name: str = "image",
) -> Pulled:
    """Pull as containerd does, and make a container's snapshot."""
    asked = []
    for number, (layer, chain_id) in enumerate(zip(manifest.layers, oci.chain_ids(diff_ids), strict=True)):
        rest = ",".join(each.digest for each in manifest.layers[number:])
        labels = {
            "containerd.io/snapshot.ref": chain_id,
            f"{_PREFIX}image-ref": image.removeprefix("docker://"),
            f"{_PREFIX}manifest-digest": manifest.digest,
            f"{_PREFIX}layer-digest": layer.digest,
            f"{_PREFIX}image-layers": rest[:4000],
        }
        asked.append(Asked(chain_id, labels))
    registry.clear_log()
    times, container = at.asker.submit(ask, at.socket, name, asked).result(120)
    waited_for = [request for request in registry.requests if not _is_search(request.path)]
    return Pulled(times[0], sum(times), container, longest_chain(waited_for, registry.latency))


def _is_search(path: str) -> bool:
    """Tell whether a request is one for traces, which goes on behind the answers: nobody waits for it."""
    return "/referrers/" in path or "/manifests/sha256-" in path


def ask(socket: Path, name: str, layers: list[Asked]) -> tuple[list[float], float]:
    """Ask for an image's layers and a container's snapshot, and return the seconds of each call. In a process apart."""
    times, parent = [], ""
    with closing(Client(socket)) as client:
        client.list()  # it is connected
        for number, layer in enumerate(layers):
            began = time.monotonic()
            try:
                client.prepare(f"{name}/extract-{number} {layer.chain_id}", parent, layer.labels)
            except Refused as refused:
                if refused.code is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
            else:
                raise SystemExit(f"layer {number} is not lazy: see `lazyfs why`")
            times.append(time.monotonic() - began)
            parent = layer.chain_id
        began = time.monotonic()
        client.prepare(f"{name}/container", parent, {})
        return times, time.monotonic() - began


def documents(layout: Path) -> tuple[oci.Manifest, oci.ImageConfig]:
    """Return the documents of the only image in a layout."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs" / "sha256"
    manifest = oci.parse_manifest((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    return manifest, oci.parse_config((blobs / manifest.config.digest[7:]).read_bytes())


def warm_up(at: Node, registry: FakeRegistry, here: Path) -> Pulled:
    """Pull another image of one layer, the first one of this daemon."""
    manifest, config = documents(here / "other")
    for blob in (here / "other" / "blobs" / "sha256").iterdir():
        registry.add_blob(blob.read_bytes())
    registry.add_manifest("other", "lazy", manifest.media_type, manifest.raw)
    return pull(at, registry, f"docker://{registry.host}/other:lazy", manifest, config.diff_ids, "other")


def make(here: Path, name: str, numbers: range) -> None:
    """Convert an image of small layers into the layout `here/name`."""
    tars = [here / f"{name}-{number}.tar" for number in numbers]
    for number, tar in zip(numbers, tars, strict=True):
        small_tar(tar, number)
    source = real.build_layout(here / f"{name}-plain", "plain", tars)
    lazy_image.command(here, here / "c", {}, "convert", source, f"oci:{here / name}:lazy")


def measure(directory: Path, layers: int, latency: float, runs: int) -> dict[str, object]:
    """Return the medians for an image of so many layers."""
    here = directory / f"image-{layers}"
    here.mkdir()
    make(here, "lazy", range(layers))
    make(here, "other", range(100, 101))
    found, cold = [], []
    with FakeRegistry(auth="bearer", anonymous=True, latency=latency) as registry:
        image = serve(registry, here / "lazy")
        manifest, config = documents(here / "lazy")
        for run in range(runs):
            with node(here, f"n{run}") as at:
                cold.append(warm_up(at, registry, here))
                found.append(pull(at, registry, image, manifest, config.diff_ids))
    chain = max(one.in_sequence for one in found)
    first = statistics.median(one.first for one in found)
    return {
        "layers": layers,
        "in_sequence": chain,
        "first_prepare_ms": round(first * 1000, 1),
        "beyond_round_trips_ms": round((first - chain * latency) * 1000, 1),
        "other_prepares_ms": round(
            statistics.median((one.layers - one.first) / max(1, layers - 1) for one in found) * 1000, 1
        ),
        "container_ms": round(statistics.median(one.container for one in found) * 1000, 1),
        "daemons_first_prepare_ms": round(statistics.median(one.first for one in cold) * 1000, 1),
        "runs": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What containerd waits for when a lazy image is pulled.")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 10])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    latency = args.latency_ms / 1000
    with scratch() as directory:
        found = [measure(directory, layers, latency, args.runs) for layers in args.layers]
    for one in found:
        print(json.dumps({"what": "prepare", "latency_s": latency, **one, **machine.facts()}))
    slow = [one for one in found if float(str(one["beyond_round_trips_ms"])) >= PROMISED * 1000]
    longer = [one for one in found if int(str(one["in_sequence"])) > int(str(found[0]["in_sequence"]))]
    return 1 if slow or longer else 0


if __name__ == "__main__":
    raise SystemExit(main())
