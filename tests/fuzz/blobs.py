"""Targets that come as parts of a layer: footer, TOC, layer table, tar, frames, trace."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import zstandard

from lazyfs import oci
from lazyfs.chunks.unpack import Unpacker
from lazyfs.errors import (
    DigestMismatch,
    FooterInvalid,
    FrameInvalid,
    TableInvalid,
    TarInvalid,
    TocInvalid,
    TraceInvalid,
)
from lazyfs.format import trace as traces
from lazyfs.format.checksum import checksum
from lazyfs.format.codec import FrameDecoder, frame_size
from lazyfs.format.entry import Kind
from lazyfs.format.erofs_write import write_erofs
from lazyfs.format.footer import MAX_FOOTER, Form, parse_footer
from lazyfs.format.inflate import STEP, decompress
from lazyfs.format.lazy import NotLazy, read_toc, refusal, toc_source
from lazyfs.format.members import MemberDecoder, MemberStream
from lazyfs.format.table import CHUNK_COLUMNS, FORM_ZSTD_CHUNKED, FRAME_COLUMNS, ROW_COLUMNS, LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.format.tar import TarScanner
from lazyfs.format.toc import parse_toc
from lazyfs.tree import Tree, build_tree
from tests.fuzz.target import Target, place
from tests.helpers import tars
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.foreign import estargz_layer, storage_layer
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of, whiteout

_BLOB = 1 << 30  # bytes of the blob that footers and TOCs are said to be of
_ENOUGH = 1 << 20  # bytes of output after which a stream is known not to end by itself


@cache
def _small() -> bytes:
    """A tar of one of each, small enough to be changed often."""
    return tar_of(
        dir_("d", mode=0o1755),
        file("d/f", b"hello" * 50, xattrs={"user.a": b"b"}, uname="u", mtime_ns=1_600_000_000_123_456_789),
        symlink("s", "d/f"),
        hardlink("h", "d/f"),
        tars.char("c", 1, 3),
        whiteout("d/gone"),
        file("é\n", bytes(3000)),
    )


@cache
def _layers() -> tuple[LayerBlob, ...]:
    return (
        zstd_chunked_layer(_small(), chunk_size=100, frame_size=300),
        estargz_layer(_small(), chunk_size=1000),
        storage_layer(_small()),
        storage_layer(_small(), podman4=True),
    )


# -- footer


def footer(data: bytes) -> None:
    """The last bytes of a blob of 1 GiB, and of one that consists of them."""
    last = data[-MAX_FOOTER:]
    for size in (len(last), _BLOB):
        refusal(last, size)
    found = parse_footer(last, _BLOB)
    if found.form is not Form.EXTERNAL_TOC:
        assert 0 <= found.toc_offset < found.toc_offset + found.toc_size <= _BLOB - found.footer_size


def _footers() -> list[bytes]:
    return [layer.blob[-MAX_FOOTER:] for layer in _layers()]


# -- TOC


def tail(data: bytes) -> None:
    """A whole blob whose TOC no digest vouches for: taken apart from its end. The first byte tells its type."""
    blob = data[1:]
    kind = oci.OCI_LAYER_GZIP if data[:1] == b"g" else oci.OCI_LAYER_ZSTD
    layer = oci.Descriptor(kind, "sha256:" + "0" * 64, len(blob), {})
    source = toc_source(layer, allow_unverified=True)
    if isinstance(source, NotLazy):
        return
    found = read_toc(source, lambda offset, size: blob[offset : offset + size])
    if not isinstance(found, NotLazy):
        parse_toc(found.raw, found.payload_end)


def _tails() -> list[bytes]:
    return [(b"g" if "gzip" in layer.media_type else b"z") + layer.blob for layer in _layers()]


def toc(data: bytes) -> None:
    """The JSON of a TOC: made a table, a tree and an image for the kernel, and all of them read from end to end."""
    listing = parse_toc(data, _BLOB)
    path = place() / "table"
    build_table(path, LayerFacts(FORM_ZSTD_CHUNKED, _BLOB + 100, _BLOB), listing)
    _read_all(path)


def _read_all(path: Path) -> None:
    """Read everything in a fresh table, and in the tree of it twice over. AssertionError: it contradicts itself."""
    table = LayerTable(path)
    try:
        for row in range(table.rows):
            _read_row(table, row)
        for frame in range(table.frame_count):
            assert 0 <= table.frame_blob_offset[frame] < table.frame_blob_end[frame] <= table.payload_end
            assert len(table.frame_chunks(frame)) > 0
        assert all(table.run_end(chunk) >= chunk for chunk in range(0, table.chunk_count, 50))
        for tables in ([table], [table, table]):
            _read_tree(tables)
    finally:
        table.close()


def _read_row(table: LayerTable, row: int) -> None:
    name = table.name(row)
    assert b"/" not in name and name not in (b".", b"..") and (row == 0) == (name == b"")
    assert table.find(table.path_of(row)) == row
    table.xattrs(row), table.mtime_ns(row)
    assert 0 <= table.inode(row) < table.rows
    kind = table.kind[row]
    if kind == Kind.SYMLINK:
        assert 0 < len(table.link(row)) < 4096
    elif kind == Kind.REG:
        covered = 0
        for place in itertools.islice(table.places(row, 0, table.size[row]), 10_000):
            covered += place.size
            assert place.size > 0 and len(table.chunk_digest(place.chunk)) == 32
        assert covered == table.size[row] or len(table.file_chunks(row)) >= 10_000
    elif kind == Kind.DIR:
        assert [table.parent[child] for child in table.children(row)] == [row] * len(table.children(row))


def _read_tree(tables: list[LayerTable]) -> None:
    where = place() / "tree"
    build_tree(where, tables)
    tree = Tree(where)
    try:
        for row in range(1, tree.rows):
            assert tree.child(tree.parent[row], tree.name(row)) == row
        write_erofs(place() / "erofs", tree, tables, "0" * 64)
    finally:
        tree.close()


def _tocs() -> list[bytes]:
    return [layer.toc for layer in _layers()] + [b'{"version":1,"entries":[]}']


# -- layer table


_HEAD = struct.Struct("<8sII16sQ16sQ")  # as lazyfs.format.columns has it


def table(data: bytes) -> None:
    """A table's file as a disk gave it back; and once more with its sums made right, as far as they can be."""
    for raw in (data, _resealed(data)):
        path = place() / "damaged"
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        try:
            found = LayerTable(path)
        except TableInvalid:
            continue
        try:
            found.ensure_names()
            for name in ROW_COLUMNS | CHUNK_COLUMNS | FRAME_COLUMNS:
                len(getattr(found, "chunk_count_of" if name == "chunk_count" else name))
        except TableInvalid:
            pass
        finally:
            found.close()


