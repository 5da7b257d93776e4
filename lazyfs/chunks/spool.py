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
        self.works = True  # False: something could not be kept, and there is no use in bringing more here
        try:
            with tempfile.TemporaryFile(dir=directory) as handle:
                self._file = OwnedFd(os.dup(handle.fileno()))
        except OSError as error:
            self.works = False
            log.warning("no spool in %s, early bytes will be fetched twice: %s", directory, error)

    def put(self, extent: int, blob_offset: int, data: bytes | memoryview) -> bool:
        """Keep an extent. False: the disk would not."""
        file = self._file
        if file is None or not self.works:
            return False
        try:
            done = os.pwrite(file.number, data, blob_offset) == len(data)
        except OSError:
            done = False
        if not done:
            self.works = False
        else:
            place = _Place(blob_offset, len(data), zlib.crc32(data))
            with self._lock:
                if self._file is file:
                    self._extents[extent] = place
        return done

    def has(self, extent: int) -> bool:
        return extent in self._extents

    def take(self, extent: int) -> bytes | None:
        """Return an extent and give its place on disk back. None: it is not here, or not as it was."""
        file = self._file
        with self._lock:
            place = self._extents.pop(extent, None)
        if place is None or file is None:
            return None
        try:
            data = os.pread(file.number, place.size, place.blob_offset)
        except OSError:
            self.works = False
            return None
        if self._punches:
            try:
                punch_hole(file.number, place.blob_offset, place.size)
            except OSError:
                self._punches = False  # the file system can't; the space comes back at the end
        if len(data) == place.size and zlib.crc32(data) == place.checksum:
            return data
        self.works = False
        return None

    def clear(self) -> None:
        """Forget all extents."""
        with self._lock:
            self._extents.clear()

    def close(self) -> None:
        """Drop everything. Further calls find nothing."""
        with self._lock:
            self._extents.clear()
            self._file = None
