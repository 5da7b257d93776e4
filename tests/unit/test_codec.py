"""Frames: exactly what was packed comes back, and nothing is believed that is not so."""

from __future__ import annotations

import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.errors import FrameInvalid
from lazyfs.format.codec import FrameDecoder, frame_size

TEXT = b"the quick brown fox jumps over the lazy dog\n" * 5000


def pack(data: bytes, *, content_size: bool = True, checksum: bool = False, level: int = 3) -> bytes:
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=content_size, write_checksum=checksum)
    return compressor.compress(data)


def unsized(data: bytes) -> bytes:
    """A frame as a streaming encoder writes it: no content size in its header."""
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    return stream.compress(data) + stream.flush()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=5000) | st.just(TEXT), st.booleans(), st.booleans(), st.sampled_from([-5, 1, 3, 19]))
def test_what_was_packed_comes_back(data: bytes, content_size: bool, checksum: bool, level: int) -> None:
    frame = pack(data, content_size=content_size, checksum=checksum, level=level)
    assert FrameDecoder().decode(frame, len(data)) == data
    assert FrameDecoder().decode(memoryview(frame), len(data)) == data
    assert frame_size(frame + b"more") == len(frame)


def test_frames_of_many_blocks_and_of_incompressible_bytes_come_back() -> None:
    for data in (os.urandom(700_000), bytes(3_000_000), TEXT * 9):
        for frame in (pack(data), unsized(data), pack(data, checksum=True)):
            assert frame_size(frame) == len(frame)
            assert FrameDecoder().decode(frame, len(data)) == data


@pytest.mark.parametrize("frame", [pack(TEXT), unsized(TEXT), pack(b""), pack(TEXT, checksum=True)])
def test_trailing_and_missing_bytes_are_refused(frame: bytes) -> None:
    decoder = FrameDecoder()
    for damaged in (frame + b"\0", frame + frame, frame[:-1], frame[:5], frame[:2], b"", b"\0" + frame):
        with pytest.raises(FrameInvalid):
            decoder.decode(damaged, 1 << 20)
    assert decoder.decode(frame, 1 << 20) in (TEXT, b"")  # an error leaves the context usable


@pytest.mark.parametrize("frame", [pack(TEXT), unsized(TEXT)])
def test_more_than_the_bound_is_refused(frame: bytes) -> None:
    with pytest.raises(FrameInvalid, match="allowed"):
        FrameDecoder().decode(frame, len(TEXT) - 1)


def test_a_bomb_is_stopped_at_the_bound() -> None:
    """Blocks that repeat one byte: 4 bytes make 128 KiB, and the header promises next to nothing or keeps silent."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    last = (1 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    silent = b"\x28\xb5\x2f\xfd\x00\x58" + block * 10_000 + last
    promising = b"\x28\xb5\x2f\xfd\x40\x58" + (1000).to_bytes(2, "little") + block * 10_000 + last
    for bomb in (silent, promising):
        assert frame_size(bomb) == len(bomb)
        with pytest.raises(FrameInvalid):
            FrameDecoder().decode(bomb, 1 << 20)


def test_a_window_beyond_all_measure_is_refused() -> None:
    """The header asks for a window of gigabytes before the first byte."""
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (1 << 3 | 1).to_bytes(3, "little") + b"x"
    with pytest.raises(FrameInvalid):
        FrameDecoder().decode(frame, 1 << 20)


def test_a_wrong_checksum_is_refused() -> None:
    frame = bytearray(pack(TEXT, checksum=True))
    frame[-1] ^= 1
    with pytest.raises(FrameInvalid):
        FrameDecoder().decode(bytes(frame), len(TEXT))


def test_the_first_of_several_frames_tells_where_it_ends() -> None:
    one, other = pack(b"one"), unsized(TEXT)
    decoder = FrameDecoder()
    data = memoryview(one + other + one)
    first, used = decoder.decode_first(data, 1 << 20)
    second, more = decoder.decode_first(data[used:], 1 << 20)
    assert (first, second) == (b"one", TEXT)
    assert bytes(data[used + more :]) == one


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 400), st.integers(1, 255), st.booleans())
def test_a_flipped_byte_never_gives_anything_but_bytes_or_frame_invalid(at: int, flip: int, sized: bool) -> None:
    frame = bytearray(pack(TEXT) if sized else unsized(TEXT))
    frame[at % len(frame)] ^= flip
    try:
        out = FrameDecoder().decode(bytes(frame), len(TEXT))
    except FrameInvalid:
        return
    assert len(out) <= len(TEXT)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic_give_bytes_or_frame_invalid(data: bytes) -> None:
    try:
        FrameDecoder().decode(b"\x28\xb5\x2f\xfd" + data, 1 << 16)
    except FrameInvalid:
        pass
