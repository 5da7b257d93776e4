"""Layers of other writers, from descriptor to bytes: what they hold is read, and what they claim falsely is found."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs import oci
from lazyfs.chunks.feed import feed_frames
from lazyfs.chunks.frames import decoder_for, frame_wanted, needed
from lazyfs.chunks.whole import WholeCheck
from lazyfs.digest import raw_of
from lazyfs.errors import (
    DigestMismatch,
    FooterInvalid,
    FormatError,
    FrameInvalid,
    TarInvalid,
    TocInvalid,
    TocMismatch,
    TrustError,
)
from lazyfs.format.entry import Kind
from lazyfs.format.footer import Form
from lazyfs.format.lazy import TABLE_FORMS, NotLazy, Toc, TocSource, read_toc, toc_source
from lazyfs.format.table import NO_FRAME, LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.format.toc import parse_toc
from lazyfs.limits import MAX_TOC
from tests.helpers.blobs import LayerBlob, annotated, flipped, toc_entry
from tests.helpers.foreign import (
    estargz_footer,
    estargz_layer,
    gzip_member,
    item_named,
    sha256,
    storage_layer,
    when,
)
from tests.helpers.tars import declared, dir_, file, hardlink, symlink, tar_of

Make = Callable[[bytes], LayerBlob]

FORMS: dict[str, tuple[Make, Form]] = {
    "estargz": (estargz_layer, Form.ESTARGZ),
    "estargz of small chunks": (lambda tar: estargz_layer(tar, chunk_size=700), Form.ESTARGZ),
    "estargz with shared members": (lambda tar: estargz_layer(tar, chunk_size=900, min_chunk=400), Form.ESTARGZ),
    "containers/storage": (storage_layer, Form.STORAGE_ZSTD_CHUNKED),
    "containers/storage, small chunks": (lambda tar: storage_layer(tar, chunk_size=600), Form.STORAGE_ZSTD_CHUNKED),
    "podman 4": (lambda tar: storage_layer(tar, podman4=True), Form.ZSTD_CHUNKED),
    "for old and new podman": (lambda tar: storage_layer(tar, both_keys=True), Form.STORAGE_ZSTD_CHUNKED),
}
every_form = pytest.mark.parametrize("name", FORMS)

ZEROS = b"begin" * 100 + bytes(5_000_000) + b"end" * 700
TREE = tar_of(
    dir_("./"),
    dir_("d", mode=0o750, uid=33, gid=34, uname="www-data", gname="www-data"),
    file("d/plain", b"some content", mode=0o4755, uid=33, uname="www-data", xattrs={"user.a": b"\xff"}),
    file("d/large", bytes(range(256)) * 30),
    file("d/half", b"t", mtime_ns=1_500_000_000_500_000_000),
    file("zeros", ZEROS),
    file("short-zeros", b"a" * 100 + bytes(900) + b"b" * 3000 + bytes(1024)),
    file("only-zeros", bytes(70_000)),
    symlink("link", "d/plain"),
    hardlink("hard", "d/plain"),
    file("empty"),
    file("last", b"x" * 1500),
)


def toc_of(layer: LayerBlob) -> Toc:
    source = toc_source(layer.descriptor)
    assert isinstance(source, TocSource), source
    toc = read_toc(source, layer.fetch)
    assert isinstance(toc, Toc), toc
    return toc


@contextmanager
def table_of(layer: LayerBlob) -> Iterator[LayerTable]:
    """The layer table, made as the daemon does it."""
    toc = toc_of(layer)
    with tempfile.TemporaryDirectory(prefix="foreign-") as scratch:
        path = Path(scratch) / "table"
        facts = LayerFacts(TABLE_FORMS[toc.form], len(layer.blob), toc.payload_end)
        build_table(path, facts, parse_toc(toc.raw, toc.payload_end))
        table = LayerTable(path)
        try:
            yield table
        finally:
            table.close()


def read_chunk(table: LayerTable, blob: bytes, chunk: int) -> bytes:
    """A chunk as a reader gets it; nothing unverified is returned."""
    frame, size = table.chunk_frame[chunk], table.chunk_size[chunk]
    data = bytes(size)
    if frame != NO_FRAME:
        start = table.frame_blob_offset[frame]
        decoded = decoder_for(table.form).decode_prefix(
            blob[start : start + needed(table, frame)], frame_wanted(table, frame)
        )
        data = decoded[table.chunk_inner[chunk] : table.chunk_inner[chunk] + size]
    if raw_of(data) != table.chunk_digest(chunk):
        raise DigestMismatch("a chunk", "another", "this")
    return data


def content(table: LayerTable, blob: bytes, row: int) -> bytes:
    return b"".join(read_chunk(table, blob, chunk) for chunk in table.file_chunks(row))


def check(layer: LayerBlob, blob: bytes | None = None, *, piece: int = 1 << 20) -> None:
    """Run the whole check as the daemon does: extent by extent, large ones in pieces."""
    blob = layer.blob if blob is None else blob
    with table_of(layer) as table:
        whole = WholeCheck(layer.digest, layer.diff_id, table, "L")
        starts = [*table.frame_blob_offset] or [table.payload_end]
        for start, end in zip([0, *starts], [*starts, table.payload_end], strict=True):
            rest, at = b"", start
            while at < end:
                step = min(piece, end - at)
                rest = feed_frames(whole, rest + blob[at : at + step], at + step == end)
                at += step
        for at in range(table.payload_end, len(blob), piece):
            whole.feed_tail(blob[at : at + piece])
        whole.finish()


@every_form
def test_every_file_is_read_and_the_whole_check_passes(name: str) -> None:
    make, form = FORMS[name]
    layer = make(TREE)
    assert toc_of(layer).form is form
    assert {e.path for e, _ in parse_toc(layer.toc, layer.payload_end)} == {e.path for e, _ in layer.pairs}
    with table_of(layer) as table:
        for path in (b"d/plain", b"hard", b"d/large", b"d/half", b"zeros", b"short-zeros", b"only-zeros", b"last"):
            item = item_named(TREE, b"d/plain" if path == b"hard" else path)
            row = table.find(path)
            assert row is not None
            assert content(table, layer.blob, table.inode(row)) == TREE[item.payload : item.payload + item.stored]
    check(layer)
    check(layer, piece=333)


@every_form
def test_names_that_json_can_not_hold_make_a_layer_plain(name: str) -> None:
    """Other writers put U+FFFD in their place: the TOC then tells of another file than the tar."""
    layer = FORMS[name][0](tar_of(file(b"latin1-\xe9", b"x")))
    with pytest.raises(TocInvalid, match="could not keep"):
        list(parse_toc(layer.toc, layer.payload_end))


def test_zeros_are_holes_that_nobody_fetches() -> None:
    with table_of(storage_layer(TREE)) as table:
        row = table.find(b"zeros")
        assert row is not None
        holes = [chunk for chunk in table.file_chunks(row) if table.chunk_frame[chunk] == NO_FRAME]
        assert sum(table.chunk_size[chunk] for chunk in holes) == 5_000_000
        assert len(holes) == 2  # in pieces that are no trouble to read
        row = table.find(b"only-zeros")  # of one chunk, so the writer does not say that it is a hole
        assert row is not None and table.chunk_frame[table.file_chunks(row)[0]] != NO_FRAME


def test_only_the_toc_of_containers_storage_is_fetched_for_a_start() -> None:
    """Behind it lies the tar-split, which may be long."""
    layer = storage_layer(TREE, tar_split=bytes(range(256)) * 1000)
    asked: list[tuple[int, int]] = []

    def fetch(blob_offset: int, size: int) -> bytes:
        asked.append((blob_offset, size))
        return layer.fetch(blob_offset, size)

    source = toc_source(layer.descriptor)
    assert isinstance(source, TocSource)
    read_toc(source, fetch)
    position = [int(word) for word in layer.annotations[oci.GITHUB_ZSTD_POSITION].split(":")]
    assert asked == [(position[0] - 8, position[1] + 8)]
    assert read_toc(without_position(layer), layer.fetch) == toc_of(layer)


def without_position(layer: LayerBlob) -> TocSource:
    source = toc_source(annotated(layer, GITHUB_ZSTD_POSITION=None).descriptor)
    assert isinstance(source, TocSource)
    return source


def test_docker_media_types_are_read_too() -> None:
    layer = replace(estargz_layer(TREE), media_type=oci.DOCKER_LAYER_GZIP)
    assert toc_of(layer).form is Form.ESTARGZ
    told = toc_source(annotated(layer, TOC_DIGEST=None).descriptor)
    assert isinstance(told, NotLazy) and "no digest" in told.reason


def test_a_gzip_layer_without_annotations_is_found_by_its_footer_when_the_user_says_so() -> None:
    layer = annotated(estargz_layer(TREE), TOC_DIGEST=None)
    source = toc_source(layer.descriptor, allow_unverified=True)
    assert isinstance(source, TocSource) and not source.verified
    toc = read_toc(source, layer.fetch)
    assert isinstance(toc, Toc) and toc.raw == layer.toc


def test_rounded_times_are_the_tars() -> None:
    assert when(1_500_000_000_500_000_000, whole=True) == "2017-07-14T02:40:01Z"
    check(estargz_layer(tar_of(file("a", b"x", mtime_ns=1_500_000_000_500_000_000))))


def test_attributes_without_a_value_may_be_told_or_not() -> None:
    tar = tar_of(dir_("a", xattrs={"user.empty": b"", "user.full": b"x"}))

    def told(**xattrs: str) -> LayerBlob:
        named = {key.replace("_", "."): value for key, value in xattrs.items()}
        return estargz_layer(tar, edit_toc=lambda toc: toc["entries"][0].update(xattrs=named))

    check(told(user_full="eA=="))
    check(told(user_full="eA==", user_empty=""))
    for wrong in (told(user_empty=""), told(user_full="eQ=="), told(user_full="eA==", user_empty="eA==")):
        with pytest.raises(TocMismatch, match="attributes"):
            check(wrong)


# -- lies


def lying(edit: Callable[[dict[str, Any]], object], **options: Any) -> LayerBlob:
    return storage_layer(TREE, edit_toc=edit, **options)


def test_a_hole_that_the_tar_does_not_have_is_found() -> None:
    def edit(toc: dict[str, Any]) -> None:
        entry = toc_entry(toc, "last")
        entry["chunkType"] = "zeros"
        entry["digest"] = ""

    with pytest.raises(TocMismatch, match="hole"):
        check(lying(edit))
    with pytest.raises(TocInvalid, match="not that of zeros"), table_of(lying(lambda toc: edit(toc) or digested(toc))):
        pass


def digested(toc: dict[str, Any]) -> None:
    toc_entry(toc, "last")["digest"] = sha256(b"x" * 1500)


def test_a_hole_of_the_tar_may_be_told_in_parts() -> None:
    def edit(toc: dict[str, Any]) -> None:
        toc_entry(toc, "only-zeros").update(chunkType="zeros", chunkSize=0)

    check(lying(edit))


@pytest.mark.parametrize("name", ["estargz", "containers/storage"])
@pytest.mark.parametrize("change", [
    {"size": 1501}, {"size": 10}, {"mode": 0o777}, {"uid": 7}, {"modtime": "2001-01-01T00:00:00Z"}, {"offset": 0},
    {"innerOffset": 3}, {"xattrs": {"user.x": "YQ=="}}, {"name": "other"},
])  # fmt: skip
def test_a_toc_that_differs_from_the_tar_is_found(name: str, change: dict[str, Any]) -> None:
    def edit(toc: dict[str, Any]) -> None:
        toc_entry(toc, "last").update(change)

    layer = (estargz_layer if name == "estargz" else storage_layer)(TREE, edit_toc=edit)
    with pytest.raises((TocMismatch, FormatError)):
        check(layer)


def test_a_gzip_tail_is_part_of_the_tar() -> None:
    """Another unpacker goes on behind the TOC's entry, and what it finds there is in its tree."""
    check(estargz_layer(TREE))
    with pytest.raises(TocMismatch, match="evil"):
        check(estargz_layer(TREE, behind=file("evil", b"x")))
    check(estargz_layer(TREE, more=gzip_member(bytes(512))))
    layer = estargz_layer(TREE)
    cut = replace(layer, blob=layer.blob[:-60] + layer.blob[-51:])
    with pytest.raises((TrustError, FormatError)):
        check(cut)


