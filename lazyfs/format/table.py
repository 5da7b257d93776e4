"""The layer table: a layer's TOC as mapped columns. The structure that everything else stands on.

One row a name, breadth first, a directory's children side by side and sorted by name: a lookup is a bisection, readdir
a range. Row 0 is the root. Rows never change for a given TOC, so (layer number << 40 | row) names a file for good.
Chunks lie in TOC order, which is data-space order and blob order alike.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazyfs.errors import TableInvalid
from lazyfs.format.columns import Columns
from lazyfs.format.entry import Kind

MAGIC = b"LZFLAYER"
# Rows keep their order in all versions: the kernel knows files by their numbers, and an upgrade in place keeps those.
VERSION = 4
NO_FRAME = 0xFFFFFFFF  # a chunk that is a hole, or a chunk of a plain layer: no frame to fetch
FLAG_OPAQUE = 1  # a directory that hides what lower layers have under it
FLAG_IMPLICIT = 2  # a directory that no entry names; a lower layer's attributes show through
FLAG_REPLACES = 4  # a directory that stands where the layer removed one: opaque, and nothing shows through
FORM_PLAIN = 0  # no TOC in the blob: made by unpacking the whole layer
FORM_ZSTD_CHUNKED = 1  # stargz's, and what podman 4 writes
FORM_ESTARGZ = 2
FORM_STORAGE_ZSTD = 3  # zstd:chunked of containers/storage

# name -> typecode. Offsets and sizes in bytes; *_data_offset in data space, *_blob_offset in blob space.
ROW_COLUMNS = {
    "parent": "I", "kind": "B", "flags": "B", "mode": "H", "uid": "I", "gid": "I", "mtime": "q", "mtime_fraction": "I",
    "size": "Q", "nlink": "I", "aux": "Q", "xattr": "I", "data_offset": "Q", "first_chunk": "I", "chunk_count": "I",
    "first_child": "I", "child_count": "I",
}  # fmt: skip
CHUNK_COLUMNS = {"chunk_data_offset": "Q", "chunk_size": "I", "chunk_frame": "I", "chunk_inner": "Q"}
FRAME_COLUMNS = {"frame_blob_offset": "Q", "frame_blob_end": "Q", "frame_first_chunk": "I"}
FRONT_COLUMNS = {*CHUNK_COLUMNS, *FRAME_COLUMNS, "chunk_digest", "meta"}  # checked whenever a table is opened
# What a mount by the kernel's erofs doesn't need: attribute -> name and typecode of its column.
_LATER = {("chunk_count_of" if name == "chunk_count" else name): (name, code) for name, code in ROW_COLUMNS.items()} | {
    "name_end": ("name_end", "I"), "names": ("names", "B"), "_links": ("links", "B"),
    "_xattr_heap": ("xattr_heap", "B"),
}  # fmt: skip
META = ("form", "blob_size", "data_size", "payload_end", "landmark", "dropped_xattrs", "entries", "holes")
_LONGEST_RUN = 256  # chunks that `run_end` looks ahead
_LENGTHS = struct.Struct("<HI")


def pack_xattrs(xattrs: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Serialise xattrs for the heap: count u16, then name length u16, value length u32, name, value each."""
    parts = [struct.pack("<H", len(xattrs))]
    for name, value in xattrs:
        parts += [_LENGTHS.pack(len(name), len(value)), name, value]
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Place:
    """A run of one chunk's bytes: chunk number, offset inside the chunk, size. Bytes, uncompressed."""

    chunk: int
    offset: int
    size: int


class Names:
    """The names of a table or tree as columns: rows breadth first, a directory's children side by side and sorted."""

    first_child: memoryview
    child_count: memoryview
    name_end: memoryview  # where each row's name begins in `names`, and behind the last one's end
    names: memoryview

    def name(self, row: int) -> bytes:
        """Return a row's name. Row 0, the root, has none."""
        return bytes(self.names[self.name_end[row] : self.name_end[row + 1]])

    def child(self, row: int, name: bytes) -> int | None:
        """Return the row of `name` in directory `row`, or None. Bisection: about 15 µs in a directory of a thousand."""
        low = self.first_child[row]
        high = low + self.child_count[row]
        end, names = self.name_end, self.names
        while low < high:
            middle = (low + high) // 2
            found = bytes(names[end[middle] : end[middle + 1]])
            if found == name:
                return int(middle)
            if found < name:
                low = middle + 1
            else:
                high = middle
        return None

    def children(self, row: int) -> range:
        """Rows of a directory's children, sorted by name (bytes)."""
        first = self.first_child[row]
        return range(first, first + self.child_count[row])

    def find(self, path: bytes) -> int | None:
        """Return the row at a cleaned path (b"" is the root), following nothing. None: no such name."""
        row = 0
        for part in path.split(b"/") if path else ():
            found = self.child(row, part)
            if found is None:
                return None
            row = found
        return row


