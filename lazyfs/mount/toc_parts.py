"""What of a blob holds its TOC: fetched and held against its digest before anybody says that a layer is lazy."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NoReturn

from lazyfs.chunks.frames import read_exactly
from lazyfs.errors import DigestMismatch, FormatError
from lazyfs.format.lazy import NotLazy, Toc, TocSource, read_toc
from lazyfs.registry.mirrored import read_again
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB

LARGE_TAIL = 8 * MiB  # bytes; larger ones are fetched when their layer's turn comes
_LOST_NAMES = (b"\xef\xbf\xbd", b"\\ufffd", b"\\uFFFD")  # U+FFFD in JSON

Parts = dict[int, bytes]  # blob_offset → bytes


@dataclass(frozen=True, slots=True)
class TocParts:
    """What holds a layer's TOC, whose digest is right; {}: not fetched. `doubtful`: it may still be malformed."""

    parts: Parts
    doubtful: bool

    @property
    def size(self) -> int:
        """Bytes, compressed."""
        return sum(map(len, self.parts.values()))


def fetch_parts(
    repository: Repository, found: TocSource, deadline: float, decoding: threading.BoundedSemaphore
) -> TocParts | str:
    """Fetch what holds a TOC and hold the TOC against its digest; a text says why the layer can't be lazy.

    `decoding` bounds how many are decoded at a time. Blocking: one request, or two where the TOC is large. One that is
    too large to wait in memory is left alone. Raise RegistryError, DigestMismatch or StoreError.
    """
    if found.size > LARGE_TAIL:
        return TocParts({}, doubtful=True)
    parts: Parts = {}

    def read() -> Toc | NotLazy:
        parts.clear()
        while True:
            try:
                with decoding:
                    return read_toc(found, lambda blob_offset, size: parts.get(blob_offset) or _lack(blob_offset, size))
            except _Lacking as lacking:
                # Not with the others' turn in hand: this host may hang.
                if sum(map(len, parts.values())) + lacking.size > LARGE_TAIL:
                    raise
                data = fetch_range(repository, found.blob_digest, lacking.blob_offset, lacking.size, deadline)
                parts[lacking.blob_offset] = data

    try:
        toc = read_again(repository, found.blob_digest, read, (DigestMismatch, FormatError))
    except FormatError as error:
        return error.message
    except _Lacking:
        return TocParts({}, doubtful=True)
    if isinstance(toc, NotLazy):
        return toc.reason
    # Names that could not be written are the one fault that honest converters' TOCs have.
    return TocParts(parts, any(mark in toc.raw for mark in _LOST_NAMES) or not toc.raw.lstrip().startswith(b"{"))


def read_parts(
    repository: Repository, found: TocSource, parts: Parts, deadline: float | None, early: Parts | None = None
) -> Toc | NotLazy:
    """Read a TOC, and leave in `parts` the ranges that it took. `early` has ranges that came before."""
    ahead = dict(early or {})

    def fetch(blob_offset: int, size: int) -> bytes:
        data = ahead.pop(blob_offset, b"")  # once: it may be what was wrong
        if len(data) != size:
            data = fetch_range(repository, found.blob_digest, blob_offset, size, deadline)
        parts[blob_offset] = data
        return data

    def read() -> Toc | NotLazy:
        parts.clear()
        return read_toc(found, fetch)

    return read_again(repository, found.blob_digest, read, (DigestMismatch, FormatError))


class _Lacking(Exception):
    """A range of a blob that a TOC lies in, and that is not here yet."""

    def __init__(self, blob_offset: int, size: int) -> None:
        self.blob_offset, self.size = blob_offset, size


def _lack(blob_offset: int, size: int) -> NoReturn:
    raise _Lacking(blob_offset, size)


def fetch_range(
    repository: Repository, digest: str, blob_offset: int, size: int, deadline: float | None = None
) -> bytes:
    """Return exactly a range of a blob. Blocking: one request. Raise RegistryError."""
    with repository.fetch(digest, blob_offset, size, deadline=deadline) as stream:
        return read_exactly(stream, size)