def test_a_member_that_the_toc_cuts_in_two_is_found() -> None:
    def edit(toc: dict[str, Any]) -> None:
        toc_entry(toc, "last")["offset"] += 7

    with pytest.raises((FormatError, TrustError)):
        check(estargz_layer(TREE, edit_toc=edit))


def test_hard_links_in_a_circle_are_refused() -> None:
    def edit(toc: dict[str, Any]) -> None:
        toc["entries"] += [
            {"name": "a", "type": "hardlink", "linkName": "b"}, {"name": "b", "type": "hardlink", "linkName": "a"},
        ]  # fmt: skip

    for make in (estargz_layer, storage_layer):
        with pytest.raises((TocInvalid, TarInvalid)), table_of(make(TREE, edit_toc=edit)):
            pass


def test_one_digest_for_contents_of_two_sizes_is_a_lie() -> None:
    def edit(toc: dict[str, Any]) -> None:
        entry = toc_entry(toc, "last")
        for key in ("digest", "chunkDigest"):
            entry[key] = sha256(b"some content")

    for make in (estargz_layer, storage_layer):
        layer = make(TREE, edit_toc=edit)
        with table_of(layer) as table:
            row = table.find(b"last")
            assert row is not None
            with pytest.raises(DigestMismatch):
                content(table, layer.blob, row)


