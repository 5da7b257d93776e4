"""One layer's chunks on the local disk: bytes that hash to what the layer table promises, or nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Protocol

from lazyfs.chunks.health import DiskHealth
from lazyfs.chunks.holes import ReadPages, drop_pages
from lazyfs.chunks.layer_files import LayerFiles
from lazyfs.chunks.private_files import OwnedFd
from lazyfs.chunks.shape import Layout
from lazyfs.errors import StoreBroken, StoreLocked
from lazyfs.format.table import FORM_PLAIN, NO_FRAME
from lazyfs.limits import MAX_CHUNK
from lazyfs.units import PAGE, KiB, MiB

SMALL = 64 * KiB  # bytes that are hashed sooner than a thread begins
_RUN_BYTES = 8 * MiB  # bytes of one write
_RUN_PIECES = 500  # chunks of one write; with the padding in between below IOV_MAX (1024)
_ZEROS = bytes(PAGE)


class ChunkTable(Layout, Protocol):
    """What the store needs of a layer table (`lazyfs.format.table.LayerTable`)."""

    @property
    def path(self) -> Path: ...
    @property
    def form(self) -> int: ...
    @property
    def holes(self) -> int: ...
    @property
    def chunk_size(self) -> Sequence[int]: ...
    @property
    def chunk_frame(self) -> Sequence[int]: ...
    def chunk_digest(self, chunk: int) -> bytes: ...


class Room(Protocol):
    """The bound on all layers together."""

    def admit(self, size: int) -> bool: ...
    def admit_spare(self, size: int) -> bool: ...
    @property
    def takes_spare(self) -> bool: ...
    def freed(self, size: int) -> None: ...
    def note_written(self, size: int) -> None: ...


def full_bytes(table: ChunkTable) -> int:
    """Return the bytes of all chunks of a table but holes: what a complete layer holds."""
    holes = sum(table.chunk_size[chunk] for chunk in hole_chunks(table))
    return sum(table.chunk_size) - holes


def hole_chunks(table: ChunkTable) -> frozenset[int]:
    """Chunks that are holes of sparse files: all zeros, in no frame, never stored."""
    if table.form == FORM_PLAIN or not table.holes:
        return frozenset()
    return frozenset(chunk for chunk, frame in enumerate(table.chunk_frame) if frame == NO_FRAME)


class LayerStore:
    """A layer's chunk store. Thread-safe; methods block on the local disk at most and never raise for what it does.

    Chunks are numbered as in the layer table; a number outside it is an IndexError. Made by `Store.open_layer`.
    """

    def __init__(
        self, files: LayerFiles, table: ChunkTable, room: Room, health: DiskHealth, release: Callable[[], None]
    ) -> None:
        self.table = table
        self.damaged = 0  # chunks that were marked present and had other bytes, since the start
        self._files = files
        self._room = room
        self._health = health
        self._release = release
        self._hole_chunks = hole_chunks(table)
        self._read_pages = ReadPages()

    @property
    def digest(self) -> str:
        """The layer's blob digest."""
        return self._files.digest

    def close(self) -> None:
        """Give the layer back, once for each `open_layer`. With the last one its files are closed."""
        self._release()

    # -- what is there

    def has(self, chunk: int) -> bool:
        """Tell whether a chunk was written and not evicted since. No promise: only `read` looks at the bytes."""
        if self._files.flags[chunk] or chunk in self._hole_chunks:
            return True
        self._files.refresh(chunk, chunk + 1)
        return bool(self._files.flags[chunk])

    def missing(self, first: int, last: int) -> list[int]:
        """Return the chunks of [first, last) that are not there, in order; holes of sparse files always are."""
        self._files.refresh(first, last)
        out: list[int] = []
        at = self._files.flags.find(0, first, last)
        while at >= 0:
            if at not in self._hole_chunks:
                out.append(at)
            at = self._files.flags.find(0, at + 1, last)
        return out

    @property
    def complete(self) -> bool:
        """Whether every chunk is there: such a layer needs no registry."""
        self._files.refresh(0, len(self._files.flags))
        return self._files.flags.count(1) + len(self._hole_chunks) >= len(self._files.flags)

    @property
    def present_bytes(self) -> int:
        """Bytes of the chunks that are there (uncompressed, without padding or holes)."""
        return sum(compress(self.table.chunk_size, self._files.flags))

    @property
    def full_bytes(self) -> int:
        """Bytes of all chunks but holes (uncompressed, without padding): `present_bytes` of a complete layer."""
        return full_bytes(self.table)

    @property
    def disk_usage(self) -> int:
        """Bytes that the chunks take on disk."""
        return self._files.disk_usage()

    # -- reading

    def read(self, chunk: int) -> bytes | None:
        """Return a chunk's bytes, hashed just now against the table; None for anything that is not exactly right.

        A chunk that was marked present and fails is forgotten and counted in `damaged`.
        """
        if chunk in self._hole_chunks:
            return self._checked(bytes(min(self.table.chunk_size[chunk], MAX_CHUNK)), chunk)
        data = self._read(chunk)
        if data is not None:
            self._files.touch(chunk)
        return data

    def read_now(self, chunk: int, room: int = 0) -> bytearray | None:
        """Return a chunk's bytes, hashed just now, where that is quicker than to have a thread do it. Doesn't block.

        Zeros follow them, up to `room` bytes. None: it is larger than SMALL, a hole, not here, not in the page cache,
        or not right; `read` knows. Also where the use is to be noted: that is a write, and a disk that hangs must not
        hold up the caller.
        """
        fd: OwnedFd | None = self._files.data
        size, offset = self.table.chunk_size[chunk], self.table.chunk_data_offset[chunk]
        if fd is None or not 0 < size <= SMALL or not self._files.flags[chunk] or chunk in self._hole_chunks:
            return None
        if not self._files.is_touched(chunk):
            return None
        buffer = bytearray(max(size, room))
        data = memoryview(buffer)[:size]
        try:
            if os.preadv(fd.number, [data], offset, os.RWF_NOWAIT) != size:
                return None
        except OSError:  # the disk would have to be asked
            return None
        if not self._is_right(data, chunk):
            return None
        self._read_pages.add(offset, size)
        return buffer

    @property
    def has_read_pages(self) -> bool:
        """Whether `drop_read_pages` is due. Doesn't block."""
        return self._read_pages.is_due

    def drop_read_pages(self) -> None:
        """Drop the pages that `read_now` has read: the reader's page cache has them. Blocking, some milliseconds."""
        fd: OwnedFd | None = self._files.data
        for offset, size in self._read_pages.take():
            if fd is not None:
                drop_pages(fd.number, offset, size)

    def read_in_order(self, chunks: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
        """Yield chunks and their bytes as `read` returns them, one behind; nothing is forgotten or counted here.

        Each is yielded when the next one was read from the disk already: whoever takes it keeps the interpreter busy
        for a while, and meanwhile the next one can be hashed but not read.
        """
        ready: tuple[int, bytes | None] | None = None
        for chunk in chunks:
            hole = chunk in self._hole_chunks
            data = bytes(min(self.table.chunk_size[chunk], MAX_CHUNK)) if hole else self._load_raw(chunk)
            if ready is not None:
                yield ready
            ready = chunk, self._checked(data, chunk) if data is not None else None
            if ready[1] is not None and not hole:
                self._files.touch(chunk)
        if ready is not None:
            yield ready

    def examine(self, chunk: int) -> bool | None:
        """Hash a chunk on the disk without using it. None: it is not there; False: it was damaged, and is forgotten.

        Holes of sparse files, which are nowhere on the disk, are not there.
        """
        if chunk in self._hole_chunks or not self.has(chunk):
            return None
        before = self.damaged
        if self._read(chunk) is not None:
            return True
        return False if self.damaged > before else None

    def _read(self, chunk: int) -> bytes | None:
        if not self.has(chunk):
            return None
        data = self._load(chunk)
        if data is None:
            # Most likely an eviction got in between. Under the lock there are no others: then the bytes are to blame.
            with self._files.lock:
                self._files.refresh(chunk, chunk + 1)
                if not self._files.flags[chunk]:
                    return None
                data = self._load(chunk)
                if data is None:
                    self._files.mark(chunk, chunk + 1, 0)
                    self.damaged += 1
                    return None
        return data

    def _load(self, chunk: int) -> bytes | None:
        data = self._load_raw(chunk)
        return self._checked(data, chunk) if data is not None else None

    def _load_raw(self, chunk: int) -> bytes | None:
        """Return the bytes in a chunk's place, whatever they are: the caller checks them."""
        fd: OwnedFd | None = self._files.data
        size, offset = self.table.chunk_size[chunk], self.table.chunk_data_offset[chunk]
        if fd is None or size > MAX_CHUNK:
            return None
        try:
            data = os.pread(fd.number, size, offset)
        except OSError:
            return None
        drop_pages(fd.number, offset, size)  # the reader's page cache has them from now on
        return data if len(data) == size else None

    def _checked(self, data: bytes, chunk: int) -> bytes | None:
        return data if self._is_right(data, chunk) else None

    def _is_right(self, data: bytes | memoryview, chunk: int) -> bool:
        return hashlib.sha256(data).digest() == self.table.chunk_digest(chunk)

    # -- writing

    def write(self, chunk: int, data: bytes | memoryview) -> bool:
        """Keep one chunk. The caller has verified the bytes. False: not kept, the cache is full, failing or closed."""
        return self.write_run(chunk, [data]) == 1

    @property
    def takes_spare(self) -> bool:
        """Whether what nobody has asked for yet is likely to be kept, see `write_run`. Doesn't block."""
        return not self._health.reason and self._room.takes_spare

    def write_run(self, first: int, pieces: Sequence[bytes | memoryview], spare: bool = False) -> int:
        """Keep the verified bytes of chunks `first`, `first` + 1, …; return how many of them are kept, from the first.

        Neighbours go out in one write, the gap up to the next file's page filled with zeros. A piece of the wrong size
        is a ValueError: that is the caller's mistake. `spare`: nobody has asked for them yet. They push out nothing
        that is in use, and count as not used yet.
        """
        for chunk, piece in enumerate(pieces, first):
            if len(piece) != self.table.chunk_size[chunk]:
                raise ValueError(f"chunk {chunk} has {self.table.chunk_size[chunk]} bytes, not {len(piece)}")
        for start, last, offset, buffers in self._runs(first, pieces):
            if 0 not in self._files.flags[start:last]:
                if not spare:
                    self._files.touch_all(start, last)
                continue
            size = sum(map(len, buffers))
            if not (self._room.admit_spare(size) if spare else self._room.admit(size)):
                return start - first
            if not self._write(start, last, offset, buffers):
                if spare:
                    self._room.freed(size)
                return start - first
            if not spare:
                self._files.touch_all(start, last)
                self._room.note_written(size)
        return len(pieces)

    def _write(self, start: int, last: int, offset: int, buffers: Sequence[bytes | memoryview]) -> bool:
        """Write the bytes of chunks [start, last). False: the disk would not have them, or the layer is closed."""
        if not self._health.may_write():
            return False
        try:
            with self._files.lock:
                self._files.write(start, last, offset, buffers)
        except OSError as error:
            self._health.failed(error)
            return False
        except StoreLocked:
            return False
        self._health.worked()
        return True

    def _runs(
        self, first: int, pieces: Sequence[bytes | memoryview]
    ) -> Iterator[tuple[int, int, int, list[bytes | memoryview]]]:
        """Yield (first chunk, chunk behind the last, data offset, buffers) of the writes to make."""
        start, after, begin, end = first, first, -1, -1
        buffers: list[bytes | memoryview] = []
        for chunk, piece in enumerate(pieces, first):
            if chunk in self._hole_chunks:
                continue
            offset = self.table.chunk_data_offset[chunk]
            joins = chunk == after and 0 <= offset - end < PAGE
            if buffers and (not joins or chunk - start >= _RUN_PIECES or end - begin >= _RUN_BYTES):
                yield start, after, begin, buffers
                buffers = []
            if not buffers:
                start, begin, end = chunk, offset, offset
            if offset > end:
                buffers.append(_ZEROS[: offset - end])
            buffers.append(piece)
            after, end = chunk + 1, offset + len(piece)
        if buffers:
            yield start, after, begin, buffers

    def copy_from(self, other: LayerStore, other_chunk: int, chunk: int) -> bytes | None:
        """Take a chunk from another layer and keep it here. Return its verified bytes, or None when it has none."""
        if other.table.chunk_digest(other_chunk) != self.table.chunk_digest(chunk):
            return None
        data = other.read(other_chunk)
        if data is None or len(data) != self.table.chunk_size[chunk]:
            return None
        self.write(chunk, data)
        return data

    def adopt(self, name: str) -> None:
        """Take over a file of the layer's directory that holds all chunks at their data offsets, verified by its maker.

        Raise StoreBroken when it can't be.
        """
        try:
            size = self._files.adopt(name)
        except OSError as error:
            self._health.failed(error)
            raise StoreBroken(f"layer {self.digest} can't be taken over: {error.strerror}") from None
        self._room.note_written(size)

    def forget(self) -> int:
        """Drop every chunk (the layer was quarantined). Return the bytes freed on disk."""
        return self._files.evict_all()
