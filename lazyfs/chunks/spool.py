"""Compressed bytes on their way to the whole check: fetched for a reader before the check came to them.

Without it every byte that a reader wanted early would cross the network twice. A sparse file, punched as the check
passes.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from lazyfs.chunks.holes import punch_hole
from lazyfs.chunks.private_files import OwnedFd
from lazyfs.units import MiB

_LOT = MiB  # bytes given back to the disk at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an extent lies in the file, which has the offsets of the blob, and what it must read back as."""

    blob_offset: int
    size: int
    checksum: int


class Spool:
    """Extents of one blob in an unnamed file of the store's disk.

    Thread-safe; blocks on the local disk; never raises for what the disk does: an extent that it would not keep, or
    gives back changed, is fetched again. The checksum is there for the disk: a damaged extent must not make the whole
    check condemn a layer.
    """

    def __init__(self, directory: Path) -> None:
        self._lock = threading.Lock()
        self._extents: dict[int, _Place] = {}
        # Each call holds a reference while it uses the descriptor: a close beside it can't hand the number to another
        # file under its hands.
        self._file: OwnedFd | None = None
        self._punches = True
        self._taken = (0, 0)  # blob offsets of what was taken in a row and still lies on the disk
        self._next = 0  # extents before this one need not come any more: the check has taken them
        self.works = True  # False: something could not be kept, and there is no use in bringing more here
        try:
            with tempfile.TemporaryFile(dir=directory) as handle:
                self._file = OwnedFd(os.dup(handle.fileno()))
        except OSError as error:
            self.works = False
            log.warning("no spool in %s, early bytes will be fetched twice: %s", directory, error)

    def put(self, extent: int, blob_offset: int, data: bytes) -> bool:
        """Keep an extent. False: the disk would not."""
        self.put_run([(extent, blob_offset, data)])
        return self.has(extent)

    def put_run(self, extents: list[tuple[int, int, bytes]]) -> None:
        """Keep (extent, blob offset, data) triples, in blob order; neighbours go out in one write."""
        file = self._file
        at = 0
        while file is not None and self.works and at < len(extents):
            end, behind = at, extents[at][1]
            while end < len(extents) and extents[end][1] == behind:
                behind += len(extents[end][2])
                end += 1
            run = extents[at:end]
            try:
                self.works = os.pwrite(file.number, b"".join(data for _, _, data in run), run[0][1]) == (
                    behind - run[0][1]
                )
            except OSError:
                self.works = False
            if self.works:
                places = {extent: _Place(offset, len(data), zlib.crc32(data)) for extent, offset, data in run}
                with self._lock:
                    if self._file is file:
                        self._extents.update(places)
            at = end

    def has(self, extent: int) -> bool:
        return extent in self._extents

    def had(self, extent: int) -> bool:
        """Tell whether an extent is here or was taken: the check is busy with it, or behind it."""
        with self._lock:
            return extent < self._next or extent in self._extents

    def take(self, extent: int) -> bytes | None:
        """Return an extent and give its place on disk back. None: it is not here, or not as it was."""
        file = self._file
        with self._lock:
            place = self._extents.pop(extent, None)
            if place is not None:
                self._next = extent + 1
        if place is None or file is None:
            return None
        try:
            data = os.pread(file.number, place.size, place.blob_offset)
        except OSError:
            self.works = False
            return None
        self._give_back(file, place)
        if len(data) == place.size and zlib.crc32(data) == place.checksum:
            return data
        self.works = False
        return None

    def _give_back(self, file: OwnedFd, place: _Place) -> None:
        """Free what was taken, neighbours together: a call a tiny extent would cost more than all else."""
        with self._lock:
            start, end = self._taken
            if place.blob_offset != end:
                start = place.blob_offset
            end = place.blob_offset + place.size
            is_lot = end - start >= _LOT
            self._taken = (end, end) if is_lot else (start, end)
        if is_lot and self._punches:
            try:
                punch_hole(file.number, start, end - start)
            except OSError:
                self._punches = False  # the file system can't; the space comes back at the end

    def clear(self) -> None:
        """Forget all extents."""
        with self._lock:
            self._extents.clear()
            self._taken = (0, 0)
            self._next = 0

    def close(self) -> None:
        """Drop everything. Further calls find nothing."""
        with self._lock:
            self._extents.clear()
            self._file = None
