"""Snapshots and lazy images between their values and the database's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lazyfs.errors import SnapshotInvalid, StoreBroken
from lazyfs.limits import MAX_KEY, MAX_LABEL
from snapshotter.model import Kind, LazyImage, LazyLayer, LazyPlace, Snapshot

COLUMNS = "key, parent, kind, labels, created, updated, number, image, position"


def check_key(key: str, what: str = "key") -> str:
    """Return a snapshot's name. Raise SnapshotInvalid for one that can't be."""
    if not key:
        raise SnapshotInvalid(key, f"a snapshot's {what} can't be empty")
    if len(key.encode("utf-8", "surrogatepass")) > MAX_KEY:
        raise SnapshotInvalid(key[:80], f"a snapshot's {what} has at most {MAX_KEY} bytes")
    return key


def pack_labels(labels: Mapping[str, str]) -> str:
    """Return labels as they are stored; those without a value are none. Raise SnapshotInvalid for one too long."""
    for name, value in labels.items():
        if len(name.encode()) + len(value.encode()) > MAX_LABEL:
            raise SnapshotInvalid(name[:80], f"label {name[:80]!r} and its value have more than {MAX_LABEL} bytes")
    return json.dumps({name: value for name, value in labels.items() if value})


def pack_layers(layers: tuple[LazyLayer, ...]) -> str:
    """Return an image's layers as they are stored: the same layers give the same text."""
    rows = [
        [x.digest, x.size, x.media_type, dict(sorted(x.annotations.items())), x.diff_id, x.chain_id] for x in layers
    ]
    return json.dumps(rows)  # as ASCII: an annotation may hold half of a surrogate pair, which SQLite refuses


def image_of(number: int, reference: str, manifest_digest: str, layers: str) -> LazyImage:
    """Return the image of a row. Raise StoreBroken when it holds none."""
    try:
        return LazyImage(number, reference, manifest_digest, tuple(LazyLayer(*row) for row in json.loads(layers)))
    except (ValueError, TypeError) as error:
        raise StoreBroken(f"the record of image {reference} is damaged: {error}") from None


def snapshot_of(row: tuple[Any, ...], image: Callable[[int], LazyImage]) -> Snapshot:
    """Return the snapshot of a row with COLUMNS; `image` finds a lazy image by its number. Raise StoreBroken."""
    key, parent, kind, labels, created, updated, number, image_number, position = row
    try:
        place = None if image_number is None else LazyPlace(image(image_number), position)
        if place is not None:
            place.image.layers[position]
        return Snapshot(key, parent, Kind(kind), json.loads(labels), created, updated, number, place)
    except (ValueError, TypeError, LookupError) as error:
        raise StoreBroken(f"the record of snapshot {key!r} is damaged: {error}") from None
