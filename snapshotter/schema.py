"""The snapshots' database file: opened, its version checked, SQLite's errors translated. Never begun anew by itself.

containerd's own records name our snapshots. A file that silently started empty would have it answer with images that
aren't there, so a damaged one is reported, and left as it is.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from lazyfs.database import NO_ROOM, check_file, code_of, translate
from lazyfs.errors import StoreBroken, StoreError
from lazyfs.limits import BUSY_TIMEOUT
from lazyfs.versions import is_readable, is_too_new

SCHEMA_VERSION = 1
_APPLICATION = 0x6C7A6673  # "lzfs", SQLite's application_id: an SQLite file of another program is not ours
_WHAT_TO_DO = (
    "containerd's records refer to it: restore it from a backup, or remove all images and containers of this "
    "snapshotter from containerd, stop both, and move the file away"
)

_SCHEMA = """
CREATE TABLE images (
    number INTEGER PRIMARY KEY AUTOINCREMENT, reference TEXT NOT NULL, manifest_digest TEXT NOT NULL,
    layers TEXT NOT NULL, used INTEGER NOT NULL);
CREATE INDEX images_by_digest ON images (manifest_digest);
CREATE TABLE snapshots (
    number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, parent TEXT NOT NULL, kind INTEGER NOT NULL,
    labels TEXT NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL, size INTEGER NOT NULL,
    inodes INTEGER NOT NULL, image INTEGER REFERENCES images (number), position INTEGER);
CREATE INDEX snapshots_by_parent ON snapshots (parent);
CREATE INDEX snapshots_by_image ON snapshots (image);
CREATE TABLE reasons (
    number INTEGER PRIMARY KEY AUTOINCREMENT, image TEXT NOT NULL, layer TEXT NOT NULL, key TEXT NOT NULL,
    reason TEXT NOT NULL, lazy INTEGER NOT NULL, time INTEGER NOT NULL);
CREATE INDEX reasons_by_image ON reasons (image);
"""


def _what(path: Path) -> str:
    return f"the snapshots' database {path}"


def _translate(error: sqlite3.Error, path: Path) -> StoreError:
    return translate(error, _what(path), damaged=_WHAT_TO_DO)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn sqlite3's errors into StoreFull and StoreBroken."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(error, path) from None


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(os.fspath(path))}?mode=ro",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Raise StoreBroken for a file of a newer version or of another program."""
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if application != _APPLICATION:
        raise StoreBroken(f"{path} is a database of another program", hint="use another --root")
    if is_too_new(version, SCHEMA_VERSION):
        raise StoreBroken(
            f"the snapshots' database {path} was written by a newer lazyfs (version {version}, this one knows "
            f"{SCHEMA_VERSION})",
            hint="use that version; the file was not touched",
        )
    if not is_readable(version, SCHEMA_VERSION):
        raise StoreBroken(
            f"the snapshots' database {path} has version {version}, which makes no sense", hint=_WHAT_TO_DO
        )


def _connect(path: Path, *, alone: bool = False) -> sqlite3.Connection:
    """Open the file; `alone`: nobody else may have it open then, and no file is needed beside it."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        if alone:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # what containerd was answered outlives a power cut
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={_APPLICATION}")
                connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise
        _check_version(connection, path)
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreBroken(f"the snapshots' database {path} is damaged: {found}", hint=_WHAT_TO_DO)
    except BaseException:
        connection.close()
        raise
    return connection


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file in WAL mode, mode 0600, made where missing. Blocking, up to BUSY_TIMEOUT.

    Raise StoreFull, or StoreBroken: locked, newer, damaged, no file of ours.
    """
    if check_file(path, _what(path), make=True) > 0:
        # A newer version may have changed anything: nothing of the file may be written before its version is known.
        try:
            with closing(_read_only(path)) as look:
                _check_version(look, path)
        except sqlite3.Error as error:
            if code_of(error) not in NO_ROOM:
                raise _translate(error, path) from None
    try:
        return _connect(path)
    except sqlite3.Error as error:
        with translated(path):
            if code_of(error) in NO_ROOM:
                # A full disk has no room for SQLite's -shm. Removing snapshots frees some, and needs us.
                return _connect(path, alone=True)
            raise


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open an existing file to look at it, beside the snapshotter that writes it. Blocking.

    Raise StoreBroken: it isn't there, or is none of ours, newer, damaged, locked.
    """
    check_file(path, _what(path), make=False)
    connection: sqlite3.Connection | None = None
    try:
        with translated(path):
            connection = _read_only(path)
            _check_version(connection, path)
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection
