"""Layers in every form: the tar that comes out, what the TOC says of it, and conversions from one form to another."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import random
import threading
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.compress import FRAME_LIMIT, FRAME_SIZE, Compressors
from indexer.frames import CHUNK_SIZE, PODMAN_CHUNK_SIZE
from indexer.layer import ConvertedLayer, LayerOptions, convert_layer
from indexer.options import LEVELS, OutputForm
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import Interrupted, StoreBroken, TarInvalid
from lazyfs.format.crc64 import crc64
from lazyfs.format.entry import LANDMARK, LANDMARK_CONTENT, TOC_NAME, Chunk, Entry, Kind
from lazyfs.format.inflate import decompress
from lazyfs.format.lazy import TABLE_FORMS, NotLazy, read_toc, toc_source
from lazyfs.format.rfc3339 import parse_time
from lazyfs.format.table import LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.format.toc import parse_toc
from tests.helpers import tars
from tests.helpers.blobs import scan
from tests.helpers.odd import SPARSE_RUNS, SPARSE_SIZE, odd_tar
from tests.helpers.tars import dir_, file, hardlink, sparse, symlink, tar_of, whiteout

ZSTD, ESTARGZ, PODMAN = OutputForm.ZSTD_CHUNKED, OutputForm.ESTARGZ, OutputForm.PODMAN
FORMS = pytest.mark.parametrize("form", list(OutputForm), ids=lambda form: form.value)
Content = dict[bytes, tuple[Entry, list[Chunk]]]


def convert(
    tar: bytes,
    form: OutputForm,
    *prefetch: bytes,
    step: int = 1 << 20,
    jobs: int = 2,
    in_flight: int = 8,
    scratch: Path | None = None,
) -> tuple[bytes, ConvertedLayer]:
    target = io.BytesIO()
    blocks = (tar[at : at + step] for at in range(0, len(tar), step))
    with Compressors(LEVELS[form][2], jobs, form) as compressors:
        result = convert_layer(blocks, target, compressors, in_flight, LayerOptions(form, prefetch, scratch))
    blob = target.getvalue()
    assert (result.digest, result.size) == (digests.of(blob), len(blob))
    return blob, result


def unpack(blob: bytes, result: ConvertedLayer) -> bytes:
    """The tar in a blob, by the ordinary decompressors."""
    tar = gzip.decompress(blob) if result.media_type == oci.OCI_LAYER_GZIP else b"".join(decompress([blob]))
    assert result.diff_id == digests.of(tar) and result.annotations[oci.UNCOMPRESSED_SIZE] == str(len(tar))
    assert result.raw_size == len(tar)
    return tar


def descriptor(result: ConvertedLayer) -> oci.Descriptor:
    return oci.Descriptor(result.media_type, result.digest, result.size, result.annotations)


def toc_of(blob: bytes, result: ConvertedLayer) -> tuple[Content, bytes]:
    """The verified TOC as lazyfs reads it from the descriptor alone."""
    source = toc_source(descriptor(result))
    assert not isinstance(source, NotLazy), source
    toc = read_toc(source, lambda offset, size: blob[offset : offset + size])
    assert not isinstance(toc, NotLazy), toc
    return {entry.path: (entry, chunks) for entry, chunks in parse_toc(toc.raw, toc.payload_end)}, toc.raw


def read(blob: bytes, chunks: list[Chunk]) -> bytes:
    """A file's content by the TOC alone, each chunk checked."""
    out = b""
    for chunk in chunks:
        at = chunk.blob_offset
        inflated = (
            next(iter(_member(blob[at:])))
            if blob[at : at + 2] == b"\x1f\x8b"
            else zstandard.ZstdDecompressor().decompress(blob[at:])
        )
        data = inflated[chunk.inner_offset : chunk.inner_offset + chunk.size]
        assert chunk.offset == len(out) and hashlib.sha256(data).digest() == chunk.digest
        out += data
    return out


def _member(data: bytes) -> Iterator[bytes]:
    import zlib

    yield zlib.decompressobj(31).decompress(data)


