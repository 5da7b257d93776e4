"""Plain layers, those without a TOC that we read: unpacked whole into chunks and a layer table, checked on the way.

The work is done in a process of its own (`main`), fed with the blob through a pipe: hashing,
inflating and parsing don't hold the daemon up, and what the tar makes of memory goes away with it. The result has the
shape of every other layer, so that it is mapped, verified on each read, and evictable.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from lazyfs import digest as digests
from lazyfs.child import MEMORY, command, limit, read_answer, refuse
from lazyfs.errors import (
    BadAnswer,
    DiffIdMismatch,
    DigestMismatch,
    FormatError,
    LazyfsError,
    RegistryError,
    StoreBroken,
    StoreFull,
    TarInvalid,
)
from lazyfs.format.entry import Chunk, Kind
from lazyfs.format.inflate import open_stream
from lazyfs.format.namespace import Namespace
from lazyfs.format.table import FORM_PLAIN
from lazyfs.format.table_build import LayerFacts, write_table
from lazyfs.format.tar import TarItem, TarScanner
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB, align

CHUNK = MiB  # bytes
_BLOCK = MiB  # bytes of one read from the pipe
_MAX_CHUNKS = 1 << 22  # of one layer: 4 TiB, most of it holes
_ZERO_DIGEST = hashlib.sha256(bytes(CHUNK)).digest()
_WAIT = 60.0  # seconds that the child may take for table and answer after its last byte
_CPU_BASE = 120  # seconds of processor time for any layer: tens of gigabytes of zeros, or millions of names
_CPU_RATE = 1_000_000  # bytes of blob for each further second; honest ones need a tenth of it
_RESUMES = 5  # broken transfers in a row without a byte between them


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """What to unpack and what it must turn out to be. Sizes in bytes."""

    blob_digest: str
    blob_size: int
    diff_id: str
    data: Path  # chunks go here, in data space
    table: Path


def unpack_plain(repository: Repository, layer: PlainLayer, on_bytes: Callable[[int], None]) -> None:
    """Fetch a whole blob and unpack it into `layer.data` and `layer.table`. Blocking, for as long as the fetch takes.

    Raise RegistryError, DigestMismatch, DiffIdMismatch, FormatError or StoreError; then neither file counts.
    """
    job = {
        "blob_digest": layer.blob_digest, "blob_size": layer.blob_size, "diff_id": layer.diff_id,
        "data": os.fspath(layer.data), "table": os.fspath(layer.table),
        "seconds": _CPU_BASE + layer.blob_size // _CPU_RATE,
    }  # fmt: skip
    words = command("lazyfs.chunks.plain", json.dumps(job))
    try:
        # Unbuffered: what is left in a buffer would be written when the pipe is closed, and fail there.
        child = subprocess.Popen(
            words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise StoreBroken(f"the unpacker can't be started: {error.strerror}") from None
    with child:
        assert child.stdin is not None
        try:
            _pour(repository, layer, child.stdin, on_bytes)
        except BrokenPipeError:
            pass  # the child gave up; its answer says why
        except BaseException:
            child.kill()
            raise
        try:
            answer, complaint = child.communicate(timeout=_WAIT)
        except subprocess.TimeoutExpired:
            child.kill()
            raise TarInvalid(f"layer {layer.blob_digest} took more than {_WAIT:.0f} s to put in order") from None
    read_answer(answer, complaint, child.returncode, TarInvalid)


def _pour(repository: Repository, layer: PlainLayer, pipe: IO[bytes], on_bytes: Callable[[int], None]) -> None:
    """Send the whole blob down the pipe, resumed where a connection broke."""
    done = failures = 0
    while done < layer.blob_size:
        try:
            with repository.fetch(layer.blob_digest, done, layer.blob_size - done) as stream:
                while data := stream.read(_BLOCK):
                    _write(pipe, data)
                    done += len(data)
                    failures = 0
                    on_bytes(len(data))
            if done < layer.blob_size:
                raise BadAnswer(repository.host, f"layer {layer.blob_digest} ends after {done} bytes")
        except RegistryError as error:
            failures += 1
            if not error.temporary or failures > _RESUMES:
                raise
            time.sleep(0.05 * 2**failures)


def _write(pipe: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


class _Hashing:
    """A stream that hashes and counts what is read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data


