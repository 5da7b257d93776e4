"""Podman's form: frames with their ends, annotations for its versions, and the tar-split."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.frames import PODMAN_CHUNK_SIZE
from indexer.layer import ConvertedLayer
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.format.crc64 import crc64
from lazyfs.format.entry import Kind
from lazyfs.format.inflate import decompress
from lazyfs.format.rfc3339 import parse_time
from tests.helpers import tars
from tests.helpers.blobs import scan
from tests.helpers.converted import (
    PODMAN,
    convert,
    noise,
    read,
    toc_of,
    unpack,
)
from tests.helpers.tars import dir_, file, sparse, symlink, tar_of


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
