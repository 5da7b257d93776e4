"""Unpacking an image's layers with a snapshotter as containerd itself does it, lazily where the snapshotter can.

Source: containerd, docs/remote-snapshotter.md, core/unpack and pkg/snapshotters (the labels).
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass

from lazyfs.containerd import gc_labels
from lazyfs.containerd.client import Client
from lazyfs.containerd.snapshots import Mount, Snapshots
from lazyfs.errors import DiffIdMismatch, LazyfsError, SnapshotExists, SnapshotMissing, SnapshotUnfit
from lazyfs.limits import UNDO_TIMEOUT
from lazyfs.oci import Descriptor, Manifest, chain_ids

log = logging.getLogger(__name__)

_PREFIX = "containerd.io/snapshot/"
_REF = "containerd.io/snapshot.ref"
_TRIES = 3  # of preparing, while others make and remove the same layer


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer to be unpacked: its blob, what it unpacks to, on what, and the labels that tell a lazy snapshotter."""

    descriptor: Descriptor
    diff_id: str
    chain_id: str
    parent: str  # the chain ID below; "" for the base
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Begun:
    """A snapshot that waits for its layer: to be applied, or given up."""

    key: str
    mounts: tuple[Mount, ...]


def plan_layers(image: str, manifest: Manifest, diff_ids: tuple[str, ...]) -> list[LayerPlan]:
    """Return the layers of an image from the base up. `image` is its name in containerd. Pure."""
    chains = chain_ids(diff_ids)
    return [
        LayerPlan(layer, diff_id, chain, parent, _labels(image, manifest, number, chain))
        for number, (layer, diff_id, chain, parent) in enumerate(
            zip(manifest.layers, diff_ids, chains, ["", *chains[:-1]], strict=True)
        )
    ]


def _labels(image: str, manifest: Manifest, number: int, chain_id: str) -> dict[str, str]:
    """Return what CRI's client tells of an extraction: the layer's annotations for snapshotters, then the facts."""
    layer = manifest.layers[number]
    given = {
        key: value
        for key, value in layer.annotations.items()
        if key.startswith(_PREFIX) and gc_labels.fits(key, value)  # one that is too long would fail the pull
    }
    layers_key = _PREFIX + "cri.image-layers"
    above = [layer.digest]
    for other in manifest.layers[number + 1 :]:
        if not gc_labels.fits(layers_key, ",".join([*above, other.digest])):
            break
        above.append(other.digest)
    return {
        **given,
        _REF: chain_id,
        _PREFIX + "cri.image-ref": image,
        _PREFIX + "cri.manifest-digest": manifest.digest,
        _PREFIX + "cri.layer-digest": layer.digest,
        layers_key: ",".join(above),
    }


class Unpacker:
    """The layers of one image, with one snapshotter, under one lease. Blocking; raises LazyfsErrors of containerd."""

    def __init__(self, client: Client, snapshots: Snapshots, lease: str) -> None:
        self._client = client
        self._snapshots = snapshots
        self._lease = lease

    def present(self, layer: LayerPlan) -> bool:
        """Tell whether the layer is unpacked already; if so, our lease keeps it."""
        # The lease first: what is there behind it stays there.
        self._client.leases.hold(self._lease, layer.chain_id, f"snapshots/{self._snapshots.snapshotter}")
        return self._snapshots.stat(layer.chain_id) is not None

    def begin(self, layer: LayerPlan) -> Begun | None:
        """Ask the snapshotter for the layer. None: it has it, and not a byte of it has to be downloaded."""
        for _ in range(_TRIES):
            key = f"extract-{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(3)} {layer.chain_id}"
            try:
                return Begun(key, self._snapshots.prepare(key, layer.parent, layer.labels, lease=self._lease))
            except SnapshotExists:
                if self.present(layer):
                    return None
        raise SnapshotMissing(
            layer.chain_id,
            f"snapshotter {self._snapshots.snapshotter} says that it has layer {layer.descriptor.digest}, and "
            f"containerd does not find it there",
            hint="remove the images that have this layer (`ctr images rm --sync`) and pull again",
        )

    def finish(self, layer: LayerPlan, begun: Begun) -> None:
        """Unpack the layer's blob, which containerd has, and make it a snapshot. Raise DiffIdMismatch."""
        actual = self._client.diff.apply(layer.descriptor, begun.mounts, lease=self._lease)
        if actual != layer.diff_id:
            raise DiffIdMismatch(layer.descriptor.digest, layer.diff_id, actual)
        try:
            self._snapshots.commit(layer.chain_id, begun.key, {}, lease=self._lease)
        except SnapshotExists:  # another pull was faster
            self.give_up(begun)
            if not self.present(layer):
                raise
        self._client.content.label(layer.descriptor.digest, {gc_labels.UNCOMPRESSED: actual})

    def give_up(self, begun: Begun) -> None:
        """Remove what was begun and not finished. Never raises: the lease's end does it otherwise."""
        deadline = time.monotonic() + UNDO_TIMEOUT
        while True:
            try:
                self._snapshots.remove(begun.key, deadline=deadline)
                return
            except SnapshotUnfit as error:  # containerd is still about to give it up, too
                if time.monotonic() > deadline - 1:
                    log.warning("a snapshot that was begun stays for a while: %s", error)
                    return
                time.sleep(0.1)
            except LazyfsError as error:
                log.warning("a snapshot that was begun stays for a while: %s", error)
                return