class _File:
    """A regular file while its payload passes by: cut into chunks, hashed, written at its place in data space."""

    def __init__(self, item: TarItem, base: int, fd: int) -> None:
        self.item = item
        self.base = base
        self.chunks: list[Chunk] = []
        self._fd = fd
        self._buffer = bytearray()
        self._offset = 0  # in the file, of the buffer's start
        self._runs = list(item.sparse) if item.sparse is not None else [(0, item.stored)]
        self._run = 0
        self._in_run = 0

    def feed(self, payload: memoryview) -> None:
        """Take stored bytes, in order; holes of a sparse file are put in between."""
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
        self._pad(self.item.entry.size)
        if self._buffer:
            self._cut()

    def _pad(self, until: int) -> None:
        if self._in_run:
            return
        while (missing := until - self._offset - len(self._buffer)) > 0:
            if not self._buffer and missing >= CHUNK:
                self._append(CHUNK, _ZERO_DIGEST)
            else:
                self._add(memoryview(bytes(min(missing, CHUNK - len(self._buffer)))))

    def _add(self, data: memoryview) -> None:
        while data:
            take = CHUNK - len(self._buffer)
            self._buffer += data[:take]
            data = data[take:]
            if len(self._buffer) == CHUNK:
                self._cut()

    def _cut(self) -> None:
        data = bytes(self._buffer)
        self._buffer.clear()
        digest = hashlib.sha256(data).digest()
        if digest != _ZERO_DIGEST:  # a file of zeros takes no room: a small blob must not fill a disk
            _write_at(self._fd, data, self.base + self._offset)
        self._append(len(data), digest)

    def _append(self, size: int, digest: bytes) -> None:
        if len(self.chunks) >= _MAX_CHUNKS:
            raise TarInvalid("is too large for a layer", self.item.entry.path)
        # A plain layer has no frames: its chunks carry their place in data space instead of one in the blob.
        self.chunks.append(Chunk(self._offset, size, self.base, 0, digest))
        self._offset += size


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:  # a disk that is just filling up takes part of it, and says why the next time
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


class Unpacker:
    """Turn a tar stream into chunks in `fd` and entries for a table. Blocking; raises TarInvalid, OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._scanner = TarScanner()
        self._position = 0  # stream offset of the next block
        self._base = 0  # data offset of the next file
        self._file: _File | None = None
        self.pairs: Namespace[list[Chunk]] = Namespace()

    def feed(self, block: bytes) -> None:
        view = memoryview(block)
        if self._file is not None:
            self._payload(view)
        for item in self._scanner.feed(block):
            entry = item.entry
            if entry.kind is Kind.REG and entry.size:
                self._file = _File(item, self._base, self._fd)
                self._base = align(self._base + entry.size)
                self._payload(view)
            else:
                self.pairs.add(entry, [])
        self._position += len(block)

    def finish(self) -> None:
        self._scanner.finish()
        os.ftruncate(self._fd, self._base)

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


def _unpack(job: dict[str, Any], source: BinaryIO) -> None:
    blob = _Hashing(source)
    diff = hashlib.sha256()
    fd = os.open(job["data"], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        unpacker = Unpacker(fd)
        broken: FormatError | None = None
        try:
            stream = open_stream(blob)
            while block := stream.read(_BLOCK):
                diff.update(block)
                unpacker.feed(block)
        except FormatError as error:
            broken = error  # damaged bytes rarely decode; whether they are the promised ones decides who is to blame
        while blob.read(_BLOCK):
            pass  # padding behind the compressed stream belongs to the blob's digest
        actual = digests.text(blob.sha256.digest())
        if actual != job["blob_digest"]:
            raise DigestMismatch(f"layer {job['blob_digest']}", job["blob_digest"], actual)
        if broken is not None:
            raise broken
        diff_id = digests.text(diff.digest())
        if job["diff_id"] and diff_id != job["diff_id"]:
            raise DiffIdMismatch(job["blob_digest"], job["diff_id"], diff_id)
        unpacker.finish()
    finally:
        os.close(fd)
    write_table(Path(job["table"]), LayerFacts(FORM_PLAIN, blob.size, blob.size), unpacker.pairs.finish())


def main() -> int:
    """Unpack standard input as the job in the first argument says. The answer on standard output tells the result."""
    gc.disable()  # nothing here is garbage before the end
    job = json.loads(sys.argv[1])
    limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, job["seconds"])
    answer: dict[str, Any] = {"ok": True}
    try:
        _unpack(job, sys.stdin.buffer)
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
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
