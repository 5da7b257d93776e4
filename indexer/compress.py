"""The threads that compress frames, each with a context of its own, and what a frame of each form is made by."""

from __future__ import annotations

import hashlib
import struct
import threading
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import zstandard

from indexer.options import LEVELS, OutputForm
from lazyfs.format.entry import Chunk
from lazyfs.limits import COMPRESSION_MEMORY
from lazyfs.units import KiB, MiB

FRAME_SIZE = MiB  # bytes; a frame that holds more than one chunk is not larger
FRAME_LIMIT = FRAME_SIZE + 64 * KiB  # bytes; no frame is larger
_DEFLATE_MEMORY = MiB  # bytes; a deflate state's window, tables and buffers
# No time, no extra flags, unknown system: the same bytes wherever it is made. Source: RFC 1952 section 2.3.
_GZIP_HEADER = bytes.fromhex("1f8b08000000000000ff")
_GZIP_END = struct.Struct("<II")


@dataclass(slots=True)
class Batch:
    """Frames on their way to a compressor: their bytes, end to end, and where each begins.

    `places` has for each chunk its offset in `data`; the chunks' inner offsets and digests are filled in.
    """

    data: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=lambda: [0])
    chunks: list[Chunk] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def frame_of(self, place: int) -> int:
        """Return the number of the frame that holds the byte at `place`."""
        return bisect_right(self.starts, place) - 1


class _Packer(Protocol):
    """Compresses one frame. One thread's."""

    def compress(self, data: memoryview, /) -> bytes: ...


class Compressors:
    """A pool of threads with a context each, shared by all layers under conversion. Use it in a `with`."""

    def __init__(self, level: int, jobs: int, form: OutputForm = OutputForm.ZSTD_CHUNKED) -> None:
        self.level = level
        self.form = form
        context = _DEFLATE_MEMORY
        if form is not OutputForm.ESTARGZ:
            context = _parameters(level).estimated_compression_context_size()
        affordable = COMPRESSION_MEMORY // (context + FRAME_LIMIT)
        self.threads = max(1, min(jobs, affordable))
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(self.threads, "compress")

    def __enter__(self) -> Compressors:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, batch: Batch) -> Future[list[bytes]]:
        """Compress a batch in the background; its chunks get digests and inner offsets. It is given away.

        The result has one compressed frame for each of its starts.
        """
        return self._pool.submit(self._compress, batch)

    def _compress(self, batch: Batch) -> list[bytes]:
        packer: _Packer | None = getattr(self._local, "packer", None)
        if packer is None:
            # A context used by two threads crashes the process.
            packer = self._local.packer = _packer(self.form, self.level)
        with memoryview(batch.data) as view:
            for chunk, place in zip(batch.chunks, batch.places, strict=True):
                chunk.digest = hashlib.sha256(view[place : place + chunk.size]).digest()
                chunk.inner_offset = place - batch.starts[batch.frame_of(place)]
            return [packer.compress(view[start:end]) for start, end in pairwise([*batch.starts, len(view)])]


def _packer(form: OutputForm, level: int) -> _Packer:
    if form is OutputForm.ESTARGZ:
        return _Members(level)
    if form is OutputForm.PODMAN:
        # Frames from a few bytes on: zstd fits its tables to each, which costs less than clearing large ones.
        return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
    return zstandard.ZstdCompressor(compression_params=_parameters(level))


class _Members:
    """gzip members by zlib-ng, whose version is held in pyproject.toml because it decides the bytes."""

    def __init__(self, level: int) -> None:
        from zlib_ng import zlib_ng

        self._level = level
        self._library = zlib_ng

    def compress(self, data: memoryview, /) -> bytes:
        library = self._library
        deflate = library.compressobj(self._level, library.DEFLATED, -15, 8)
        body = deflate.compress(data)
        end = _GZIP_END.pack(library.crc32(data), len(data) & 0xFFFFFFFF)
        return b"".join((_GZIP_HEADER, body, deflate.flush(), end))


def gzip_member(data: bytes, level: int) -> bytes:
    """Return `data` as one gzip member, made as the members of a layer are. Blocks (CPU, GIL released)."""
    return _Members(level).compress(memoryview(data))


def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """Return the parameters of a level for frames of our size.

    At the default level with tables of 64 Ki entries, that stay in a core's second-level cache: measured on a Debian
    tar 10 to 15 % faster, and 0.3 % larger, than what zstd takes for a MiB.
    """
    default = LEVELS[OutputForm.ZSTD_CHUNKED][2]
    tables = {"hash_log": 16, "chain_log": 16} if level == default else {}
    return zstandard.ZstdCompressionParameters.from_level(
        level, source_size=FRAME_LIMIT, write_content_size=True, **tables
    )
