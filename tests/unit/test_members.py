"""gzip members in pieces, and runs of zeros: the same answer however a stream is cut, and nothing unbounded."""

from __future__ import annotations

import gzip
import hashlib
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.chunks.zero_runs import MIN_RUN, ZeroRuns
from lazyfs.errors import FrameInvalid
from lazyfs.format.members import STEP, MemberDecoder, MemberStream
from lazyfs.format.zeros import ZeroDigests

PARTS = st.lists(st.one_of(st.binary(max_size=300), st.integers(1, 4000).map(bytes)), max_size=8)


def member(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@settings(max_examples=200, deadline=None)
@given(PARTS, st.integers(1, 500))
def test_members_decode_the_same_however_they_are_cut(parts: list[bytes], step: int) -> None:
    blob = b"".join(map(member, parts))
    stream = MemberStream()
    out = b"".join(b"".join(stream.feed(blob[at : at + step])) for at in range(0, len(blob), step))
    assert out == b"".join(parts) and stream.at_boundary


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=2000), st.data())
def test_a_prefix_is_the_beginning_and_an_early_end_is_told(data: bytes, draw: st.DataObject) -> None:
    size = draw.draw(st.integers(0, len(data)))
    blob = member(data) + b"what follows is nobody's"
    assert MemberDecoder().decode_prefix(blob, size) == data[:size]
    with pytest.raises(FrameInvalid, match="wanted"):
        MemberDecoder().decode_prefix(blob, len(data) + 1)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=500), st.data())
def test_a_flipped_bit_never_gives_other_bytes(data: bytes, draw: st.DataObject) -> None:
    blob = bytearray(member(data))
    blob[draw.draw(st.integers(0, len(blob) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    stream = MemberStream()
    try:
        out = b"".join(stream.feed(bytes(blob)))
    except FrameInvalid:
        return
    assert out == data or not stream.at_boundary


def test_a_bomb_comes_in_bounded_pieces_and_many_tiny_members_in_linear_time() -> None:
    squeezed = zlib.compressobj(9, wbits=31)
    bomb = b"".join(squeezed.compress(bytes(STEP)) for _ in range(16)) + squeezed.flush()
    sizes = [len(piece) for piece in MemberStream().feed(bomb)]
    assert sum(sizes) == 16 * STEP and max(sizes) <= STEP
    stream = MemberStream()
    assert list(stream.feed(member(b"") * 20_000)) == [] and stream.at_boundary


@pytest.mark.parametrize("data", [b"\0", b"no gzip", member(b"x") + b"\0" * 20, b"\x1f\x8b\x08\xff" + b"x" * 40])
def test_what_is_no_member_is_refused(data: bytes) -> None:
    stream = MemberStream()
    try:
        list(stream.feed(data))
    except FrameInvalid:
        return
    assert not stream.at_boundary


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.integers(1, 5000).map(bytes)), max_size=8), st.data())
def test_zeros_are_found_wherever_pieces_are_cut(parts: list[bytes], draw: st.DataObject) -> None:
    data = b"".join(parts)
    runs = ZeroRuns()
    at = 0
    while at < len(data):
        step = draw.draw(st.integers(1, 2500))
        runs.feed(data[at : at + step])
        at += step
    for _ in range(5):
        start = draw.draw(st.integers(0, len(data)))
        size = draw.draw(st.integers(MIN_RUN, 6000))
        inside = start + size <= len(data)
        assert runs.holds(start, size) == (inside and not data[start : start + size].strip(b"\0"))


@pytest.mark.parametrize("size", [0, 1, 1024, 65_536, 65_537, 4 << 20, (4 << 20) + 1, 9_000_000])
def test_digests_of_zeros(size: int) -> None:
    digests = ZeroDigests()
    assert digests.digest(size) == hashlib.sha256(bytes(size)).digest() == digests.digest(size)
