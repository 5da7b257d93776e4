"""One layer checked from its first byte to its last, in bounded memory: what `lazyfs verify` does to each."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from lazyfs import child
from lazyfs import digest as digests
from lazyfs.chunks.feed import feed_frames
from lazyfs.chunks.frames import decoder_for, frame_wanted, needed
from lazyfs.chunks.whole import WholeCheck
from lazyfs.cli import common
from lazyfs.errors import (
    BadAnswer,
    DiffIdMismatch,
    DigestMismatch,
    FormatError,
    FrameInvalid,
    RegistryError,
    StoreBroken,
)
from lazyfs.format.inflate import open_stream
from lazyfs.format.lazy import TABLE_FORMS, NotLazy, TocSource, read_toc, toc_source
from lazyfs.format.table import LayerTable
from lazyfs.format.tar import TarScanner
from lazyfs.oci import Descriptor
from lazyfs.registry.repository import ByteStream, Repository
from lazyfs.units import MiB

_READ = MiB  # bytes of one read
_TRIES = 5  # of a broken stream, without any byte in between


@dataclass(frozen=True, slots=True)
class Verdict:
    """A layer that is what it promises. `form`: of a lazy layer its kind, of a plain one its media type.

    `checked` names what was compared; `entries` is -1 for plain layers.
    """

    form: str
    checked: tuple[str, ...]
    entries: int


class BlobReader:
    """A blob from start to end as a stream, hashed on the way, resumed where a connection broke off. One thread.

    `read(n)` gives 1 to n bytes, b"" at the end; raises RegistryError when the registry keeps failing.
    """

    def __init__(self, repository: Repository, descriptor: Descriptor, advance: Callable[[int], None]) -> None:
        self._repository = repository
        self._digest = descriptor.digest
        self._size = descriptor.size
        self._advance = advance
        self._stream: ByteStream | None = None
        self._hash = hashlib.sha256()
        self.position = 0  # blob offset of the next byte

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes, at most `size` (and never more than one MiB). Blocking."""
        size = min(size if size >= 0 else _READ, _READ, self._size - self.position)
        if size <= 0:
            return b""
        data = self._read_resumed(size)
        self.position += len(data)
        self._hash.update(data)
        self._advance(len(data))
        return data

    def read_exactly(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer only at the blob's end. Blocking."""
        parts = []
        while size > 0 and (data := self.read(size)):
            parts.append(data)
            size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check(self) -> None:
        """Read what is left and raise DigestMismatch unless the whole is what its descriptor promises."""
        while self.read(_READ):
            pass
        actual = digests.text(self._hash.digest())
        if actual != self._digest:
            raise DigestMismatch(f"layer {self._digest}", self._digest, actual)

    def close(self) -> None:
        """Close the stream under way, if any."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_resumed(self, size: int) -> bytes:
        for attempt in range(_TRIES):
            try:
                if self._stream is None:
                    self._stream = self._repository.fetch(self._digest, self.position, self._size - self.position)
                data = self._stream.read(size)
                if data:
                    return data
                raise BadAnswer(self._repository.host, f"layer {self._digest} ends after {self.position} bytes")
            except RegistryError as error:
                self.close()
                if not error.temporary or attempt == _TRIES - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last try returns or raises")


def verify_layer(
    repository: Repository, descriptor: Descriptor, diff_id: str, advance: Callable[[int], None]
) -> Verdict:
    """Check one layer whole; `advance` is told of the blob's bytes as they come. Blocking; one blob in bounded memory.

    Lazy layers: blob digest, diff ID, TOC digest, each chunk's digest, the TOC against the tar's headers. Others: blob
    digest, diff ID, and that the tar can be read. Raise TrustError, FormatError, RegistryError, StoreError.
    """
    source = toc_source(descriptor)
    try:
        if isinstance(source, NotLazy):
            return _verify_plain(repository, descriptor, diff_id, advance)
        return _verify_lazy(repository, descriptor, source, diff_id, advance)
    except FormatError:
        # Damaged bytes rarely decode. Whether they are the bytes that were promised decides who is to blame.
        with BlobReader(repository, descriptor, lambda size: None) as reader:
            reader.check()
        raise


def _verify_lazy(
    repository: Repository, descriptor: Descriptor, source: TocSource, diff_id: str, advance: Callable[[int], None]
) -> Verdict:
    try:
        with tempfile.TemporaryDirectory(prefix="lazyfs-verify-") as scratch:
            toc, out = Path(scratch, "toc"), Path(scratch, "table")
            found = read_toc(source, partial(common.fetch_bytes, repository, descriptor.digest))
            if isinstance(found, NotLazy):
                return _verify_plain(repository, descriptor, diff_id, advance)
            toc.write_bytes(found.raw)
            job = {
                "toc": str(toc), "out": str(out), "form": TABLE_FORMS[found.form], "blob_size": descriptor.size,
                "payload_end": found.payload_end,
            }  # fmt: skip
            child.run_job({"tables": [job]})
            table = LayerTable(out)
            try:
                with BlobReader(repository, descriptor, advance) as reader:
                    _feed(reader, table, WholeCheck(descriptor.digest, diff_id, table, descriptor.digest))
                entries = table.entries
            finally:
                table.close()
    except OSError as error:
        raise StoreBroken(f"no scratch space for the check: {error.strerror}") from None
    checked = ("blob digest", "diff ID", "TOC digest", "chunk digests", "TOC against tar")
    return Verdict(found.form.value, checked, entries)


def _feed(reader: BlobReader, table: LayerTable, whole: WholeCheck) -> None:
    """Give the check the blob in order, cut at the frames that the table names, each chunk's digest checked."""
    frames = decoder_for(table.form)
    _feed_extent(reader, whole, b"", table.frame_blob_offset[0] if table.frame_count else table.payload_end)
    for frame in range(table.frame_count):
        begin = reader.read_exactly(needed(table, frame))
        _check_chunks(table, frame, frames.decode_prefix(begin, frame_wanted(table, frame)))
        _feed_extent(reader, whole, begin, table.frame_blob_end[frame])
    while tail := reader.read(_READ):
        whole.feed_tail(tail)
    whole.finish()


def _feed_extent(reader: BlobReader, whole: WholeCheck, begin: bytes, end: int) -> None:
    """Give the check an extent that ends at blob offset `end`, of which `begin` was read already."""
    rest = begin
    while True:
        more = reader.read(min(end - reader.position, _READ))
        rest = feed_frames(whole, rest + more if rest else more, reader.position >= end or not more)
        if reader.position >= end or not more:
            return


def _check_chunks(table: LayerTable, frame: int, decoded: bytes) -> None:
    view = memoryview(decoded)
    for chunk in table.frame_chunks(frame):
        if table.chunk_frame[chunk] != frame:
            continue  # a hole of a sparse file: it has no bytes
        start, size = table.chunk_inner[chunk], table.chunk_size[chunk]
        if start + size > len(decoded):
            raise FrameInvalid(f"frame {frame} is too short for the chunks that the TOC puts there")
        digests.check(view[start : start + size], digests.text(table.chunk_digest(chunk)), f"chunk {chunk}")


def _verify_plain(
    repository: Repository, descriptor: Descriptor, diff_id: str, advance: Callable[[int], None]
) -> Verdict:
    with BlobReader(repository, descriptor, advance) as reader:
        unpacked = open_stream(reader)
        whole = hashlib.sha256()
        scanner = TarScanner()
        broken: FormatError | None = None
        while data := unpacked.read(_READ):
            whole.update(data)
            if broken is None:
                try:
                    scanner.feed(data)
                except FormatError as error:
                    broken = error  # a wrong digest is the worse news: go on to the end first
        reader.check()
        actual = digests.text(whole.digest())
        if actual != diff_id:
            raise DiffIdMismatch(descriptor.digest, diff_id, actual)
        if broken is not None:
            raise broken
        scanner.finish()
    return Verdict(descriptor.media_type, ("blob digest", "diff ID"), -1)
