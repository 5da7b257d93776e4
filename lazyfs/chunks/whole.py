"""The whole check of a layer: blob digest, diff ID, and the TOC against the tar, over a blob that streams by in order.

The TOC's digest says who wrote it and nothing about the diff ID, and containerd shares snapshots by that: an image
that declares another's diff IDs over a TOC of its own would own that chain on the node. So every lazy layer
passes here once.
"""

from __future__ import annotations

import hashlib
from array import array

from lazyfs import digest as digests
from lazyfs.chunks.layer_store import hole_chunks
from lazyfs.chunks.tar_check import TarCheck
from lazyfs.chunks.zero_runs import ZeroRuns
from lazyfs.errors import DiffIdMismatch, DigestMismatch, FrameInvalid, TarInvalid, TocMismatch
from lazyfs.format.footer import SKIPPABLE, SKIPPABLE_HEADER
from lazyfs.format.members import MemberStream
from lazyfs.format.table import FORM_ESTARGZ, FORM_PLAIN, LayerTable
from lazyfs.format.tar import TarScanner


class WholeCheck:
    """Feed it a blob in order: frames with what they decode to, then the rest; `finish` gives the verdict.

    Not thread-safe; it may move from thread to thread between calls. Nothing is raised before `finish`, because only
    the blob's digest can tell a damaged transfer from a lying TOC. Memory: 16 bytes a row, 8 a frame, the entries that
    differ from their row so far and, where the table has holes, 16 a run of zeros.
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
        self._zeros = ZeroRuns() if hole_chunks(table) else None
        self._members = MemberStream()  # of gzip layers
        self._frame_raw = array("q", [-1]) * table.frame_count  # where each frame's bytes start in the tar stream
        self._next_frame = 0
        self._false: TocMismatch | None = None
        self._tail_skip = 0  # bytes of the tail that belong to the skippable frame under way
        self._tail_header = b""
        self._tail_broken: TocMismatch | None = None  # of a gzip layer

    @property
    def is_gzip(self) -> bool:
        """Whether the layer's frames are gzip members: `feed_members` takes them, not `feed_frame`."""
        return self._table.form == FORM_ESTARGZ

    @property
    def blob_offset(self) -> int:
        """Blob offset of the next byte to feed."""
        return self._blob_offset

    def feed_frame(self, compressed: bytes | memoryview, decoded: bytes | memoryview) -> None:
        """Take the blob's next bytes and what they decode to. Blocking: two sha256 passes, about 20 µs an entry.

        One or more whole frames; every frame that the table names must begin a call.
        """
        self._blob(compressed)
        self._tar_bytes(decoded)

    def feed_members(self, compressed: bytes | memoryview, last: bool) -> None:
        """Take the blob's next bytes before the tail of a gzip layer, in pieces of any size. Blocking; decodes them.

        Every frame that the table names must begin a call, and the call before it be told that it is the `last` one.
        Raise FrameInvalid for something else than whole members; nothing may be fed after that.
        """
        self._blob(compressed)
        for decoded in self._members.feed(compressed):
            self._tar_bytes(decoded)
        if last and not self._members.at_boundary:
            raise FrameInvalid("a gzip member runs into the next one that the TOC names")

    def _blob(self, compressed: bytes | memoryview) -> None:
        frames, at = self._table.frame_blob_offset, self._next_frame
        while at < len(self._frame_raw) and frames[at] < self._blob_offset:
            at += 1
        if at < len(self._frame_raw) and frames[at] == self._blob_offset:
            self._frame_raw[at] = self._raw_offset
            at += 1
        self._next_frame = at
        self._blob_hash.update(compressed)
        self._blob_offset += len(compressed)

    def _tar_bytes(self, decoded: bytes | memoryview) -> None:
        self._raw_hash.update(decoded)
        self._raw_offset += len(decoded)
        if self._zeros is not None:
            self._zeros.feed(decoded)
        if self._false is None:
            try:
                for item in self._scanner.feed(decoded):
                    self._tar.add(item)
            except TocMismatch as error:
                self._false = error
            except TarInvalid as error:
                self._false = TocMismatch(self._layer, error.message)

    def feed_tail(self, compressed: bytes | memoryview) -> None:
        """Take bytes behind the last frame: TOC and footer, in pieces of any size. Of a gzip layer they are tar too."""
        self._blob_hash.update(compressed)
        self._blob_offset += len(compressed)
        if not self.is_gzip:
            if self._false is None and self._table.form != FORM_PLAIN:
                self._check_tail(memoryview(compressed))
            return
        try:
            # For the diff ID's sake even when the TOC is known to be false.
            for decoded in self._members.feed(compressed if self._tail_broken is None else b""):
                self._tar_bytes(decoded)
        except FrameInvalid as error:
            self._tail_broken = TocMismatch(self._layer, f"what follows its last frame is broken: {error.message}")

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
        if self._tail_broken is not None:
            raise self._tail_broken
        if self._tail_skip or self._tail_header or not self._members.at_boundary:
            raise TocMismatch(self._layer, "the blob ends inside a frame")
        try:
            self._scanner.finish()
        except TarInvalid as error:
            raise TocMismatch(self._layer, error.message) from None
        self._tar.finish(self._frame_raw, self._zeros)