def test_end_offsets_that_lie_are_refused() -> None:
    def end(name: str, value: int) -> LayerBlob:
        return lying(lambda toc: toc_entry(toc, name).update(endOffset=value))

    for layer in (end("d/large", 1 << 40), end("d/large", 1), end("d/plain", 1 << 20)):
        with pytest.raises(TocInvalid), table_of(layer):
            pass


# -- bombs


def test_a_toc_bomb_in_gzip_is_refused_before_it_is_unpacked() -> None:
    squeezed = zlib.compressobj(9, wbits=31)
    bomb = squeezed.compress(declared("stargz.index.json", MAX_TOC + 1))
    bomb += b"".join(squeezed.compress(bytes(1 << 20)) for _ in range(151)) + squeezed.flush()
    layer = estargz_layer(TREE)
    blob = bomb + estargz_footer(0)
    with pytest.raises(TocInvalid, match="allowed"):
        toc_of(replace(layer, blob=blob))


@pytest.mark.parametrize("entry", [file("other", b"{}"), dir_("stargz.index.json"), bytes(1024), b"no tar" * 200])
def test_what_stands_in_the_place_of_the_toc_is_refused(entry: bytes) -> None:
    layer = estargz_layer(TREE)
    member = gzip_member(entry)
    for packed in (member, member[:-9], b"\0" + member):
        with pytest.raises(TocInvalid):
            toc_of(replace(layer, blob=packed + estargz_footer(0)))


