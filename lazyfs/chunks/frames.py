"""One GET of neighbouring extents, decoded, verified and stored frame by frame as it streams. For worker threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lazyfs import digest as digests
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.link import Flow
from lazyfs.errors import DigestMismatch, FrameInvalid, RegistryTimeout
from lazyfs.format.codec import FrameDecoder
from lazyfs.format.members import MemberDecoder
from lazyfs.format.table import FORM_ESTARGZ, LayerTable
from lazyfs.limits import MAX_DECODED
from lazyfs.registry.repository import ByteStream, Repository
from lazyfs.units import MiB

_READ = 1 * MiB  # bytes of one read from a stream
PIECE = 256 << 10  # bytes of one read while they are counted
_FIRST_PIECE = 64 << 10  # bytes of the first one: what follows it tells the link's rate
_TOGETHER = 16 << 10  # bytes; smaller frames are read from the network and handed on several at a time
_thread = threading.local()


def decoder() -> FrameDecoder:
    """Return this thread's decoder: zstd contexts must not be shared."""
    found: FrameDecoder | None = getattr(_thread, "decoder", None)
    if found is None:
        found = _thread.decoder = FrameDecoder()
    return found


class PrefixDecoder(Protocol):
    """What the frames of any form are read with."""

    def decode_prefix(self, data: bytes | memoryview, size: int, /) -> bytes: ...


def decoder_for(form: int) -> PrefixDecoder:
    """Return this thread's decoder for the frames of a form (FORM_*): gzip members, or zstd frames."""
    return MemberDecoder() if form == FORM_ESTARGZ else decoder()


@dataclass(frozen=True, slots=True)
class Sample:
    """How a request went, for the scheduler: seconds to the first byte; bytes and seconds of the body behind its first
    piece, which had time to arrive while the header was read."""

    first_byte: float
    size: int
    seconds: float


def read_exactly(stream: ByteStream, size: int) -> bytes:
    """Read `size` bytes of a stream that promises at least as many. Blocking; raises RegistryError."""
    data = stream.read(min(size, _READ))
    if len(data) == size:
        return data
    parts, have = [data], len(data)
    while have < size:
        data = stream.read(min(size - have, _READ))
        parts.append(data)
        have += len(data)
    return b"".join(parts)


def frame_chunks(layer: ServedLayer, frame: int, decoded: bytes) -> dict[int, bytes]:
    """Cut a decoded frame into its chunks and check each one's digest. Raise DigestMismatch or FrameInvalid."""
    table = layer.table
    out: dict[int, bytes] = {}
    for chunk in table.frame_chunks(frame):
        if table.chunk_frame[chunk] != frame:
            continue  # a hole between two chunks of a sparse file
        start, size = table.chunk_inner[chunk], table.chunk_size[chunk]
        data = decoded if start == 0 and size == len(decoded) else decoded[start : start + size]
        if len(data) != size:
            raise FrameInvalid(f"frame {frame} of layer {layer.digest} is too short for its chunks")
        if digests.raw_of(data) != table.chunk_digest(chunk):
            raise DigestMismatch(
                f"chunk {chunk} of layer {layer.digest}",
                digests.text(table.chunk_digest(chunk)),
                digests.of(data),
            )
        out[chunk] = data
    return out


def prove_frame(layer: ServedLayer, frame: int, data: bytes) -> None:
    """Check the digests of a frame's chunks; `data`: its first `needed` compressed bytes. Blocking.

    The whole check must not pass over them: a chunk whose bytes are not the promised ones could be taken from another
    layer of the node that has the promised ones. Raise DigestMismatch or FrameInvalid.
    """
    wanted = frame_wanted(layer.table, frame)
    frame_chunks(layer, frame, decoder_for(layer.table.form).decode_prefix(data, wanted))


def store_chunks(layer: ServedLayer, chunks: dict[int, bytes], spare: bool = False) -> None:
    """Write verified chunks to the store, neighbours together. `spare`: see `LayerStore.write_run`."""
    run: list[bytes] = []
    first = -1
    for chunk, data in chunks.items():
        if run and chunk != first + len(run):
            layer.store.write_run(first, run, spare)
            run = []
        if not run:
            first = chunk
        run.append(data)
    if run:
        layer.store.write_run(first, run, spare)


def frame_wanted(table: LayerTable, frame: int) -> int:
    """Return how many decoded bytes from a frame's start hold all its chunks; headers or dead files may follow."""
    ends = (
        table.chunk_inner[chunk] + table.chunk_size[chunk]
        for chunk in table.frame_chunks(frame)
        if table.chunk_frame[chunk] == frame
    )
    return int(max(ends, default=0))


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a request whose body arrived whole: how it went, and the frames whose bytes were wrong."""

    sample: Sample
    damaged: dict[int, DigestMismatch | FrameInvalid]


def needed(table: LayerTable, frame: int) -> int:
    """Return how many compressed bytes at a frame's start hold all its chunks, whatever else its extent brings.

    zstd makes nothing larger by more than 1/256 and a header a block, deflate by less: an extent may be gigabytes of
    files that no name leads to, and neither memory nor a reader has room for them.
    """
    bound = frame_wanted(table, frame)
    return min(int(table.frame_blob_end[frame] - table.frame_blob_offset[frame]), bound + (bound >> 7) + _READ)


class _Nothing(ByteStream):
    """What is left where all is here."""

    def read(self, size: int) -> bytes:
        return b""

    def close(self) -> None:
        """There is nothing to close."""


class _Counted(ByteStream):
    """A stream whose bytes are counted as they come, in pieces small enough to tell a slow one soon."""

    def __init__(self, stream: ByteStream, flow: Flow) -> None:
        self._stream = stream
        self._flow = flow

    def read(self, size: int) -> bytes:
        if self._flow.dropped:
            raise RegistryTimeout("", "the rest of a range is asked for elsewhere")
        data = self._stream.read(min(size, PIECE if self._flow.came else _FIRST_PIECE))
        self._flow.count(time.monotonic(), len(data))
        return data

    def close(self) -> None:
        """Whoever opened the stream closes it."""


class _Body:
    """A body cut into frames. Tiny ones are read together, and `before` is called whenever the network may block."""

    def __init__(self, stream: ByteStream, size: int, before: Callable[[], None], flow: Flow, head: bytes) -> None:
        """`head` is here already; `size` bytes are to come."""
        self._stream = _Counted(stream, flow)
        self._left = size  # bytes that have not been read from the stream
        self._before = before
        self._buffer = head
        self._at = 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes. Blocking; raises RegistryError."""
        have = self._buffer[self._at : self._at + size]
        self._at += len(have)
        missing = size - len(have)
        if not missing:
            return have
        self._before()
        if missing >= _TOGETHER:
            self._left -= missing
            rest = read_exactly(self._stream, missing)
            return have + rest if have else rest
        self._buffer, self._at = read_exactly(self._stream, min(_TOGETHER, self._left)), missing
        self._left -= len(self._buffer)
        return have + self._buffer[:missing]