def _resealed(data: bytes) -> bytes:
    """Return the file with its size and both of its sums made right: what only our own process could have written."""
    head = data[: _HEAD.size].ljust(_HEAD.size, b"\0")
    magic, version, count, _, _, _, front = _HEAD.unpack(head)
    front = min(front, len(data))
    rest = checksum([memoryview(data)[front:]])
    blank = _HEAD.pack(magic, version, count, b"", len(data), rest, front)
    told = checksum([blank, memoryview(data)[_HEAD.size : max(front, _HEAD.size)]])
    return _HEAD.pack(magic, version, count, told, len(data), rest, front) + data[_HEAD.size :]


def _tables() -> list[bytes]:
    path = place() / "seed"
    out = []
    for layer in _layers()[:2]:
        build_table(path, LayerFacts(FORM_ZSTD_CHUNKED, _BLOB + 100, _BLOB), parse_toc(layer.toc, _BLOB))
        out.append(path.read_bytes())
    return out


# -- tar

SPARSE: tuple[tars.Sparseness, ...] = ("gnu", "0.0", "0.1", "1.0")


def tar(data: bytes) -> None:
    """A layer's tar in blocks of an odd size, unpacked and made a table; and once more with right checksums."""
    for raw in (data, _summed(data)):
        try:
            _unpack(raw)
        except (TarInvalid, TocInvalid):
            continue


def _unpack(raw: bytes) -> None:
    scanner = TarScanner()
    items = [item for at in range(0, len(raw), 777) for item in scanner.feed(raw[at : at + 777])]
    scanner.finish()
    assert all(item.start < item.payload <= item.end for item in items)
    expanded = sum(item.entry.size for item in items)
    if expanded > _ENOUGH:
        return  # a sparse file may have terabytes of holes, and as many chunks
    unpacker, written = Unpacker(), 0
    for at in range(0, len(raw), 777):
        for piece in unpacker.feed(raw[at : at + 777]):
            assert sum(map(len, piece.parts)) == piece.chunk.size > 0
            piece.chunk.digest = hashlib.sha256(b"".join(piece.parts)).digest()  # as their writer does
            written += piece.chunk.size
    unpacker.finish()
    assert written <= sum(item.entry.size for item in items if item.entry.kind is Kind.REG)  # holes are no pieces
    unpacker.write_table(place() / "unpacked", len(raw))
    LayerTable(place() / "unpacked").close()


def _summed(data: bytes) -> bytes:
    """Return the tar with the checksums of its headers made right, so that the damage reaches what lies behind them."""
    blocks = (data[at : at + 512] for at in range(0, len(data), 512))
    return b"".join(tars.with_checksum(one) if one[257:262] == b"ustar" and len(one) == 512 else one for one in blocks)


