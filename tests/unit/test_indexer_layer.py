"""Converting one layer: lossless, every chunk where the TOC says, the same bytes whatever the threads."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.compress import FRAME_LIMIT, FRAME_SIZE, Compressors
from indexer.frames import CHUNK_SIZE
from indexer.layer import ConvertedLayer, convert_layer
from indexer.rewrite import regular_header
from lazyfs import digest as digests
from lazyfs.errors import TarInvalid
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.footer import Form, parse_footer
from lazyfs.format.tar import TarScanner
from lazyfs.format.toc import parse_toc
from lazyfs.format.zstd_chunked import decode_toc
from lazyfs.oci import TOC_DIGEST, UNCOMPRESSED_SIZE
from tests.helpers import tars
from tests.helpers.odd import SPARSE_RUNS, SPARSE_SIZE, odd_tar
from tests.helpers.tars import dir_, file, hardlink, sparse, symlink, tar_of


def cut(data: bytes, step: int) -> Iterator[bytes]:
    return (data[at : at + step] for at in range(0, len(data), step))


def convert(
    tar: bytes, *, step: int = 1 << 20, level: int = 3, jobs: int = 2, in_flight: int = 8
) -> tuple[bytes, ConvertedLayer]:
    target = io.BytesIO()
    with Compressors(level, jobs) as compressors:
        result = convert_layer(cut(tar, step), target, compressors, in_flight)
    return target.getvalue(), result


def unpack(blob: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True) as reader:
        return reader.read()


def toc_of(blob: bytes, result: ConvertedLayer) -> dict[bytes, tuple[Entry, list[Chunk]]]:
    footer = parse_footer(blob[-72:], len(blob))
    assert footer.form is Form.ZSTD_CHUNKED
    start = footer.toc_offset
    raw = decode_toc(blob[start - 8 : start], blob[start : start + footer.toc_size], footer)
    assert digests.of(raw) == result.annotations[TOC_DIGEST]
    return {entry.path: (entry, chunks) for entry, chunks in parse_toc(raw, start - 8)}


def frame_at(blob: bytes, blob_offset: int) -> bytes:
    return zstandard.ZstdDecompressor().decompress(blob[blob_offset:])


def content(blob: bytes, chunks: list[Chunk]) -> bytes:
    """A file's content by the TOC alone, each chunk checked."""
    out = b""
    for chunk in chunks:
        data = frame_at(blob, chunk.blob_offset)[chunk.inner_offset : chunk.inner_offset + chunk.size]
        assert chunk.offset == len(out) and len(data) == chunk.size
        assert hashlib.sha256(data).digest() == chunk.digest
        out += data
    return out


def frames_of(blob: bytes) -> list[int]:
    """The decompressed size of each frame, as its own header says."""
    sizes, at = [], 0
    while blob[at : at + 4] == b"\x28\xb5\x2f\xfd":
        worker = zstandard.ZstdDecompressor().decompressobj()
        size = zstandard.frame_content_size(blob[at:])
        assert size >= 0
        assert len(worker.decompress(blob[at:])) == size
        sizes.append(size)
        at = len(blob) - len(worker.unused_data)
    return sizes


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_the_tar_comes_out_as_it_went_in() -> None:
    tar = tar_of(dir_("d"), file("d/a", b"hello"), symlink("l", "d/a"), hardlink("h", "d/a"), file("empty")) + bytes(
        8192
    )
    blob, result = convert(tar)
    assert unpack(blob) == tar
    assert result.digest == digests.of(blob) and result.size == len(blob)
    assert result.diff_id == result.source_diff_id == digests.of(tar)
    assert result.raw_size == len(tar) and result.annotations[UNCOMPRESSED_SIZE] == str(len(tar))
    toc = toc_of(blob, result)
    assert set(toc) == {b"d", b"d/a", b"l", b"h", b"empty"} and result.entries == 5
    assert content(blob, toc[b"d/a"][1]) == b"hello"
    assert toc[b"h"][0].kind is Kind.HARDLINK and toc[b"empty"][1] == []


