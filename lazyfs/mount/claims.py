"""What the next daemon must know of something that is shown: whose layers, from where, by which mount."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lazyfs import oci
from lazyfs.mount.forest import Planted
from lazyfs.mount.mounted_image import LayerFacts
from lazyfs.mount.showing import Shown
from lazyfs.oci import Descriptor


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that is shown. `access` is what `Access.to_json` gives: it holds secrets, and goes to no disk."""

    reference: str
    manifest_digest: str
    plain_http: bool | None
    access: dict[str, Any] | None
    layers: tuple[tuple[Descriptor, str], ...]  # with their diff IDs, base first
    shown: Shown

    def to_json(self) -> dict[str, Any]:
        """Return the value for `from_json`."""
        return {
            "reference": self.reference,
            "manifest_digest": self.manifest_digest,
            "plain_http": self.plain_http,
            "access": self.access,
            "layers": [{"descriptor": descriptor.to_json(), "diff_id": diff_id} for descriptor, diff_id in self.layers],
            "shown": [self.shown.path, self.shown.driver, self.shown.reason],
        }


def from_json(value: dict[str, Any]) -> Claim:
    """Return what `to_json` was called on, by a daemon of this release or of one before."""
    layers = tuple(
        (oci.parse_descriptor(layer["descriptor"], "a layer that was shown"), str(layer["diff_id"]))
        for layer in value["layers"]
    )
    return Claim(
        value["reference"],
        value["manifest_digest"],
        value.get("plain_http"),
        value.get("access"),
        layers,
        Shown(*value["shown"][:3]),  # a release behind this one may tell more
    )


def numbers_of(planted: Planted, facts: Sequence[LayerFacts]) -> list[int]:
    """Return the numbers that the kernel knows a tree and its layers by."""
    return [planted.number, *(fact.layer.number for fact in facts)]


def layers_of(facts: Sequence[LayerFacts]) -> tuple[tuple[Descriptor, str], ...]:
    """Return the layers of a claim."""
    return tuple((fact.layer.descriptor, fact.layer.diff_id) for fact in facts)