def entries_of(tar: bytes) -> list[tuple[Entry, bytes]]:
    """Entries with their content, but for the TOC's."""
    return [
        (item.entry, tar[item.payload : item.payload + item.stored])
        for item in scan(tar)
        if item.entry.path != TOC_NAME
    ]


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


SMALL = tar_of(
    dir_("d"), file("d/a", b"hello"), symlink("l", "d/a"), hardlink("h", "d/a"), file("empty"), file("b", b"b" * 700)
)


@FORMS
def test_what_comes_out(form: OutputForm) -> None:
    blob, result = convert(SMALL, form)
    tar = unpack(blob, result)
    assert entries_of(tar) == entries_of(SMALL) and result.source_diff_id == digests.of(SMALL)
    toc, _ = toc_of(blob, result)
    assert set(toc) == {b"d", b"d/a", b"l", b"h", b"empty", b"b"}
    assert read(blob, toc[b"d/a"][1]) == b"hello" and read(blob, toc[b"b"][1]) == b"b" * 700
    assert toc[b"h"][0].link == b"d/a" and toc[b"empty"][1] == []
    if form is ESTARGZ:
        body = SMALL[: -2 * 512]
        assert tar.startswith(body) and scan(tar)[-1].entry.path == TOC_NAME and tar.endswith(bytes(1024))
        assert result.notes == ("the TOC of an eStargz layer is an entry of its tar",)
    else:
        assert tar == SMALL and result.diff_id == result.source_diff_id and result.notes == ()


@FORMS
def test_a_layer_table_finds_every_byte(form: OutputForm, tmp_path: Path) -> None:
    contents = {b"d%d/f%d" % (i % 3, i): noise(size, i) for i, size in enumerate((1, 700, 90_000, 1_300_000, 0, 5))}
    blob, result = convert(tar_of(*(file(name, data) for name, data in contents.items())), form)
    source = toc_source(descriptor(result))
    assert not isinstance(source, NotLazy)
    toc = read_toc(source, lambda offset, size: blob[offset : offset + size])
    assert not isinstance(toc, NotLazy) and TABLE_FORMS[toc.form] == TABLE_FORMS[source.form]
    facts = LayerFacts(TABLE_FORMS[toc.form], len(blob), toc.payload_end)
    build_table(tmp_path / "table", facts, parse_toc(toc.raw, toc.payload_end))
    with contextlib.closing(LayerTable(tmp_path / "table")) as table:
        for name, data in contents.items():
            row = table.find(name)
            assert row is not None and table.size[row] == len(data)
            at = 0
            for place in table.places(row, 0, len(data)):
                part = data[at : at + place.size]
                assert place.offset == 0 and hashlib.sha256(part).digest() == table.chunk_digest(place.chunk)
                at += place.size
            assert at == len(data)
            assert read(blob, toc_of(blob, result)[0][name][1]) == data


@FORMS
def test_everything_odd(form: OutputForm) -> None:
    tar = odd_tar()
    blob, result = convert(tar, form, step=50_000)
    out = unpack(blob, result)
    assert [entry for entry, _ in entries_of(out)] == [entry for entry, _ in entries_of(tar)]
    assert all(item.sparse is None for item in scan(out)) and "sparse files expanded" in result.notes
    if form is PODMAN:
        # Names that aren't UTF-8 have no place in podman's TOC: it pulls such a layer whole.
        assert set(result.annotations) == {oci.UNCOMPRESSED_SIZE}
        assert any("UTF-8" in note for note in result.notes)
        return
    toc, _ = toc_of(blob, result)
    assert read(blob, toc[b"twice"][1]) == b"second and last"
    assert read(blob, toc[b"keeps-the-old"][1]) == b"the old content"
    assert read(blob, toc[b"sparse/0.0"][1]) == tars.expand(SPARSE_RUNS, SPARSE_SIZE)
    assert toc[b"bin/ping"][0].xattrs == ((b"security.capability", tars.capability()),)


