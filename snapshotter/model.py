"""What a snapshot is, as values. Times are nanoseconds since the epoch, sizes bytes."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

REF_LABEL = "containerd.io/snapshot.ref"  # the chain ID that an extraction is to produce
UID_LABEL = "containerd.io/snapshot/uidmapping"  # "CONTAINER:HOST:SIZE" of a pod's user namespace
GID_LABEL = "containerd.io/snapshot/gidmapping"


class Kind(enum.IntEnum):
    """The kinds of snapshot, with the numbers that they have on the wire."""

    VIEW = 1  # to be mounted read-only
    ACTIVE = 2  # to be written to
    COMMITTED = 3  # never changes; others stand on it


@dataclass(frozen=True, slots=True)
class LazyLayer:
    """A layer of an image, as the daemon resolved it."""

    digest: str  # of the blob
    size: int  # of the blob
    media_type: str
    annotations: Mapping[str, str]
    diff_id: str
    chain_id: str


@dataclass(frozen=True, slots=True)
class LazyImage:
    """An image of which layers are lazy snapshots. `number` is its row; 0 for one that isn't recorded yet."""

    number: int
    reference: str
    manifest_digest: str
    layers: tuple[LazyLayer, ...]  # base first


@dataclass(frozen=True, slots=True)
class LazyPlace:
    """A lazy snapshot's place: it is the chain `image.layers[: index + 1]`."""

    image: LazyImage
    index: int

    @property
    def layer(self) -> LazyLayer:
        """The snapshot's own layer, the top of its chain."""
        return self.image.layers[self.index]

    @property
    def layers(self) -> tuple[LazyLayer, ...]:
        """The whole chain, base first."""
        return self.image.layers[: self.index + 1]


@dataclass(frozen=True, slots=True)
class LazyOffer:
    """The layer of an extraction is ready: it is `image.layers[index]`, to be committed with these labels.

    `staged`: the client commits it itself, when Prepare answers with a read-only mount.
    """

    image: LazyImage
    index: int
    labels: Mapping[str, str]
    staged: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A lazy chain that the daemon shows: its directories, nearest first, and what the root in them is like."""

    chain: str
    lowerdirs: tuple[str, ...]
    mode: int  # permission bits
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. `number` names its directory; a committed one with a place is lazy and has none."""

    key: str
    parent: str  # "" for none
    kind: Kind
    labels: Mapping[str, str]
    created: int
    updated: int
    number: int
    lazy: LazyPlace | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot itself takes on this disk, its parents not counted."""

    size: int = 0
    inodes: int = 0


@dataclass(frozen=True, slots=True)
class Mount:
    """What containerd is to mount, in its own words: mount(8)'s options, "rw" and "rbind" among them."""

    type: str
    source: str
    options: tuple[str, ...]
    target: str = ""  # below the place where the snapshot is mounted


@dataclass(frozen=True, slots=True)
class Reason:
    """What became of a layer at an extraction, and why. `when` in nanoseconds since the epoch."""

    image: str
    layer: str  # blob digest
    key: str
    reason: str
    lazy: bool
    when: int
