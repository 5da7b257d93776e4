"""What spans layers and survives restarts, in SQLite: numbers, layers, chunk places, documents, references, mounts.

All of it but the pins can be had again, so a damaged file is begun anew. Every method is thread-safe and blocks on the
local disk, up to 5 s while another process writes; none belongs into an event loop. They raise StoreFull for a full
disk and StoreBroken for a database that fails.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lazyfs import digest as digests
from lazyfs.chunks.catalog_schema import open_database, translated
from lazyfs.errors import DocumentInvalid, StoreBroken, StoreError, StoreFull
from lazyfs.oci import MAX_DOCUMENT

log = logging.getLogger(__name__)

MAX_NUMBER = (1 << 23) - 1  # node ids have 63 bits, 40 of them for the row
DOCUMENTS_BOUND = 256 << 20  # bytes of all documents
_BATCH = 5000  # chunk places in one transaction: others get their turn every few milliseconds
_PREFIX = 16  # bytes of a chunk digest in the index; whoever copies a chunk hashes it in full anyway


class Digests(Protocol):
    """What the index of chunk places needs of a layer table."""

    @property
    def chunk_count(self) -> int: ...
    def chunk_digest(self, chunk: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer that the node knows. Sizes in bytes, `last_use` in seconds since the epoch."""

    digest: str
    blob_size: int
    data_size: int
    last_use: int
    pinned: bool
    verified: bool  # the whole check has passed
    quarantine: str  # why nothing may be read from it; empty: it may


@dataclass(frozen=True, slots=True)
class Resolved:
    """The manifest that a reference led to, and when (seconds since the epoch)."""

    digest: str
    time: int


@dataclass(frozen=True, slots=True)
class MountRecord:
    """A mount, for `status` and for the clean-up after a crash."""

    id: str
    image: str
    manifest_digest: str
    dir: str  # where it shows; "" until attached
    kind: str  # "ro", "rw", "container"
    state_dir: str  # what has to be removed with it; "" for nothing
    pid: int  # who asked for it
    tree_key: str


