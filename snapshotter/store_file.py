"""The store's one connection: a lock around it, transactions, and its errors translated."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyfs.database import OneConnection
from lazyfs.errors import StoreBroken
from snapshotter import rows
from snapshotter.model import LazyImage
from snapshotter.schema import translated


class StoreFile(OneConnection):
    """The connection to `<root>/snapshots.db`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, now: Callable[[], int] = time.time_ns) -> None:
        """Take over an open connection. `now` gives nanoseconds since the epoch."""
        super().__init__(path, f"the snapshots' database {path}", connection, translated)
        self._now = now

    @contextmanager
    def _passing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that outlives kills, and perhaps no power cut: it costs no fsync."""
        with self._using() as connection:
            connection.execute("PRAGMA synchronous=NORMAL")
            try:
                with self._transaction():
                    yield connection
            finally:
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
