"""Files of typed columns: written once by the child process, mapped by everybody else, never parsed.

    magic 8 | version u32 | number of columns u32 | front's checksum (16) | total size u64 |
    the rest's checksum (16) | where the front ends u64
    per column: name 24 | typecode 1 | pad 7 | offset u64 | size u64                                  (48 bytes each)
    the columns' bytes, each on an 8-byte boundary, in the machine's order (little endian only)

The front is the header, the directory and the first columns; its checksum has zeros in its own place. What a file is
opened for lies in front; the rest is checked when somebody asks for it.

Mapped columns cost no anonymous memory and no Python object a row; a restart parses nothing. A checksum is compared
before the bytes are used, because a cache file is not to be trusted more than the disk it lies on; see
`lazyfs.format.checked` for files that are opened again.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from lazyfs.errors import StoreBroken, StoreFull, TableInvalid
from lazyfs.format.checked import CHECKED
from lazyfs.format.checksum import checksum, file_checksum

T = TypeVar("T")

_HEAD = struct.Struct("<8sII16sQ16sQ")
_COLUMN = struct.Struct("<24sc7xQQ")
_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8, "q": 8}
_MAX_COLUMNS = 64
_SUM_AT = 16  # bytes before the front's checksum
_REST = 1  # the part of a file that `CHECKED` knows by itself; 0 is the front

Column = array | bytes | bytearray  # type: ignore[type-arg]


def pick(column: Sequence[T], rows: Sequence[int]) -> Sequence[T]:
    """Return a column's items of these rows, negative ones counted from its end."""
    if isinstance(rows, range) and rows.step == 1:
        return column[rows.start : rows.stop]
    if len(rows) > 1:
        values = column.tolist() if isinstance(column, memoryview) and len(rows) > len(column) // 8 else column
        found: tuple[T, ...] = itemgetter(*rows)(values)
        return found
    return [column[row] for row in rows]


def write_columns(
    path: Path, magic: bytes, version: int, columns: Mapping[str, Column], rest: Mapping[str, Column] | None = None
) -> None:
    """Write a column file at `path` through a temporary neighbour and rename(2): whole or not at all. Blocking.

    The columns of `rest` are those that are checked when they are asked for. No fsync: a torn file fails its checksum
    and is built again. Raise StoreFull or StoreBroken.
    """
    if sys.byteorder != "little":
        raise StoreBroken("layer tables need a little-endian machine")
    directory = bytearray()
    parts: list[memoryview] = []
    front, in_front = 0, 0  # where the front ends, and how many of the parts lie in it
    named = [*columns.items(), *(rest or {}).items()]
    offset = _HEAD.size + _COLUMN.size * len(named)
    for number, (name, column) in enumerate(named):
        if number == len(columns):
            front, in_front = offset, len(parts)
        view = memoryview(column)
        typecode = column.typecode if isinstance(column, array) else "B"
        pad = -offset & 7
        offset += pad
        directory += _COLUMN.pack(name.encode(), typecode.encode(), offset, view.nbytes)
        parts += [memoryview(bytes(pad)), view.cast("B") if view.nbytes else memoryview(b"")]
        offset += view.nbytes
    if not rest:
        front, in_front = offset, len(parts)
    facts = (offset, checksum(parts[in_front:]), front)
    blank = _HEAD.pack(magic, version, len(named), b"", *facts)
    head = _HEAD.pack(magic, version, len(named), checksum([blank, directory, *parts[:in_front]]), *facts)
    write_parts(path, [head, directory, *parts])


