"""What a conversion did, layer by layer, and what of the source stayed behind. Schema: docs/convert-report.md."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SCHEMA = 1  # of the JSON; raised when a reader of the old one would be misled


class Action(StrEnum):
    """What became of a layer."""

    CONVERTED = "converted"
    REUSED = "reused"  # an earlier conversion of the same source was at hand
    KEPT = "kept"  # it was in the wanted form already


class Origin(StrEnum):
    """Where an earlier conversion was found."""

    DESTINATION = "destination"
    WORK = "work directory"
    CACHE = "cache repository"


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
    origin: Origin | None = None  # of reused layers
    notes: tuple[str, ...] = ()  # why the diff ID changed, or what the result can't do

    def to_json(self) -> dict[str, Any]:
        return {
            "source": {"digest": self.source_digest, "size": self.source_size},
            "result": {"digest": self.digest, "size": self.size},
            "action": self.action.value,
            "reused_from": self.origin.value if self.origin else None,
            "entries": self.entries if self.entries >= 0 else None,
            "diff_id_kept": self.diff_id_kept,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class ImageReport:
    """One image of the source, by its platform."""

    platform: str
    source_manifest: str
    manifest_digest: str
    layers: tuple[LayerReport, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "platform": self.platform,
            "source_manifest": self.source_manifest,
            "manifest": self.manifest_digest,
            "source_size": sum(layer.source_size for layer in self.layers),
            "size": sum(layer.size for layer in self.layers),
        }


@dataclass(frozen=True, slots=True)
class KeptReport:
    """A manifest of the source's index that was copied as it is."""

    kind: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "digest": self.digest}


@dataclass(frozen=True, slots=True)
class ReferrerReport:
    """Something that refers to the source: what it is, and its copy's digest or why there is none."""

    subject: str
    digest: str
    kind: str
    size: int
    copy: str  # digest; "" when it wasn't copied
    reason: str  # "" when it was

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "digest": self.digest,
            "type": self.kind,
            "size": self.size,
            "copy": self.copy or None,
            "reason": self.reason or None,
        }


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was converted and pushed.

    `manifest_digest` is what the destination's tag names now; `pushed` and `mounted` count the bytes of blobs that had
    to be uploaded, and that the registry took over from another repository.
    """

    source: str
    destination: str
    form: str
    level: int
    source_manifest: str
    manifest_digest: str
    images: tuple[ImageReport, ...]
    kept: tuple[KeptReport, ...]
    referrers: tuple[ReferrerReport, ...]
    notes: tuple[str, ...]
    pushed: int
    mounted: int
    seconds: float

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """The layers of all images, in order."""
        return tuple(layer for image in self.images for layer in image.layers)

    @property
    def platform(self) -> str:
        """The image's platform, or all of them."""
        return ", ".join(image.platform for image in self.images)

    @property
    def source_size(self) -> int:
        """Bytes of all layers before, each once."""
        return sum({layer.source_digest: layer.source_size for layer in self.layers}.values())

    @property
    def size(self) -> int:
        """Bytes of all layers after, each once."""
        return sum({layer.digest: layer.size for layer in self.layers}.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "status": "converted",
            "source": self.source,
            "destination": self.destination,
            "form": self.form,
            "level": self.level,
            "platform": self.platform,
            "source_manifest": self.source_manifest,
            "manifest": self.manifest_digest,
            "images": [image.to_json() for image in self.images],
            "layers": [
                {"platform": image.platform, **layer.to_json()} for image in self.images for layer in image.layers
            ],
            "kept": [kept.to_json() for kept in self.kept],
            "referrers": [referrer.to_json() for referrer in self.referrers],
            "notes": list(self.notes),
            "source_size": self.source_size,
            "size": self.size,
            "pushed": self.pushed,
            "mounted": self.mounted,
            "seconds": round(self.seconds, 3),
        }
