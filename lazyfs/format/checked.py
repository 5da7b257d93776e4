"""Which files were read through and found whole, so that this process reads none twice that nobody has touched since.

Such a file is known by its inode, size and times. Nobody but the owner of the store, who could make it anew with a
checksum that fits, can change it and leave its ctime as it was. What a disk does to it later without a word, it does to
a file that stays mapped or mounted for weeks as well: that is not looked at again either.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from lazyfs.limits import MAX_CHECKED

_TICK = 0.1  # seconds; a file system's clock may stand still so long, and a file may change in the meantime


class Checked:
    """The memory of it. Thread-safe (each step is one operation of a dictionary), never blocks."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._known: dict[tuple[int, int, int], tuple[int, int, int]] = {}

    def knows(self, found: os.stat_result, part: int = 0) -> bool:
        """Tell whether a file, by fstat(2), is one that was whole and is unchanged: all of it, or a part by number."""
        return self._known.get((*_inode(found), part)) == _state(found)

    def note(self, found: os.stat_result, part: int = 0) -> None:
        """Remember that a file, or a part of it, is whole. `found` is of the time before it was read."""
        if self._now() - max(found.st_mtime, found.st_ctime) < _TICK:
            return  # it might change at once, and its times not
        if len(self._known) >= MAX_CHECKED:
            self._known.clear()
        self._known[*_inode(found), part] = _state(found)


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


CHECKED = Checked()
