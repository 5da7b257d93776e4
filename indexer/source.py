"""The source of a layer: its blob as it arrives, hashed, and decompressed by what its first bytes say it is.

Media types lie often enough (Docker's "tar.gzip" around zstd, OCI's "tar" around gzip) that they are not asked.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard

from lazyfs.errors import FrameInvalid, Interrupted, RegistryError, StoreBroken
from lazyfs.oci import Descriptor
from lazyfs.registry.repository import Repository
from lazyfs.units import KiB, MiB

_READ = 256 * KiB  # bytes asked of the registry at once
_STEP = MiB  # bytes decompressed at once: bounds what a bomb can do to our memory
_DEPTH = 4  # blocks between the two threads
_WINDOW = 128 * MiB  # the largest zstd window taken, as the zstd program's default
_RESUMES = 5  # broken transfers in a row without a byte between them
_POLL = 0.2  # seconds until a cancelled conversion is noticed
_SLOWEST = 50_000  # bytes/s; a source slower than this is given up after the grace
_GRACE = 600.0  # seconds

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4"}


class BlobSource:
    """One blob, read in order from its repository; resumed where a connection broke."""

    def __init__(self, repository: Repository, blob: Descriptor, advance: Callable[[int], None]) -> None:
        self.size = 0  # bytes read so far
        self._repository = repository
        self._blob = blob
        self._advance = advance
        self._sum = hashlib.sha256()

    @property
    def digest(self) -> str:
        """sha256 of what was read."""
        return "sha256:" + self._sum.hexdigest()

    def blocks(self) -> Iterator[bytes]:
        """Yield the blob's bytes from where it stands. Blocks. Raise RegistryError."""
        total = self._blob.size
        deadline = time.monotonic() + _GRACE + total / _SLOWEST
        failures = 0
        while self.size < total:
            try:
                with self._repository.fetch(
                    self._blob.digest, self.size, total - self.size, deadline=deadline
                ) as stream:
                    while block := stream.read(_READ):
                        failures = 0
                        self._sum.update(block)
                        self.size += len(block)
                        self._advance(len(block))
                        yield block
            except RegistryError as error:
                failures += 1
                if not error.temporary or failures > _RESUMES or time.monotonic() > deadline:
                    raise


def decompressed(blob: BlobSource, copy: BinaryIO | None = None) -> Iterator[bytes]:
    """Yield the tar inside of `blob`: plain, gzip (any number of members) or zstd (any number of frames).

    Blocks on the network. No block is larger than 1 MiB. What arrives is also written to `copy`. The blob is read to
    its end. Raise RegistryError; FrameInvalid for damage, and for compressions that no layer may have; StoreBroken when
    `copy` fails.
    """
    blocks = blob.blocks() if copy is None else _copied(blob.blocks(), copy)
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 8:
            break
    rest = _chain(head, blocks)
    if head.startswith(_GZIP):
        yield from _gunzip(rest)
    elif head.startswith(_ZSTD) or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        yield from _unzstd(rest)
    else:
        for magic, name in _OTHERS.items():
            if head.startswith(magic):
                raise FrameInvalid(f"the layer is compressed with {name}, which is not allowed for layers")
        yield from rest


def _copied(blocks: Iterator[bytes], target: BinaryIO) -> Iterator[bytes]:
    for block in blocks:
        try:
            target.write(block)
        except OSError as error:
            raise StoreBroken(f"a temporary file can't be written: {error.strerror}") from None
        yield block


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _gunzip(blocks: Iterator[bytes]) -> Iterator[bytes]:
    inflate = zlib.decompressobj(31)
    begun = False  # whether this member has had a byte
    try:
        for block in blocks:
            data = block
            while data:
                if inflate.eof:
                    inflate = zlib.decompressobj(31)
                begun = True
                out = inflate.decompress(data, _STEP)
                data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
                if out:
                    yield out
        while begun and not inflate.eof:
            out = inflate.decompress(b"", _STEP)
            if not out and not inflate.eof:
                raise FrameInvalid("the layer's gzip stream ends too early")
            yield out
    except zlib.error as error:
        raise FrameInvalid(f"the layer's gzip stream is damaged: {error}") from None


def _unzstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    # A stream cut short ends quietly here; the diff ID tells.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        with decompressor.stream_reader(
            _Readable(blocks),  # type: ignore[arg-type]
            read_size=_READ,
            read_across_frames=True,
        ) as reader:
            while out := reader.read(_STEP):
                yield out
    except zstandard.ZstdError as error:
        raise FrameInvalid(f"the layer's zstd stream is damaged: {error}") from None
    except MemoryError:
        raise FrameInvalid(f"the layer's zstd stream wants a window of more than {_WINDOW} bytes") from None


class _Readable:
    """An iterator of blocks as the file that zstandard wants to read."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        block = self._left or next(self._blocks, b"")
        if size < 0:
            raise AssertionError("unreachable: the reader asks for pieces")
        self._left = block[size:]
        return block[:size] if self._left else block


class Pump:
    """Runs an iterator in a thread of its own, a few blocks ahead of the one who iterates over the pump.

    The thread is a daemon: one that hangs in a network read holds neither clean-up nor the end of the process.
    """

    def __init__(self, blocks: Iterator[bytes], cancelled: threading.Event) -> None:
        self._blocks = blocks
        self._cancelled = cancelled
        self._ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_DEPTH)
        self._ended = False  # the last thing was taken out of the queue; nothing will come any more
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks not yet taken. Raise what the iterator raised, or Interrupted soon after cancellation."""
        while not self._ended:
            try:
                block = self._ready.get(timeout=_POLL)
            except queue.Empty:
                if self._cancelled.is_set():
                    raise Interrupted("the conversion was cancelled") from None
                continue
            if isinstance(block, BaseException):
                self._ended = True
                raise block
            if block is None:
                self._ended = True
                return
            if self._cancelled.is_set():
                raise Interrupted("the conversion was cancelled")
            yield block

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for block in self._blocks:
                if not self._put(block):
                    return
        except BaseException as error:  # whatever it is, it belongs to the one who waits for us
            last = error
        self._put(last)

    def _put(self, block: bytes | BaseException | None) -> bool:
        while not self._cancelled.is_set():
            try:
                self._ready.put(block, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False