def write_parts(path: Path, parts: Sequence[bytes | bytearray | memoryview]) -> None:
    """Write a file of these bytes, mode 0600, whole or not at all: under another name first. Blocking.

    Raise StoreFull or StoreBroken.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb", opener=_private) as handle:
            for part in parts:
                handle.write(part)
        os.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreBroken
        raise kind(f"{path} can't be written: {error.strerror}") from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


class Columns:
    """A mapped column file. `view(name, typecode)` gives a read-only memoryview of items; close() drops the mapping."""

    def __init__(self, path: Path, magic: bytes, version: int) -> None:
        """Open and map the file, and check its front: about 0.1 ms a megabyte, unless `CHECKED` knows it.

        Raise TableInvalid for anything unexpected.
        """
        self.path = path
        self._views: list[memoryview] = []
        self._fd = -1  # open for `ensure_rest`, which several threads may be in
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._found = os.fstat(self._fd)
            self._directory = self._read_directory(self._check(magic, version))
            self._map = mmap.mmap(self._fd, self._found.st_size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        except OSError as error:
            self._close_file()
            raise TableInvalid(f"{path} can't be read or mapped: {error.strerror}") from None
        except BaseException:
            self._close_file()
            raise
        self._is_whole = self._front == self._found.st_size or CHECKED.knows(self._found, _REST)

    def _check(self, magic: bytes, version: int) -> bytes:
        """Return the directory of a file whose front is whole. Raise TableInvalid or OSError."""
        fd, size = self._fd, self._found.st_size
        head = os.pread(fd, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
        found_magic, found_version, count, told, total, self._rest_sum, self._front = _HEAD.unpack(head)
        if found_magic != magic or found_version != version or total != size or count > _MAX_COLUMNS:
            raise TableInvalid(f"{self.path} is of another kind or version, or cut short")
        if not _HEAD.size + count * _COLUMN.size <= self._front <= size:
            raise TableInvalid(f"{self.path} has a broken column")
        if not CHECKED.knows(self._found):
            if file_checksum(fd, 0, self._front, _SUM_AT) != told:
                raise TableInvalid(f"{self.path} is damaged")
            CHECKED.note(self._found)
        return os.pread(fd, count * _COLUMN.size, _HEAD.size)

    def _read_directory(self, raw: bytes) -> dict[str, tuple[str, int, int]]:
        directory = {}
        for name, typecode, offset, length in _COLUMN.iter_unpack(raw):
            code = typecode.decode("ascii", "replace")
            if code not in _SIZES or offset + length > self._found.st_size or length % _SIZES[code]:
                raise TableInvalid(f"{self.path} has a broken column")
            directory[name.rstrip(b"\0").decode("ascii", "replace")] = (code, offset, length)
        return directory

    def ensure_rest(self) -> None:
        """Check what lies behind the front, unless that was done. Blocking, about 0.1 ms a megabyte. Thread-safe.

        Raise TableInvalid; the file is gone then, so that whoever opens it next makes it again.
        """
        if self._is_whole:
            return
        try:
            fd = os.dup(self._fd)  # ours, should somebody close the columns meanwhile
            try:
                if not os.path.samestat(os.fstat(fd), self._found):
                    raise TableInvalid(f"{self.path} is closed")
                found = file_checksum(fd, self._front, self._found.st_size)
            finally:
                os.close(fd)
        except OSError as error:
            raise TableInvalid(f"{self.path} can't be read: {error.strerror}") from None
        if found != self._rest_sum:
            with suppress(OSError):
                if os.path.samestat(self.path.lstat(), self._found):
                    self.path.unlink()
            raise TableInvalid(f"{self.path} is damaged")
        CHECKED.note(self._found, _REST)
        self._is_whole = True

    def length(self, name: str, typecode: str) -> int:
        """Return the number of items of a column, wherever it lies. Raise TableInvalid when it is missing."""
        return self._place(name, typecode)[1] // _SIZES[typecode]

    def _place(self, name: str, typecode: str) -> tuple[int, int]:
        code, offset, length = self._directory.get(name, ("", 0, 0))
        if code != typecode:
            raise TableInvalid(f"{self.path} has no column {name} of type {typecode}")
        return offset, length

    def view(self, name: str, typecode: str) -> memoryview:
        """Return one column. Raise TableInvalid when it is missing, of another type, or behind the front and damaged.

        Blocking for the first one behind the front, see `ensure_rest`.
        """
        offset, length = self._place(name, typecode)
        if offset + length > self._front:
            self.ensure_rest()
        whole = memoryview(self._map)
        part = whole[offset : offset + length]
        view = part if typecode == "B" else part.cast(typecode)  # type: ignore[call-overload]
        self._views += [view, part, whole] if view is not part else [part, whole]
        return view

    def close(self) -> None:
        """Release the views and the mapping. Views taken before are unusable afterwards."""
        for view in self._views:
            view.release()
        self._views.clear()
        self._map.close()
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self._close_file()

    def __repr__(self) -> str:
        return f"<Columns {self.path} {len(self._directory)} columns>"
