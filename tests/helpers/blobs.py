"""Layers with a TOC for tests, made the slow and plain way, and all the ways to falsify one.

    layer = zstd_chunked_layer(tar_of(file("a", b"x")))
    liar = zstd_chunked_layer(tar, edit_toc=lambda toc: toc["entries"][0].update(mode=0o4755))

A falsified TOC is sealed with right digests: it is what an attacker would publish.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import zstandard

from lazyfs import oci
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.namespace import Namespace
from lazyfs.format.table import FORM_ESTARGZ, FORM_STORAGE_ZSTD, FORM_ZSTD_CHUNKED
from lazyfs.format.tar import TarItem, TarScanner
from lazyfs.format.toc_write import TocWriter
from lazyfs.format.zstd_chunked import encode_tail
from tests.helpers import tars

Toc = dict[str, Any]


@dataclass(frozen=True)
class LayerBlob:
    """A layer's blob and all that a test may want to know of it. `frames` are (blob offset, size) each."""

    blob: bytes
    annotations: dict[str, str]
    diff_id: str
    toc: bytes
    tar: bytes  # what the frames decompress to
    frames: list[tuple[int, int]]
    media_type: str = oci.OCI_LAYER_ZSTD
    pairs: list[tuple[Entry, list[Chunk]]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.blob).hexdigest()

    @property
    def descriptor(self) -> oci.Descriptor:
        return oci.Descriptor(self.media_type, self.digest, len(self.blob), dict(self.annotations))

    @property
    def form(self) -> int:
        """The table's word for the layer's form (FORM_*)."""
        if self.media_type == oci.OCI_LAYER_GZIP:
            return FORM_ESTARGZ
        return FORM_STORAGE_ZSTD if oci.GITHUB_ZSTD_CHECKSUM in self.annotations else FORM_ZSTD_CHUNKED

    @property
    def payload_end(self) -> int:
        return sum(self.frames[-1]) if self.frames else 0

    @property
    def tail(self) -> bytes:
        return self.blob[self.payload_end :]

    def fetch(self, blob_offset: int, size: int) -> bytes:
        """A range of the blob, as `read_toc` wants it."""
        return self.blob[blob_offset : blob_offset + size]

    def chunks_of(self, path: bytes) -> list[Chunk]:
        return next(chunks for entry, chunks in self.pairs if entry.path == path)


def scan(tar: bytes) -> list[TarItem]:
    scanner = TarScanner()
    items = scanner.feed(tar)
    scanner.finish()
    return items


def without_sparse(tar: bytes) -> bytes:
    """Write sparse entries out in full, as a converter has to; all else stays as it is."""
    out, at = [], 0
    for item in scan(tar):
        if item.sparse is None:
            continue
        entry, data, runs = item.entry, io.BytesIO(tar[item.payload : item.payload + item.stored]), []
        for offset, size in item.sparse:
            runs.append((offset, data.read(size)))
        out += [tar[at : item.start], _full(entry, tars.expand(runs, entry.size))]
        at = item.end
    return b"".join([*out, tar[at:]])


def _full(entry: Entry, data: bytes) -> bytes:
    return tars.file(
        entry.path,
        data,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        uname=entry.uname,
        gname=entry.gname,
        xattrs=dict(entry.xattrs),
    )


