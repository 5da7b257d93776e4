"""zstd:chunked of containers/storage, written: its TOC, and the tail behind the frames.

    zstd frames … | skippable frame: the TOC | skippable frame: tar-split | skippable frame: 64 bytes of footer

podman compares the TOC with the headers in the tar-split, value by value, so names and modes stand here as they stand
in the tar. Source: specs/estargz.md sections 8 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import zstandard

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import TocInvalid
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.footer import SKIPPABLE, SKIPPABLE_HEADER, STORAGE_BODY, STORAGE_MAGIC, TOC_TYPE
from lazyfs.format.rfc3339 import TimeTable
from lazyfs.format.toc_json import TYPE_OF
from lazyfs.limits import MAX_STORAGE_TOC, MAX_TOC_ITEMS

_Int = Annotated[int, msgspec.Meta(ge=0)]


class _Item(msgspec.Struct, omit_defaults=True, rename="camel", gc=False):
    """One element of `entries`, in the order in which fields are written."""

    type: Literal["dir", "reg", "symlink", "hardlink", "char", "block", "fifo", "chunk"]
    name: str
    link_name: str = ""
    mode: _Int = 0
    size: _Int = 0
    uid: _Int = 0
    gid: _Int = 0
    modtime: str = ""
    accesstime: str = ""
    changetime: str = ""
    dev_major: _Int = 0
    dev_minor: _Int = 0
    xattrs: dict[str, bytes] | None = None
    digest: str = ""
    offset: _Int = 0
    end_offset: _Int = 0
    chunk_size: _Int = 0
    chunk_offset: _Int = 0
    chunk_digest: str = ""


@dataclass(frozen=True, slots=True)
class Verbatim:
    """What a tar says of an entry in its own words. Times in nanoseconds, None where the tar has none."""

    name: bytes
    link: bytes
    mode: int
    atime_ns: int | None = None
    ctime_ns: int | None = None


class StorageTocWriter:
    """Collect entries in blob order with `add`, then take the JSON with `finish`. Not thread-safe.

    The same entries give the same bytes everywhere. A name, link target or attribute name that isn't UTF-8 raises
    UnicodeDecodeError: this form has no words for it. `escaped` tells whether any text needed a backslash.
    """

    def __init__(self) -> None:
        self.escaped = False
        self._out = bytearray(b'{"version":1,"entries":[')
        self._encode_into = msgspec.json.Encoder().encode_into
        self._times = TimeTable()
        self._count = 0

    def add(self, entry: Entry, told: Verbatim, digest: bytes, chunks: list[Chunk], blob_end: int) -> None:
        """Append one entry. `digest`: sha256 of the content; `blob_end`: where its last frame ends, 0 without any.

        Raise TocInvalid when the TOC grows larger than readers take.
        """
        name = told.name.decode()
        item = _Item(TYPE_OF[entry.kind], name, told.link.decode(), told.mode, uid=entry.uid, gid=entry.gid)
        item.modtime = self._times.format(entry.mtime_ns)
        if told.atime_ns is not None:
            item.accesstime = self._times.format(told.atime_ns)
        if told.ctime_ns is not None:
            item.changetime = self._times.format(told.ctime_ns)
        if entry.kind is Kind.CHAR or entry.kind is Kind.BLOCK:
            item.dev_major, item.dev_minor = entry.rdev
        if entry.xattrs:
            item.xattrs = {key.decode(): value for key, value in entry.xattrs}
        if chunks:
            item.size, item.digest = entry.size, digests.text(digest)
            item.offset, item.end_offset = chunks[0].blob_offset, blob_end
        for number, chunk in enumerate(chunks):
            if number:
                item = _Item("chunk", name, chunk_offset=chunk.offset, offset=chunk.blob_offset)
            if len(chunks) > 1:
                item.chunk_size, item.chunk_digest = chunk.size, digests.text(chunk.digest)
            self._put(item)
        if not chunks:
            self._put(item)

    def finish(self, tar_split: bytes | None) -> bytes:
        """Return the whole TOC; the digest of the compressed tar-split goes into it, when there is one."""
        self._out += b"]" if tar_split is None else b'],"tarSplitDigest":"%s"' % digests.of(tar_split).encode()
        self._out += b"}"
        return bytes(self._out)

    def _put(self, item: _Item) -> None:
        out = self._out
        if self._count:
            out += b","
        self._count += 1
        start = len(out)
        self._encode_into(item, out, start)
        self.escaped = self.escaped or out.find(b"\\", start) >= 0
        if len(out) > MAX_STORAGE_TOC or self._count > MAX_TOC_ITEMS:
            raise TocInvalid(f"the layer needs a TOC of more than {MAX_STORAGE_TOC} bytes or {MAX_TOC_ITEMS} entries")


def encode_tail(
    toc_json: bytes, tar_split: bytes | None, tar_split_raw_size: int, blob_offset: int, level: int, *, old_keys: bool
) -> tuple[bytes, dict[str, str]]:
    """Return what follows a layer's frames, and the annotations that its descriptor needs.

    `blob_offset` is the end of the frames; `tar_split` is compressed. Pure; blocks for the compression of the TOC. The
    annotations stand under their newer names and, with `old_keys`, under those that podman 4 knows too. Trust is rooted
    in the checksum of the TOC.
    """
    packed = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress(toc_json)
    toc_offset = blob_offset + SKIPPABLE_HEADER
    position = f"{toc_offset}:{len(packed)}:{len(toc_json)}:{TOC_TYPE}"
    checksum = digests.of(packed)
    annotations = {oci.GITHUB_ZSTD_CHECKSUM: checksum, oci.GITHUB_ZSTD_POSITION: position}
    if old_keys:
        annotations |= {oci.ZSTD_CHECKSUM: checksum, oci.ZSTD_POSITION: position}
    tail = _skippable(packed)
    split_offset = split_size = 0
    if tar_split is not None:
        split_offset, split_size = toc_offset + len(packed) + SKIPPABLE_HEADER, len(tar_split)
        annotations[oci.GITHUB_TAR_SPLIT_POSITION] = f"{split_offset}:{split_size}:{tar_split_raw_size}"
        tail += _skippable(tar_split)
    footer = STORAGE_BODY.pack(
        toc_offset,
        len(packed),
        len(toc_json),
        TOC_TYPE,
        split_offset,
        split_size,
        tar_split_raw_size if tar_split is not None else 0,
        STORAGE_MAGIC,
    )
    return tail + _skippable(footer), annotations


def _skippable(body: bytes) -> bytes:
    return SKIPPABLE + len(body).to_bytes(4, "little") + body
