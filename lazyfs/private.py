"""Directories and small files of ours: nobody else's, and never reached through a symbolic link.

They lie where only we may write, yet a link that got there all the same (a restored backup, a container that was given
the directory as a volume) must not make root write or remove anything elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from lazyfs.errors import StoreBroken

_LOOSE = stat.S_IWGRP | stat.S_IWOTH


def make_directory(path: Path) -> None:
    """Make a directory, mode 0700, and what is missing above it; one that is there has to be ours alone. Blocking.

    Raise what `check_directory` does.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    check_directory(path)


def check_directory(path: Path) -> None:
    """Refuse anything but a directory that only we may write to. Blocking. Raise StoreBroken, OSError."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise StoreBroken(
            f"{path} is a symbolic link, and lazyfs follows none there", hint="put the directory itself there"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))
    if found.st_uid != os.geteuid() or found.st_mode & _LOOSE:
        raise StoreBroken(f"{path} belongs to another user or can be written by others", hint=f"chmod 700 {path}")


def write_text(path: Path, text: str) -> None:
    """Write a file, mode 0600 where it is made, in a directory of ours. Blocking. Raise OSError, also for a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as handle:
        handle.write(text)


def opened(path: str, flags: int) -> int:
    """Open a file for `open(…, opener=…)`: mode 0600 where it is made, no link followed. Raise OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def find_loose(path: Path) -> Path | None:
    """Return a directory above `path` in which another user could put something else in its place. Blocking.

    `path` is absolute and free of links. None: nobody but root and we can.
    """
    for above in path.parents:
        try:
            found = os.lstat(above)
        except OSError:
            return above
        loose = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX and stat.S_ISDIR(found.st_mode)
        if found.st_uid not in (0, os.geteuid()) or loose:
            return above
    return None


def find_foreign_link(path: Path) -> Path | None:
    """Return a symbolic link on the way to `path` that another user has made, None when there is none. Blocking.

    The kernel follows none of those in directories like /tmp (fs.protected_symlinks); realpath(3) does.
    """
    for part in (*reversed(path.parents), path):
        try:
            found = os.lstat(part)
        except OSError:
            return None  # not there yet, or not for us: whoever opens it says so
        if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
            return part
    return None
