"""One image into containerd, through its own API: documents, layers from the base up, and the name last.

All of it is under a lease until the name keeps it. What an interrupted pull got stays under its lease, which expires
after a day, or ends with the next pull of the same image, which goes on from there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lazyfs import oci
from lazyfs.cli.blob_download import ContentFiller, Downloads, filling
from lazyfs.cli.output import Progress
from lazyfs.containerd import gc_labels
from lazyfs.containerd.client import Client
from lazyfs.containerd.images import Image
from lazyfs.containerd.snapshots import Snapshots
from lazyfs.containerd.unpack import LayerPlan, Unpacker, plan_layers
from lazyfs.errors import LazyfsError
from lazyfs.oci import Descriptor
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import ResolvedImage, fetch_config, resolve_image

log = logging.getLogger(__name__)

_LEASE_IMAGE = "dev.lazyfs.pull.image"
_LEASE_OWNER = "dev.lazyfs.pull.process"
ShowProgress = Callable[[str, int], AbstractContextManager[Progress]]


class How(Enum):
    """How a layer came to be there."""

    LAZY = "lazy"  # the snapshotter shows it without its blob
    PRESENT = "present"  # it was unpacked before
    DOWNLOADED = "downloaded"  # its blob was fetched, and unpacked
    UNPACKED = "unpacked"  # its blob was there, and unpacked now


@dataclass(frozen=True, slots=True)
class PulledLayer:
    """What was done for one layer. `fetched` is bytes from the network, `seconds` what the pull waited for it."""

    digest: str
    chain_id: str
    size: int
    how: How
    fetched: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "how": self.how.value, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, slots=True)
class PulledImage:
    """What was done for an image. `name` is what containerd calls it, `target` what that name stands for."""

    name: str
    target: str
    manifest_digest: str
    layers: tuple[PulledLayer, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.name,
            "target": self.target,
            "manifest_digest": self.manifest_digest,
            "layers": [layer.to_json() for layer in self.layers],
            "size": sum(layer.size for layer in self.layers),
            "fetched": sum(layer.fetched for layer in self.layers),
            "seconds": round(self.seconds, 3),
        }


def containerd_name(reference: Reference) -> str:
    """Return what containerd calls an image of a registry: docker.io/library/debian:12."""
    return str(reference).removeprefix("docker://")


class ImagePull:
    """One pull. `run` blocks, and raises LazyfsErrors; interrupted or failed it leaves no snapshot half made."""

    def __init__(
        self,
        client: Client,
        snapshots: Snapshots,
        repository: Repository,
        reference: Reference,
        *,
        platform: str,
        jobs: int,
        progress: ShowProgress,
    ) -> None:
        self._client = client
        self._snapshots = snapshots
        self._repository = repository
        self._reference = reference
        self._platform = platform
        self._jobs = jobs
        self._progress = progress
        self._name = containerd_name(reference)

    def run(self) -> PulledImage:
        """Pull."""
        began = time.monotonic()
        self._snapshots.check()
        resolved = resolve_image(self._repository, self._reference, self._platform)
        config = fetch_config(self._repository, resolved.manifest, platform=self._platform)
        labels = {_LEASE_IMAGE: self._name, _LEASE_OWNER: _this_process()}
        with filling(self._client, self._repository, self._reference, labels) as filler:
            self._store_documents(filler, resolved, config.raw)
            plan = plan_layers(self._name, resolved.manifest, config.diff_ids)
            layers = self._unpack(plan, filler)
            if plan:
                kept = gc_labels.of_config(self._snapshots.snapshotter, plan[-1].chain_id)
                self._client.content.label(config.digest, kept)
            target = _target(resolved)
            self._client.images.put(Image(self._name, target), lease=filler.lease)
        self._end_leases_of_the_dead()
        return PulledImage(self._name, target.digest, resolved.manifest.digest, tuple(layers), time.monotonic() - began)

    def _store_documents(self, filler: ContentFiller, resolved: ResolvedImage, config: bytes) -> None:
        manifest = resolved.manifest
        filler.document(manifest.config.digest, config, {})
        filler.document(manifest.digest, manifest.raw, gc_labels.of_manifest(manifest))
        for index in (*reversed(resolved.inner), *((resolved.index,) if resolved.index is not None else ())):
            filler.document(index.digest, index.raw, gc_labels.of_index(index))

    def _unpack(self, plan: list[LayerPlan], filler: ContentFiller) -> list[PulledLayer]:
        unpacker = Unpacker(self._client, self._snapshots, filler.lease)

        def fetch(blob: Descriptor, stop: threading.Event) -> int:
            with self._progress(f"layer {blob.digest[7:19]}", blob.size) as bar:
                return filler.blob(blob, stop, bar.advance)

        downloads = Downloads(fetch, self._jobs)
        try:
            return [self._unpack_one(unpacker, downloads, filler, plan[number:]) for number in range(len(plan))]
        finally:
            downloads.stop()

    def _unpack_one(
        self, unpacker: Unpacker, downloads: Downloads, filler: ContentFiller, from_here: list[LayerPlan]
    ) -> PulledLayer:
        layer = from_here[0]
        began = time.monotonic()
        how, fetched = How.PRESENT, 0
        if not unpacker.present(layer):
            begun = unpacker.begin(layer)
            if begun is None:
                how = How.LAZY
            else:
                try:
                    # A layer above one that isn't lazy is not lazy either: all of them will be needed.
                    downloads.start([one.descriptor for one in from_here if one is layer or not unpacker.present(one)])
                    fetched = downloads.wait(layer.descriptor.digest)
                    unpacker.finish(layer, begun)
                except BaseException:
                    unpacker.give_up(begun)
                    raise
                how = How.DOWNLOADED if fetched else How.UNPACKED
        blob = layer.descriptor
        if how in (How.LAZY, How.PRESENT):
            filler.keep(blob.digest)
        return PulledLayer(blob.digest, layer.chain_id, blob.size, how, fetched, time.monotonic() - began)

    def _end_leases_of_the_dead(self) -> None:
        """End the leases of pulls of this image that were killed: all that they held is held by its name now."""
        ours = _this_process()
        here = ours.rsplit("/", 2)[0]
        try:
            for lease in self._client.leases.all():
                owner = lease.labels.get(_LEASE_OWNER, "")
                if lease.labels.get(_LEASE_IMAGE) != self._name or not owner.startswith(here + "/"):
                    continue  # of another image, or a process that can't be looked at from here
                if owner == ours or owner != _process(here, owner.rsplit("/", 2)[1]):
                    self._client.leases.delete(lease.id, collect=True)
        except LazyfsError as error:
            log.warning("leases of earlier pulls stay until they expire: %s", error)


def _target(resolved: ResolvedImage) -> Descriptor:
    document: oci.Index | oci.Manifest = resolved.index or resolved.manifest
    return Descriptor(document.media_type, document.digest, len(document.raw))


def _this_process() -> str:
    """Return BOOT/PID NAMESPACE/PID/START: what no other process ever is."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "unknown/0/0/0"
    return _process(f"{boot}/{namespace}", str(os.getpid()))


def _process(here: str, pid: str) -> str:
    """Return a process of this boot and PID namespace in the form of `_this_process`; one that has ended: no START."""
    if not pid.isdecimal():
        return ""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            start = file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start = ""
    return f"{here}/{pid}/{start}"
