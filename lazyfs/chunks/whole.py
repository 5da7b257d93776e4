"""The whole check of a layer: blob digest, diff ID, and the TOC against the tar, over a blob that streams by in order.

The TOC's digest says who wrote it and nothing about the diff ID, and containerd shares snapshots by that: an image
that declares another's diff IDs over a TOC of its own would own that chain on the node. So every lazy layer
passes here once.
"""

from __future__ import annotations

import hashlib
from array import array

from lazyfs import digest as digests
from lazyfs.chunks.tar_check import TarCheck
from lazyfs.errors import DiffIdMismatch, DigestMismatch, TarInvalid, TocMismatch
from lazyfs.format.footer import SKIPPABLE, SKIPPABLE_HEADER
from lazyfs.format.table import FORM_ZSTD_CHUNKED, LayerTable
from lazyfs.format.tar import TarScanner


class WholeCheck:
    """Feed it a blob in order: frames with what they decode to, then the rest; `finish` gives the verdict.

    Not thread-safe; it may move from thread to thread between calls. Nothing is raised before `finish`, because only
    the blob's digest can tell a damaged transfer from a lying TOC. Memory: 16 bytes a row, 8 a frame, and the entries
    that differ from their row so far.
    """

    def __init__(self, blob_digest: str, diff_id: str, table: LayerTable, layer_name: str) -> None:
        """`table` is of this blob and stays open until `finish`; `layer_name` is for messages."""
        self._blob_digest = blob_digest
        self._diff_id = diff_id
        self._table = table
        self._layer = layer_name
        self._blob_hash = hashlib.sha256()
        self._raw_hash = hashlib.sha256()
        self._blob_offset = 0
        self._raw_offset = 0
        self._scanner = TarScanner()
        self._tar = TarCheck(table, layer_name)
        self._frame_raw = array("q", [-1]) * table.frame_count  # where each frame's bytes start in the tar stream
        self._next_frame = 0
        self._false: TocMismatch | None = None
        self._tail_skip = 0  # bytes of the tail that belong to the skippable frame under way
        self._tail_header = b""

    @property
    def blob_offset(self) -> int:
        """Blob offset of the next byte to feed."""
        return self._blob_offset

    def feed_frame(self, compressed: bytes | memoryview, decoded: bytes | memoryview) -> None:
        """Take the blob's next bytes and what they decode to. Blocking: two sha256 passes, about 20 µs an entry.

        One or more whole frames; every frame that the table names must begin a call.
        """
        frames, at = self._table.frame_blob_offset, self._next_frame
        while at < len(self._frame_raw) and frames[at] < self._blob_offset:
            at += 1
        if at < len(self._frame_raw) and frames[at] == self._blob_offset:
            self._frame_raw[at] = self._raw_offset
            at += 1
        self._next_frame = at
        self._blob_hash.update(compressed)
        self._blob_offset += len(compressed)
        self._raw_hash.update(decoded)
        self._raw_offset += len(decoded)
        if self._false is None:
            try:
                for item in self._scanner.feed(decoded):
                    self._tar.add(item)
            except TocMismatch as error:
                self._false = error
            except TarInvalid as error:
                self._false = TocMismatch(self._layer, error.message)

    def feed_tail(self, compressed: bytes | memoryview) -> None:
        """Take bytes behind the last frame: TOC and footer, in pieces of any size."""
        self._blob_hash.update(compressed)
        self._blob_offset += len(compressed)
        if self._table.form == FORM_ZSTD_CHUNKED and self._false is None:
            self._check_tail(memoryview(compressed))

    def _check_tail(self, data: memoryview) -> None:
        """A decoder passes over skippable frames only; any other would be content that the diff ID here misses."""
        while data:
            step = min(self._tail_skip, len(data))
            self._tail_skip -= step
            data = data[step:]
            wanted = SKIPPABLE_HEADER - len(self._tail_header)
            self._tail_header += bytes(data[:wanted])
            data = data[wanted:]
            if len(self._tail_header) == SKIPPABLE_HEADER:
                if self._tail_header[:4] != SKIPPABLE:
                    self._false = TocMismatch(self._layer, "something else than a TOC and a footer follows the frames")
                    return
                self._tail_skip = int.from_bytes(self._tail_header[4:], "little")
                self._tail_header = b""

    def finish(self) -> None:
        """Give the verdict over the whole blob. Blocks for about 2 µs a row and chunk.

        Raise DigestMismatch when this is not the blob, DiffIdMismatch when it unpacks to something else than the image
        config declares, TocMismatch when its TOC does not tell what its tar holds.
        """
        actual = digests.text(self._blob_hash.digest())
        if actual != self._blob_digest:
            raise DigestMismatch(f"layer {self._layer}", self._blob_digest, actual)
        unpacked = digests.text(self._raw_hash.digest())
        if unpacked != self._diff_id:
            raise DiffIdMismatch(self._layer, self._diff_id, unpacked)
        if self._false is not None:
            raise self._false
        if self._tail_skip or self._tail_header:
            raise TocMismatch(self._layer, "the blob ends inside a skippable frame")
        try:
            self._scanner.finish()
        except TarInvalid as error:
            raise TocMismatch(self._layer, error.message) from None
        self._tar.finish(self._frame_raw)