@FORMS
def test_the_same_bytes_whatever_the_threads_and_blocks(form: OutputForm, tmp_path: Path) -> None:
    tar = odd_tar()[:-1024] + tar_of(file("noise", noise(2 << 20)))
    prefetch = () if form is PODMAN else (b"noise", b"one")
    blobs = {
        convert(tar, form, *prefetch, step=step, jobs=jobs, in_flight=in_flight, scratch=tmp_path)[0]
        for step, jobs, in_flight in ((1 << 20, 1, 1), (7777, 3, 2), (len(tar), 2, 8))
    }
    assert len(blobs) == 1


@FORMS
def test_any_other_form_can_be_made_of_it(form: OutputForm) -> None:
    source, first = convert(SMALL, form, *(() if form is PODMAN else (b"b",)))
    tar = unpack(source, first)
    for other in OutputForm:
        blob, result = convert(tar, other)
        again = entries_of(unpack(blob, result))
        expected = entries_of(tar)
        if other is PODMAN:
            expected = [pair for pair in expected if pair[0].path != LANDMARK]
        assert again == expected
        toc, _ = toc_of(blob, result)
        assert read(blob, toc[b"d/a"][1]) == b"hello" and TOC_NAME not in toc
        assert (b"the TOC of an earlier conversion left out".decode() in result.notes) == (
            form is ESTARGZ or (other is PODMAN and form is ZSTD)
        )


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(OutputForm)), st.lists(st.integers(0, 1_500_000), max_size=7), st.integers(300, 3_000_000))
def test_any_sizes_and_blocks(form: OutputForm, sizes: list[int], step: int) -> None:
    pattern = bytes(itertools.islice(itertools.cycle(range(251)), 1_500_000))
    tar = tar_of(*(file(f"f{i}", pattern[:size]) for i, size in enumerate(sizes)))
    blob, result = convert(tar, form, step=step)
    out = unpack(blob, result)
    assert out.startswith(tar[:-1024]) and (form is ESTARGZ or out == tar)
    toc, _ = toc_of(blob, result)
    for i, size in enumerate(sizes):
        assert read(blob, toc[b"f%d" % i][1]) == pattern[:size]
    again, _ = convert(out, form, step=step)
    assert again == blob  # nothing is left to be done


# -- eStargz -----------------------------------------------------------------------------------------------------------


def test_small_files_share_members() -> None:
    tar = tar_of(*(file(f"s{i}", noise(100_000, i)) for i in range(30)), file("big", noise(2_500_000)))
    blob, result = convert(tar, ESTARGZ)
    toc, _ = toc_of(blob, result)
    assert len({toc[b"s%d" % i][1][0].blob_offset for i in range(30)}) < 6
    assert [chunk.size for chunk in toc[b"big"][1]] == [CHUNK_SIZE, CHUNK_SIZE, 2_500_000 - 2 * CHUNK_SIZE]
    for _, chunks in toc.values():
        assert all(chunk.inner_offset == 0 or chunk.inner_offset + chunk.size <= FRAME_SIZE for chunk in chunks)


def test_members_say_nothing_of_when_and_where_they_were_made() -> None:
    blob, result = convert(SMALL, ESTARGZ)
    toc, _ = toc_of(blob, result)
    assert {blob[c.blob_offset :][:10] for _, chunks in toc.values() for c in chunks} == {
        bytes.fromhex("1f8b08000000000000ff")
    }


def test_junk_behind_the_end_and_a_missing_padding_make_no_other_estargz() -> None:
    body = SMALL[:-1024]
    blobs = {convert(tar, ESTARGZ)[0] for tar in (SMALL, body, body[:-300], SMALL + bytes(9000), SMALL + b"junk" * 99)}
    assert len(blobs) == 1


# -- podman's form -----------------------------------------------------------------------------------------------------


