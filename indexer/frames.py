"""A tar stream cut into frames: which bytes go into which frame, and the order in which they are written.

The rule decides the blob's bytes, so it depends on the stream alone, never on block sizes, threads or timing:
- content is cut into chunks of at most the form's chunk size; a chunk never crosses a frame;
- shared frames (zstd-chunked, eStargz): a frame ends before a chunk that would make it larger than 1 MiB, so small
  files share frames with their headers;
- frames alone (podman's form): each chunk is a frame, and what lies between contents is a frame too;
- where no content comes for long (runs of headers, trailing zeros), a frame ends at FRAME_LIMIT bytes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import BinaryIO

from indexer.compress import FRAME_LIMIT, FRAME_SIZE, Batch, Compressors
from indexer.options import OutputForm
from lazyfs.errors import StoreBroken
from lazyfs.format.entry import Chunk
from lazyfs.units import KiB, MiB

CHUNK_SIZE = MiB  # bytes of content verified at once
PODMAN_CHUNK_SIZE = 256 * KiB  # bytes; what podman moves when a byte of a large file has changed
_EMPTY = hashlib.sha256().digest()


@dataclass(slots=True)
class Content:
    """One file's content in the blob. Digests and blob offsets are filled in when its frames are written."""

    chunks: list[Chunk] = field(default_factory=list)
    whole: bytes | None = None  # sha256 of a file of several chunks; others have it in their chunk
    blob_end: int = 0  # where the frame of the last chunk written ends, in the blob

    @property
    def digest(self) -> bytes:
        """The sha256 of the whole content."""
        if self.whole is not None:
            return self.whole
        return self.chunks[0].digest if self.chunks else _EMPTY


class FrameWriter:
    """Writes frames to `target` in order, however they get ready. One thread's."""

    def __init__(self, target: BinaryIO, compressors: Compressors, in_flight: int) -> None:
        self.blob_size = 0  # bytes written
        self.digest = hashlib.sha256()  # of them
        self.frames = 0
        self._target = target
        self._compressors = compressors
        self._in_flight = in_flight
        self._waiting: deque[tuple[Future[list[bytes]], Batch, list[Content]]] = deque()

    def submit(self, batch: Batch, contents: list[Content]) -> None:
        """Take a batch and the content that each of its chunks belongs to. Blocks while too many are in flight."""
        while self._waiting and (len(self._waiting) >= self._in_flight or self._waiting[0][0].done()):
            self._write_first()
        self._waiting.append((self._compressors.submit(batch), batch, contents))

    def finish(self) -> None:
        """Write what is in flight. Blocks."""
        while self._waiting:
            self._write_first()

    def append(self, data: bytes) -> None:
        """Write bytes behind the frames. Raise StoreBroken when the disk doesn't take them."""
        try:
            self._target.write(data)
        except OSError as error:
            raise StoreBroken(f"the converted layer can't be written to disk: {error.strerror}") from None
        self.digest.update(data)
        self.blob_size += len(data)

    def await_content(self, content: Content) -> None:
        """Write frames until this content's are written, so that its offsets and digests are known. Blocks."""
        while content.chunks and content.chunks[-1].blob_offset < 0:
            self._write_first()

    def _write_first(self) -> None:
        future, batch, contents = self._waiting.popleft()
        packed = future.result()
        offsets = [self.blob_size]
        for frame in packed:
            offsets.append(offsets[-1] + len(frame))
        for chunk, place, content in zip(batch.chunks, batch.places, contents, strict=True):
            number = batch.frame_of(place)
            chunk.blob_offset, content.blob_end = offsets[number], offsets[number + 1]
        self.append(packed[0] if len(packed) == 1 else b"".join(packed))
        self.frames += len(packed)


class FrameCutter:
    """Cuts the stream that it is fed: `plain` bytes between contents, and the `content` of one file after another."""

    def __init__(self, writer: FrameWriter, form: OutputForm = OutputForm.ZSTD_CHUNKED) -> None:
        self._writer = writer
        self._alone = form is OutputForm.PODMAN
        self._chunk_size = PODMAN_CHUNK_SIZE if self._alone else CHUNK_SIZE
        self._batch = Batch()
        self._data = self._batch.data
        self._contents: list[Content] = []
        self._file = Content()
        self._offset = 0  # in the file: what has come of it
        self._left = 0  # of the file
        self._chunk_left = 0
        self._after_chunk = False  # the last byte of the batch is content of a frame that takes nothing more
        self._whole: hashlib._Hash | None = None

    def plain(self, data: memoryview | bytes) -> None:
        """Take bytes that are no content: headers, padding, the end of the archive."""
        while len(self._data) + len(data) > FRAME_LIMIT:
            room = FRAME_LIMIT - len(self._data)
            self._add_plain(data[:room])
            data = data[room:]
            self.cut()
        self._add_plain(data)

    def begin(self, size: int, content: Content | None = None) -> Content:
        """Start a file of `size` bytes, which `content` must then be given in full. Return where its chunks will be."""
        self._file = Content() if content is None else content
        self._offset, self._left, self._chunk_left = 0, size, 0
        self._whole = hashlib.sha256() if size > self._chunk_size else None
        return self._file

    def content(self, data: memoryview | bytes) -> None:
        """Take the next bytes of the file's content."""
        at, end = 0, len(data)
        while at < end:
            if not self._chunk_left:
                self._begin_chunk()
            step = min(end - at, self._chunk_left)
            self._data += data[at : at + step]
            at += step
            self._chunk_left -= step
        self._offset += end
        self._left -= end
        if self._whole is not None:
            self._whole.update(data)
            if not self._left:
                self._file.whole = self._whole.digest()

    def cut(self) -> None:
        """End the frame here, if there is anything in it."""
        if self._data:
            self._writer.submit(self._batch, self._contents)
            self._batch, self._contents, self._after_chunk = Batch(), [], False
            self._data = self._batch.data

    def _add_plain(self, data: memoryview | bytes) -> None:
        if self._after_chunk and len(data):
            self._batch.starts.append(len(self._data))
            self._after_chunk = False
        self._data += data

    def _begin_chunk(self) -> None:
        offset = self._chunk_size * len(self._file.chunks)
        size = min(self._chunk_size, self._offset + self._left - offset)
        if self._data and len(self._data) + size > FRAME_SIZE:
            self.cut()
        elif self._alone and self._data:
            self._batch.starts.append(len(self._data))
        self._after_chunk = self._alone
        chunk = Chunk(offset, size, -1, 0, b"")
        self._file.chunks.append(chunk)
        self._batch.chunks.append(chunk)
        self._batch.places.append(len(self._data))
        self._contents.append(self._file)
        self._chunk_left = size
