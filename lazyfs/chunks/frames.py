"""One GET of neighbouring extents, decoded, verified and stored frame by frame as it streams. For worker threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lazyfs import digest as digests
from lazyfs.chunks.layer import ServedLayer
from lazyfs.errors import DigestMismatch, FrameInvalid
from lazyfs.format.codec import FrameDecoder
from lazyfs.format.table import LayerTable
from lazyfs.registry.repository import ByteStream
from lazyfs.units import MiB

_SLACK = 8 * MiB  # bytes of headers that a frame may hold behind its last chunk
_READ = 1 * MiB  # bytes of one read from a stream
_thread = threading.local()


def decoder() -> FrameDecoder:
    """Return this thread's decoder: zstd contexts must not be shared."""
    found: FrameDecoder | None = getattr(_thread, "decoder", None)
    if found is None:
        found = _thread.decoder = FrameDecoder()
    return found


@dataclass(frozen=True, slots=True)
class Sample:
    """How a request went, for the scheduler: seconds to the first byte, bytes and seconds of the body."""

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


def pass_over(stream: ByteStream, size: int) -> None:
    """Read and drop `size` bytes. Blocking; raises RegistryError."""
    while size > 0:
        size -= len(stream.read(min(size, _READ)))


def decode_extent(data: bytes, *, bound: int) -> bytes:
    """Decode all frames of an extent: a payload frame and frames of headers behind it. At most `bound` bytes come out.

    Raise FrameInvalid.
    """
    parts: list[bytes] = []
    view, size = memoryview(data), 0
    while view:
        part, used = decoder().decode_first(view, bound - size)
        parts.append(part)
        size += len(part)
        view = view[used:]
    return parts[0] if len(parts) == 1 else b"".join(parts)


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


def store_chunks(layer: ServedLayer, chunks: dict[int, bytes]) -> None:
    """Write verified chunks to the store, neighbours together."""
    run: list[bytes] = []
    first = -1
    for chunk, data in chunks.items():
        if run and chunk != first + len(run):
            layer.store.write_run(first, run)
            run = []
        if not run:
            first = chunk
        run.append(data)
    if run:
        layer.store.write_run(first, run)


def frame_bound(table: LayerTable, frame: int) -> int:
    """Return how many bytes a frame may decode to: its chunks, and a slack for headers between and behind them."""
    ends = (table.chunk_inner[chunk] + table.chunk_size[chunk] for chunk in table.frame_chunks(frame))
    return int(max(ends, default=0)) + _SLACK


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a request whose body arrived whole: how it went, and the frames whose bytes were wrong."""

    sample: Sample
    damaged: dict[int, DigestMismatch | FrameInvalid]


def needed(table: LayerTable, frame: int) -> int:
    """Return how many compressed bytes at a frame's start hold all of it, whatever else its extent brings behind it.

    zstd makes nothing larger by more than 1/256 and a header a block: an extent may be gigabytes of files that no name
    leads to, and neither memory nor a reader has room for them.
    """
    bound = frame_bound(table, frame)
    return min(int(table.frame_blob_end[frame] - table.frame_blob_offset[frame]), bound + (bound >> 7) + _READ)


def fetch_frames(
    layer: ServedLayer,
    first: int,
    stop: int,
    deadline: float,
    deliver: Callable[[int, dict[int, bytes]], None],
) -> Fetched:
    """Fetch frames [first, stop) with one range request; call `deliver(frame, chunks)` as each is decoded and verified.

    Blocking, to be run in a worker thread; `deadline` is a `time.monotonic()` value. Chunks are delivered before they
    are written to the store, so that no reader waits for the disk; when the next frame is delivered, or this returns,
    they are written. A frame with wrong bytes is passed over: its neighbours are no worse for it. Raise RegistryError;
    frames delivered before that are good.
    """
    table = layer.table
    start = table.frame_blob_offset[first]
    size = table.frame_blob_offset[stop - 1] + needed(table, stop - 1) - start
    damaged: dict[int, DigestMismatch | FrameInvalid] = {}
    began = time.monotonic()
    with layer.repository.fetch(layer.digest, start, size, deadline=deadline) as stream:
        first_byte = time.monotonic() - began
        for frame in range(first, stop):
            extent = table.frame_blob_end[frame] - table.frame_blob_offset[frame]
            data = read_exactly(stream, needed(table, frame))
            if frame + 1 < stop:
                pass_over(stream, extent - len(data))
            try:
                decoded, _ = decoder().decode_first(data, frame_bound(table, frame))
                chunks = frame_chunks(layer, frame, decoded)
            except (DigestMismatch, FrameInvalid) as error:
                damaged[frame] = error
                continue
            check = layer.check
            if check is not None and check.next <= frame + 1 and len(data) == extent:
                # Before the delivery: whoever waits for the frame on behalf of the check looks here next.
                check.spool.put(frame + 1, table.frame_blob_offset[frame], data)
            deliver(frame, chunks)
            store_chunks(layer, chunks)
    return Fetched(Sample(first_byte, size, time.monotonic() - began - first_byte), damaged)