def storage_toc(blob: bytes, result: ConvertedLayer) -> dict[str, Any]:
    """The TOC as containers/storage finds it: by the annotations, verified by the checksum of the compressed bytes."""
    offset, size, raw_size, kind = map(int, result.annotations[oci.GITHUB_ZSTD_POSITION].split(":"))
    packed = blob[offset : offset + size]
    assert digests.of(packed) == result.annotations[oci.GITHUB_ZSTD_CHECKSUM] and kind == 1
    raw = zstandard.ZstdDecompressor().decompress(packed)
    assert len(raw) == raw_size
    return dict(json.loads(raw))


def remade(blob: bytes, result: ConvertedLayer, contents: dict[str, bytes]) -> bytes:
    """The tar made again as podman does it: from the tar-split, and the files of an unpacked tree."""
    offset, size, raw_size = map(int, result.annotations[oci.GITHUB_TAR_SPLIT_POSITION].split(":"))
    packed = blob[offset : offset + size]
    assert digests.of(packed) == storage_toc(blob, result)["tarSplitDigest"]
    lines = b"".join(decompress([packed]))
    assert len(lines) == raw_size
    out = b""
    for number, line in enumerate(map(json.loads, lines.splitlines())):
        assert line["position"] == number
        if line["type"] == 2:
            out += b64decode(line["payload"])
        elif line.get("size"):
            content = contents[line["name"]]
            assert line["size"] == len(content) and b64decode(line["payload"]) == crc64(content).to_bytes(8, "big")
            out += content
    return out


def test_podman_has_a_frame_a_chunk_with_its_end() -> None:
    big = noise(PODMAN_CHUNK_SIZE * 2 + 5)
    tar = tar_of(dir_("./"), file("./a", b"first"), file("./big", big), file("z", b"last"), file("./none"))
    blob, result = convert(tar, PODMAN)
    document = storage_toc(blob, result)
    by_name = {item["name"]: item for item in document["entries"] if item["type"] != "chunk"}
    assert list(by_name) == ["./", "./a", "./big", "z", "./none"]
    decoder = zstandard.ZstdDecompressor()
    for name, content in (("./a", b"first"), ("z", b"last")):
        item = by_name[name]
        # Exactly the range that is told, without the headers behind it.
        assert decoder.decompress(blob[item["offset"] : item["endOffset"]], allow_extra_data=False) == content
        assert item["digest"] == digests.of(content) and "chunkDigest" not in item
    parts = [item for item in document["entries"] if item["name"] == "./big"]
    assert [part["chunkSize"] for part in parts] == [PODMAN_CHUNK_SIZE, PODMAN_CHUNK_SIZE, 5]
    ends = [*(part["offset"] for part in parts[1:]), parts[0]["endOffset"]]
    assert b"".join(decoder.decompress(blob[p["offset"] : end]) for p, end in zip(parts, ends, strict=True)) == big
    assert "digest" not in by_name["./none"] and "offset" not in by_name["./none"]
    assert result.annotations[oci.ZSTD_CHECKSUM] == result.annotations[oci.GITHUB_ZSTD_CHECKSUM]
    assert result.annotations[oci.ZSTD_POSITION] == result.annotations[oci.GITHUB_ZSTD_POSITION]
    assert oci.TOC_DIGEST not in result.annotations
    assert remade(blob, result, {"./a": b"first", "./big": big, "z": b"last"}) == unpack(blob, result) == tar


def test_a_changed_byte_changes_one_frame_of_podmans_form() -> None:
    big = bytearray(noise(PODMAN_CHUNK_SIZE * 3))
    before = convert(tar_of(file("a", b"a"), file("big", bytes(big))), PODMAN)
    big[PODMAN_CHUNK_SIZE + 7] ^= 1
    after = convert(tar_of(file("a", b"a"), file("big", bytes(big))), PODMAN)
    old, new = (
        [(i.get("chunkDigest"), i["digest"] if i["name"] == "a" else "") for i in storage_toc(*made)["entries"]]
        for made in (before, after)
    )
    assert [one == other for one, other in zip(old, new, strict=True)] == [True, True, False, True]