def _tars() -> list[bytes]:
    return [
        _small(),
        tar_of(
            tars.old_file("old", b"x", uid=1 << 22),
            tars.fifo("p"),
            tars.block("b", 8, 1),
            tars.opaque("d"),
            file("d", b"replaced"),
            dir_("d/e"),
            symlink("l" * 150, "t" * 150),
            hardlink("k", "old"),
        ),
        tar_of(
            *(tars.sparse("f", ((0, b"begin"), (5000, b"end")), 9000, form) for form in ("0.0", "0.1", "1.0", "gnu"))
        ),
        tar_of(tars.global_pax([(b"comment", b"x")]), file("l" * 200, b"x", xattrs={"user.b": b"\0\xff"})),
    ]


# -- frames


def frames(data: bytes) -> None:
    """Compressed bytes through everything that decodes some: whole frames, their beginnings, members, streams."""
    decoder = FrameDecoder()
    attempts: tuple[Callable[[], object], ...] = (
        lambda: decoder.decode(data, _ENOUGH),
        lambda: decoder.decode_prefix(data, 300),
        lambda: MemberDecoder().decode_prefix(data, 300),
        lambda: _members(data),
        lambda: _stream(data),
        lambda: _walk(decoder, data),
    )
    for attempt in attempts:
        try:
            attempt()
        except FrameInvalid:
            continue


def _members(data: bytes) -> None:
    size = 0
    for piece in MemberStream().feed(data):
        assert len(piece) <= STEP
        size += len(piece)
        if size > _ENOUGH:
            break


def _stream(data: bytes) -> None:
    blocks = (data[at : at + 100] for at in range(0, len(data), 100))
    size = 0
    for piece in decompress(blocks):
        assert 0 < len(piece) <= STEP
        size += len(piece)
        if size > _ENOUGH:
            break


def _walk(decoder: FrameDecoder, data: bytes) -> None:
    """Frame by frame, as an extent is taken apart."""
    view = memoryview(data)
    while view:
        size = frame_size(view)
        assert 0 < size <= len(view)
        decoded, used = decoder.decode_first(view, _ENOUGH)
        assert used == size and len(decoded) <= _ENOUGH
        view = view[used:]


def _frames() -> list[bytes]:
    text = b"the quick brown fox " * 100
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    unsized = stream.compress(text) + stream.flush()
    sized = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(text)
    repeated = b"\x28\xb5\x2f\xfd\x00\x58" + (((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x") * 20
    return [unsized, sized, sized + unsized, repeated, *(layer.blob for layer in _layers()[:2])]


# -- trace


def trace(data: bytes) -> None:
    """A trace as a file, or the JSON in one; what is read can be written again, and is the same."""
    raw = zstandard.compress(data) if data[:1] == b"{" else data
    found = traces.decode(raw)
    try:
        again = traces.encode(found)
    except TraceInvalid:
        return  # larger than it came
    assert traces.decode(again) == found
    traces.merged([found, found])
    traces.paths(traces.stripped(found))


def _traces() -> list[bytes]:
    layers = tuple("sha256:" + hashlib.sha256(str(number).encode()).hexdigest() for number in range(3))
    reads = tuple(traces.Read(b"usr/bin/%d" % (n % 4), n % 3, n * 100, 100, n / 10, n / 20) for n in range(6))
    requests = (traces.Request(0, 5, 100, 0, 0.1, 0.2, 0.3),)
    whole = traces.encode(
        traces.Trace(layers[0], layers, reads, requests, 1.5, ("sh", "-c", "true\udcff"), (traces.Span(1, 2, 3),))
    )
    return [whole, zstandard.decompress(whole)]


_TOC_WORDS = tuple(
    f'"{word}"'.encode()
    for word in (
        "name", "type", "size", "modtime", "linkName", "mode", "uid", "gid", "devMajor", "devMinor", "xattrs", "digest",
        "offset", "endOffset", "innerOffset", "chunkOffset", "chunkSize", "chunkDigest", "chunkType", "zeros", "chunk",
        "reg", "dir", "symlink", "hardlink", "char", "block", "fifo", "nameRaw", "linkNameRaw", "xattrsRaw",
    )
)  # fmt: skip

TARGETS = (
    Target("footer", footer, _footers, (FooterInvalid,), (b"STARGZ", b"GnUlInUx", b"GNUlInUx"), most=200),
    Target("tail", tail, _tails, (FooterInvalid, TocInvalid, DigestMismatch), _TOC_WORDS),
    Target("toc", toc, _tocs, (TocInvalid, TarInvalid), _TOC_WORDS, json=True),
    Target("table", table, _tables, (TableInvalid,)),
    Target("tar", tar, _tars, (TarInvalid, TocInvalid), (b"SCHILY.xattr.", b"GNU.sparse.", b"ustar\0", b"path=")),
    Target("frames", frames, _frames, (FrameInvalid,), (b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"\x50\x2a\x4d\x18")),
    Target("trace", trace, _traces, (TraceInvalid,), (b"[0,0,0,0,0,0]", b'"reads":', b'"spans":'), json=True),
)
