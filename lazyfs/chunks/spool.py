"""Compressed bytes on their way to the whole check: fetched for a reader before the check came to them.

Without it every byte that a reader wanted early would cross the network twice. A sparse file, punched as the check passes.
"""  # noqa: E501

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from lazyfs.chunks.holes import punch_hole


class Spool:
    """Extents of one blob in an unnamed file of the store's disk. Thread-safe; never raises for what the disk does: an
    extent that could not be kept is fetched again."""

    def __init__(self, directory: Path) -> None:
        self._lock = threading.Lock()
        self._extents: dict[int, tuple[int, int]] = {}  # number -> (blob_offset, size)
        self._fd = -1
        try:
            with tempfile.TemporaryFile(dir=directory) as handle:
                self._fd = os.dup(handle.fileno())
        except OSError:
            pass

    def put(self, extent: int, blob_offset: int, data: bytes | memoryview) -> bool:
        """Keep an extent. False: the disk would not."""
        if self._fd < 0:
            return False
        try:
            done = os.pwrite(self._fd, data, blob_offset) == len(data)
        except OSError:
            done = False
        if done:
            with self._lock:
                self._extents[extent] = (blob_offset, len(data))
        return done

    def has(self, extent: int) -> bool:
        return extent in self._extents

    def take(self, extent: int) -> bytes | None:
        """Return an extent and give its place on disk back. None: it is not here, or not whole."""
        with self._lock:
            place = self._extents.pop(extent, None)
        if place is None or self._fd < 0:
            return None
        try:
            data = os.pread(self._fd, place[1], place[0])
            punch_hole(self._fd, *place)
        except OSError:
            return None
        return data if len(data) == place[1] else None

    def clear(self) -> None:
        """Forget all extents."""
        with self._lock:
            self._extents.clear()

    def close(self) -> None:
        """Drop everything. Further calls find nothing."""
        with self._lock:
            self._extents.clear()
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
