"""The catalog's database file: opened, checked for its version, begun anew when damaged. SQLite errors translated."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyfs import private
from lazyfs.database import DAMAGED, NO_ROOM, check_file, code_of, translate
from lazyfs.errors import StoreBroken
from lazyfs.limits import BUSY_TIMEOUT
from lazyfs.versions import is_readable, is_too_new

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_SUFFIXES = ("", "-wal", "-shm")

_SCHEMA = """
CREATE TABLE schema (version INTEGER NOT NULL);
CREATE TABLE numbers (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
CREATE TABLE layers (
    digest TEXT PRIMARY KEY, blob_size INTEGER NOT NULL, data_size INTEGER NOT NULL, last_use INTEGER NOT NULL,
    verified INTEGER NOT NULL DEFAULT 0, quarantine TEXT NOT NULL DEFAULT '');
CREATE TABLE chunk_places (
    digest BLOB NOT NULL, number INTEGER NOT NULL, chunk INTEGER NOT NULL,
    PRIMARY KEY (digest, number, chunk)) WITHOUT ROWID;
CREATE TABLE indexed (number INTEGER PRIMARY KEY);
CREATE TABLE documents (
    digest TEXT PRIMARY KEY, body BLOB NOT NULL, size INTEGER NOT NULL, last_use INTEGER NOT NULL);
CREATE TABLE resolved (
    reference TEXT NOT NULL, platform TEXT NOT NULL, digest TEXT NOT NULL, time INTEGER NOT NULL,
    last_use INTEGER NOT NULL, PRIMARY KEY (reference, platform));
CREATE TABLE mounts (
    id TEXT PRIMARY KEY, image TEXT NOT NULL, manifest_digest TEXT NOT NULL, dir BLOB NOT NULL, kind TEXT NOT NULL,
    state_dir BLOB NOT NULL, pid INTEGER NOT NULL, tree_key TEXT NOT NULL);
"""
_PINS = """
CREATE TABLE pins (
    reference TEXT NOT NULL, platform TEXT NOT NULL, image TEXT NOT NULL, time INTEGER NOT NULL,
    PRIMARY KEY (reference, platform));
CREATE TABLE pinned (image TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (image, digest)) WITHOUT ROWID;
"""
# What turns a file of each older version into the next one. A pin was a mark on a layer; it becomes an image of one.
_STEPS = {
    1: f"""{_PINS}
ALTER TABLE resolved ADD COLUMN last_use INTEGER NOT NULL DEFAULT 0;
UPDATE resolved SET last_use = time;
INSERT INTO pins SELECT digest, '', digest, last_use FROM layers WHERE pinned != 0;
INSERT INTO pinned SELECT digest, digest FROM layers WHERE pinned != 0;
ALTER TABLE layers RENAME TO layers_before;
CREATE TABLE layers (
    digest TEXT PRIMARY KEY, blob_size INTEGER NOT NULL, data_size INTEGER NOT NULL, last_use INTEGER NOT NULL,
    verified INTEGER NOT NULL DEFAULT 0, quarantine TEXT NOT NULL DEFAULT '');
INSERT INTO layers SELECT digest, blob_size, data_size, last_use, verified, quarantine FROM layers_before;
DROP TABLE layers_before;
""",
}


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether the file itself is malformed, as opposed to a disk or a lock."""
    return code_of(error) in DAMAGED


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn sqlite3's errors into StoreFull and StoreBroken.

    A file found malformed in the middle of the work is left in place and marked: its numbers are in use, so only the
    next start may begin anew.
    """
    try:
        yield
    except sqlite3.Error as error:
        if is_damage(error):
            _mark_damaged(path)
        raise translate(error, _what(path), damaged="it is begun anew at the next start") from None


def _what(path: Path) -> str:
    return f"the catalog {path}"


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")


def _mark_damaged(path: Path) -> None:
    try:
        private.write_text(_marker(path), "")
    except OSError as error:
        log.warning("the damaged catalog %s can't be marked: %s", path, error)


def _connect(path: Path, *, alone: bool = False) -> sqlite3.Connection:
    """Open the file; `alone`: nobody else may have it open then, and no file is needed beside it."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        if alone:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        known = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'schema'").fetchone()[0]
        if not known:
            _execute(connection, _SCHEMA + _PINS)
            connection.execute("INSERT INTO schema VALUES (?)", (SCHEMA_VERSION,))
        row = connection.execute("SELECT max(version) FROM schema").fetchone()
        version = row[0] if isinstance(row[0], int) else 0
        while version in _STEPS:
            _execute(connection, _STEPS[version])
            version += 1
            connection.execute("UPDATE schema SET version = ?", (version,))
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise
    if is_too_new(version, SCHEMA_VERSION):
        raise StoreBroken(
            f"the catalog {path} was written by a newer lazyfs", hint="use that version, or another --root"
        )
    if not is_readable(version, SCHEMA_VERSION):
        raise sqlite3.DatabaseError("the schema's version makes no sense")


def _execute(connection: sqlite3.Connection, statements: str) -> None:
    # Not executescript, which would commit what is under way.
    for statement in filter(str.strip, statements.split(";")):
        connection.execute(statement)


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    try:
        for suffix in _SUFFIXES:
            source = path.with_name(path.name + suffix)
            if source.exists():
                source.rename(aside.with_name(aside.name + suffix))
        _marker(path).unlink(missing_ok=True)
    except OSError as error:
        raise StoreBroken(f"the damaged catalog {path} can't be moved aside: {error.strerror}") from None
    return aside


def open_database(path: Path, *, anew: bool = True) -> sqlite3.Connection:
    """Open the catalog's file in WAL mode, mode 0600, made where missing. Blocking, up to BUSY_TIMEOUT.

    A damaged file is moved aside and begun anew, with a warning; with `anew` false it is left, as StoreBroken: another
    daemon has given out the numbers in it. Raise StoreFull, or StoreBroken (also for a newer
    version, and for anything but a file of ours under that name).
    """
    if os.path.lexists(_marker(path)):
        if not anew:
            raise StoreBroken(f"the catalog {path} was found damaged, and a daemon serves by it")
        _begin_anew(path, "it was found damaged earlier")
    check_file(path, _what(path), make=True)
    try:
        return _connect(path)
    except sqlite3.Error as error:
        # An error without a code is our own finding about the schema, or a table that is not what it should be.
        if not is_damage(error) and code_of(error) not in (0, sqlite3.SQLITE_ERROR):
            with translated(path):
                if code_of(error) in NO_ROOM:
                    # A disk without a free block has no room for SQLite's -shm. Whoever comes to free some needs us.
                    return _connect(path, alone=True)
                raise
        if not anew:
            raise StoreBroken(f"the catalog {path} is damaged, and a daemon serves by it") from None
        _begin_anew(path, str(error))
    check_file(path, _what(path), make=True)
    with translated(path):
        return _connect(path)


def _begin_anew(path: Path, reason: str) -> None:
    aside = _move_aside(path)
    log.warning(
        "the catalog was damaged (%s), is kept as %s and begun anew: layers are found again when they are used, "
        "but pins are lost and have to be set again",
        reason,
        aside,
    )
