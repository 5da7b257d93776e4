"""Compressed streams, told by content: whatever the cuts of the input, the same bytes, in small pieces."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.errors import FrameInvalid, LazyfsError
from lazyfs.format.inflate import STEP, decompress, open_stream

DATA = b"".join(b"%08d\n" % i for i in range(30_000)) + os.urandom(5000)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def skippable(data: bytes) -> bytes:
    return b"\x5a\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def as_it_is(data: bytes) -> bytes:
    return data


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "plain": as_it_is,
    "gzip": gzip.compress,
    "members": lambda data: gzip.compress(data[:999]) + gzip.compress(b"") + gzip.compress(data[999:]) + bytes(600),
    "padded between": lambda data: gzip.compress(data[:999]) + bytes(7) + gzip.compress(data[999:]),
    "zstd": zstd,
    "frames": lambda data: zstd(data[:999]) + skippable(b"x" * 9) + zstd(b"") + zstd(data[999:]) + skippable(b""),
    "skippable first": lambda data: skippable(b"first") + zstd(data),
}


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 30])
def test_the_cuts_of_the_input_do_not_matter(form: str, size: int) -> None:
    packed = FORMS[form](DATA)
    if size == 1:
        packed, size = FORMS[form](DATA[:3000]), 1
    pieces = list(decompress(cut(packed, size)))
    assert b"".join(pieces) == (DATA[:3000] if size == 1 else DATA)
    assert all(pieces)


@pytest.mark.parametrize("form", FORMS)
def test_streams_read_like_files(form: str) -> None:
    stream = open_stream(io.BytesIO(FORMS[form](DATA)))
    got, sizes = b"", []
    while data := stream.read(1000):
        got += data
        sizes.append(len(data))
    assert got == DATA and max(sizes) <= 1000
    assert stream.read(1000) == b""


@pytest.mark.parametrize("data", [b"", b"a", b"abc", b"\x1f", b"\x28\xb5"])
def test_short_streams_are_as_they_are(data: bytes) -> None:
    assert b"".join(decompress([data])) == data
    assert open_stream(io.BytesIO(data)).read(10) == data


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (gzip.compress(DATA, mtime=0)[:-20], "too early"),
        (gzip.compress(DATA, mtime=0)[:-1], "too early"),
        (gzip.compress(DATA, mtime=0)[:5], "too early"),
        (gzip.compress(DATA, mtime=0) + b"rubbish", "damaged"),
        (gzip.compress(DATA, mtime=0)[:-8] + b"12345678", "damaged"),
        (zstd(DATA) + b"rubbish", "damaged"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "damaged"),
        (bz2.compress(DATA), "bzip2"),
        (lzma.compress(DATA), "xz"),
        (b"\x04\x22\x4d\x18" + bytes(20), "lz4"),
    ],
)
def test_damage_is_told(packed: bytes, reason: str) -> None:
    with pytest.raises(FrameInvalid, match=reason):
        list(decompress(cut(packed, 1000)))
    stream = open_stream(io.BytesIO(packed))
    with pytest.raises(FrameInvalid, match=reason):
        while stream.read(1 << 16):
            pass


@pytest.mark.parametrize("form", ["plain", "gzip", "zstd"])
def test_pieces_are_bounded(form: str) -> None:
    packed = FORMS[form](bytes(100 << 20))
    sizes = [len(piece) for piece in decompress([packed])]
    assert sum(sizes) == 100 << 20 and max(sizes) <= STEP


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([gzip.compress, zstd]), st.integers(0, 10_000), st.integers(1, 255), st.integers(1, 600))
def test_no_other_error_whatever_the_bytes(pack: Callable[[bytes], bytes], at: int, flip: int, size: int) -> None:
    packed = bytearray(pack(DATA[:20_000]))
    packed[at % len(packed)] ^= flip
    try:
        list(decompress(cut(bytes(packed), size)))
    except LazyfsError as error:
        assert type(error) is FrameInvalid
