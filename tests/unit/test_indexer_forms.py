"""Layers in every form: the tar that comes out, what the TOC says of it, and conversions from one form to another."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.compress import FRAME_LIMIT, FRAME_SIZE
from indexer.frames import CHUNK_SIZE
from indexer.options import OutputForm
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import TarInvalid
from lazyfs.format.entry import LANDMARK, TOC_NAME, Kind
from lazyfs.format.lazy import TABLE_FORMS, NotLazy, read_toc, toc_source
from lazyfs.format.table import LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.format.toc import parse_toc
from tests.helpers import tars
from tests.helpers.blobs import scan
from tests.helpers.converted import (
    ESTARGZ,
    FORMS,
    PODMAN,
    SMALL,
    ZSTD,
    convert,
    descriptor,
    entries_of,
    noise,
    read,
    toc_of,
    unpack,
)
from tests.helpers.odd import SPARSE_RUNS, SPARSE_SIZE, odd_tar
from tests.helpers.tars import dir_, file, hardlink, tar_of


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
