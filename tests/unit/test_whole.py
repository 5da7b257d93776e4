"""The whole check: honest layers pass, every lie is found, a damaged transfer is not blamed on the TOC."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.chunks.whole import WholeCheck
from lazyfs.errors import DiffIdMismatch, DigestMismatch, LazyfsError, TocMismatch
from lazyfs.format.codec import FrameDecoder
from lazyfs.format.entry import Kind
from lazyfs.format.footer import SKIPPABLE
from lazyfs.format.table import FORM_ZSTD_CHUNKED, LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.format.toc import parse_toc
from tests.helpers.blobs import LayerBlob, Toc, flipped, toc_entry, without_sparse, zstd_chunked_layer
from tests.helpers.odd import odd_tar
from tests.helpers.tars import (
    block,
    char,
    dir_,
    file,
    hardlink,
    opaque,
    sparse,
    symlink,
    tar_of,
    whiteout,
)


@dataclass
class Claims:
    """What a check is told, where that differs from the layer."""

    digest: str = ""
    diff_id: str = ""
    tail: bytes | None = None


@contextmanager
def table_of(layer: LayerBlob) -> Iterator[LayerTable]:
    """The layer table of a layer's TOC, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="whole-") as scratch:
        path = Path(scratch) / "table"
        facts = LayerFacts(FORM_ZSTD_CHUNKED, len(layer.blob), layer.payload_end)
        build_table(path, facts, parse_toc(layer.toc, layer.payload_end))
        table = LayerTable(path)
        try:
            yield table
        finally:
            table.close()


def check(layer: LayerBlob, claims: Claims | None = None, *, whole_blob: bytes | None = None) -> None:
    """Run the whole check the way the daemon does: extents that begin at the frames of the table."""
    claims = claims or Claims()
    blob = layer.blob if whole_blob is None else whole_blob
    with table_of(layer) as table:
        whole = WholeCheck(claims.digest or layer.digest, claims.diff_id or layer.diff_id, table, "L")
        decoder = FrameDecoder()
        named = set(table.frame_blob_offset)
        compressed, decoded = b"", b""
        for offset, size in layer.frames:
            if offset in named and compressed:
                whole.feed_frame(compressed, decoded)
                compressed, decoded = b"", b""
            compressed += blob[offset : offset + size]
            decoded += decoder.decode(layer.blob[offset : offset + size])
        if compressed:
            whole.feed_frame(compressed, decoded)
        tail = blob[layer.payload_end :] if claims.tail is None else claims.tail
        for at in range(0, len(tail), 7):
            whole.feed_tail(tail[at : at + 7])
        whole.finish()


TREE = tar_of(
    dir_("d", mode=0o750, uid=1, gid=2),
    file("d/plain", b"some content", mode=0o640, xattrs={"user.a": b"b"}),
    file("d/large", os.urandom(5000)),
    file("d/fraction", b"t", mtime_ns=1_500_000_000_500_000_000),
    symlink("d/link", "plain"),
    hardlink("d/hard", "d/plain"),
    char("d/char", 1, 3),
    block("d/block", 7, 0),
    file("empty"),
    file("another", b"x" * 600),
)

