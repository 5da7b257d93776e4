"""The snapshotter's records as others read them, beside it or without it: what became of images, and who uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs import digest as digests
from snapshotter import rows
from snapshotter.metrics import Held
from snapshotter.model import REF_LABEL, Kind, LazyImage, Reason, Snapshot
from snapshotter.reasons import Outcome, classify
from snapshotter.schema import open_for_reading
from snapshotter.store_file import image_finder
from snapshotter.store_images import ImageStore


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What the records say of one image. `reasons`: the latest of each layer (by blob digest), the latest first."""

    reference: str
    reasons: tuple[Reason, ...]
    image: LazyImage | None  # its layers, where one of them is a lazy snapshot
    ready: frozenset[str]  # blob digests of layers that are lazy snapshots now
    snapshots: tuple[str, ...]  # keys of its committed snapshots
    users: tuple[str, ...]  # keys of the active snapshots and views that stand on them


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What the records say of one layer under all images. `reasons`: the latest first; `ready`: chain IDs."""

    reasons: tuple[Reason, ...]
    ready: frozenset[str]  # of the lazy snapshots whose top it is

    def nearest(self, chain_id: str) -> Reason | None:
        """Return the latest decision on this layer in this place of an image, else of one that is about itself."""
        exact = [one for one in self.reasons if chain_id and _chain_id(one.key) == chain_id]
        own = [one for one in self.reasons if one.lazy or classify(one.reason) is not Outcome.BELOW_NOT_LAZY]
        return next(iter([*exact, *own, *self.reasons]), None)


class Records(ImageStore):
    """The store's file, for looking. Every method blocks on the local disk and raises StoreBroken."""

    def snapshots(self) -> list[Snapshot]:
        """Return all snapshots of one moment, oldest first."""
        with self._looking() as connection:
            image = image_finder(connection)
            found = connection.execute(f"SELECT {rows.COLUMNS} FROM snapshots ORDER BY number").fetchall()
            return [rows.snapshot_of(row, image) for row in found]

    def references(self) -> set[tuple[str, str]]:
        """Return the names of all images that something is known of, each with its manifest's digest or ""."""
        found = self._rows("SELECT image, '' FROM reasons UNION SELECT reference, manifest_digest FROM images")
        return {(str(name), str(digest)) for name, digest in found if name}

    def summary(self) -> dict[str, Any]:
        """Return what `lazyfs status --json` tells as `snapshotter`: `layers` counts what became of the last ones."""
        held = count_held(self, self.snapshots())
        outcomes = Counter(
            classify(one.reason).value if not one.lazy else "small" if one.reason else "lazy" for one in self.reasons()
        )
        return {
            "snapshots": dict(held.snapshots),
            "chains_in_use": held.chains,
            "layers": {outcome: outcomes[outcome] for outcome in Outcome if outcomes[outcome]},
        }

    def image(self, reference: str) -> ImageRecord:
        """Return what is known of an image; empty where that is nothing."""
        snapshots = self.snapshots()
        lazy = [one for one in snapshots if one.lazy is not None and one.lazy.image.reference == reference]
        image = max((one.lazy.image for one in lazy if one.lazy), key=lambda found: found.number, default=None)
        latest: dict[str, Reason] = {}
        for reason in self.reasons(reference):
            if reason.image == reference:
                latest.setdefault(reason.layer or reason.key, reason)
        chain_ids = {_chain_id(reason.key) for reason in latest.values()} - {""}
        if image is not None:
            chain_ids |= {layer.chain_id for layer in image.layers}
        committed = [one.key for one in snapshots if one.kind is Kind.COMMITTED and _produced(one, chain_ids)]
        return ImageRecord(
            reference,
            tuple(latest.values()),
            image,
            frozenset(one.lazy.layer.digest for one in lazy if one.lazy and one.kind is Kind.COMMITTED),
            tuple(committed),
            tuple(_users(snapshots, set(committed))),
        )

    def layers(self) -> dict[str, LayerRecord]:
        """Return what became of each layer, by blob digest, whichever image it was decided for."""
        ready: dict[str, set[str]] = {}
        for one in self.snapshots():
            if one.lazy is not None and one.kind is Kind.COMMITTED:
                ready.setdefault(one.lazy.layer.digest, set()).add(one.lazy.layer.chain_id)
        decided: dict[str, list[Reason]] = {digest: [] for digest in ready}
        for reason in self.reasons():
            if reason.layer:
                decided.setdefault(reason.layer, []).append(reason)
        return {
            digest: LayerRecord(tuple(reasons), frozenset(ready.get(digest, ()))) for digest, reasons in decided.items()
        }


def open_records(path: Path) -> Records:
    """Open the file to look at it; close it. Blocking. Raise StoreBroken, also where it is not."""
    return Records(path, open_for_reading(path))


def count_held(store: ImageStore, snapshots: Iterable[Snapshot]) -> Held:
    """Return the numbers for the metrics. Blocking. Raise StoreBroken."""
    kinds = Counter("lazy" if one.lazy is not None else one.kind.name.lower() for one in snapshots)
    return Held({kind: kinds[kind] for kind in ("active", "view", "committed", "lazy")}, len(store.chains_in_use()))


def _chain_id(key: str) -> str:
    """Return the chain ID in containerd's name for an extraction, "…/extract-… sha256:…", or ""."""
    last = key.rpartition(" ")[2]
    return last if digests.is_digest(last) else ""


def _produced(snapshot: Snapshot, chain_ids: Collection[str]) -> bool:
    """Tell whether a committed snapshot is one of these chains, whatever namespace it was made in."""
    names = (snapshot.labels.get(REF_LABEL, ""), snapshot.key.rpartition("/")[2])
    return any(name in chain_ids for name in names)


def _users(snapshots: Iterable[Snapshot], committed: Collection[str]) -> list[str]:
    return [
        one.key
        for one in snapshots
        if one.kind is not Kind.COMMITTED and one.parent in committed and REF_LABEL not in one.labels
    ]
