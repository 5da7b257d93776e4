"""Layers as other writers make them, byte for byte, and all the ways to falsify one.

    layer = estargz_layer(tar, chunk_size=4)          stargz's gzip form, the TOC as a tar entry in it
    layer = storage_layer(tar)                        containers/storage's zstd:chunked, 64 bytes of footer
    layer = storage_layer(tar, podman4=True)          what podman 4 writes: 40 bytes of footer, other annotations

Layouts: specs/estargz.md sections 1 to 4, 7, 8 and 10. A falsified TOC is sealed with right digests.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import zstandard

from lazyfs import oci
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.tar import TarItem
from tests.helpers import tars
from tests.helpers.blobs import LayerBlob, Toc, scan

TYPES = {
    Kind.DIR: "dir", Kind.REG: "reg", Kind.SYMLINK: "symlink", Kind.HARDLINK: "hardlink", Kind.CHAR: "char",
    Kind.BLOCK: "block", Kind.FIFO: "fifo",
}  # fmt: skip
MIN_HOLE = 1024
Edit = Callable[[Toc], object]


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def when(mtime_ns: int, *, whole: bool) -> str:
    """An RFC 3339 time; `whole`: rounded half up to seconds, as stargz does."""
    if whole:
        mtime_ns = (mtime_ns + 500_000_000) // 10**9 * 10**9
    seconds, fraction = divmod(mtime_ns, 10**9)
    text = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    return text + (f".{fraction:09}".rstrip("0") if fraction else "") + "Z"


def described(entry: Entry, raw: bytes, *, whole: bool) -> dict[str, Any]:
    """A TOC element of an entry without its content."""
    name = entry.path.decode("utf-8", "replace") + ("/" if entry.kind is Kind.DIR else "")
    out: dict[str, Any] = {
        "name": name or "./",
        "type": TYPES[entry.kind],
        "modtime": when(entry.mtime_ns, whole=whole),
    }
    if entry.kind is Kind.DIR:
        out["mode"] = 0o40000 | entry.mode  # with the bits of the type, as some headers have them
    else:
        out["mode"] = entry.mode
    out |= {key: value for key, value in (("uid", entry.uid), ("gid", entry.gid), ("size", entry.size)) if value}
    if entry.link:
        out["linkName"] = entry.link.decode("utf-8", "replace")
    if entry.kind in (Kind.CHAR, Kind.BLOCK):
        out["devMajor"], out["devMinor"] = entry.rdev
    if entry.xattrs:
        out["xattrs"] = {key.decode(): base64.b64encode(value).decode() for key, value in entry.xattrs}
    return out


def gzip_member(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def estargz_footer(toc_offset: int) -> bytes:
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % toc_offset
    return b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra + b"\1\0\0\xff\xff" + bytes(8)


def estargz_layer(
    tar: bytes,
    *,
    chunk_size: int = 4 << 20,
    min_chunk: int = 0,
    edit_toc: Edit | None = None,
    behind: bytes = b"",
    more: bytes = b"",
) -> LayerBlob:
    """Make an eStargz layer of a tar without sparse entries.

    `min_chunk`: a member takes further chunks until it has that many bytes. `behind`: entries that follow the
    TOC's in its member. `more`: members between that one and the footer.
    """
    items = scan(tar)
    stop = items[-1].end if items else 0
    blob, frames = bytearray(), list[tuple[int, int]]()
    start = 0  # in the tar, of the member under way
    entries: list[dict[str, Any]] = []
    pairs: list[tuple[Entry, list[Chunk]]] = []
    users: set[int] = set()

    def cut(at: int) -> None:
        nonlocal start
        packed = gzip_member(tar[start:at])
        frames.append((len(blob), len(packed)))
        blob.extend(packed)
        start = at

    for item in items:
        element = described(item.entry, tar, whole=True)
        if item.entry.uname and item.entry.uid not in users:
            users.add(item.entry.uid)
            element["userName"] = item.entry.uname
        payload = tar[item.payload : item.payload + item.stored]
        chunks: list[Chunk] = []
        if item.entry.kind is Kind.REG:
            element["digest"] = sha256(payload)
            element["NumLink"] = 1
        for offset in range(0, len(payload), chunk_size):
            place = item.payload + offset
            if place - start >= min_chunk:
                cut(place)
            piece = payload[offset : offset + chunk_size]
            told = {
                "offset": len(blob),
                "innerOffset": place - start,
                "chunkOffset": offset,
                "chunkDigest": sha256(piece),
            }
            if offset + len(piece) < len(payload) or len(piece) == chunk_size:
                told["chunkSize"] = len(piece)
            told = {key: value for key, value in told.items() if value}
            if offset:
                entries.append(element)
                element = {"name": element["name"], "type": "chunk"}
            element |= told
            chunks.append(Chunk(offset, len(piece), len(blob), place - start, hashlib.sha256(piece).digest()))
        entries.append(element)
        pairs.append((item.entry, chunks))
    if start < stop:
        cut(stop)
    document: Toc = {"version": 1, "entries": entries}
    if edit_toc is not None:
        edit_toc(document)
    toc = json.dumps(document, indent="\t").encode()
    last = tars.file("stargz.index.json", toc, mtime_ns=0) + behind + bytes(1024)
    offset = len(blob)
    content = tar[:stop] + last + b"".join(gzip_all(more))
    blob += gzip_member(last) + more + estargz_footer(offset)
    annotations = {oci.TOC_DIGEST: sha256(toc), oci.UNCOMPRESSED_SIZE: str(len(content))}
    return LayerBlob(bytes(blob), annotations, sha256(content), toc, content, frames, oci.OCI_LAYER_GZIP, pairs)


def gzip_all(data: bytes) -> Iterator[bytes]:
    while data:
        member = zlib.decompressobj(31)
        yield member.decompress(data)
        data = member.unused_data


def skippable(body: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(body)) + body


def cut_at_zeros(payload: bytes, chunk_size: int) -> list[tuple[int, bytes, bool]]:
    """(offset, bytes, whether a hole) of a payload: runs of zeros by themselves, the rest cut at `chunk_size`."""
    out: list[tuple[int, bytes, bool]] = []
    at = 0
    while at < len(payload):
        hole = payload.find(bytes(MIN_HOLE), at)
        stop = len(payload) if hole < 0 else hole
        out += [(place, payload[place : min(place + chunk_size, stop)], False) for place in range(at, stop, chunk_size)]
        at = stop
        if hole >= 0:
            end = hole + len(payload[hole:]) - len(payload[hole:].lstrip(b"\0"))
            out.append((hole, payload[hole:end], True))
            at = end
    return out


def storage_layer(
    tar: bytes,
    *,
    podman4: bool = False,
    chunk_size: int = 1 << 16,
    edit_toc: Edit | None = None,
    both_keys: bool = False,
    tar_split: bytes = b"the tar's headers in a form of their own",
) -> LayerBlob:
    """Make a zstd:chunked layer of containers/storage's variant; the tar is carried over whole.

    Headers have frames of their own; a file's frames are followed by `endOffset`. `both_keys`: the annotations for
    podman 4 beside the newer ones.
    """
    items = scan(tar)
    packer = zstandard.ZstdCompressor(level=3, write_content_size=False)
    blob, frames = bytearray(), list[tuple[int, int]]()
    entries: list[dict[str, Any]] = []
    pairs: list[tuple[Entry, list[Chunk]]] = []
    at = 0

    def put(stop: int) -> int:
        nonlocal at
        packed = packer.compress(tar[at:stop])
        frames.append((len(blob), len(packed)))
        blob.extend(packed)
        at = stop
        return frames[-1][0]

    for item in items:
        element = described(item.entry, tar, whole=False)
        element |= {"accesstime": "0001-01-01T00:00:00Z", "changetime": "0001-01-01T00:00:00Z"}
        chunks: list[Chunk] = []
        group = [element]
        if item.stored:
            put(item.payload)
            payload = tar[item.payload : item.payload + item.stored]
            element["digest"] = sha256(payload)
            cuts = cut_at_zeros(payload, chunk_size)
            for number, (offset, piece, hole) in enumerate(cuts):
                told: dict[str, Any] = {"offset": put(item.payload + offset + len(piece))}
                if len(cuts) > 1:
                    told |= {"chunkSize": len(piece), "chunkDigest": sha256(piece)}
                    told |= {"chunkType": "zeros"} if hole else {}
                if number:
                    group.append({"name": element["name"], "type": "chunk", "chunkOffset": offset})
                group[-1] |= told
                place = -1 if hole and len(cuts) > 1 else told["offset"]
                chunks.append(Chunk(offset, len(piece), place, 0, hashlib.sha256(piece).digest()))
            element["endOffset"] = len(blob)
        entries += group
        pairs.append((item.entry, chunks))
    if at < len(tar):
        put(len(tar))
    document: Toc = {"version": 1, "entries": entries}
    if edit_toc is not None:
        edit_toc(document)
    toc = json.dumps(document, separators=(",", ":")).encode()
    packed = packer.compress(toc)
    place = len(blob) + 8
    if podman4:
        footer = struct.pack("<QQQQ8s", place, len(packed), len(toc), 1, b"GnUlInUx")
        blob += skippable(packed) + skippable(footer)
    else:
        split = packer.compress(tar_split)
        where = place + len(packed) + 8
        footer = struct.pack(
            "<QQQQQQQ8s", place, len(packed), len(toc), 1, where, len(split), len(tar_split), b"GNUlInUx"
        )
        blob += skippable(packed) + skippable(split) + skippable(footer)
    ours = {oci.ZSTD_CHECKSUM: sha256(packed), oci.ZSTD_POSITION: f"{place}:{len(packed)}:{len(toc)}:1"}
    github = dict(zip((oci.GITHUB_ZSTD_CHECKSUM, oci.GITHUB_ZSTD_POSITION), ours.values(), strict=True))
    annotations = ours if podman4 else {**ours, **github} if both_keys else github
    return LayerBlob(bytes(blob), annotations, sha256(tar), toc, tar, frames, oci.OCI_LAYER_ZSTD, pairs)


def item_named(tar: bytes, path: bytes) -> TarItem:
    return next(item for item in scan(tar) if item.entry.path == path)
