"""Members of archives: where they lie, and what is refused, for no archive is trusted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import (
    DocumentInvalid,
    TarInvalid,
)
from lazyfs.limits import MAX_ARCHIVE_NAMES, MAX_MEMBERS
from lazyfs.registry.local.tar_members import find_members, follow
from tests.helpers.archives import IMAGE, docker_archive, opened
from tests.helpers.tars import declared, dir_, file, global_pax, header, sparse, symlink, tar_of


def members_of(tar: bytes) -> dict[str, tuple[int, int]]:
    found = find_members(lambda size, at: tar[at : at + size], len(tar))
    return {name: (member.offset, member.size) for name, member in found.items() if member.is_file}


_NAME = st.lists(st.text("abcé.-_ ", min_size=1, max_size=90), min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(_NAME, st.binary(max_size=1500), max_size=8), st.sampled_from((0, 1, 2)))
def test_members_are_where_tarfile_finds_them(files: dict[str, bytes], form: int) -> None:
    kept = {}
    for name, data in files.items():
        clean = "/".join(word for word in name.split("/") if word not in ("", "."))
        if clean and ".." not in name.split("/") and clean not in kept:
            kept[clean] = data
    out = io.BytesIO()
    try:
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name, data in kept.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    except ValueError:
        return  # ustar has no place for such a name
    raw = out.getvalue()
    assert {name: raw[at : at + size] for name, (at, size) in members_of(raw).items()} == kept


@given(st.binary(max_size=3000))
def test_any_bytes_are_an_archive_or_refused(raw: bytes) -> None:
    try:
        members_of(raw)
    except TarInvalid:
        pass


@given(st.data())
def test_a_flipped_byte_leaves_ranges_within_the_archive(data: st.DataObject) -> None:
    raw = bytearray(docker_archive(IMAGE, "app:1"))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        found = members_of(bytes(raw))
    except TarInvalid:
        return
    assert all(offset + size <= len(raw) for offset, size in found.values())


_BIG = 1 << 40

HOSTILE = {
    "a name twice": (tar_of(file("a", b"1"), file("a", b"2")), "two members"),
    "a directory and a file": (tar_of(file("a", b"1"), dir_("a/")), "two members"),
    "a name that leads out": (tar_of(file("../a", b"1")), "leads out"),
    "a name in the middle that leads out": (tar_of(file("a/../../b", b"1")), "leads out"),
    "an absolute name": (tar_of(file("/etc/passwd", b"1")), "leads out"),
    "a sparse member": (tar_of(sparse("a", [(0, b"data")], 1 << 30)), "sparse"),
    "an old sparse member": (tar_of(sparse("a", [(0, b"data")], 1 << 30, "gnu")), "sparse"),
    "a member larger than the archive": (declared("a", _BIG), "cut short"),
    "a huge extension header": (header(b"x", size=_BIG, kind=b"x"), "extension header"),
    "a header cut short": (tar_of(file("a", b"1"), end=False) + b"x" * 100, "cut short"),
    "a wrong checksum": (tar_of(file("a", b"1"), end=False) + b"y" * 512, "checksum"),
    "no tar at all": (b"not a tar" * 100, "no tar archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    raw, reason = HOSTILE[name]
    for transport in ("oci-archive", "docker-archive"):
        with pytest.raises(DocumentInvalid, match=reason) as caught:
            opened(tmp_path / "a.tar", raw, transport).manifest("")
        assert str(tmp_path / "a.tar") in str(caught.value)


def test_members_are_bounded() -> None:
    block = {0: header(b"d", kind=b"5")}
    count = 0

    def read_at(size: int, at: int) -> bytes:
        nonlocal count
        count += 1
        return block[0]

    with pytest.raises(TarInvalid, match="more than"):
        find_members(read_at, 1 << 50)
    assert count == MAX_MEMBERS + 1


def test_all_names_together_are_bounded() -> None:
    long = b"n" * 4000
    raw = tar_of(*(symlink(b"%d" % number, long) for number in range(MAX_ARCHIVE_NAMES // len(long) + 1)))
    with pytest.raises(TarInvalid, match="names have more than"):
        find_members(lambda size, at: raw[at : at + size], len(raw))


def test_global_headers_and_leading_dots_do_not_matter() -> None:
    tar = tar_of(global_pax([(b"path", b"evil")]), dir_("./"), dir_("./blobs/"), file("./blobs//x", b"abc"))
    assert {name: tar[at : at + size] for name, (at, size) in members_of(tar).items()} == {"blobs/x": b"abc"}


def test_links_are_followed_within_the_archive_only() -> None:
    tar = tar_of(
        file("one/layer.tar", b"abc"), symlink("two/layer.tar", "../one/layer.tar"),
        symlink("out", "../../etc/passwd"), symlink("root", "/etc/passwd"), symlink("a", "b"), symlink("b", "a"),
        symlink("gone", "nowhere"), dir_("d/"),
    )  # fmt: skip
    found = find_members(lambda size, at: tar[at : at + size], len(tar))
    member = follow(found, "two/layer.tar")
    assert member is not None and member.name == "one/layer.tar"
    assert follow(found, "gone") is None and follow(found, "d") is None and follow(found, "x") is None
    for name, reason in (("out", "leads out"), ("root", "leads out"), ("a", "circles"), ("../x", "leads out")):
        with pytest.raises(TarInvalid, match=reason):
            follow(found, name)
