"""Layers on their way to being served: what an image wants of one, and what `preparing` makes of it. No I/O."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from lazyfs.chunks.layer import ServedLayer
from lazyfs.mount.toc_parts import TocParts
from lazyfs.oci import GITHUB_ZSTD_CHECKSUM, TOC_DIGEST, ZSTD_CHECKSUM, Descriptor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A layer that can be served. `reason`: why it is not lazy, empty when it is. `key` names its table's content.

    `beside` tells it apart from others of the same blob, which are false and still shown.
    """

    layer: ServedLayer
    reason: str
    key: str
    beside: int = 0


class TooLarge(Exception):
    """A layer that is not lazy and larger than its caller lets it be fetched whole. `reason`: why it is not lazy."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Wanted:
    """A layer as an image names it, and what getting it may take."""

    descriptor: Descriptor
    diff_id: str
    origin: str  # the repository as the reference names it, for messages, the record and `lazy_from`
    tail: Future[bytes] | None = None  # the blob's last bytes, on their way since the manifest was there
    parts: TocParts | None = None  # what `Preparer.fetch_parts` brought
    whole: str = ""  # why it has to be fetched in full, where that is known; then its TOC isn't looked at
    largest: int | None = None  # bytes of a blob that may be fetched whole; None: any
    deadline: float | None = None  # of the requests for it
    beside: int = 0  # as `Prepared` has it
    regained: bool = False  # a daemon before us showed it: a verdict on it concerns its bytes alone


def toc_claims(descriptor: Descriptor) -> str:
    """Return what an image promises of a layer's TOC: its digest, or that of its compressed bytes."""
    told = descriptor.annotations
    return told.get(TOC_DIGEST) or told.get(GITHUB_ZSTD_CHECKSUM) or told.get(ZSTD_CHECKSUM) or ""