def test_everything_odd() -> None:
    tar = odd_tar()
    blob, result = convert(tar, step=50_000)
    toc = toc_of(blob, result)
    assert result.source_diff_id == digests.of(tar) != result.diff_id == digests.of(unpack(blob))
    assert content(blob, toc[b"twice"][1]) == b"second and last"
    assert content(blob, toc[b"keeps-the-old"][1]) == b"the old content"
    assert content(blob, toc[b"was-a-link-target"][1]) == b"the new content"
    expanded = tars.expand(SPARSE_RUNS, SPARSE_SIZE)
    assert content(blob, toc[b"sparse/0.0"][1]) == content(blob, toc[b"sparse/0.1"][1]) == expanded
    assert content(blob, toc[b"sparse/only-a-hole"][1]) == bytes(50_000)
    assert toc[b"bin/ping"][0].xattrs == ((b"security.capability", tars.capability()),)
    # What was rewritten reads back as the same entries, without anything sparse.
    scanner = TarScanner()
    again = scanner.feed(unpack(blob))
    assert all(item.sparse is None for item in again)
    first = TarScanner()
    assert [item.entry for item in again] == [item.entry for item in first.feed(tar)]


def test_chunks_and_shared_frames() -> None:
    small = [file(f"s{i}", noise(100_000, i)) for i in range(30)]
    tar = tar_of(file("big", noise(2_500_000)), *small, file("mib", noise(1 << 20)), file("end", b"e"))
    blob, result = convert(tar)
    toc = toc_of(blob, result)
    entry, chunks = toc[b"big"]
    assert [(c.offset, c.size) for c in chunks] == [
        (0, CHUNK_SIZE),
        (CHUNK_SIZE, CHUNK_SIZE),
        (2 * CHUNK_SIZE, 402_848),
    ]
    assert content(blob, chunks) == noise(2_500_000) and entry.size == 2_500_000
    for i in range(30):
        assert content(blob, toc[b"s%d" % i][1]) == noise(100_000, i)
    assert len({toc[b"s%d" % i][1][0].blob_offset for i in range(30)}) < 6  # about ten of them share a frame
    assert max(frames_of(blob)) <= FRAME_LIMIT and len(frames_of(blob)) == result.frames
    for _, file_chunks in toc.values():
        for chunk in file_chunks:
            assert chunk.inner_offset == 0 or chunk.inner_offset + chunk.size <= FRAME_SIZE


def test_frames_are_bounded_where_no_content_comes() -> None:
    tar = tar_of(*(dir_(f"d{i}") for i in range(6000))) + bytes(5 << 20)
    blob, _ = convert(tar)
    assert unpack(blob) == tar
    assert max(frames_of(blob)) == FRAME_LIMIT


def test_the_same_bytes_whatever_the_threads_and_blocks() -> None:
    tar = odd_tar() + noise(3 << 20)
    blobs = {
        convert(tar, step=step, jobs=jobs, in_flight=in_flight)[0]
        for step, jobs, in_flight in ((1 << 20, 1, 1), (1 << 20, 4, 32), (7777, 3, 2), (len(tar), 2, 8))
    }
    assert len(blobs) == 1


def test_another_level_makes_another_blob_of_the_same_tar() -> None:
    tar = odd_tar()
    (fast, one), (small, two) = convert(tar, level=1), convert(tar, level=9)
    assert fast != small and one.diff_id == two.diff_id and unpack(fast) == unpack(small)