# Trees where the last word is not the first: what each name means in the end is what counts.
REWRITTEN = {
    "a name twice": tar_of(file("a", b"1"), file("a", b"2", mode=0o600)),
    "a name twice, alike but for the content": tar_of(file("a", b"1"), file("a", b"2")),
    "a name twice, back to the first": tar_of(file("a", b"1"), file("a", b"22"), file("a", b"1")),
    "a directory twice": tar_of(dir_("d", mode=0o700), file("d/f", b"1"), dir_("d", mode=0o711)),
    "a link keeps the old content": tar_of(file("a", b"old"), hardlink("b", "a"), file("a", b"new")),
    "two links keep it": tar_of(
        file("a", b"old"), hardlink("b", "a"), hardlink("c", "a"), file("a", b"new"), hardlink("d", "b")
    ),
    "links to a link": tar_of(file("a", b"old"), hardlink("b", "a"), hardlink("c", "b"), symlink("a", "c")),
    "an empty file, linked and replaced": tar_of(file("a"), hardlink("b", "a"), file("a", mode=0o600)),
    "a link replaced by a file": tar_of(file("a", b"1"), hardlink("b", "a"), file("b", b"2")),
    "a link to a symlink": tar_of(symlink("a", "x"), hardlink("b", "a")),
    "a link to a device": tar_of(char("a", 1, 3), hardlink("b", "a")),
    "a link replaced, and linked to another": tar_of(
        file("a", b"1"), hardlink("b", "a"), hardlink("d", "b"), file("c", b"2", mode=0o755), hardlink("b", "c")
    ),
    "a link before its target, which goes away": tar_of(hardlink("d", "b"), file("a"), hardlink("b", "a"), dir_("a")),
    "a link before its target": tar_of(hardlink("b", "a"), hardlink("c", "b"), file("a", b"1")),
    "a directory replaced by a file": tar_of(dir_("d"), file("d/a", b"1"), file("d/e/f", b"2"), file("d", b"3")),
    "an implicit directory replaced": tar_of(file("d/a", b"1"), symlink("d", "elsewhere")),
    "a directory replaced and made again": tar_of(
        file("d/a", b"1"), file("d/b", b"1"), file("d", b"file"), dir_("d"), file("d/a", b"2")
    ),
    "content of a replaced directory lives on": tar_of(file("d/a", b"1"), hardlink("b", "d/a"), file("d", b"2")),
    "a file replaced by a directory": tar_of(file("d", b"1"), dir_("d"), file("d/a", b"2")),
    "a parent that is a symlink": tar_of(dir_("usr/lib"), symlink("lib", "usr/lib"), file("lib/a", b"1")),
    "an absolute one, two steps, dots": tar_of(
        dir_("usr/lib"), symlink("x", "/usr"), symlink("lib", "./x/../usr/lib"), file("lib/a", b"1"),
        hardlink("b", "lib/a"), symlink("top", "../../.."), file("top/c", b"2"),
    ),
    "a parent that was a symlink": tar_of(
        dir_("t"), symlink("l", "t"), file("l/a", b"1"), file("l", b"2"), file("u", b"3")
    ),
    "a symlink that takes the place of a directory": tar_of(
        file("l/a", b"1"), dir_("t"), symlink("l", "t"), file("l/b", b"2")
    ),
    "a parent that is a hard link to a symlink": tar_of(
        dir_("t"), symlink("s", "t"), hardlink("l", "s"), file("l/a", b"1")
    ),
    "whiteouts": tar_of(whiteout("old"), whiteout("d/old"), file("d/new", b"1"), opaque("o"), dir_("o")),
    "a whiteout beside what it removes": tar_of(whiteout("a"), file("a", b"1"), whiteout("d"), file("d/x", b"2")),
    "a whiteout, a file, a directory": tar_of(whiteout("a"), file("a"), dir_("a")),
    "a whiteout twice": tar_of(whiteout("a"), whiteout("a")),
    "an opaque root": tar_of(file(".wh..wh..opq"), file("a", b"1")),
    "aufs leftovers": tar_of(file(".wh..wh.aufs"), file("a", b"1")),
    "the root itself": tar_of(dir_("./", mode=0o700, uid=5), file("a", b"1"), dir_("./", mode=0o711)),
    "dropped attributes": tar_of(
        dir_("d", xattrs={"trusted.overlay.opaque": b"y"}), file("a", b"1", xattrs={"user.overlay.redirect": b"/"})
    ),
    "nothing at all": tar_of(),
    "no end": tar_of(file("a", b"1"), end=False),
}  # fmt: skip


