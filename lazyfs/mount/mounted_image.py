"""What is known of an image that is in the forest: for mounts, status and the daemon that takes over. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.chunks.layer import ServedLayer
from lazyfs.mount.forest import Planted
from lazyfs.mount.starts import Start
from lazyfs.oci import ImageConfig, Manifest
from lazyfs.reference import Reference
from lazyfs.units import format_size


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a mount tells of one of its layers."""

    layer: ServedLayer
    lazy: bool
    reason: str  # why it is not lazy


@dataclass(frozen=True, slots=True)
class MountedImage:
    """An image in the forest."""

    reference: Reference
    platform: str  # that was asked for
    manifest: Manifest
    config: ImageConfig
    planted: Planted
    layers: tuple[LayerFacts, ...]
    remarks: tuple[str, ...]  # on what the registry did not say
    start: Start | None  # as far as traces are concerned; None: nothing is to be started of it

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the image: remarks, and why layers are not lazy."""
        plain = [
            f"layer {fact.layer.digest[:19]}… ({format_size(fact.layer.descriptor.size)}) can't be lazy, "
            f"{fact.reason}: fetched in full and checked"
            for fact in self.layers
            if fact.reason
        ]
        return (*self.remarks, *plain)

    def distinct_layers(self) -> list[ServedLayer]:
        """Return the layers, each once."""
        return list({fact.layer.digest: fact.layer for fact in self.layers}.values())

    @property
    def size(self) -> int:
        """Bytes of all layer blobs, each counted once."""
        return sum({layer.digest: layer.size for layer in self.manifest.layers}.values())
