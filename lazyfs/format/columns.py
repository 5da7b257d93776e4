"""Files of typed columns: written once by the child process, mapped by everybody else, never parsed.

    magic 8 | version u32 | number of columns u32 | checksum (16) | total size u64 | pad to 64
    per column: name 24 | typecode 1 | pad 7 | offset u64 | size u64                                  (48 bytes each)
    the columns' bytes, each on an 8-byte boundary, in the machine's order (little endian only)

The checksum is that of the whole file with zeros in its own place.

Mapped columns cost no anonymous memory and no Python object a row; a restart parses nothing. The checksum is compared
when the file is opened, because a cache file is not to be trusted more than the disk it lies on; see
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
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from lazyfs.errors import StoreBroken, StoreFull, TableInvalid
from lazyfs.format.checked import CHECKED
from lazyfs.format.checksum import checksum, file_checksum

T = TypeVar("T")

_HEAD = struct.Struct("<8sII16sQ24x")
_COLUMN = struct.Struct("<24sc7xQQ")
_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8, "q": 8}
_MAX_COLUMNS = 64
_SUM_AT = 16  # bytes in front of the checksum

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


def write_columns(path: Path, magic: bytes, version: int, columns: Mapping[str, Column]) -> None:
    """Write a column file at `path` through a temporary neighbour and rename(2): whole or not at all. Blocking.

    No fsync: a torn file fails its checksum and is built again. Raise StoreFull or StoreBroken.
    """
    if sys.byteorder != "little":
        raise StoreBroken("layer tables need a little-endian machine")
    directory = bytearray()
    parts: list[memoryview] = []
    offset = _HEAD.size + _COLUMN.size * len(columns)
    for name, column in columns.items():
        view = memoryview(column)
        typecode = column.typecode if isinstance(column, array) else "B"
        pad = -offset & 7
        offset += pad
        directory += _COLUMN.pack(name.encode(), typecode.encode(), offset, view.nbytes)
        parts += [memoryview(bytes(pad)), view.cast("B") if view.nbytes else memoryview(b"")]
        offset += view.nbytes
    blank = _HEAD.pack(magic, version, len(columns), b"", offset)
    head = _HEAD.pack(magic, version, len(columns), checksum([blank, directory, *parts]), offset)
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
        """Open, map and check the whole file: about 0.1 ms a megabyte, unless `CHECKED` knows it.

        Raise TableInvalid for anything unexpected.
        """
        self.path = path
        self._views: list[memoryview] = []
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if found.st_size < _HEAD.size:
                    raise TableInvalid(f"{path} is too short")
                count = self._check(fd, found, magic, version)
                self._map = mmap.mmap(fd, found.st_size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            finally:
                os.close(fd)
        except OSError as error:
            raise TableInvalid(f"{path} can't be read or mapped: {error.strerror}") from None
        try:
            self._directory = self._read_directory(count, found.st_size)
        except BaseException:
            self._map.close()
            raise

    def _check(self, fd: int, file: os.stat_result, magic: bytes, version: int) -> int:
        """Return the number of columns of a file that is whole. Raise TableInvalid or OSError."""
        head = os.pread(fd, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
        found_magic, found_version, count, told, total = _HEAD.unpack(head)
        if found_magic != magic or found_version != version or total != file.st_size or count > _MAX_COLUMNS:
            raise TableInvalid(f"{self.path} is of another kind or version, or cut short")
        if not CHECKED.knows(file):
            if file_checksum(fd, file.st_size, _SUM_AT) != told:
                raise TableInvalid(f"{self.path} is damaged")
            CHECKED.note(file)
        return int(count)

    def _read_directory(self, count: int, size: int) -> dict[str, tuple[str, int, int]]:
        if _HEAD.size + count * _COLUMN.size > size:
            raise TableInvalid(f"{self.path} has a broken column")
        directory = {}
        for number in range(count):
            name, typecode, offset, length = _COLUMN.unpack_from(self._map, _HEAD.size + number * _COLUMN.size)
            code = typecode.decode("ascii", "replace")
            if code not in _SIZES or offset + length > size or length % _SIZES[code]:
                raise TableInvalid(f"{self.path} has a broken column")
            directory[name.rstrip(b"\0").decode("ascii", "replace")] = (code, offset, length)
        return directory

    def view(self, name: str, typecode: str) -> memoryview:
        """Return one column. Raise TableInvalid when it is missing or of another type."""
        code, offset, length = self._directory.get(name, ("", 0, 0))
        if code != typecode:
            raise TableInvalid(f"{self.path} has no column {name} of type {typecode}")
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

    def __repr__(self) -> str:
        return f"<Columns {self.path} {len(self._directory)} columns>"