@pytest.mark.parametrize("chunk_size, frame_size", [(1000, 0), (1000, 3000), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("tar", [TREE, without_sparse(odd_tar()), *REWRITTEN.values()], ids=lambda tar: str(len(tar)))
def test_an_honest_layer_passes(tar: bytes, chunk_size: int, frame_size: int) -> None:
    try:
        layer = zstd_chunked_layer(tar, chunk_size=chunk_size, frame_size=frame_size)
    except LazyfsError as error:
        pytest.fail(str(error))
    check(layer)


def test_times_that_a_writer_rounded_are_the_same_time() -> None:
    def rounded(toc: Toc) -> None:
        toc_entry(toc, "d/fraction")["modtime"] = "2017-07-14T02:40:01Z"  # half up, as stargz does

    check(zstd_chunked_layer(TREE, edit_toc=rounded))


def _set(name: str, **fields: Any) -> Callable[[Toc], None]:
    def edit(toc: Toc) -> None:
        toc_entry(toc, name).update(fields)

    return edit


def _drop(name: str) -> Callable[[Toc], None]:
    def edit(toc: Toc) -> None:
        toc["entries"] = [entry for entry in toc["entries"] if entry["name"] != name]

    return edit


def _add(**fields: Any) -> Callable[[Toc], None]:
    def edit(toc: Toc) -> None:
        toc["entries"].append(fields)

    return edit


LIES = {
    "setuid": (_set("d/plain", mode=0o4755), "mode"),
    "owner": (_set("d/plain", uid=7), "belongs"),
    "group": (_set("d/", gid=0), "belongs"),
    "time": (_set("another", modtime="2001-01-01T00:00:00Z"), "time"),
    "a shifted time": (_set("d/fraction", modtime="2017-07-14T02:40:00Z"), "time"),
    "size": (_set("another", size=599), "bytes"),
    "symlink target": (_set("d/link", linkName="/etc/shadow"), "leads elsewhere"),
    "device number": (_set("d/char", devMinor=5), "device"),
    "device kind": (_set("d/char", type="block"), "kind"),
    "xattr value": (_set("d/plain", xattrs={"user.a": "Yw=="}), "attributes"),
    "xattr gone": (_set("d/plain", xattrs={}), "attributes"),
    "xattr added": (_set("empty", xattrs={"security.capability": "AAAA"}), "attributes"),
    "a file that isn't there": (_add(name="d/extra", type="reg"), "not in the tar"),
    "a directory that isn't there": (_add(name="d/more/", type="dir"), "not in the tar"),
    "a file kept secret": (_drop("empty"), "not in the TOC"),
    "a directory's entry kept secret": (_drop("d/"), "no entry in the TOC"),
    "a hard link kept secret": (_drop("d/hard"), "not in the TOC"),
    "a hard link elsewhere": (_set("d/hard", linkName="another"), "another file"),
    "a whiteout that isn't there": (_add(name="d/.wh.gone", type="reg"), "not in the tar"),
    "an opaque marker that isn't there": (_add(name="d/.wh..wh..opq", type="reg"), "opaque"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_toc_is_found(lie: str) -> None:
    edit, reason = LIES[lie]
    with pytest.raises(TocMismatch, match=reason):
        check(zstd_chunked_layer(TREE, chunk_size=1000, frame_size=3000, edit_toc=edit))


def test_content_moved_inside_its_frame_is_found() -> None:
    """Sizes, kinds and digests all right: the TOC takes one file's content from the middle of another's."""
    tar = tar_of(file("a", b"A" * 1000), file("b", b"B" * 10))

    def edit(toc: Toc) -> None:
        b = toc_entry(toc, "b")
        b["innerOffset"] += 1

    with pytest.raises(TocMismatch, match="content elsewhere"):
        check(zstd_chunked_layer(tar, edit_toc=edit))


@pytest.mark.parametrize("tar, lie, reason", [
    (tar_of(whiteout("a"), file("b")), _drop(".wh.a"), "removes a name"),
    (tar_of(opaque("d"), dir_("d")), _drop("d/.wh..wh..opq"), "opaque"),
    (tar_of(dir_("./", mode=0o700), file("b")), _drop("./"), "no entry"),
    (tar_of(file("a", b"1"), hardlink("b", "a"), file("a", b"1")), _set("b", linkName="a", type="hardlink"), "another"),
    (tar_of(file("a"), hardlink("b", "a"), hardlink("c", "a")), _set("c", type="reg", linkName=""), "hard link"),
    (tar_of(file("d/a"), file("d", b"2")), lambda toc: toc.update(entries=toc["entries"][:0]), "not in the TOC"),
])  # fmt: skip
def test_lies_about_marks_and_links_are_found(tar: bytes, lie: Callable[[Toc], None], reason: str) -> None:
    with pytest.raises(TocMismatch, match=reason):
        check(zstd_chunked_layer(tar, edit_toc=lie))


def test_a_toc_that_tells_of_the_first_of_two_is_found() -> None:
    tar = tar_of(file("a", b"1", mode=0o4755), file("a", b"2", mode=0o600))
    first = zstd_chunked_layer(tar_of(file("a", b"1", mode=0o4755)))
    layer = zstd_chunked_layer(tar, edit_toc=lambda toc: toc.update(_decoded(first)))
    with pytest.raises(TocMismatch, match="mode"):
        check(layer)


def _decoded(layer: LayerBlob) -> Toc:
    document: Toc = json.loads(layer.toc)
    return document


def test_names_of_a_replaced_directory_are_lies() -> None:
    """The TOC shows a file that a full unpack had removed again."""
    tar = tar_of(dir_("d"), file("d/a", b"1"), file("d", b"file"), dir_("d"))
    honest = tar_of(dir_("d"), file("d/a", b"1"))
    told = _decoded(zstd_chunked_layer(honest))
    with pytest.raises(TocMismatch, match="not in the tar"):
        check(zstd_chunked_layer(tar, edit_toc=lambda toc: toc.update(told)))


def test_other_content_under_the_same_toc_is_another_diff_id() -> None:
    evil = tar_of(file("a", b"evil"))
    layer = zstd_chunked_layer(tar_of(file("a", b"good")), frames_from=evil)
    good = zstd_chunked_layer(tar_of(file("a", b"good")))
    with pytest.raises(DiffIdMismatch):
        check(layer, Claims(diff_id=good.diff_id))


def test_a_borrowed_diff_id_is_found() -> None:
    with pytest.raises(DiffIdMismatch) as caught:
        check(zstd_chunked_layer(TREE), Claims(diff_id="sha256:" + "0" * 64))
    assert caught.value.actual == zstd_chunked_layer(TREE).diff_id


def test_a_damaged_transfer_is_not_blamed_on_the_toc() -> None:
    layer = zstd_chunked_layer(TREE, edit_toc=_set("d/plain", mode=0o4755))
    with pytest.raises(DigestMismatch):
        check(layer, whole_blob=flipped(layer, len(layer.blob) - 60).blob)


def test_another_frame_behind_the_last_one_is_found() -> None:
    """A full unpack would decode it; the diff ID of the frames alone does not know of it."""
    layer = zstd_chunked_layer(TREE)
    extra = layer.blob[slice(*layer.frames[0])]
    for tail in (extra + layer.tail, layer.tail + extra, layer.tail + b"\0", layer.tail + SKIPPABLE + b"\5\0\0\0ab"):
        digest = "sha256:" + hashlib.sha256(layer.blob[: layer.payload_end] + tail).hexdigest()
        with pytest.raises(TocMismatch, match="frame"):
            check(layer, Claims(digest=digest, tail=tail))


def test_a_sparse_entry_in_a_lazy_layer_is_refused() -> None:
    """Its content lies in the tar in another form than a file has, so no frame holds it as it is."""
    tar = tar_of(sparse("a", ((0, b"x"),), 5000))
    full = without_sparse(tar)
    layer = zstd_chunked_layer(full, frames_from=tar.ljust(len(full), b"\0"))
    with pytest.raises(TocMismatch, match="sparse"):
        check(layer)


def test_a_stream_that_is_no_tar_is_the_tocs_fault() -> None:
    tar = tar_of(file("a", b"1"))
    with pytest.raises(TocMismatch, match="tar"):
        check(zstd_chunked_layer(tar, frames_from=b"\1" * len(tar)))


def test_more_entries_out_of_place_than_memory_is_for_are_refused() -> None:
    entries = [file(f"d/{number}") for number in range((1 << 16) + 1)]
    tar = tar_of(*entries, file("d", b"and all of them are gone"))
    with pytest.raises(TocMismatch, match="not in the TOC"):
        check(zstd_chunked_layer(tar))


NAMES = ("a", "b", "d", "d/a", "d/b", "d/e", "d/e/f", "s", "s/a")
ENTRIES = st.one_of(
    st.builds(lambda name, data, mode: file(name, data, mode=mode), st.sampled_from(NAMES),
              st.sampled_from([b"", b"1", b"22", b"x" * 700]), st.sampled_from([0o644, 0o4755])),
    st.builds(dir_, st.sampled_from(NAMES)),
    st.builds(symlink, st.sampled_from(NAMES), st.sampled_from(["a", "d", "/d/e", "../d", "s"])),
    st.builds(hardlink, st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.builds(whiteout, st.sampled_from(NAMES)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTRIES, max_size=9), st.sampled_from([0, 600, 1 << 20]))
def test_whatever_a_converter_makes_of_any_tar_passes(entries: list[bytes], frame_size: int) -> None:
    try:
        layer = zstd_chunked_layer(tar_of(*entries), chunk_size=400, frame_size=frame_size)
    except LazyfsError:
        return  # no full unpack would take that tar either
    check(layer)


def _tree(layer: LayerBlob) -> list[tuple[object, ...]]:
    """All that a process can see of a layer, and where its content lies."""
    with table_of(layer) as table:
        return [
            (
                table.path_of(row), table.kind[row], table.flags[row], table.mode[row], table.size[row],
                table.path_of(table.inode(row)), table.link(row) if table.kind[row] == Kind.SYMLINK else b"",
                [(table.chunk_inner[c], table.frame_blob_offset[table.chunk_frame[c]]) for c in table.file_chunks(row)],
            )
            for row in range(table.rows)
        ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTRIES, max_size=7), st.integers(-1, 6), st.integers(-1, 6), ENTRIES)
def test_a_toc_of_another_tar_passes_only_when_it_tells_the_same_tree(
    entries: list[bytes], without: int, at: int, extra: bytes
) -> None:
    """The other tar lacks one entry, has one more, or both, so that most of the lies are small."""
    others = [entry for number, entry in enumerate(entries) if number != without]
    if at >= 0:
        others.insert(at, extra)
    try:
        honest = zstd_chunked_layer(tar_of(*entries))
        other = zstd_chunked_layer(tar_of(*others))
        liar = zstd_chunked_layer(tar_of(*entries), edit_toc=lambda toc: toc.update(_decoded(other)))
        same = _tree(honest) == _tree(liar)
    except LazyfsError:
        return
    if same:
        check(liar)
    else:
        with pytest.raises(TocMismatch):
            check(liar)
