"""What a conversion did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Action(StrEnum):
    """What became of a layer."""

    CONVERTED = "converted"
    REUSED = "reused"  # an earlier conversion of the same source is at the destination
    KEPT = "kept"  # it was in the wanted form already


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer. Sizes in bytes, of the blobs; `entries` is -1 where the layer was not read."""

    source_digest: str
    source_size: int
    digest: str
    size: int
    action: Action
    entries: int
    seconds: float
    diff_id_kept: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "source": {"digest": self.source_digest, "size": self.source_size},
            "result": {"digest": self.digest, "size": self.size},
            "action": self.action.value,
            "entries": self.entries if self.entries >= 0 else None,
            "diff_id_kept": self.diff_id_kept,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """One image. `manifest_digest` names the result; `pushed` counts the bytes of blobs that had to be uploaded."""

    source: str
    destination: str
    platform: str
    source_manifest: str
    manifest_digest: str
    layers: tuple[LayerReport, ...]
    pushed: int
    seconds: float

    @property
    def source_size(self) -> int:
        """Bytes of all layers before."""
        return sum(layer.source_size for layer in self.layers)

    @property
    def size(self) -> int:
        """Bytes of all layers after."""
        return sum(layer.size for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "destination": self.destination,
            "platform": self.platform,
            "source_manifest": self.source_manifest,
            "manifest": self.manifest_digest,
            "layers": [layer.to_json() for layer in self.layers],
            "source_size": self.source_size,
            "size": self.size,
            "pushed": self.pushed,
            "seconds": round(self.seconds, 3),
        }
