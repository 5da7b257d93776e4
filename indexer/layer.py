"""One layer: a tar stream in, a zstd-chunked layer out, losslessly.

The decompressed output is the source's tar, byte for byte, so diff ID and image config stay what they are, and one
sha256 pass is the check of the source and the diff ID of the result. That is why there is no landmark in it: an entry
of our own would change the diff ID of every layer. What can't be carried over verbatim is rewritten entry by entry
(`indexer.rewrite`); such a layer gets a diff ID of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

from indexer.compress import Compressors
from indexer.frames import Content, FrameCutter, FrameWriter
from indexer.rewrite import Expander, must_rewrite, regular_header
from lazyfs.errors import TarInvalid
from lazyfs.format.entry import LANDMARK, TOC_NAME, Kind
from lazyfs.format.namespace import Namespace
from lazyfs.format.tar import TarItem, TarScanner
from lazyfs.format.tar_headers import pad
from lazyfs.format.toc_write import TocWriter
from lazyfs.format.zstd_chunked import encode_tail
from lazyfs.oci import MAX_BLOB, UNCOMPRESSED_SIZE


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What came out. Sizes are bytes; digests "sha256:<hex>"."""

    digest: str
    size: int
    diff_id: str
    source_diff_id: str  # sha256 of the tar that went in
    raw_size: int  # of the decompressed blob
    entries: int  # names that live in the layer
    frames: int
    annotations: dict[str, str]


def convert_layer(
    blocks: Iterable[bytes], target: BinaryIO, compressors: Compressors, in_flight: int
) -> ConvertedLayer:
    """Read a tar from `blocks`, write the converted layer to `target`.

    Blocks until all is written; memory is bounded by `in_flight` frames and the layer's names. Raise TarInvalid with
    the entry's name for what can't be a layer (names that lead out, hard links to nothing or in a circle, absurd
    sizes), TocInvalid when its TOC would be too large to be read, StoreBroken when `target` fails, and what `blocks`
    raises.
    Nothing is checked against a digest here: the caller compares `source_diff_id`.
    """
    writer = FrameWriter(target, compressors, in_flight)
    stream = LayerStream(FrameCutter(writer))
    for block in blocks:
        stream.feed(block)
    stream.finish()
    toc = TocWriter()
    living = stream.namespace.finish()
    for live in living:  # while the last frames are being compressed
        if live.entry.kind is Kind.REG and live.tag is not None:
            writer.await_content(live.tag)
            toc.add(live.entry, live.tag.digest, live.tag.chunks)
        else:
            toc.add(live.entry, None, [])
    writer.finish()
    tail, annotations = encode_tail(toc.finish(), writer.blob_size, compressors.level)
    writer.append(tail)
    return ConvertedLayer(
        "sha256:" + writer.digest.hexdigest(),
        writer.blob_size,
        stream.diff_id,
        stream.source_diff_id,
        stream.raw_size,
        len(living),
        writer.frames,
        {**annotations, UNCOMPRESSED_SIZE: str(stream.raw_size)},
    )


class LayerStream:
    """Hands a tar's bytes to the cutter, and its entries to the namespace. One thread's."""

    def __init__(self, cutter: FrameCutter) -> None:
        self.namespace: Namespace[Content | None] = Namespace()
        self.raw_size = 0  # bytes handed to the cutter
        self._cutter = cutter
        self._scanner = TarScanner()
        self._held = b""  # an entry's headers, of which more is to come
        self._at = 0  # stream offset of the first byte not yet handed on
        self._hashed = 0  # stream offset up to which the source is hashed
        self._payload_left = 0  # of the entry under way
        self._padding_left = 0  # of a rewritten entry: to be left out
        self._expander: Expander | None = None  # the rewritten entry under way
        self._expanded_size = 0  # of that entry
        self._holes = 0
        self._source = hashlib.sha256()
        self._result: hashlib._Hash | None = None  # None: no entry rewritten yet, so the source's is the result's

    @property
    def source_diff_id(self) -> str:
        return "sha256:" + self._source.hexdigest()

    @property
    def diff_id(self) -> str:
        return "sha256:" + (self._result or self._source).hexdigest()

    def feed(self, block: bytes) -> None:
        """Take the next bytes of the tar. Blocks while too many frames are in flight. Raise TarInvalid."""
        items = self._scanner.feed(block)
        if self._scanner.position > MAX_BLOB:
            raise TarInvalid(f"it is longer than {MAX_BLOB} bytes")
        data = memoryview(self._held + block if self._held else block)
        base = self._at
        for item in items:
            self._pass(data, base, item.start)
            self._begin(item, data, base)
        settled = self._scanner.settled
        self._pass(data, base, settled)
        self._hash(data, base, settled)
        self._held = bytes(data[settled - base :])

    def finish(self) -> None:
        """Say that the stream is over. Raise TarInvalid when it stopped inside an entry."""
        self._scanner.finish()
        self._cutter.cut()

    def _begin(self, item: TarItem, data: memoryview, base: int) -> None:
        entry = item.entry
        header = data[item.start - base : item.payload - base]
        rewrite = must_rewrite(item)
        if rewrite:
            self._expander = Expander(item, self._holes)
            self._holes = self._expander.holes
            if self._result is None:
                self._hash(data, base, item.start)
                self._result = self._source.copy()
            header = memoryview(regular_header(entry))
        self._plain(header)
        self._at = item.payload
        content: Content | None = None
        if entry.kind is Kind.REG:
            if entry.path == LANDMARK:
                self._cutter.cut()  # a landmark ends the prefetch region, so its frame starts there
            content = self._cutter.begin(entry.size)
        self._payload_left = item.stored
        self._padding_left = item.end - item.payload - item.stored if rewrite else 0
        if rewrite:
            self._expanded_size = entry.size
            if not item.stored:
                self._end_rewritten()
        if entry.path != TOC_NAME:
            self.namespace.add(entry, content)

    def _pass(self, data: memoryview, base: int, stop: int) -> None:
        """Hand on the bytes before stream offset `stop`: the rest of a content, then padding and the like."""
        if self._payload_left and self._at < stop:
            step = min(self._payload_left, stop - self._at)
            stored = data[self._at - base : self._at - base + step]
            self._at += step
            self._payload_left -= step
            if self._expander is None:
                self._content(stored)
            else:
                for piece in self._expander.expand(stored):
                    self._content(piece)
                if not self._payload_left:
                    self._end_rewritten()
        if self._padding_left and not self._payload_left:
            step = min(self._padding_left, stop - self._at)
            self._at += step
            self._padding_left -= step
        if self._at < stop:
            self._plain(data[self._at - base : stop - base])
            self._at = stop

    def _end_rewritten(self) -> None:
        assert self._expander is not None
        for piece in self._expander.finish():
            self._content(piece)
        self._expander = None
        self._plain(bytes(pad(self._expanded_size)))

    def _plain(self, data: memoryview | bytes) -> None:
        self.raw_size += len(data)
        if self._result is not None:
            self._result.update(data)
        self._cutter.plain(data)

    def _content(self, data: memoryview) -> None:
        self.raw_size += len(data)
        if self._result is not None:
            self._result.update(data)
        self._cutter.content(data)

    def _hash(self, data: memoryview, base: int, stop: int) -> None:
        # Behind what was handed on, so that the sum of a rewritten layer can fork at the right byte.
        self._source.update(data[self._hashed - base : stop - base])
        self._hashed = stop
