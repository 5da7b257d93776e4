"""What spans layers and survives restarts, in SQLite: numbers, layers, chunk places, documents, references, mounts.

All of it but the pins can be had again, so a damaged file is begun anew. Every method is thread-safe and blocks on the
local disk, up to 5 s while another process writes; none belongs into an event loop. They raise StoreFull for a full
disk and StoreBroken for a database that fails.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from lazyfs.chunks.catalog_images import ImageCatalog, NamedImage, Pin, Resolved
from lazyfs.errors import StoreFull

__all__ = ["Catalog", "LayerRecord", "MountRecord", "NamedImage", "Pin", "Resolved"]

MAX_NUMBER = (1 << 23) - 1  # node ids have 63 bits, 40 of them for the row
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


class Catalog(ImageCatalog):
    """The whole catalog."""

    # -- numbers

    def number(self, key: str) -> int:
        """Return the number of "layer:<digest>:<table>" or "tree:<key>", 1 to MAX_NUMBER; the same for ever.

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

    def reserve(self, number: int) -> None:
        """Give out no number up to this one any more. Doesn't touch those that are given out."""
        rows = self._rows("SELECT coalesce(max(number), 0) FROM numbers", ())
        if rows and int(rows[0][0]) < number <= MAX_NUMBER:
            with self._transaction() as connection:
                words = "INSERT OR IGNORE INTO numbers (number, key) VALUES (?, ?)"
                connection.execute(words, (number, f"reserved:{number}"))

    def key_of(self, number: int) -> str | None:
        """Return the key that has this number."""
        rows = self._rows("SELECT key FROM numbers WHERE number = ?", (number,))
        return str(rows[0][0]) if rows else None

    # -- layers

    def add_layer(self, digest: str, blob_size: int, data_size: int) -> None:
        """Note a layer, or a new use of it. Bytes. Verification and quarantine stay as they are."""
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
        columns = "digest, blob_size, data_size, last_use, digest IN (SELECT digest FROM pinned), verified, quarantine"
        return [
            LayerRecord(str(d), int(b), int(s), int(u), bool(p), bool(v), str(q))
            for d, b, s, u, p, v, q in self._rows(f"SELECT {columns} FROM layers {condition}", values)
        ]

    def set_verified(self, digest: str) -> None:
        """Note that a layer's whole check has passed; what was said against it before was a false claim's doing."""
        self._set(digest, "verified", 1)
        self._set(digest, "quarantine", "")

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

    def remove_layer(self, digest: str) -> None:
        """Forget where a layer's chunks are, and the layer; a pin and a quarantine are kept. So is its number."""
        with self._transaction() as connection:
            keys = (f"layer:{digest}", f"layer:{digest}:", f"layer:{digest};")  # ";" comes behind ":"
            found = connection.execute("SELECT number FROM numbers WHERE key = ? OR (key >= ? AND key < ?)", keys)
            for (number,) in found.fetchall():
                self._forget_places(connection, int(number))
            connection.execute(
                "DELETE FROM layers WHERE digest = ? AND quarantine = '' AND digest NOT IN (SELECT digest FROM pinned)",
                (digest,),
            )

    # -- chunk places

    def index_layer(self, number: int, table: Digests) -> None:
        """Make a complete layer's chunks findable by digest. About a second for 100,000, in short transactions."""
        if self._rows("SELECT 1 FROM indexed WHERE number = ?", (number,)):
            return
        for first in range(0, table.chunk_count, _BATCH):
            last = min(first + _BATCH, table.chunk_count)
            rows = [(table.chunk_digest(chunk)[:_PREFIX], number, chunk) for chunk in range(first, last)]
            with self._transaction() as connection:
                connection.executemany(
                    "INSERT OR IGNORE INTO chunk_places (digest, number, chunk) VALUES (?, ?, ?)", rows
                )
        with self._using() as connection:
            connection.execute("INSERT OR IGNORE INTO indexed (number) VALUES (?)", (number,))

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

    # -- mounts

    def set_mount(self, mount: MountRecord) -> None:
        """Note a mount, or what has changed of it."""
        with self._using() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO mounts (id, image, manifest_digest, dir, kind, state_dir, pid, tree_key) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
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
