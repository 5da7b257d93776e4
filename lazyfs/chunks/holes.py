"""Give disk blocks and cached pages of a file back to the system: what eviction and "read once" need of the kernel."""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque

from lazyfs.limits import MAX_COLD_EXTENTS
from lazyfs.units import PAGE, KiB, MiB, align

_KEEP_SIZE = 1  # <linux/falloc.h>
_PUNCH_HOLE = 2
_LOT = 8 * MiB  # bytes written between two calls for write-back
_READ_BYTES = 4 * MiB  # that small reads have had when it is worth a thread to drop them
_NEAR = 64 * KiB  # bytes between two reads that become one extent


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.fallocate64.restype = ctypes.c_int
    return libc


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Free the disk blocks under [offset, offset + size), which reads as zeros afterwards. The file keeps its size.

    Bytes. Blocking (metadata of the file system). Raise OSError: EOPNOTSUPP where the file system can't (fallocate(2)).
    """
    if size <= 0:
        return
    if _libc().fallocate64(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def drop_pages(fd: int, offset: int, size: int) -> None:
    """Forget the cached pages that [offset, offset + size) touches; dirty ones are only sent on their way to the disk.

    Bytes. Doesn't wait for the disk. Never raises: it is advice (posix_fadvise(2), POSIX_FADV_DONTNEED).
    """
    start = offset & ~(PAGE - 1)  # the kernel skips a page that is named in part
    try:
        os.posix_fadvise(fd, start, align(offset + size) - start, os.POSIX_FADV_DONTNEED)
    except OSError:
        return  # a file system without a page cache has nothing to drop


class ReadPages:
    """What small reads have had, until it is worth a thread to drop it. Belongs to one thread but for `take`."""

    __slots__ = ("_extents", "_size")

    def __init__(self) -> None:
        self._extents: list[tuple[int, int]] = []
        self._size = 0

    def add(self, offset: int, size: int) -> None:
        """Note a read. Neighbours become one extent."""
        if self._extents and offset - _NEAR <= sum(self._extents[-1]) <= offset:
            first = self._extents[-1][0]
            self._extents[-1] = first, offset + size - first
        else:
            self._extents.append((offset, size))
        self._size += size

    @property
    def is_due(self) -> bool:
        """Whether enough was read, or in enough places."""
        return self._size >= _READ_BYTES or len(self._extents) >= MAX_COLD_EXTENTS

    def take(self) -> list[tuple[int, int]]:
        """Return what was noted, as (offset, bytes), and begin anew."""
        taken, self._extents, self._size = self._extents, [], 0
        return taken


class WrittenPages:
    """Keeps what was just written from filling the page cache. Not thread-safe: the caller holds the file's lock.

    A dirty page can't be dropped, so every range is named twice: the first time starts its write-back, the second, at
    least 8 MiB of writes later, drops it.
    """

    __slots__ = ("_fresh", "_fresh_bytes", "_started")

    def __init__(self) -> None:
        self._fresh: deque[tuple[int, int]] = deque(maxlen=MAX_COLD_EXTENTS)
        self._started: deque[tuple[int, int]] = deque()
        self._fresh_bytes = 0

    def written(self, fd: int, offset: int, size: int) -> None:
        """Note that [offset, offset + size) was written. Bytes. Now and then starts write-back; doesn't wait for it."""
        self._fresh.append((offset, size))
        self._fresh_bytes += size
        if self._fresh_bytes < _LOT:
            return
        for start, length in self._started:
            drop_pages(fd, start, length)
        for start, length in self._fresh:
            drop_pages(fd, start, length)
        self._started, self._fresh, self._fresh_bytes = self._fresh, deque(maxlen=MAX_COLD_EXTENTS), 0
