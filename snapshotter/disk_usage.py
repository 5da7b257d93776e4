"""What a directory takes on its disk: blocks and inodes, hard links counted once, symbolic links never followed.

A container may change the tree while it is walked, so every directory is opened by its name in its parent.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from lazyfs.errors import StoreBroken
from lazyfs.limits import MAX_OPEN_DIRECTORIES
from snapshotter.model import Usage

_BLOCK = 512  # bytes in a unit of st_blocks
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.EACCES})
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def disk_usage(directory: str) -> Usage:
    """Return what `directory` and everything in it takes. Blocking; a file that vanishes meanwhile is not counted.

    Raise StoreBroken when the directory itself can't be read.
    """
    try:
        top = os.open(directory, _OPEN)
    except OSError as error:
        raise StoreBroken(f"the snapshot's directory {directory} can't be read: {error.strerror}") from None
    found = os.fstat(top)
    size, inodes = found.st_blocks * _BLOCK, 1
    linked: set[tuple[int, int]] = set()
    walking: list[tuple[int, Iterator[os.DirEntry[str]]]] = []
    try:
        _enter(walking, top)
        while walking:
            fd, entries = walking[-1]
            try:
                entry = next(entries, None)
                if entry is None:
                    walking.pop()
                    os.close(fd)
                    continue
                status = entry.stat(follow_symlinks=False)
                if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    if (status.st_dev, status.st_ino) in linked:
                        continue
                    linked.add((status.st_dev, status.st_ino))
                size, inodes = size + status.st_blocks * _BLOCK, inodes + 1
                if entry.is_dir(follow_symlinks=False) and len(walking) < MAX_OPEN_DIRECTORIES:
                    _enter(walking, os.open(entry.name, _OPEN, dir_fd=fd))
            except OSError as error:
                if error.errno not in _GONE:
                    raise
    except OSError as error:
        raise StoreBroken(f"the snapshot's directory {directory} can't be read: {error.strerror}") from None
    finally:
        for fd, _ in walking:
            os.close(fd)
    return Usage(size, inodes)


def _enter(walking: list[tuple[int, Iterator[os.DirEntry[str]]]], fd: int) -> None:
    try:
        entries = os.scandir(fd)
    except BaseException:
        os.close(fd)
        raise
    walking.append((fd, entries))