def test_a_landmark_starts_its_frame_and_the_toc_of_the_source_is_left_out() -> None:
    entries = [file("a", b"a"), file(".prefetch.landmark", b"\x0f"), file("b", b"b")]
    tar = tar_of(*entries, file("stargz.index.json", b"{}"))
    blob, result = convert(tar)
    toc = toc_of(blob, result)
    (landmark,) = toc[b".prefetch.landmark"][1]
    assert landmark.inner_offset == 0 and landmark.blob_offset > toc[b"a"][1][0].blob_offset
    assert b"stargz.index.json" not in toc and unpack(blob) == tar_of(*entries)
    assert result.source_diff_id == digests.of(tar) and result.diff_id == digests.of(tar_of(*entries))
    assert result.notes == ("the TOC of an earlier conversion left out",)


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("step", [1, 511, 100_000])
def test_sparse_files_are_expanded(form: tars.Sparseness, step: int) -> None:
    runs = [(i * 1500, b"%d" % i) for i in range(30)]
    tar = tar_of(file("before", b"b"), sparse("s", runs, 50_001, form, mode=0o4711, uid=7), file("after", b"a"))
    blob, result = convert(tar, step=step)
    toc = toc_of(blob, result)
    entry, chunks = toc[b"s"]
    assert content(blob, chunks) == tars.expand(runs, 50_001)
    assert (entry.mode, entry.uid, entry.size) == (0o4711, 7, 50_001)
    assert content(blob, toc[b"before"][1]) == b"b" and content(blob, toc[b"after"][1]) == b"a"
    assert result.diff_id == digests.of(unpack(blob)) and result.source_diff_id == digests.of(tar)
    # Rewritten once, there is nothing left to rewrite.
    again, second = convert(unpack(blob))
    assert again == blob and second.diff_id == second.source_diff_id


def test_a_sparse_file_that_claims_terabytes_is_refused() -> None:
    with pytest.raises(TarInvalid, match="sparse files of more") as caught:
        convert(tar_of(sparse("lastlog", [(0, b"x")], 1 << 40)))
    assert caught.value.entry == b"lastlog"


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ([file("../x")], b"../x"),
        ([hardlink("l", "nothing")], b"l"),
        ([hardlink("a", "b"), hardlink("b", "a")], b"a"),
        ([hardlink("self", "self")], b"self"),
        ([tars.declared("huge", 1 << 50)], b"huge"),
        ([dir_("d"), hardlink("l", "d")], b"l"),
    ],
)
def test_attacks_are_refused_by_name(entries: list[bytes], name: bytes) -> None:
    with pytest.raises(TarInvalid) as caught:
        convert(tar_of(*entries))
    assert caught.value.entry == name


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"a", Kind.REG, 0o644, 1, 2, 3 * 10**9, 100),
        Entry(b"d/" * 60 + b"x", Kind.REG, 0o4755, 2**31, 2**32 - 2, -1_500_000_000, 1 << 40, uname="\N{SNOWMAN}"),
        Entry(
            b"\xe9\xff", Kind.REG, 0, 0, 0, 1_234_567_891, 5, xattrs=((b"user.a", b"\0\n="), (b"user.b", b"x" * 999))
        ),
        Entry(b"n" * 100, Kind.REG, 0o7777, 0, 0, 10**19, 8**11 - 1, gname="g" * 40),
    ],
)
def test_a_header_of_our_own_reads_back(entry: Entry) -> None:
    header = regular_header(entry)
    assert len(header) % 512 == 0
    (item,) = TarScanner().feed(header)
    assert item.entry == entry and item.payload == len(header)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3_000_000), max_size=8), st.integers(300, 3_000_000))
def test_any_sizes_and_blocks(sizes: list[int], step: int) -> None:
    pattern = bytes(itertools.islice(itertools.cycle(range(251)), 3_000_000))
    tar = tar_of(*(file(f"f{i}", pattern[:size]) for i, size in enumerate(sizes)))
    blob, result = convert(tar, step=step)
    assert unpack(blob) == tar and result.diff_id == digests.of(tar)
    toc = toc_of(blob, result)
    for i, size in enumerate(sizes):
        assert content(blob, toc[b"f%d" % i][1]) == pattern[:size]
    assert all(size <= FRAME_LIMIT for size in frames_of(blob))
