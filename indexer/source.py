"""The source of a layer: its blob as it arrives, hashed, and decompressed by what its first bytes say it is."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

from lazyfs.errors import Interrupted, RegistryError, StoreBroken
from lazyfs.format.inflate import decompress
from lazyfs.limits import SLOWEST_SOURCE, SOURCE_DEPTH, SOURCE_GRACE
from lazyfs.oci import Descriptor
from lazyfs.registry.repository import Repository
from lazyfs.units import KiB

_READ = 256 * KiB  # bytes asked of the registry at once
_RESUMES = 5  # broken transfers in a row without a byte between them
_POLL = 0.2  # seconds until a cancelled conversion is noticed


class BlobSource:
    """One blob, read in order from its repository; resumed where a connection broke.

    `hashed` False leaves the sum to somebody who hashes the same bytes anyway; then there is no `digest`.
    """

    def __init__(
        self, repository: Repository, blob: Descriptor, advance: Callable[[int], None], *, hashed: bool = True
    ) -> None:
        self.size = 0  # bytes read so far
        self.hashed = hashed
        self._repository = repository
        self._blob = blob
        self._advance = advance
        self._sum = hashlib.sha256()

    @property
    def digest(self) -> str:
        """sha256 of what was read."""
        assert self.hashed
        return "sha256:" + self._sum.hexdigest()

    def blocks(self) -> Iterator[bytes]:
        """Yield the blob's bytes from where it stands. Blocks. Raise RegistryError."""
        total = self._blob.size
        deadline = time.monotonic() + SOURCE_GRACE + total / SLOWEST_SOURCE
        failures = 0
        while self.size < total:
            try:
                with self._repository.fetch(
                    self._blob.digest, self.size, total - self.size, deadline=deadline
                ) as stream:
                    while block := stream.read(_READ):
                        failures = 0
                        if self.hashed:
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
    return decompress(blob.blocks() if copy is None else _copied(blob.blocks(), copy))


def _copied(blocks: Iterator[bytes], target: BinaryIO) -> Iterator[bytes]:
    for block in blocks:
        try:
            target.write(block)
        except OSError as error:
            raise StoreBroken(f"a temporary file can't be written: {error.strerror}") from None
        yield block


class Pump:
    """Runs an iterator in a thread of its own, a few blocks ahead of the one who iterates over the pump.

    The thread is a daemon: one that hangs in a network read holds neither clean-up nor the end of the process.
    """

    def __init__(self, blocks: Iterator[bytes], cancelled: threading.Event) -> None:
        self._blocks = blocks
        self._cancelled = cancelled
        self._ready: queue.Queue[bytes | BaseException | None] = queue.Queue(SOURCE_DEPTH)
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
