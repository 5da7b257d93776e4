"""The snapshots' directories, `<root>/s/<number>/{fs,work}`: made under another name, and moved to their place.

A crash leaves directories without a record, never a record without its directory. `strays` finds them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from lazyfs.errors import StoreBroken, StoreError, StoreFull, UsageError

_NEW = "new-"  # being made
_GONE = "gone-"  # on its way out
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_ODD = ":,\\\n"  # what overlayfs's options take for something else


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a snapshot's root directory is, and its permission bits."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0


class Directories:
    """All directories of one snapshotter. Thread-safe; every method blocks on the local disk."""

    def __init__(self, root: Path) -> None:
        """Make `<root>/s` where missing. Raise StoreFull, StoreBroken, and UsageError for a path that can't do."""
        if any(c in _ODD for c in os.fspath(root)):
            raise UsageError(
                f"snapshots can't lie in {os.fspath(root)!r}: overlayfs takes no path with : , or \\ in it"
            )
        self.top = root / "s"
        self._run = f"{_NEW}{os.getpid():x}-{time.time_ns():x}-"  # tells what this process makes from older remains
        self._count = itertools.count()
        try:
            self.top.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self.top)
        except OSError as error:
            raise _translated(error, f"the directory of snapshots {self.top}") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise StoreBroken(f"the directory of snapshots {self.top} is not ours alone", hint=f"chmod 700 {self.top}")

    def fs(self, number: int) -> str:
        """Return where a snapshot's own files lie."""
        return f"{self.top}/{number}/fs"

    def work(self, number: int) -> str:
        """Return overlayfs's scratch directory beside them."""
        return f"{self.top}/{number}/work"

    def owner(self, number: int) -> Owner:
        """Return whose a snapshot's root is. Never call it for what lies on a FUSE mount. Raise StoreBroken."""
        try:
            found = os.lstat(self.fs(number))
        except OSError as error:
            raise _translated(error, f"the snapshot's directory {self.fs(number)}") from None
        return Owner(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)

    def make(self, owner: Owner, *, work: bool) -> str:
        """Make a directory under a name of its own and return that. Raise StoreFull, StoreBroken; then none is left."""
        name = f"{self._run}{next(self._count)}"
        path = self.top / name
        try:
            path.mkdir(mode=0o700)
            (path / "fs").mkdir(mode=0o700)
            os.chown(path / "fs", owner.uid, owner.gid)
            os.chmod(path / "fs", owner.mode)
            if work:
                (path / "work").mkdir(mode=0o711)
        except OSError as error:
            self.discard(name)
            raise _translated(error, f"the snapshot's directory {path}") from None
        return name

    def settle(self, name: str, number: int) -> None:
        """Move a directory that was made to its number. Raise StoreFull, StoreBroken."""
        place = self.top / str(number)
        try:
            if os.path.lexists(place):  # a crash or a full disk took the record of whoever was to have it
                self.set_aside(number)
            os.rename(self.top / name, place)
        except OSError as error:
            raise _translated(error, f"the snapshot's directory {place}") from None

    def withdraw(self, name: str, number: int) -> None:
        """Undo `settle`; what can't be moved is found by `strays` later."""
        with contextlib.suppress(OSError):
            os.rename(self.top / str(number), self.top / name)

    def discard(self, name: str) -> None:
        """Remove a directory that was made and is not needed; what can't be removed is found by `strays` later."""
        shutil.rmtree(self.top / name, ignore_errors=True)

    def set_aside(self, number: int) -> str:
        """Move a number's directory out of the way, and return its new name. Raise OSError."""
        name = f"{_GONE}{number}-{time.time_ns():x}"
        os.rename(self.top / str(number), self.top / name)
        return name

    def check_free(self, name: str) -> None:
        """Raise OSError (EBUSY) when something is mounted in what lies under a name."""
        inside = os.fsencode(self.top.resolve() / name) + b"/"
        with open("/proc/self/mountinfo", "rb") as mounts:
            # A mount that somebody made in a snapshot's directory shows other files there, which nobody gave us.
            for line in mounts:
                if (_unescaped(line.split(b" ", 5)[4]) + b"/").startswith(inside):
                    raise OSError(errno.EBUSY, "something is mounted in it")

    def clear(self, name: str) -> None:
        """Remove what lies under a name that no snapshot has and where nothing is mounted. Raise OSError."""
        path = self.top / name
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()

    def names(self) -> list[str]:
        """Return the names of all that lies here. Raise StoreBroken."""
        try:
            return sorted(os.listdir(self.top))
        except OSError as error:
            raise _translated(error, f"the directory of snapshots {self.top}") from None

    def strays(self, names: list[str], numbers: Set[int]) -> list[str]:
        """Return which of `names` belong to no snapshot and are not being made.

        `numbers` (the store's) must have been asked for after `names`: a directory is recorded after it shows.
        """
        return [
            name
            for name in names
            if not name.startswith(self._run) and not (name.isdecimal() and name.isascii() and int(name) in numbers)
        ]


def _unescaped(path: bytes) -> bytes:
    """Return a path as mountinfo means it: blanks and backslashes stand there as octal digits."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), path)


def _translated(error: OSError, what: str) -> StoreError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFull(f"{what} can't be made: {reason}", hint="free some space")
    return StoreBroken(f"{what} can't be used: {reason}")
