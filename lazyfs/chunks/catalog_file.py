"""The catalog's one connection: a lock around it, transactions, and its errors translated."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazyfs.chunks.catalog_schema import open_database, translated
from lazyfs.errors import StoreBroken

DOCUMENTS_BOUND = 256 << 20  # bytes of all documents


class CatalogFile:
    """One connection behind a lock. Close it, else SQLite leaves its WAL for the next start."""

    def __init__(
        self, path: Path, *, documents_bound: int = DOCUMENTS_BOUND, now: Callable[[], float] = time.time
    ) -> None:
        """Open `<root>/catalog.db`, made where missing, in a directory that only we can write to.

        A damaged file is moved aside with a warning. Raise StoreFull, or StoreBroken (also for a newer version).
        """
        self.path = path
        self._documents_bound = documents_bound
        self._now = now
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = open_database(path)

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
                raise StoreBroken(f"the catalog {self.path} is closed")
            yield self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
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

    def _seconds(self) -> int:
        return int(self._now())
