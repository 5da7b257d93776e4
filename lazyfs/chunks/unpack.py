"""The process that unpacks a plain layer: its blob on standard input, chunks and a layer table out.

Five threads share the work: one reads and hashes the blob, one inflates, one hashes the tar (the diff ID), one hashes
and writes chunks, and the main thread reads the tar's headers. What all this takes of memory goes with the process.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lazyfs import digest as digests
from lazyfs.child import go_first, limit, refuse
from lazyfs.chunks.cut import CHUNK, FileCutter, Piece, PieceWriter
from lazyfs.chunks.stages import Ahead, Sink
from lazyfs.errors import DiffIdMismatch, DigestMismatch, FormatError, LazyfsError, StoreBroken, StoreFull, TarInvalid
from lazyfs.format.entry import Chunk, Kind
from lazyfs.format.inflate import LONGEST_MAGIC, STEP, decompress, is_compressed
from lazyfs.format.listing import Listing
from lazyfs.format.namespace import Namespace
from lazyfs.format.table import FORM_PLAIN
from lazyfs.format.table_build import LayerFacts, write_table
from lazyfs.format.tar import TarScanner
from lazyfs.limits import CHILD_MEMORY, UNPACK_BLOCKS, UNPACK_INPUTS
from lazyfs.units import KiB, align

_INPUT = 256 * KiB  # bytes of one read from the pipe
_LEAST = 512 * KiB  # bytes; shorter blocks are joined, for handing one over may cost a wait for the interpreter's lock
_SWITCH = 0.0001  # seconds; the main thread gives way sooner than usual, for the others hold the lock but shortly


class Unpacker:
    """Turn a tar stream into pieces to write and entries for a table. Raises TarInvalid; doesn't block."""

    def __init__(self) -> None:
        self._scanner = TarScanner()
        self._position = 0  # stream offset of the next block
        self._file: FileCutter | None = None
        self.data_size = 0  # bytes of data space so far
        self.pairs: Namespace[list[Chunk]] = Namespace()

    def feed(self, block: bytes) -> list[Piece]:
        """Take the next bytes of the stream. Return the chunks that ended in them, views of this and earlier bytes."""
        pieces: list[Piece] = []
        view = memoryview(block)
        if self._file is not None:
            self._file.out = pieces
            self._payload(view)
        for item in self._scanner.feed(block):
            entry = item.entry
            if entry.kind is Kind.REG and entry.size:
                start = item.payload - self._position
                if entry.size <= CHUNK and item.sparse is None and start + entry.size <= len(view):
                    # Nearly all files: one chunk, and all of it is here.
                    chunk = Chunk(0, entry.size, self.data_size, 0, b"")
                    pieces.append(Piece(chunk, [view[start : start + entry.size]], self.data_size))
                    self.data_size = align(self.data_size + entry.size)
                    self.pairs.add(entry, [chunk])
                    continue
                self._file = FileCutter(item, self.data_size, pieces)
                self.data_size = align(self.data_size + entry.size)
                self._payload(view)
            else:
                self.pairs.add(entry, [])
        self._position += len(block)
        return pieces

    def finish(self) -> None:
        """Raise TarInvalid when the stream stopped inside an entry."""
        self._scanner.finish()

    def write_table(self, path: Path, blob_size: int) -> None:
        """Write the table of what was unpacked, all pieces written. Blocking; errors as `table_build.build_table`."""
        listing = Listing.of(zip(self.pairs.entries, self.pairs.tags, strict=True))
        write_table(path, LayerFacts(FORM_PLAIN, blob_size, blob_size), listing, self.pairs.survivors)

    def _payload(self, view: memoryview) -> None:
        file = self._file
        assert file is not None
        item = file.item
        start = max(item.payload - self._position, 0)
        stop = max(item.payload + item.stored - self._position, 0)
        file.feed(view[start : min(stop, len(view))])
        if stop <= len(view):
            file.finish()
            self.pairs.add(item.entry, file.chunks)
            self._file = None


def _joined(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in blocks of _LEAST to 1 MiB, the last excepted."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        if held and size + len(block) > STEP:
            yield b"".join(held)
            held, size = [], 0
        if not held and len(block) >= _LEAST:
            yield block
            continue
        held.append(block)
        size += len(block)
        if size >= _LEAST:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


class _Blob:
    """The compressed bytes: hashed and counted as they are read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sha256 = hashlib.sha256()
        self._head = b""
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        while block := os.read(self._fd, _INPUT):
            if self.size < LONGEST_MAGIC:
                self._head += block[:LONGEST_MAGIC]
            self._sha256.update(block)
            self.size += len(block)
            yield block

    @property
    def is_tar(self) -> bool:
        """Whether the blob is its own tar. Known once anything came out of the decoder."""
        return not is_compressed(self._head)

    @property
    def digest(self) -> str:
        return digests.text(self._sha256.digest())


def _unpack(job: dict[str, Any], source: int) -> None:
    fd = os.open(job["data"], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    blob, diff, unpacker = _Blob(source), hashlib.sha256(), Unpacker()
    compressed = Ahead(blob, UNPACK_INPUTS, to_the_end=True)
    blocks = Ahead(_joined(decompress(compressed)), UNPACK_BLOCKS)
    hashing, writing = Sink(diff.update, UNPACK_BLOCKS), Sink(PieceWriter(fd).write, UNPACK_BLOCKS)
    broken: FormatError | None = None
    try:
        for block in blocks:
            if not blob.is_tar:  # else its digest is the diff ID
                hashing.put(block)
            if pieces := unpacker.feed(block):
                writing.put(pieces)
    except FormatError as error:
        broken = error  # damaged bytes rarely decode; whether they are the promised ones decides who is to blame
    blocks.drop()
    compressed.drop()
    compressed.wait()  # padding behind the compressed stream belongs to the blob's digest
    if blob.digest != job["blob_digest"]:
        raise DigestMismatch(f"layer {job['blob_digest']}", job["blob_digest"], blob.digest)
    if broken is not None:
        raise broken
    hashing.finish()
    diff_id = blob.digest if blob.is_tar else digests.text(diff.digest())
    if job["diff_id"] and diff_id != job["diff_id"]:
        raise DiffIdMismatch(job["blob_digest"], job["diff_id"], diff_id)
    unpacker.finish()
    writing.finish()
    os.ftruncate(fd, unpacker.data_size)
    os.close(fd)
    unpacker.write_table(Path(job["table"]), blob.size)


def main() -> int:
    """Unpack standard input as the job in the first argument says. The answer on standard output tells the result."""
    gc.disable()  # nothing here is garbage before the end
    sys.setswitchinterval(_SWITCH)
    job = json.loads(sys.argv[1])
    limit(resource.RLIMIT_AS, CHILD_MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, job["seconds"])
    go_first()
    answer: dict[str, Any] = {"ok": True}
    try:
        _unpack(job, sys.stdin.fileno())
    except LazyfsError as error:
        answer = refuse(error)
    except MemoryError:
        answer = refuse(TarInvalid("it has more entries than fit into memory"))
    except OSError as error:
        if error.errno == errno.EFBIG:
            answer = refuse(TarInvalid("it claims more content than a file system takes"))
        else:
            kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreBroken
            answer = refuse(kind(f"a layer can't be unpacked into the store: {error.strerror}"))
    if "error" in answer and answer["error"]["class"] != StoreFull.__name__:  # how far that came is looked at
        with suppress(OSError):
            os.unlink(job["data"])  # whoever started us may be gone
    json.dump(answer, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # no waiting for threads in the middle of something that nobody wants any more


if __name__ == "__main__":
    sys.exit(main())