def test_a_tar_split_makes_sparse_and_empty_layers_again() -> None:
    tar = tar_of(sparse("s", [(5000, b"data")], 20_000), file("after", b"x"), dir_("d"))
    blob, result = convert(tar, PODMAN)
    whole = tars.expand([(5000, b"data")], 20_000)
    assert remade(blob, result, {"s": whole, "after": b"x"}) == unpack(blob, result)
    for empty in (b"", bytes(1024), bytes(50_000)):
        blob, result = convert(empty, PODMAN)
        assert remade(blob, result, {}) == unpack(blob, result) == empty


@pytest.mark.parametrize(
    "tar",
    [
        tar_of(file("twice", b"1"), file("twice", b"2")),
        tar_of(tars.global_pax([(b"comment", b"x")]), file("a", b"a")),
        tar_of(tars.old_file("seven", b"7", kind=b"7")),
        tar_of(file("a", b"a", xattrs={"user.empty": b""})),
    ],
    ids=["twice", "global", "contiguous", "empty-attribute"],
)
def test_what_a_tar_split_cant_tell_is_pulled_whole_by_podman_5(tar: bytes) -> None:
    blob, result = convert(tar, PODMAN)
    assert oci.GITHUB_TAR_SPLIT_POSITION not in result.annotations and "tarSplitDigest" not in storage_toc(blob, result)
    assert "it has entries that a tar-split can't tell: podman 5 pulls it whole" in result.notes
    assert unpack(blob, result) == tar and toc_of(blob, result)[0]


def test_names_that_podman_4_misreads_are_for_newer_ones_only() -> None:
    blob, result = convert(tar_of(file('a"b', b"x"), file("c", b"y")), PODMAN)
    assert oci.ZSTD_CHECKSUM not in result.annotations and oci.GITHUB_ZSTD_CHECKSUM in result.annotations
    assert read(blob, toc_of(blob, result)[0][b'a"b'][1]) == b"x"
    assert "it has names that podman 4 misreads in a TOC: podman 4 pulls it whole" in result.notes


def test_podmans_toc_tells_times_and_modes_in_the_tars_words() -> None:
    tar = tar_of(file("a", b"a", mode=0o4755, mtime_ns=1_500_000_000_500_000_000, uid=7, gid=8), tars.char("c", 5, 1))
    blob, result = convert(tar, PODMAN)
    one, two = storage_toc(blob, result)["entries"]
    assert (one["mode"], one["uid"], one["gid"], one["modtime"]) == (0o4755, 7, 8, "2017-07-14T02:40:00.5Z")
    assert (two["type"], two["devMajor"], two["devMinor"]) == ("char", 5, 1)