class Catalog:
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

    # -- numbers

    def number(self, key: str) -> int:
        """Return the number of "layer:<digest>" or "tree:<key>", 1 to MAX_NUMBER; the same for ever.

        A new one is synced to the disk before it is returned: the kernel will remember it. StoreFull: all given out.
        """
        with self._using() as connection:
            found = connection.execute("SELECT number FROM numbers WHERE key = ?", (key,)).fetchone()
            if found is not None:
                return int(found[0])
            connection.execute("PRAGMA synchronous=FULL")
            try:
                with self._transaction():
                    # Another process may have been faster.
                    connection.execute(
                        "INSERT INTO numbers (number, key) SELECT coalesce(max(number), 0) + 1, ? FROM numbers "
                        "WHERE true ON CONFLICT (key) DO NOTHING",
                        (key,),
                    )
                    number = int(connection.execute("SELECT number FROM numbers WHERE key = ?", (key,)).fetchone()[0])
                    if number > MAX_NUMBER:
                        raise StoreFull("the store has given out all its layer numbers", hint="begin a new --root")
            finally:
                connection.execute("PRAGMA synchronous=NORMAL")
            return number

    def key_of(self, number: int) -> str | None:
        """Return the key that has this number."""
        rows = self._rows("SELECT key FROM numbers WHERE number = ?", (number,))
        return str(rows[0][0]) if rows else None

    # -- layers

    def add_layer(self, digest: str, blob_size: int, data_size: int) -> None:
        """Note a layer, or a new use of it. Bytes. Pin, verification and quarantine stay as they are."""
        with self._using() as connection:
            connection.execute(
                "INSERT INTO layers (digest, blob_size, data_size, last_use) VALUES (?, ?, ?, ?) ON CONFLICT (digest) "
                "DO UPDATE SET blob_size = excluded.blob_size, data_size = excluded.data_size, "
                "last_use = excluded.last_use",
                (digest, blob_size, data_size, self._seconds()),
            )

    def layer(self, digest: str) -> LayerRecord | None:
        """Return what is known of a layer."""
        found = self._layers("WHERE digest = ?", (digest,))
        return found[0] if found else None

    def layers(self) -> list[LayerRecord]:
        """Return all layers, the most recently used first."""
        return self._layers("ORDER BY last_use DESC, digest", ())

    def _layers(self, condition: str, values: Iterable[Any]) -> list[LayerRecord]:
        columns = "digest, blob_size, data_size, last_use, pinned, verified, quarantine"
        return [
            LayerRecord(str(d), int(b), int(s), int(u), bool(p), bool(v), str(q))
            for d, b, s, u, p, v, q in self._rows(f"SELECT {columns} FROM layers {condition}", values)
        ]

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Keep a layer whatever the store's bound says, or no longer. A layer not noted yet is noted with it."""
        self._set(digest, "pinned", int(pinned))

    def set_verified(self, digest: str) -> None:
        """Note that a layer's whole check has passed."""
        self._set(digest, "verified", 1)

    def set_quarantine(self, digest: str, reason: str) -> None:
        """Note that a layer was found false; nothing may be read from it. An empty reason lifts that."""
        self._set(digest, "quarantine", reason)

    def _set(self, digest: str, column: str, value: int | str) -> None:
        with self._using() as connection:
            connection.execute(
                f"INSERT INTO layers (digest, blob_size, data_size, last_use, {column}) VALUES (?, 0, 0, ?, ?) "
                f"ON CONFLICT (digest) DO UPDATE SET {column} = excluded.{column}",
                (digest, self._seconds(), value),
            )

    def pinned(self) -> frozenset[str]:
        """Return the digests of the pinned layers."""
        return frozenset(str(row[0]) for row in self._rows("SELECT digest FROM layers WHERE pinned != 0"))

    def remove_layer(self, digest: str) -> None:
        """Forget where a layer's chunks are, and the layer; a pin and a quarantine are kept. So is its number."""
        with self._transaction() as connection:
            found = connection.execute("SELECT number FROM numbers WHERE key = ?", (f"layer:{digest}",)).fetchone()
            if found is not None:
                self._forget_places(connection, int(found[0]))
            connection.execute("DELETE FROM layers WHERE digest = ? AND pinned = 0 AND quarantine = ''", (digest,))

    # -- chunk places

    def index_layer(self, number: int, table: Digests) -> None:
        """Make a complete layer's chunks findable by digest. About a second for 100,000, in short transactions."""
        if self._rows("SELECT 1 FROM indexed WHERE number = ?", (number,)):
            return
        for first in range(0, table.chunk_count, _BATCH):
            last = min(first + _BATCH, table.chunk_count)
            rows = [(table.chunk_digest(chunk)[:_PREFIX], number, chunk) for chunk in range(first, last)]
            with self._transaction() as connection:
                connection.executemany("INSERT OR IGNORE INTO chunk_places VALUES (?, ?, ?)", rows)
        with self._using() as connection:
            connection.execute("INSERT OR IGNORE INTO indexed VALUES (?)", (number,))

    def places(self, digest: bytes, limit: int = 8) -> list[tuple[int, int]]:
        """Return (layer number, chunk) of `limit` chunks at most that should have this digest (32 bytes).

        Only 16 bytes of it are compared: the copy is verified in full, and may have been evicted.
        """
        rows = self._rows(
            "SELECT number, chunk FROM chunk_places WHERE digest = ? ORDER BY number DESC, chunk LIMIT ?",
            (digest[:_PREFIX], limit),
        )
        return [(int(number), int(chunk)) for number, chunk in rows]

    def forget_places(self, number: int) -> None:
        """Make a layer's chunks unfindable."""
        with self._transaction() as connection:
            self._forget_places(connection, number)

    @staticmethod
    def _forget_places(connection: sqlite3.Connection, number: int) -> None:
        connection.execute("DELETE FROM indexed WHERE number = ?", (number,))
        # No index over the number: it would double the file for what happens once a layer's life.
        connection.execute("DELETE FROM chunk_places WHERE number = ?", (number,))

    # -- documents

    def put_document(self, raw: bytes) -> str:
        """Keep a manifest, index or config. Return its digest. Raise DocumentInvalid above MAX_DOCUMENT bytes.

        Beyond the bound of all documents the least recently used ones go.
        """
        if len(raw) > MAX_DOCUMENT:
            raise DocumentInvalid(f"a document of {len(raw)} bytes is more than the {MAX_DOCUMENT} allowed")
        digest = digests.of(raw)
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO documents (digest, body, size, last_use) VALUES (?, ?, ?, ?)",
                (digest, raw, len(raw), self._seconds()),
            )
            connection.execute(
                "DELETE FROM documents WHERE digest IN (SELECT digest FROM (SELECT digest, sum(size) OVER "
                "(ORDER BY last_use DESC, digest = ? DESC, digest) AS running FROM documents) WHERE running > ?)",
                (digest, self._documents_bound),
            )
        return digest

    def document(self, digest: str) -> bytes | None:
        """Return a document whose digest was checked just now; a damaged one is removed and None."""
        rows = self._rows("SELECT body, last_use FROM documents WHERE digest = ?", (digest,))
        if not rows:
            return None
        body, last_use = rows[0]
        intact = isinstance(body, bytes) and digests.of(body) == digest
        try:
            with self._using() as connection:
                if not intact:
                    connection.execute("DELETE FROM documents WHERE digest = ?", (digest,))
                elif last_use != self._seconds():
                    connection.execute("UPDATE documents SET last_use = ? WHERE digest = ?", (self._seconds(), digest))
        except StoreError as error:  # a full disk must not take away what can be read
            log.warning("the use of document %s is not noted: %s", digest, error)
        return body if intact else None

    # -- references

    def remember_reference(self, reference: str, platform: str, digest: str) -> None:
        """Note the manifest digest that a reference led to for a platform, as of now."""
        with self._using() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO resolved VALUES (?, ?, ?, ?)", (reference, platform, digest, self._seconds())
            )

    def last_digest(self, reference: str, platform: str) -> Resolved | None:
        """Return what the reference led to last: for when the registry is down."""
        rows = self._rows(
            "SELECT digest, time FROM resolved WHERE reference = ? AND platform = ?", (reference, platform)
        )
        return Resolved(str(rows[0][0]), int(rows[0][1])) if rows else None

    # -- mounts

    def set_mount(self, mount: MountRecord) -> None:
        """Note a mount, or what has changed of it."""
        with self._using() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO mounts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (mount.id, mount.image, mount.manifest_digest, os.fsencode(mount.dir), mount.kind,
                 os.fsencode(mount.state_dir), mount.pid, mount.tree_key),
            )  # fmt: skip

    def remove_mount(self, mount_id: str) -> None:
        """Forget a mount."""
        with self._using() as connection:
            connection.execute("DELETE FROM mounts WHERE id = ?", (mount_id,))

    def mounts(self) -> list[MountRecord]:
        """Return all mounts noted, by id."""
        return [
            MountRecord(str(i), str(im), str(m), os.fsdecode(d), str(k), os.fsdecode(s), int(p), str(t))
            for i, im, m, d, k, s, p, t in self._rows(
                "SELECT id, image, manifest_digest, dir, kind, state_dir, pid, tree_key FROM mounts ORDER BY id"
            )
        ]
