"""Snapshots, lazy images and reasons in SQLite. What a method returned from is on the disk.

The rules are those of containerd's own metadata store, so that it meets no surprise. Every method is one transaction,
thread-safe, and blocks on the local disk only, up to 5 s while another process writes. They raise StoreFull and
StoreBroken besides what they say.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lazyfs.errors import SnapshotExists, SnapshotInvalid, SnapshotMissing, SnapshotUnfit, StoreError, StoreFull
from lazyfs.limits import MAX_REASONS
from snapshotter import rows
from snapshotter.model import Kind, LazyImage, Snapshot, Usage
from snapshotter.reserve import Reserve
from snapshotter.schema import open_database, open_for_reading
from snapshotter.store_file import image_finder
from snapshotter.store_images import ImageStore, put_image
from snapshotter.store_reasons import ReasonStore

__all__ = ["MAX_REASONS", "Store", "open_readonly"]


class Store(ImageStore):
    """The whole store, `<root>/snapshots.db`."""

    def __init__(self, path: Path, now: Callable[[], int] = time.time_ns) -> None:
        """Open the file, made where missing. Raise StoreFull, or StoreBroken: locked, newer, damaged, not ours."""
        super().__init__(path, open_database(path), now)
        self._reserve = Reserve(path.with_name(path.name + ".reserve"))

    # -- looking

    def get(self, key: str) -> Snapshot:
        """Return a snapshot. Raise SnapshotMissing."""
        return self.get_with_usage(key)[0]

    def find(self, key: str) -> Snapshot | None:
        """Return a snapshot, None when there is none of that name."""
        with self._looking() as connection:
            found = connection.execute(f"SELECT {rows.COLUMNS} FROM snapshots WHERE key = ?", (key,)).fetchone()
            return None if found is None else rows.snapshot_of(found, image_finder(connection))

    def get_with_usage(self, key: str) -> tuple[Snapshot, Usage]:
        """Return a snapshot and the usage that was recorded when it was committed. Raise SnapshotMissing."""
        with self._looking() as connection:
            found = connection.execute(
                f"SELECT {rows.COLUMNS}, size, inodes FROM snapshots WHERE key = ?", (key,)
            ).fetchone()
            if found is None:
                raise SnapshotMissing(key, f"there is no snapshot {key!r}")
            return rows.snapshot_of(found[:-2], image_finder(connection)), Usage(*found[-2:])

    def get_chain(self, key: str) -> list[Snapshot]:
        """Return a snapshot and its ancestors, nearest first. Raise SnapshotMissing."""
        chain: list[Snapshot] = []
        with self._looking() as connection:
            image = image_finder(connection)
            seen: set[str] = set()
            while key and key not in seen:
                found = connection.execute(f"SELECT {rows.COLUMNS} FROM snapshots WHERE key = ?", (key,)).fetchone()
                if found is None:
                    what = (
                        f"the parent {key!r} of {chain[-1].key!r} is gone" if chain else f"there is no snapshot {key!r}"
                    )
                    raise SnapshotMissing(key, what)
                seen.add(key)
                chain.append(rows.snapshot_of(found, image))
                key = chain[-1].parent
        return chain

    def walk(self) -> list[Snapshot]:
        """Return all snapshots as they are at one moment, oldest first."""
        with self._looking() as connection:
            image = image_finder(connection)
            found = connection.execute(f"SELECT {rows.COLUMNS} FROM snapshots ORDER BY number").fetchall()
            return [rows.snapshot_of(row, image) for row in found]

    def numbers(self) -> set[int]:
        """Return the numbers whose directories are in use.

        List the directories first and ask afterwards: one that is made meanwhile has its row before this returns.
        """
        found = self._rows("SELECT number FROM snapshots WHERE image IS NULL OR kind != ?", (Kind.COMMITTED,))
        return {int(number) for (number,) in found}

    def unless_used(self, number: int, act: Callable[[], None]) -> bool:
        """Act while no snapshot has this number's directory, and none can get it. False, and nothing done: one has.

        `act` may wait for nothing. Numbers of records that failed are given again.
        """
        with self._lock:
            used = self._rows(
                "SELECT 1 FROM snapshots WHERE number = ? AND (image IS NULL OR kind != ?)", (number, Kind.COMMITTED)
            )
            if not used:
                act()
            return not used

    # -- changing

    def create(
        self,
        key: str,
        parent: str,
        kind: Kind,
        labels: Mapping[str, str],
        *,
        place: Callable[[int], None] = lambda number: None,
        withdraw: Callable[[int], None] = lambda number: None,
        staged: tuple[LazyImage, int] | None = None,
    ) -> Snapshot:
        """Record an active snapshot or a view. `place` puts its directory where the number says, before the record is
        final; `withdraw` undoes that when the record fails; neither may wait for anything. `staged`: it stands for
        this lazy layer, and will be committed as it.

        Raise SnapshotExists, SnapshotMissing (the parent), SnapshotInvalid (it is not committed; names; labels).
        """
        if kind == Kind.COMMITTED:
            raise SnapshotInvalid(key, "a snapshot is made active or as a view")
        rows.check_key(key)
        packed = rows.pack_labels(labels)
        now = self._now()
        # The number is free again when the transaction fails: nobody may get it before the directory is withdrawn.
        with self._lock, contextlib.ExitStack() as undo, self._transaction() as connection:
            if parent:
                below = _kind(connection, parent)
                if below is None:
                    raise SnapshotMissing(parent, f"the parent {parent!r} does not exist")
                if below != Kind.COMMITTED:
                    raise SnapshotInvalid(parent, f"the parent {parent!r} is not committed")
            if _kind(connection, key) is not None:
                raise SnapshotExists(key, f"there is a snapshot {key!r} already")
            image = position = None
            if staged is not None:
                image, position = put_image(connection, staged[0], now).number, staged[1]
            number = connection.execute(
                "INSERT INTO snapshots (key, parent, kind, labels, created, updated, size, inodes, image, position) "
                "VALUES (?, ?, ?, ?, ?, ?, 0, 0, ?, ?)",
                (key, parent, kind, packed, now, now, image, position),
            ).lastrowid
            assert number is not None
            place(number)
            undo.push(lambda kind, error, trace: withdraw(number) if kind is not None else None)
            return _get(connection, key)

    def commit(self, name: str, key: str, labels: Mapping[str, str], usage: Usage, parent: str = "") -> Snapshot:
        """Make an active snapshot a committed one under another name, with these labels and no others.

        `parent`: the one it gets, for a snapshot that was made without. Raise SnapshotExists, SnapshotMissing,
        SnapshotUnfit (it is not active, or the parent not committed), SnapshotInvalid (it has another parent).
        """
        rows.check_key(name, "name")
        rows.check_key(key)
        packed = rows.pack_labels(labels)
        now = self._now()
        with self._transaction() as connection:
            if _kind(connection, name) is not None:
                raise SnapshotExists(name, f"there is a snapshot {name!r} already")
            before = _get(connection, key)
            if before.kind != Kind.ACTIVE:
                raise SnapshotUnfit(key, f"snapshot {key!r} is not active, so it can't be committed")
            if parent and before.parent and parent != before.parent:
                raise SnapshotInvalid(key, f"snapshot {key!r} has the parent {before.parent!r}, which can't be changed")
            parent = before.parent or parent
            if parent:
                below = _kind(connection, parent)
                if below is None:
                    raise SnapshotMissing(parent, f"the parent {parent!r} does not exist")
                if below != Kind.COMMITTED:
                    raise SnapshotUnfit(parent, f"the parent {parent!r} is not committed")
            connection.execute(
                "UPDATE snapshots SET key = ?, parent = ?, kind = ?, labels = ?, created = ?, updated = ?, size = ?, "
                "inodes = ? WHERE key = ?",
                (name, parent, Kind.COMMITTED, packed, now, now, usage.size, usage.inodes, key),
            )
            return _get(connection, name)

    def commit_lazy(
        self, name: str, parent: str, labels: Mapping[str, str], image: LazyImage, index: int, usage: Usage
    ) -> Snapshot:
        """Record a lazy snapshot: the chain `image.layers[: index + 1]`; the image too, where it isn't yet.

        Raise SnapshotExists, SnapshotMissing (the parent), SnapshotUnfit (it isn't committed), SnapshotInvalid.
        """
        rows.check_key(name, "name")
        if not 0 <= index < len(image.layers):
            raise SnapshotInvalid(name, f"the image {image.reference} has no layer {index}")
        packed = rows.pack_labels(labels)
        now = self._now()
        with self._transaction() as connection:
            if _kind(connection, name) is not None:
                raise SnapshotExists(name, f"there is a snapshot {name!r} already")
            if parent:
                below = _kind(connection, parent)
                if below is None:
                    raise SnapshotMissing(parent, f"the parent {parent!r} does not exist")
                if below != Kind.COMMITTED:
                    raise SnapshotUnfit(parent, f"the parent {parent!r} is not committed")
            connection.execute(
                "INSERT INTO snapshots (key, parent, kind, labels, created, updated, size, inodes, image, position) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, parent, Kind.COMMITTED, packed, now, now, usage.size, usage.inodes,
                 put_image(connection, image, now).number, index),
            )  # fmt: skip
            return _get(connection, name)

    def remove(self, key: str) -> Snapshot:
        """Forget a snapshot and return what it was; its directory stays. Raise SnapshotMissing, SnapshotUnfit.

        On a full disk the space that was held back for this is used.
        """
        rows.check_key(key)
        with self._lock:
            try:
                removed = self._remove(key)
                self._reserve.hold()
                return removed
            except StoreFull:
                self._reserve.release()
            with contextlib.suppress(StoreError), self._using() as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return self._remove(key)

    def _remove(self, key: str) -> Snapshot:
        with self._transaction() as connection:
            removed = _get(connection, key)
            child = connection.execute("SELECT key FROM snapshots WHERE parent = ? LIMIT 1", (key,)).fetchone()
            if child is not None:
                raise SnapshotUnfit(key, f"can't remove snapshot {key!r}: {child[0]!r} stands on it")
            connection.execute("DELETE FROM snapshots WHERE key = ?", (key,))
            return removed

    def update(self, key: str, labels: Mapping[str, str], fieldpaths: Iterable[str] = ()) -> Snapshot:
        """Change labels: those that `fieldpaths` ("labels", "labels.NAME") name, or all of them without.

        A label that is named and has no value is removed. Raise SnapshotMissing, SnapshotInvalid (another field).
        """
        rows.check_key(key)
        with self._transaction() as connection:
            before = _get(connection, key)
            after = dict(before.labels)
            paths = list(fieldpaths)
            for path in paths or ["labels"]:
                if path == "labels":
                    after = dict(labels)
                elif path.startswith("labels.") and len(path) > len("labels."):
                    name = path.removeprefix("labels.")
                    after[name] = labels.get(name, "")
                else:
                    raise SnapshotInvalid(key, f"the field {path[:80]!r} of a snapshot can't be changed")
            connection.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE key = ?",
                (rows.pack_labels(after), self._now(), key),
            )
            return _get(connection, key)


def open_readonly(path: Path) -> ReasonStore:
    """Open the store to read reasons, beside the snapshotter; close it. Raise StoreBroken, also where there is none."""
    return ReasonStore(path, open_for_reading(path))


def _kind(connection: sqlite3.Connection, key: str) -> Kind | None:
    found = connection.execute("SELECT kind FROM snapshots WHERE key = ?", (key,)).fetchone()
    return None if found is None else Kind(found[0])


def _get(connection: sqlite3.Connection, key: str) -> Snapshot:
    found = connection.execute(f"SELECT {rows.COLUMNS} FROM snapshots WHERE key = ?", (key,)).fetchone()
    if found is None:
        raise SnapshotMissing(key, f"there is no snapshot {key!r}")
    return rows.snapshot_of(found, image_finder(connection))
