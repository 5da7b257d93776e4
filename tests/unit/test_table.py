"""The layer table: every name, attribute and byte of content is where the entries said."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.errors import TableInvalid, TarInvalid, TocInvalid
from lazyfs.format import table as tables
from lazyfs.format import table_build, table_content
from lazyfs.format.entry import LANDMARK, LANDMARK_CONTENT, OPAQUE_MARKER, TOC_NAME, Chunk, Entry, Kind
from lazyfs.format.listing import Listing
from lazyfs.format.table import (
    FLAG_IMPLICIT,
    FLAG_OPAQUE,
    FLAG_REPLACES,
    FORM_PLAIN,
    FORM_ZSTD_CHUNKED,
    NO_FRAME,
    LayerTable,
    Place,
)
from lazyfs.format.table_build import LayerFacts, build_table
from tests.helpers.entries import entry
from tests.helpers.layer_tables import FACTS, table_at

MTIME = 1_700_000_000_123_456_789


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def regular(path: bytes, size: int) -> Entry:
    return Entry(path, Kind.REG, 0o640, 1, 2, MTIME, size)


def test_attributes_come_back(tmp_path: Path) -> None:
    entries = [
        Entry(b"", Kind.DIR, 0o1777, 3, 4, -1),
        Entry(b"d", Kind.DIR, 0o2755, 1000, 2**32 - 2, MTIME, xattrs=((b"user.a", b"1"), (b"user.b", b""))),
        Entry(b"d/empty", Kind.REG, 0o4711, 1, 2, 0),
        Entry(b"d/l", Kind.SYMLINK, 0o777, 0, 0, MTIME, link=b"\xff/../x"),
        Entry(b"c", Kind.CHAR, 0o666, 0, 5, MTIME, rdev=(4095, (1 << 20) - 1)),
        Entry(b"b", Kind.BLOCK, 0o660, 0, 6, MTIME, rdev=(7, 0)),
        Entry(b"p", Kind.FIFO, 0o600, 0, 0, -(10**9) - 1),
        Entry(b"d/h", Kind.HARDLINK, 0, 0, 0, 0, link=b"d/l"),
    ]
    table = table_at(tmp_path / "table", entries)
    assert table.rows == 8
    for wanted in entries:
        row = table.find(wanted.path)
        assert row is not None
        assert table.path_of(row) == wanted.path
        assert table.kind[row] == wanted.kind
        if wanted.kind is Kind.HARDLINK:
            assert table.inode(row) == table.find(b"d/l")
            continue
        assert table.inode(row) == row
        assert (table.mode[row], table.uid[row], table.gid[row]) == (wanted.mode, wanted.uid, wanted.gid)
        assert table.mtime_ns(row) == wanted.mtime_ns
        assert table.xattrs(row) == dict(wanted.xattrs)
        assert not table.flags[row]
        if wanted.kind in (Kind.CHAR, Kind.BLOCK):
            assert table.rdev(row) == wanted.rdev
        if wanted.kind is Kind.SYMLINK:
            assert table.link(row) == wanted.link
            assert (table.size[row], table.nlink[row]) == (len(wanted.link), 2)
    table.close()


def test_names_are_found_and_others_are_not(tmp_path: Path) -> None:
    names = [b"a", b"b", b"a/b", b"a/b/c", b"ab", b"\xff", b" ", b"a.", b"z" * 255]
    kinds = {b"a", b"a/b"}
    table = table_at(tmp_path / "table", [entry(n, Kind.DIR if n in kinds else Kind.REG) for n in names])
    for name in names:
        row = table.find(name)
        assert row is not None and table.path_of(row) == name
    for name in (b"c", b"a/", b"a/bb", b"b/a", b"a/b/c/d", b"/a", b".", b"..", b"z" * 254, b"z" * 256):
        assert table.find(name) is None
    assert table.find(b"") == 0
    assert [table.name(row) for row in table.children(0)] == sorted(n for n in names if b"/" not in n)
    assert "rows" in repr(table)
    table.close()


def test_link_counts(tmp_path: Path) -> None:
    table = table_at(
        tmp_path / "table",
        [entry(b"d/sub", Kind.DIR), entry(b"d/f"), entry(b"d/g", Kind.HARDLINK, b"d/f"), entry(b".wh.x")],
    )
    count = {table.path_of(row): table.nlink[row] for row in range(table.rows)}
    assert count == {b"": 3, b"d": 3, b"d/sub": 2, b"d/f": 2, b"d/g": 2, b"x": 1}
    table.close()


# -- what steers lower layers


def test_whiteouts_and_flags(tmp_path: Path) -> None:
    entries = [
        entry(b"named", Kind.DIR),
        entry(b"named/.wh.gone"),
        entry(b"implied/" + OPAQUE_MARKER),
        entry(b"again/x"),
        entry(b".wh.again"),
        entry(b"file"),
        entry(b".wh.file"),
        entry(b".wh..wh.aufs"),
    ]
    table = table_at(tmp_path / "table", entries)
    found = {table.path_of(row): (Kind(table.kind[row]), table.flags[row]) for row in range(table.rows)}
    assert found == {
        b"": (Kind.DIR, FLAG_IMPLICIT),
        b"named": (Kind.DIR, 0),
        b"named/gone": (Kind.WHITEOUT, 0),
        b"implied": (Kind.DIR, FLAG_IMPLICIT | FLAG_OPAQUE),
        b"again": (Kind.DIR, FLAG_IMPLICIT | FLAG_OPAQUE | FLAG_REPLACES),
        b"again/x": (Kind.REG, 0),
        b"file": (Kind.REG, 0),
    }
    table.close()


def test_attributes_that_could_steer_overlayfs_are_dropped_and_counted(tmp_path: Path) -> None:
    keys = (
        b"security.capability",
        b"trusted.overlay.opaque",
        b"trusted.x",
        b"user.overlay.redirect",
        b"user.overlayed",
    )
    pairs = tuple((key, b"v") for key in keys)
    table = table_at(tmp_path / "table", [Entry(b"f", Kind.REG, 0o644, 0, 0, 0, xattrs=pairs), entry(b"g")])
    row = table.find(b"f")
    assert row is not None
    assert table.xattrs(row) == {b"security.capability": b"v", b"user.overlayed": b"v"}
    assert table.dropped_xattrs == 3
    table.close()


def test_the_landmark_is_no_name_but_a_place(tmp_path: Path) -> None:
    mark = Entry(LANDMARK, Kind.REG, 0o644, 0, 0, 0, 1)
    chunks = {LANDMARK: [Chunk(0, 1, 777, 512, sha256(LANDMARK_CONTENT))]}
    table = table_at(tmp_path / "table", [mark, entry(b"d/" + LANDMARK), entry(TOC_NAME)], chunks)
    assert table.landmark == 777
    assert table.find(LANDMARK) is None
    assert table.find(TOC_NAME) is None
    assert table.find(b"d/" + LANDMARK) is not None, "only the one at the root is a landmark"
    table.close()


# -- content


@st.composite
def layers(draw: st.DrawFn) -> list[tuple[Entry, list[Chunk], bytes]]:
    """Files cut into chunks anywhere, packed into frames anywhere."""
    out = []
    frame, inner = 0, 0
    for number in range(draw(st.integers(1, 5))):
        sizes = draw(st.lists(st.integers(1, 9000), max_size=6))
        data = hashlib.shake_128(b"%d" % number).digest(sum(sizes))
        chunks, offset = [], 0
        for size in sizes:
            if draw(st.booleans()):
                frame, inner = frame + 100, 0
            chunks.append(Chunk(offset, size, frame, inner, sha256(data[offset : offset + size])))
            inner += size
            offset += size
        out.append((regular(b"f%d" % number, offset), chunks, data))
    return out


@settings(max_examples=150, deadline=None)
@given(layers(), st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 60_000)), min_size=1, max_size=20))
def test_places_are_the_slice_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[Entry, list[Chunk], bytes]],
    reads: list[tuple[int, int]],
) -> None:
    path = tmp_path_factory.getbasetemp() / "places"
    build_table(path, FACTS, Listing.of((item, chunks) for item, chunks, _ in files))
    table = LayerTable(path)
    of_chunk: dict[int, bytes] = {}
    for item, chunks, data in files:
        row = table.find(item.path)
        assert row is not None
        assert len(table.file_chunks(row)) == len(chunks)
        assert not chunks or table.data_offset[row] % 4096 == 0
        for number, chunk in zip(table.file_chunks(row), chunks, strict=True):
            of_chunk[number] = data[chunk.offset : chunk.offset + chunk.size]
            assert table.chunk_digest(number) == chunk.digest
            assert table.chunk_inner[number] == chunk.inner_offset
            assert table.frame_blob_offset[table.chunk_frame[number]] == chunk.blob_offset
            assert number in table.frame_chunks(table.chunk_frame[number])
            assert table.chunk_data_offset[number] == table.data_offset[row] + chunk.offset
    assert list(table.chunk_data_offset) == sorted(table.chunk_data_offset)
    assert list(table.frame_blob_end) == [*list(table.frame_blob_offset)[1:], *([FACTS.payload_end] * bool(of_chunk))]
    assert sum(len(table.frame_chunks(frame)) for frame in range(table.frame_count)) == table.chunk_count
    for item, _, data in files:
        row = table.find(item.path)
        assert row is not None
        for offset, size in reads:
            runs = list(table.places(row, offset, size))
            got = b"".join(of_chunk[run.chunk][run.offset : run.offset + run.size] for run in runs)
            assert got == data[offset : offset + size]
            assert all(run.size > 0 for run in runs)
        for at in table.chunk_data_offset[
            table.first_chunk[row] : table.first_chunk[row] + len(table.file_chunks(row))
        ]:
            for _, size in reads:
                _check_lone_chunk(table, at, size)
    for offset, size in reads:
        _check_lone_chunk(table, offset, size)
    table.close()


def _check_lone_chunk(table: LayerTable, data_offset: int, size: int) -> None:
    """`lone_chunk` has one where the range is one whole chunk that begins a run, and zeros."""
    places = list(table.data_places(data_offset, size))
    wanted = None
    if len(places) == 1 and places[0] == (0, Place(chunk := places[0][1].chunk, 0, table.chunk_size[chunk])):
        ends = [start + length for start, length in zip(table.chunk_data_offset, table.chunk_size, strict=True)]
        wanted = None if data_offset in ends else chunk
    assert table.lone_chunk(data_offset, size) == wanted


def test_places_outside_of_a_file_are_none(tmp_path: Path) -> None:
    chunks = {b"f": [Chunk(0, 10, 0, 0, sha256(b"x"))]}
    table = table_at(tmp_path / "table", [regular(b"f", 10), regular(b"e", 0)], chunks)
    row, empty = table.find(b"f"), table.find(b"e")
    assert row is not None and empty is not None
    assert list(table.places(row, 9, 5)) == [Place(0, 9, 1)]
    for at, offset, size in ((row, 10, 1), (row, -1, 5), (row, 0, 0), (empty, 0, 1), (row, 1 << 60, 1)):
        assert list(table.places(at, offset, size)) == []
    table.close()


def test_holes_have_no_frame(tmp_path: Path) -> None:
    chunks = [
        Chunk(0, 10, 50, 0, sha256(b"a")),
        Chunk(10, 20, -1, 0, sha256(bytes(20))),
        Chunk(30, 5, 50, 10, b"b" * 32),
    ]
    table = table_at(tmp_path / "table", [regular(b"f", 35)], {b"f": chunks})
    assert list(table.chunk_frame) == [0, NO_FRAME, 0]
    assert table.frame_chunks(0) == range(3)
    assert [place.chunk for place in table.places(table.find(b"f") or 0, 5, 30)] == [0, 1, 2]
    table.close()


def test_chunks_of_a_plain_layer_lie_where_they_were_written(tmp_path: Path) -> None:
    """Space of files that were replaced later stays unused."""
    first, second = [Chunk(0, 7, 0, 0, sha256(b"1"))], [Chunk(0, 9, 4096, 0, sha256(b"2"))]
    path = tmp_path / "table"
    facts = LayerFacts(FORM_PLAIN, 100, 100)
    build_table(path, facts, Listing.of([(regular(b"f", 7), first), (regular(b"f", 9), second)]))
    table = LayerTable(path)
    assert (table.form, table.rows, table.chunk_count) == (FORM_PLAIN, 2, 1)
    assert list(table.chunk_data_offset) == [4096]
    assert list(table.chunk_frame) == [NO_FRAME]
    assert table.data_size == 8192
    table.close()


def test_facts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "table"
    build_table(path, LayerFacts(FORM_ZSTD_CHUNKED, 1 << 39, 12345), Listing())
    table = LayerTable(path)
    assert (table.form, table.blob_size, table.payload_end, table.entries) == (FORM_ZSTD_CHUNKED, 1 << 39, 12345, 0)
    assert (table.rows, table.chunk_count, table.frame_count, table.data_size, table.landmark) == (1, 0, 0, 0, 0)
    assert table.mode[0] == 0o755
    table.close()


# -- refusals


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([(regular(b"f", 10), [])], "'f' has chunks up to 0 of its 10 bytes"),
        ([(regular(b"f", 10), [Chunk(0, 4, 0, 0, b"d" * 32)])], "'f' has chunks up to 4 of its 10 bytes"),
        (
            [(regular(b"f", 1), [Chunk(0, 1, 50, 0, b"d" * 32)]), (regular(b"g", 1), [Chunk(0, 1, 10, 0, b"d" * 32)])],
            "'g' is not in blob order",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, pairs: list[tuple[Entry, list[Chunk]]], reason: str) -> None:
    with pytest.raises(TocInvalid, match=reason.replace("'", ".")):
        build_table(tmp_path / "table", FACTS, Listing.of(pairs))
    assert not list(tmp_path.iterdir())


def test_what_a_namespace_refuses_makes_no_table(tmp_path: Path) -> None:
    for bad in ([entry(b"a", Kind.HARDLINK, b"b")], [entry(b"f"), entry(b"f/x")], [entry(b".wh.x/y")]):
        with pytest.raises(TarInvalid):
            build_table(tmp_path / "table", FACTS, Listing.of((item, []) for item in bad))
    with pytest.raises(TarInvalid, match="hard link"):
        table_at(tmp_path / "table", [entry(TOC_NAME), entry(b"a", Kind.HARDLINK, TOC_NAME)])


def test_heaps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = tuple((b"user.%05d" % i, b"") for i in range(66_000))
    with pytest.raises(TocInvalid, match="extended attributes"):
        table_at(tmp_path / "table", [Entry(b"f", Kind.REG, 0o644, 0, 0, 0, xattrs=many)])
    monkeypatch.setattr(table_content, "MAX_DATA", 4096)
    chunks = {b"f": [Chunk(0, 4097, 0, 0, b"d" * 32)]}
    with pytest.raises(TocInvalid, match="claims more than 4096 bytes"):
        table_at(tmp_path / "table", [regular(b"f", 4097)], chunks)
    monkeypatch.setattr(table_build, "MAX_TABLE_HEAP", 1000)
    with pytest.raises(TocInvalid, match="bytes of names"):
        table_at(tmp_path / "table", [entry(b"%0200d" % i) for i in range(10)])


def test_any_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table"
    chunks = {b"d/f": [Chunk(0, 10, 0, 0, sha256(b"x"))]}
    table_at(path, [regular(b"d/f", 10), entry(b"l", Kind.SYMLINK, b"x")], chunks).close()
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x04]) + whole[position + 1 :])
        with pytest.raises(TableInvalid):
            LayerTable(path).ensure_names()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(TableInvalid):
            LayerTable(path)
    path.write_bytes(whole)
    monkeypatch.setattr(tables, "VERSION", tables.VERSION + 1)
    with pytest.raises(TableInvalid):
        LayerTable(path)
