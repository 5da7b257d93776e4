"""SQLite files of ours: one connection behind a lock, the file checked before SQLite opens it, errors translated.

The daemon's catalog and the snapshotter's records stand on this; what becomes of a damaged file is theirs to say.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from lazyfs.errors import StoreBroken, StoreError, StoreFull
from lazyfs.limits import BUSY_TIMEOUT

DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def code_of(error: sqlite3.Error) -> int:
    """Return the primary result code, 0 for none; extended ones carry it in the low byte."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def translate(error: sqlite3.Error, what: str, *, damaged: str) -> StoreError:
    """Return what an error is for callers. `what` names the file; `damaged`: what to do about a malformed one."""
    code = code_of(error)
    if code == sqlite3.SQLITE_FULL:
        return StoreFull(f"{what} can't grow: the disk is full", hint="free some space")
    if code in _BUSY:
        locked = StoreBroken(f"{what} is locked by another process for more than {BUSY_TIMEOUT:.0f} s")
        locked.temporary = True
        return locked
    if code in DAMAGED:
        return StoreBroken(f"{what} is damaged", hint=damaged)
    return StoreBroken(f"{what} can't be used: {error}")


def check_file(path: Path, what: str, *, make: bool) -> int:
    """Return the file's size; with `make` it is made with its mode (0600) before SQLite would. Blocking.

    Raise StoreFull, and StoreBroken for anything but a regular file of ours under that name, in a directory where
    nobody else could put another one in its place meanwhile.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        around = os.stat(path.parent)
        if around.st_uid != os.geteuid() or around.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreBroken(
                f"{path.parent}, where {what} lies, belongs to another user or can be written by others",
                hint=f"chmod 700 {path.parent}",
            )
        fd = os.open(path, flags | os.O_CREAT if make else flags, 0o600)
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o077:
                os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"{what} can't be made: {error.strerror}", hint="free some space") from None
        raise StoreBroken(f"{what} can't be opened: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        raise StoreBroken(f"{what} is not a file of ours", hint="remove it")
    return found.st_size


class OneConnection:
    """One connection behind a lock; nobody may wait for a network while holding it. Thread-safe.

    Close it when done, else SQLite leaves its WAL for the next start. `translated` turns sqlite3's errors into
    StoreErrors.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        connection: sqlite3.Connection,
        translated: Callable[[Path], AbstractContextManager[None]],
    ) -> None:
        """Take over an open connection to `path`, which messages call `what`."""
        self.path = path
        self._what = what
        self._translated = translated
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = connection

    def close(self) -> None:
        """Close the database. Every later call raises StoreBroken."""
        with self._lock:
            if self._connection is not None:
                with self._translated(self.path):
                    self._connection.close()
                self._connection = None

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated(self.path):
            if self._connection is None:
                raise StoreBroken(f"{self._what} is closed")
            yield self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing."""
        with self._using() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _rows(self, statement: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._using() as connection:
            return connection.execute(statement, tuple(values)).fetchall()