def zstd_chunked_layer(
    tar: bytes,
    *,
    chunk_size: int = 1 << 20,
    frame_size: int = 1 << 20,
    level: int = 3,
    frames_from: bytes | None = None,
    edit_toc: Callable[[Toc], object] | None = None,
) -> LayerBlob:
    """Make a zstd:chunked layer of stargz's variant from a tar without sparse entries.

    A chunk starts every `chunk_size` bytes of a file; a frame starts at the first chunk that is `frame_size` bytes or
    more behind the start of the last one (0: a frame a chunk). `frames_from` is another tar of the same length that
    goes into the frames while the TOC tells of `tar`. `edit_toc` changes the decoded TOC before it is sealed.
    """
    content = tar if frames_from is None else frames_from
    assert len(content) == len(tar)
    items = scan(tar)
    starts = [0]
    spans: list[list[tuple[int, int, int, int]]] = []  # an item's (file offset, size, frame number, inner offset)
    for item in items:
        assert item.sparse is None, "write sparse entries out first: without_sparse()"
        spans.append([])
        for offset in range(0, item.entry.size, chunk_size):
            place = item.payload + offset
            if place - starts[-1] >= max(frame_size, 1):
                starts.append(place)
            size = min(chunk_size, item.entry.size - offset)
            spans[-1].append((offset, size, len(starts) - 1, place - starts[-1]))
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
    blob, frames = bytearray(), []
    for start, stop in zip(starts, [*starts[1:], len(content)], strict=True):
        packed = compressor.compress(content[start:stop])
        frames.append((len(blob), len(packed)))
        blob += packed

    namespace: Namespace[list[Chunk]] = Namespace()
    digests: dict[int, bytes] = {}
    for item, cuts in zip(items, spans, strict=True):
        payload = tar[item.payload : item.payload + item.stored]
        chunks = [
            Chunk(offset, size, frames[frame][0], inner, _sha256(payload[offset : offset + size]))
            for offset, size, frame, inner in cuts
        ]
        digests[id(chunks)] = _sha256(payload)
        namespace.add(item.entry, chunks)
    survivors = namespace.finish()
    writer = TocWriter()
    for live in survivors:
        is_file = live.entry.kind is Kind.REG
        writer.add(live.entry, digests[id(live.tag)] if is_file else None, live.tag if is_file else [])
    toc = writer.finish()
    if edit_toc is not None:
        toc = edited(toc, edit_toc)
    tail, annotations = encode_tail(toc, len(blob), level)
    annotations[oci.UNCOMPRESSED_SIZE] = str(len(content))
    return LayerBlob(
        bytes(blob) + tail,
        annotations,
        "sha256:" + hashlib.sha256(content).hexdigest(),
        toc,
        content,
        frames,
        pairs=[(live.entry, live.tag) for live in survivors],
    )


def edited(toc: bytes, edit: Callable[[Toc], object]) -> bytes:
    """Decode a TOC, let `edit` change it in place, and encode it."""
    document: Toc = json.loads(toc)
    edit(document)
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def toc_entry(toc: Toc, name: str) -> Toc:
    """The element of a decoded TOC with this `name` (a directory's ends with a slash)."""
    found: Toc = next(entry for entry in toc["entries"] if entry["name"] == name)
    return found


def resealed(layer: LayerBlob, toc: bytes) -> LayerBlob:
    """The same frames under another TOC, with right digests for it."""
    tail, annotations = encode_tail(toc, layer.payload_end, 3)
    blob = layer.blob[: layer.payload_end] + tail
    return replace(layer, blob=blob, toc=toc, annotations={**layer.annotations, **annotations})


def flipped(layer: LayerBlob, blob_offset: int) -> LayerBlob:
    """The blob with one bit of one byte turned over; the annotations stay."""
    blob = bytearray(layer.blob)
    blob[blob_offset] ^= 0x10
    return replace(layer, blob=bytes(blob))


def flipped_chunk(layer: LayerBlob, path: bytes, number: int = 0) -> LayerBlob:
    """The blob with a byte changed in the middle of the frame that holds chunk `number` of `path`."""
    start = layer.chunks_of(path)[number].blob_offset
    size = next(size for offset, size in layer.frames if offset == start)
    return flipped(layer, start + size // 2)


def annotated(layer: LayerBlob, **changes: str | None) -> LayerBlob:
    """The layer with annotations set, or removed (None), by their names in `lazyfs.oci` ("TOC_DIGEST")."""
    annotations = dict(layer.annotations)
    for constant, value in changes.items():
        key = getattr(oci, constant)
        annotations.pop(key, None)
        if value is not None:
            annotations[key] = value
    return replace(layer, annotations=annotations)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def crowded(names: int) -> LayerBlob:
    """Return a layer whose TOC has a directory `crowd` of so many empty files, which are not in its tar, and `data`."""
    honest = zstd_chunked_layer(tars.tar_of(tars.file("data", b"crowded")))
    end = honest.toc.rindex(b"]")
    more = b",".join(b'{"name":"crowd/%d","type":"reg"}' % number for number in range(names))
    return resealed(
        honest, b'%s,{"name":"crowd/","type":"dir","mode":493},%s%s' % (honest.toc[:end], more, honest.toc[end:])
    )