class LayerTable(Names):
    """A mapped layer table. Immutable, thread-safe, no Python object a file. Open it with `LayerTable(path)`.

    Columns are memoryviews under the names of ROW_COLUMNS, CHUNK_COLUMNS and FRAME_COLUMNS; use the methods where there
    is one. IndexError means a row that does not exist.
    """

    parent: memoryview
    kind: memoryview
    flags: memoryview
    mode: memoryview
    uid: memoryview
    gid: memoryview
    mtime: memoryview
    mtime_fraction: memoryview
    size: memoryview
    nlink: memoryview
    aux: memoryview
    xattr: memoryview
    data_offset: memoryview
    first_chunk: memoryview
    chunk_count_of: memoryview
    chunk_data_offset: memoryview
    chunk_size: memoryview
    chunk_frame: memoryview
    chunk_inner: memoryview
    frame_blob_offset: memoryview
    frame_blob_end: memoryview
    frame_first_chunk: memoryview
    _links: memoryview
    _xattr_heap: memoryview

    def __init__(self, path: Path) -> None:
        """Map the file and check what reading data takes: chunks and frames. Names are checked by their first use.

        Blocking. Raise TableInvalid: then build it again from the TOC.
        """
        self.path = path
        self._columns = Columns(path, MAGIC, VERSION)
        try:
            self._load()
        except BaseException:
            self._columns.close()
            raise

    def __getattr__(self, name: str) -> memoryview:
        """Return a column of names and attributes when it is asked for the first time. Raise TableInvalid."""
        if name not in _LATER:
            raise AttributeError(name)
        view = self._columns.view(*_LATER[name])
        setattr(self, name, view)
        return view

    def ensure_names(self) -> None:
        """Check names and attributes now, unless that was done. Blocking. Raise TableInvalid: open it again then."""
        self._columns.ensure_rest()

    def _load(self) -> None:
        view = self._columns.view
        for name, code in (CHUNK_COLUMNS | FRAME_COLUMNS).items():
            setattr(self, name, view(name, code))
        self._digests = view("chunk_digest", "B")
        meta = dict(zip(META, view("meta", "q"), strict=False))
        if len(meta) != len(META):
            raise TableInvalid(f"{self.path} has no meta column")
        self.form: int = meta["form"]
        self.blob_size: int = meta["blob_size"]  # bytes of the whole blob
        self.data_size: int = meta["data_size"]  # bytes of the data space
        self.payload_end: int = meta["payload_end"]  # blob offset behind the last frame; the TOC lies behind it
        self.landmark: int = meta["landmark"]  # blob offset of the prefetch landmark; 0: prefetch nothing
        self.dropped_xattrs: int = meta["dropped_xattrs"]
        self.entries: int = meta["entries"]
        self.holes: int = meta["holes"]  # chunks that are in no frame, except of a plain layer
        self.rows = self._columns.length("kind", "B")
        self.chunk_count = len(self.chunk_size)
        self.frame_count = len(self.frame_blob_offset)
        ends = self._columns.length("name_end", "I")
        if self.rows == 0 or ends != self.rows + 1 or len(self._digests) != 32 * self.chunk_count:
            raise TableInvalid(f"{self.path} has columns of unequal length")

    def close(self) -> None:
        """Unmap. The table is unusable afterwards."""
        self._columns.close()

    def path_of(self, row: int) -> bytes:
        """Return a row's path from the layer's root, without a leading slash."""
        parts = []
        while row:
            parts.append(self.name(row))
            row = self.parent[row]
        return b"/".join(reversed(parts))

    def inode(self, row: int) -> int:
        """Return the row that carries the inode: the target of a hard link, else `row` itself."""
        return int(self.aux[row]) if self.kind[row] == Kind.HARDLINK else row

    def link(self, row: int) -> bytes:
        """Return a symlink's target."""
        start = self.aux[row]
        return bytes(self._links[start : start + self.size[row]])

    def rdev(self, row: int) -> tuple[int, int]:
        """Return a device's (major, minor)."""
        value = self.aux[row]
        return value >> 32, value & 0xFFFFFFFF

    def mtime_ns(self, row: int) -> int:
        """Return the modification time in nanoseconds since the epoch."""
        return int(self.mtime[row] * 1_000_000_000 + self.mtime_fraction[row])

    def xattrs(self, row: int) -> dict[bytes, bytes]:
        """Return the extended attributes, those dropped for safety excepted. Shared by many rows; parsed each time."""
        start = self.xattr[row]
        if start == 0:
            return {}
        heap, at = self._xattr_heap, start - 1
        (count,) = struct.unpack_from("<H", heap, at)
        at += 2
        out = {}
        for _ in range(count):
            name_size, value_size = _LENGTHS.unpack_from(heap, at)
            at += _LENGTHS.size
            out[bytes(heap[at : at + name_size])] = bytes(heap[at + name_size : at + name_size + value_size])
            at += name_size + value_size
        return out

    def chunk_digest(self, chunk: int) -> bytes:
        """Return the 32 raw bytes of a chunk's sha256."""
        return bytes(self._digests[32 * chunk : 32 * chunk + 32])

    def places(self, row: int, offset: int, size: int) -> Iterator[Place]:
        """Yield the chunk runs that make up [offset, offset + size) of regular file `row`, cut at its end."""
        end = min(offset + size, self.size[row])
        if offset < 0 or offset >= end:
            return
        base = self.data_offset[row]
        first = self.first_chunk[row]
        chunk = bisect_right(self.chunk_data_offset, base + offset, first, first + self.chunk_count_of[row]) - 1
        while offset < end:
            inside = base + offset - self.chunk_data_offset[chunk]
            run = min(self.chunk_size[chunk] - inside, end - offset)
            yield Place(chunk, inside, run)
            offset += run
            chunk += 1

    def data_places(self, data_offset: int, size: int) -> Iterator[tuple[int, Place]]:
        """Yield (bytes behind `data_offset`, chunk run) for what lies in a range of the data space; the rest is zeros.

        The range may begin and end inside of files, and go over any number of them.
        """
        end = data_offset + size
        chunk = max(0, bisect_right(self.chunk_data_offset, data_offset) - 1)
        while chunk < self.chunk_count and (start := self.chunk_data_offset[chunk]) < end:
            first = max(start, data_offset)
            last = min(start + self.chunk_size[chunk], end)
            if first < last:
                yield first - data_offset, Place(chunk, first - start, last - first)
            chunk += 1

    def lone_chunk(self, data_offset: int, size: int) -> int | None:
        """Return the chunk that begins at `data_offset`, all of which a range of `size` bytes has, and no other.

        None: there is no such chunk, or it goes on from the one before, which has the same file (or ends with a page).
        """
        starts, sizes = self.chunk_data_offset, self.chunk_size
        chunk = bisect_left(starts, data_offset)
        if chunk == self.chunk_count or starts[chunk] != data_offset or sizes[chunk] > size:
            return None
        if chunk and starts[chunk - 1] + sizes[chunk - 1] == data_offset:
            return None
        after = chunk + 1
        return None if after < self.chunk_count and starts[after] < data_offset + size else chunk

    def run_end(self, chunk: int) -> int:
        """Return the last chunk of those that follow `chunk` without a gap in data space, which ends a file.

        Of files whose size is a multiple of PAGE the next one may belong to it too. Looks _LONGEST_RUN chunks far.
        """
        starts, sizes = self.chunk_data_offset, self.chunk_size
        end = min(self.chunk_count - 1, chunk + _LONGEST_RUN)
        while chunk < end and starts[chunk] + sizes[chunk] == starts[chunk + 1]:
            chunk += 1
        return chunk

    def file_chunks(self, row: int) -> range:
        """Chunk numbers of a regular file, in order."""
        first = self.first_chunk[row]
        return range(first, first + self.chunk_count_of[row])

    def frame_chunks(self, frame: int) -> range:
        """Chunk numbers whose bytes lie in a frame, in order of their inner offset (holes in between included)."""
        first = self.frame_first_chunk[frame]
        last = self.frame_first_chunk[frame + 1] if frame + 1 < self.frame_count else self.chunk_count
        return range(first, last)

    def __repr__(self) -> str:
        return f"<LayerTable {self.path.name} {self.rows} rows, {self.chunk_count} chunks, {self.frame_count} frames>"