_NAME = st.text("abc-._ é☃", min_size=1, max_size=8).filter(lambda name: name.strip(".") == name)
_ATTRIBUTES = st.fixed_dictionaries(
    {
        "mode": st.integers(0, 0o7777),
        "uid": st.sampled_from([0, 33, 3_000_000]),
        "mtime_ns": st.sampled_from([0, 1, 10**18, 1_500_000_000_500_000_000, -(10**9)]),
        "xattrs": st.dictionaries(
            st.sampled_from(["user.a", "security.capability"]), st.binary(min_size=1, max_size=9)
        ),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(_NAME, st.tuples(st.integers(0, 3), st.binary(max_size=2000), _ATTRIBUTES), max_size=8))
def test_podmans_toc_says_what_the_headers_say(names: dict[str, tuple[int, bytes, Any]]) -> None:
    """podman 5 compares them value by value, and refuses the image for any difference."""
    entries = [
        (file(f"./{name}", data, **more), dir_(f"{name}/", **more), symlink(name, "to"), file(name, data, **more))[kind]
        for name, (kind, data, more) in names.items()
    ]
    blob, result = convert(tar_of(*entries), PODMAN)
    contents = {("./" if kind == 0 else "") + name: data for name, (kind, data, _) in names.items()}
    tar = remade(blob, result, contents)
    assert tar == unpack(blob, result)
    told = {item["name"]: item for item in storage_toc(blob, result)["entries"]}
    items = scan(tar)
    assert len(items) == len(names) == len(told)
    for item in items:
        found, entry = told[item.name.decode()], item.entry
        kinds = {Kind.REG: "reg", Kind.DIR: "dir", Kind.SYMLINK: "symlink"}
        assert (found["type"], found.get("mode", 0)) == (kinds[entry.kind], item.mode)
        assert (found.get("uid", 0), found.get("gid", 0)) == (entry.uid, entry.gid)
        assert found.get("linkName", "").encode() == item.link and found.get("size", 0) == entry.size
        assert parse_time(found["modtime"]) == entry.mtime_ns
        xattrs = {key.encode(): b64decode(value) for key, value in found.get("xattrs", {}).items()}
        assert xattrs == dict(entry.xattrs)


def test_crc64_is_that_of_iso_3309() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001 and crc64(b"") == 0
    data = noise(100_000)
    for cut in (0, 1, 7, 8, 9, 500, 16_384, 16_385, 99_999):
        assert crc64(data[cut:], crc64(data[:cut])) == crc64(data)
    slow = (1 << 64) - 1
    for byte in data[:999]:
        slow ^= byte
        for _ in range(8):
            slow = slow >> 1 ^ (0xD800000000000000 if slow & 1 else 0)
    assert crc64(data[:999]) == slow ^ ((1 << 64) - 1)


# -- prefetch lists ----------------------------------------------------------------------------------------------------

ORDERED = tar_of(
    dir_("./"),
    file("first", b"1"),
    dir_("usr"),
    dir_("usr/bin"),
    file("usr/bin/app", b"app"),
    file("usr/bin/other", b"other"),
    symlink("bin", "usr/bin"),
    dir_("lib"),
    file("lib/real", b"real"),
    hardlink("lib/hard", "lib/real"),
    symlink("lib/soft", "real"),
    file("last", b"last" * 300),
)


@pytest.mark.parametrize("form", [ZSTD, ESTARGZ], ids=lambda form: form.value)
def test_a_prefetch_list_moves_files_to_the_front(form: OutputForm, tmp_path: Path) -> None:
    blob, result = convert(ORDERED, form, b"lib/hard", b"bin/app", b"nowhere", b"usr/bin/app", scratch=tmp_path)
    tar = unpack(blob, result)
    names = [entry.path for entry, _ in entries_of(tar)]
    front = [b"", b"lib", b"lib/real", b"lib/hard", b"bin", b"usr", b"usr/bin", b"usr/bin/app", LANDMARK]
    assert names == [*front, b"first", b"usr/bin/other", b"lib/soft", b"last"]
    assert result.prefetched == (b"lib/hard", b"bin/app", b"usr/bin/app")
    assert result.source_diff_id == digests.of(ORDERED) != result.diff_id
    toc, _ = toc_of(blob, result)
    (landmark,) = toc[LANDMARK][1]
    assert landmark.inner_offset == 0 and read(blob, [landmark]) == LANDMARK_CONTENT
    for name, (_, chunks) in toc.items():
        assert all(
            (chunk.blob_offset < landmark.blob_offset) == (name in front[:-1]) for chunk in chunks if name != LANDMARK
        )
    assert {pair[0].path: pair for pair in entries_of(tar) if pair[0].path != LANDMARK} == {
        pair[0].path: pair for pair in entries_of(ORDERED)
    }
    assert not list(tmp_path.iterdir())


def test_a_symlink_brings_its_target_along(tmp_path: Path) -> None:
    _, result = convert(ORDERED, ZSTD, b"lib/soft", scratch=tmp_path)
    blob, _ = convert(ORDERED, ZSTD, b"lib/soft", scratch=tmp_path)
    names = [entry.path for entry, _ in entries_of(unpack(blob, result))]
    assert names[:5] == [b"", b"lib", b"lib/soft", b"lib/real", LANDMARK]


@pytest.mark.parametrize("form", [ZSTD, ESTARGZ], ids=lambda form: form.value)
def test_a_layer_without_any_of_the_paths_is_unchanged(form: OutputForm, tmp_path: Path) -> None:
    without, plain = convert(ORDERED, form)
    blob, result = convert(ORDERED, form, b"nowhere", b"usr/bin/app/below", b"../x", scratch=tmp_path)
    assert blob == without and result.prefetched == () and result.source_diff_id == plain.source_diff_id


@pytest.mark.parametrize(
    ("entries", "path"),
    [
        ([file("a", b"1"), file("b", b"b"), file("a", b"2")], b"a"),
        ([whiteout("a"), file("a", b"1")], b"a"),
        ([whiteout("d"), dir_("d"), file("d/a", b"1")], b"d/a"),
        ([file("t", b"1"), hardlink("h", "t"), file("t", b"2")], b"h"),
        ([symlink("l", "d"), dir_("d"), file("l/a", b"1"), file("d/a", b"2")], b"d/a"),
        ([symlink("x", "y"), symlink("y", "x")], b"x"),
    ],
    ids=["twice", "whited-out", "parent-whited-out", "target-twice", "through-a-link", "circle"],
)
def test_what_can_not_be_moved_stays(entries: list[bytes], path: bytes, tmp_path: Path) -> None:
    tar = tar_of(*entries)
    blob, result = convert(tar, ZSTD, path, scratch=tmp_path)
    assert unpack(blob, result) == tar and result.prefetched == ()


def test_an_older_landmark_gives_way_to_a_new_list(tmp_path: Path) -> None:
    first, one = convert(ORDERED, ESTARGZ, b"first", scratch=tmp_path)
    blob, result = convert(unpack(first, one), ZSTD, b"last", scratch=tmp_path)
    names = [entry.path for entry, _ in entries_of(unpack(blob, result))]
    assert names[:3] == [b"", b"last", LANDMARK] and names.count(LANDMARK) == 1 and TOC_NAME not in names


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12), st.sampled_from([ZSTD, ESTARGZ]), st.booleans())
def test_any_order_leaves_the_same_names(order: list[int], count: int, form: OutputForm, short: bool) -> None:
    entries = [
        sparse(f"d{i % 3}/s{i}", [(100 * i, b"x" * i)], 9000) if i % 4 == 3 else file(f"d{i % 3}/f{i}", b"%d" % i * 700)
        for i in range(12)
    ]
    tar = tar_of(dir_("d1"), *entries, end=not short)
    tar = tar[:-100] if short else tar
    paths = [scan(entry)[0].entry.path for entry in entries]
    blob, result = convert(tar, form, *(paths[i] for i in order[:count]))
    out = unpack(blob, result)
    again = [pair for pair in entries_of(out) if pair[0].path != LANDMARK]
    plain = entries_of(unpack(*convert(tar, form)))
    assert sorted(again, key=lambda pair: pair[0].path) == sorted(plain, key=lambda pair: pair[0].path)
    assert len(result.prefetched) == count and result.entries == 14


def test_a_cancelled_conversion_ends_while_the_tar_is_read_back(tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    options = LayerOptions(ZSTD, (b"first",), tmp_path, cancelled)
    with Compressors(3, 1) as compressors, pytest.raises(Interrupted):
        convert_layer([ORDERED], io.BytesIO(), compressors, 2, options)
    assert not list(tmp_path.iterdir())


def test_a_scratch_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreBroken, match="temporary file"):
        convert(ORDERED, ZSTD, b"first", scratch=tmp_path / "missing")


@FORMS
def test_attacks_are_refused_by_name(form: OutputForm) -> None:
    with pytest.raises(TarInvalid) as caught:
        convert(tar_of(file("fine"), hardlink("l", "nothing")), form)
    assert caught.value.entry == b"l"


@FORMS
def test_frames_are_bounded_where_no_content_comes(form: OutputForm) -> None:
    tar = tar_of(*(dir_(f"d{i}") for i in range(6000))) + bytes(5 << 20)
    blob, result = convert(tar, form)
    out = unpack(blob, result)
    assert result.frames >= len(out) // FRAME_LIMIT - 1 and {entry.kind for entry, _ in entries_of(out)} == {Kind.DIR}
