"""The store's one connection: a lock around it, transactions, and its errors translated."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazyfs.errors import StoreBroken
from snapshotter import rows
from snapshotter.model import LazyImage
from snapshotter.schema import translated


class StoreFile:
    """One connection behind a lock; nobody may wait for a network while holding it. Close it when done."""

    def __init__(self, path: Path, connection: sqlite3.Connection, now: Callable[[], int] = time.time_ns) -> None:
        """Take over an open connection. `now` gives nanoseconds since the epoch."""
        self.path = path
        self._now = now
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = connection

    def close(self) -> None:
        """Close the database. Every later call raises StoreBroken."""
        with self._lock:
            if self._connection is not None:
                with translated(self.path):
                    self._connection.close()
                self._connection = None

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock, translated(self.path):
            if self._connection is None:
                raise StoreBroken(f"the snapshots' database {self.path} is closed")
            yield self._connection

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing. `durable`: on the disk at the end, with all before it; else it outlives kills alone."""
        with self._using() as connection:
            if not durable:
                connection.execute("PRAGMA synchronous=NORMAL")
            try:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            finally:
                if not durable:
                    connection.execute("PRAGMA synchronous=FULL")

    @contextmanager
    def _looking(self) -> Iterator[sqlite3.Connection]:
        """Several reads that see one state."""
        with self._using() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _rows(self, statement: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._using() as connection:
            return connection.execute(statement, tuple(values)).fetchall()


def image_finder(connection: sqlite3.Connection) -> Callable[[int], LazyImage]:
    """Return a function that finds lazy images by number, each read once."""
    found: dict[int, LazyImage] = {}

    def find(number: int) -> LazyImage:
        if number not in found:
            row = connection.execute(
                "SELECT number, reference, manifest_digest, layers FROM images WHERE number = ?", (number,)
            ).fetchone()
            if row is None:
                raise StoreBroken(f"a snapshot's image {number} is not recorded")
            found[number] = rows.image_of(*row)
        return found[number]

    return find
