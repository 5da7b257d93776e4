"""File contents cut into chunks, hashed, and written at their places in data space: the last stage of unpacking.

Contents are passed on as views of the blocks that they came in. Whoever scans the tar makes `Piece`s; `PieceWriter`
hashes and writes them in another thread, neighbours in one system call.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import Chunk
from lazyfs.format.tar import TarItem
from lazyfs.limits import MAX_FILE_CHUNKS
from lazyfs.units import PAGE, MiB

CHUNK = MiB  # bytes
_SMALL = 4096  # bytes; shorter parts are joined, so that a chunk has a few hundred parts at most
_RUN_BYTES = 4 * MiB  # bytes of one write
_RUN_PARTS = 500  # parts after which a write is made; a chunk has fewer, and IOV_MAX is 1024
_ZERO_DIGEST = hashlib.sha256(bytes(CHUNK)).digest()
_ZEROS = bytes(PAGE)

Part = memoryview | bytearray


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk whose bytes are there. Its digest is filled in by the writer."""

    chunk: Chunk
    parts: list[Part]  # the chunk's bytes, one part after another
    data_offset: int  # in data space


class FileCutter:
    """A regular file while its payload passes by."""

    def __init__(self, item: TarItem, base: int, out: list[Piece]) -> None:
        """`base`: the file's place in data space. `out` takes the pieces; it may be replaced between two calls."""
        self.item = item
        self.base = base
        self.chunks: list[Chunk] = []
        self.out = out
        self._parts: list[Part] = []
        self._filled = 0  # bytes in `_parts`
        self._offset = 0  # in the file, of the first of them
        self._runs = list(item.sparse) if item.sparse is not None else [(0, item.stored)]
        self._run = 0
        self._in_run = 0

    def feed(self, payload: memoryview) -> None:
        """Take stored bytes, in order; holes of a sparse file are put in between. The view is kept."""
        while payload:
            start, size = self._runs[self._run]
            self._pad(start)
            take = min(size - self._in_run, len(payload))
            self._add(payload[:take])
            self._in_run += take
            payload = payload[take:]
            if self._in_run == size:
                self._run += 1
                self._in_run = 0

    def finish(self) -> None:
        """Fill up to the file's size and end its last chunk."""
        self._pad(self.item.entry.size)
        if self._filled:
            self._cut()

    def _pad(self, until: int) -> None:
        if self._in_run:
            return
        while (missing := until - self._offset - self._filled) > 0:
            if not self._filled and missing >= CHUNK:
                self._append(CHUNK, _ZERO_DIGEST)
            else:
                self._add(memoryview(bytes(min(missing, CHUNK - self._filled))))

    def _add(self, data: memoryview) -> None:
        while data:
            part, data = data[: CHUNK - self._filled], data[CHUNK - self._filled :]
            self._filled += len(part)
            last = self._parts[-1] if self._parts else None
            if len(part) >= _SMALL or self._filled == len(part) == self.item.entry.size:
                self._parts.append(part)
            elif isinstance(last, bytearray):
                last += part
            else:
                self._parts.append(bytearray(part))
            if self._filled == CHUNK:
                self._cut()

    def _cut(self) -> None:
        parts, self._parts = self._parts, []
        size, self._filled = self._filled, 0
        place = self.base + self._offset
        self.out.append(Piece(self._append(size, b""), parts, place))

    def _append(self, size: int, digest: bytes) -> Chunk:
        if len(self.chunks) >= MAX_FILE_CHUNKS:
            raise TarInvalid("is too large for a layer", self.item.entry.path)
        # A plain layer has no frames: its chunks carry their place in data space instead of one in the blob.
        chunk = Chunk(self._offset, size, self.base, 0, digest)
        self.chunks.append(chunk)
        self._offset += size
        return chunk


class PieceWriter:
    """Hash pieces and write them into `fd`. Blocking on the disk; raises OSError. One thread at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._parts: list[Part | bytes] = []
        self._begin = 0  # data offset of the first of them
        self._end = 0  # data offset behind the last

    def write(self, pieces: list[Piece]) -> None:
        """Take the next pieces, in data order, and write what they and earlier ones make."""
        for piece in pieces:
            chunk, parts = piece.chunk, piece.parts
            whole = hashlib.sha256(parts[0])
            for part in parts[1:]:
                whole.update(part)
            chunk.digest = whole.digest()
            # A file of zeros takes no room: a small blob must not fill a disk.
            if chunk.size != CHUNK or chunk.digest != _ZERO_DIGEST:
                self._put(piece.data_offset, parts, chunk.size)
        self.flush()  # the blocks under the parts are wanted back

    def _put(self, data_offset: int, parts: list[Part], size: int) -> None:
        gap = data_offset - self._end
        full = len(self._parts) + len(parts) >= _RUN_PARTS or self._end - self._begin >= _RUN_BYTES
        if self._parts and (full or not 0 <= gap < PAGE):
            self.flush()
        if not self._parts:
            self._begin = data_offset
        elif gap:
            self._parts.append(_ZEROS[:gap])  # up to the next file's page
        self._parts += parts
        self._end = data_offset + size

    def flush(self) -> None:
        """Write what is held."""
        parts, self._parts = self._parts, []
        if parts:
            done = os.pwritev(self._fd, parts, self._begin)
            if done < self._end - self._begin:
                _write_rest(self._fd, memoryview(b"".join(parts))[done:], self._begin + done)


def _write_rest(fd: int, view: memoryview, offset: int) -> None:
    while view:  # a disk that is just filling up takes part of it, and says why the next time
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