def test_a_member_bomb_costs_a_reader_what_it_wants_and_no_more() -> None:
    squeezed = zlib.compressobj(9, wbits=31)
    bomb = squeezed.compress(b"wanted") + b"".join(squeezed.compress(bytes(1 << 20)) for _ in range(64))
    assert decoder_for(estargz_layer(TREE).form).decode_prefix(bomb, 6) == b"wanted"


def test_refused_footers_say_why() -> None:
    layer = estargz_layer(TREE)
    external = bytes.fromhex("1f8b0804000000000 0ff15005347 1100".replace(" ", "")) + b"STARGZEXTERNALTOC"
    external += b"\1\0\0\xff\xff" + bytes(8)
    found = toc_source(replace(layer, blob=layer.blob + external).descriptor)
    assert isinstance(found, TocSource)
    told = read_toc(found, replace(layer, blob=layer.blob + external).fetch)
    assert isinstance(told, NotLazy) and "another image" in told.reason


# -- properties

PIECES = st.lists(
    st.one_of(
        st.binary(max_size=600),
        st.integers(1, 3000).map(bytes),
        st.tuples(st.integers(0, 255), st.integers(1, 5000)).map(lambda pair: bytes([pair[0]]) * pair[1]),
    ),
    max_size=5,
).map(b"".join)
TREES = st.lists(st.tuples(st.sampled_from("abcdef"), PIECES), max_size=6, unique_by=lambda pair: pair[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FORMS)), TREES, st.randoms(use_true_random=False))
def test_any_tree_reads_back(name: str, tree: list[tuple[str, bytes]], random: Random) -> None:
    tar = tar_of(dir_("t"), *(file(f"t/{path}", data, mode=0o600 + len(data) % 8) for path, data in tree))
    layer = FORMS[name][0](tar)
    check(layer, piece=random.randint(1, 4000))
    with table_of(layer) as table:
        for path, data in tree:
            row = table.find(b"t/" + path.encode())
            assert row is not None and table.kind[row] == Kind.REG
            assert content(table, layer.blob, row) == data
            offset, size = random.randint(0, len(data)), random.randint(0, len(data))
            parts = [
                read_chunk(table, layer.blob, place.chunk)[place.offset : place.offset + place.size]
                for place in table.places(row, offset, size)
            ]
            assert b"".join(parts) == data[offset : offset + size]


DAMAGED = tar_of(
    file("a", b"some content " * 50), file("h", b"x" * 300 + bytes(3000)), symlink("l", "a"), file("b", b"y" * 900)
)
WHOLE = {name: make(DAMAGED) for name, (make, _) in FORMS.items()}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.floats(0, 1, exclude_max=True))
def test_no_flipped_bit_passes(name: str, where: float) -> None:
    layer = WHOLE[name]
    damaged = flipped(layer, int(where * len(layer.blob)))
    with pytest.raises((TrustError, FormatError)):
        check(layer, damaged.blob)
    with table_of(layer) as table:
        for path in (b"a", b"h", b"b"):
            row = table.find(path)
            assert row is not None
            item = item_named(DAMAGED, path)
            try:
                found = content(table, damaged.blob, row)
            except (DigestMismatch, FrameInvalid):
                continue
            assert found == DAMAGED[item.payload : item.payload + item.stored]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.floats(0, 1, exclude_max=True))
def test_no_flipped_bit_of_a_toc_passes(name: str, where: float) -> None:
    layer = WHOLE[name]
    at = layer.payload_end + int(where * len(layer.tail))
    damaged = flipped(layer, at)
    source = toc_source(layer.descriptor)
    assert isinstance(source, TocSource)
    try:
        found = read_toc(source, damaged.fetch)
    except (DigestMismatch, FooterInvalid, TocInvalid):
        return
    # A gzip header's time, the tar's end, a tar-split: nothing of the TOC. The whole check finds them.
    assert isinstance(found, NotLazy) or found.raw == layer.toc