def fetch_frames(
    layer: ServedLayer,
    first: int,
    stop: int,
    deadline: float,
    deliver: Callable[[dict[int, dict[int, bytes]]], None],
    flow: Flow | None = None,
    head: bytes = b"",
    is_spare: Callable[[], bool] = lambda: False,
) -> Fetched:
    """Fetch frames [first, stop) with one range request; call `deliver` with the chunks by frame as they are verified.

    No request is made where `head` is all of it.

    Blocking, to be run in a worker thread; `deadline` is a `time.monotonic()` value. Chunks are delivered before they
    are written to the store, so that no reader waits for the disk; at the next delivery, or when this returns, they are
    written. A frame with wrong bytes is passed over: its neighbours are no worse for it. `flow` counts the bytes;
    `head` are those that need not be asked for; `is_spare` tells whether still nobody has asked for any of it. Raise
    RegistryError; frames delivered before that are good.
    """
    flow = flow or Flow()
    table, frames = layer.table, decoder_for(layer.table.form)
    start = table.frame_blob_offset[first]
    size = table.frame_blob_offset[stop - 1] + needed(table, stop - 1) - start
    damaged: dict[int, DigestMismatch | FrameInvalid] = {}
    ready: dict[int, dict[int, bytes]] = {}
    early: list[tuple[int, int, bytes]] = []  # (extent, blob offset, compressed bytes)

    waiting = 0  # decoded bytes in `ready`

    def hand_over() -> None:
        nonlocal ready, waiting
        waiting = 0
        if layer.dropped:  # its store may be closed, and its blob served anew from another table
            ready = {}
            early.clear()
        if not ready:
            return
        check = layer.check
        if check is not None:
            # Before the delivery: whoever waits for the frames on behalf of the check looks here next.
            check.spool.put_run([extent for extent in early if extent[0] >= check.next])
        done, ready = ready, {}
        early.clear()
        deliver(done)
        chunks = {chunk: data for chunks in done.values() for chunk, data in chunks.items()}
        store_chunks(layer, chunks, is_spare())

    began = time.monotonic()
    left = size - len(head)
    with (
        layer.repository.fetch(layer.digest, start + len(head), left, deadline=deadline) if left else _Nothing()
    ) as stream:
        first_byte = time.monotonic() - began
        flow.answered = True
        body = _Body(stream, left, hand_over, flow, head)
        for frame in range(first, stop):
            extent = table.frame_blob_end[frame] - table.frame_blob_offset[frame]
            data = body.take(needed(table, frame))
            if len(data) == extent:
                early.append((frame + 1, table.frame_blob_offset[frame], data))
            try:
                decoded = frames.decode_prefix(data, frame_wanted(table, frame))
                ready[frame] = frame_chunks(layer, frame, decoded)
                waiting += len(decoded)
            except (DigestMismatch, FrameInvalid) as error:
                damaged[frame] = error
                if not head:  # else the wrong bytes may be those of whoever sent the head
                    stream.reject(error.message)
                if early and early[-1][0] == frame + 1:
                    del early[-1]
            if waiting > MAX_DECODED:
                hand_over()
            over = extent - len(data) if frame + 1 < stop else 0
            while over:
                over -= len(body.take(min(over, _READ)))
    sample = Sample(first_byte, flow.came - flow.first, time.monotonic() - flow.since)
    hand_over()
    return Fetched(sample, damaged)


def fetch_piece(
    layer: ServedLayer, blob_offset: int, size: int, deadline: float | None, flow: Flow
) -> tuple[bytes, Sample]:
    """Fetch some bytes of a layer's blob, see `fetch_bytes`."""
    return fetch_bytes(layer.repository, layer.digest, blob_offset, size, deadline, flow)


def fetch_bytes(
    repository: Repository, digest: str, blob_offset: int, size: int, deadline: float | None, flow: Flow
) -> tuple[bytes, Sample]:
    """Fetch some bytes of a blob, and tell how that went. Blocking, for worker threads. Raise RegistryError."""
    began = time.monotonic()
    with repository.fetch(digest, blob_offset, size, deadline=deadline) as stream:
        first_byte = time.monotonic() - began
        flow.answered = True
        data = read_exactly(_Counted(stream, flow), size)
    return data, Sample(first_byte, flow.came - flow.first, time.monotonic() - flow.since)
