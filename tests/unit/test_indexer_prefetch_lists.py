"""Prefetch lists: what is moved to the front of a layer, and what stays."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.compress import Compressors
from indexer.layer import LayerOptions, convert_layer
from indexer.options import OutputForm
from lazyfs import digest as digests
from lazyfs.errors import Interrupted, StoreBroken
from lazyfs.format.entry import LANDMARK, LANDMARK_CONTENT, TOC_NAME
from tests.helpers.blobs import scan
from tests.helpers.converted import (
    ESTARGZ,
    ZSTD,
    convert,
    entries_of,
    read,
    toc_of,
    unpack,
)
from tests.helpers.tars import dir_, file, hardlink, sparse, symlink, tar_of, whiteout

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
