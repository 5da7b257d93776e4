"""Compressed layer streams as plain tar streams: gzip (any number of members), zstd (any number of frames), or as they are.

Told apart by magic, because media types lie. Output comes in bounded pieces whatever the input claims.
"""  # noqa: E501

from __future__ import annotations

import zlib
from typing import Protocol

import zstandard

from lazyfs.errors import FrameInvalid
from lazyfs.units import KiB, MiB

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"  # behind a first byte of 0x50 to 0x5f
_INPUT = 256 * KiB  # bytes of compressed input at a time
_MAX_WINDOW = 128 * MiB  # bytes of zstd history: what `zstd --long` reaches without asking


class Readable(Protocol):
    """What a stream must offer: up to `size` bytes, b"" at its end. Blocking."""

    def read(self, size: int, /) -> bytes: ...


class _Ahead:
    """A stream with some bytes put back in front of it."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        return self._stream.read(size)


class _Gzip:
    """Members one after another. Zero padding behind the last one is tolerated, as gzip does."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._member = zlib.decompressobj(wbits=31)
        self._input = b""
        self._begun = False

    def read(self, size: int, /) -> bytes:
        while True:
            if not self._input:
                self._input = self._stream.read(_INPUT)
                if not self._input:
                    if self._begun:
                        raise FrameInvalid("the gzip stream ends early")
                    return b""
            if not self._begun:
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    continue
                self._begun = True
            try:
                out = self._member.decompress(self._input, size)
            except zlib.error as error:
                raise FrameInvalid(f"the gzip stream does not decode: {error}") from None
            if self._member.eof:
                self._input = self._member.unused_data
                self._member = zlib.decompressobj(wbits=31)
                self._begun = False
            else:
                self._input = self._member.unconsumed_tail
            if out:
                return out


class _Zstd:
    def __init__(self, stream: Readable) -> None:
        context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._reader = context.stream_reader(stream, read_size=_INPUT, read_across_frames=True)  # type: ignore[arg-type]

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except zstandard.ZstdError as error:
            raise FrameInvalid(f"the zstd stream does not decode: {error}") from None


def open_stream(stream: Readable) -> Readable:
    """Return a stream of the decompressed bytes; its read() raises FrameInvalid. Blocking: reads the first bytes."""
    head = b""
    while len(head) < 4 and (more := stream.read(4 - len(head))):
        head += more
    ahead = _Ahead(head, stream)
    if head.startswith(_GZIP):
        return _Gzip(ahead)
    if head == _ZSTD or (head[1:] == _SKIPPABLE and head[0] >> 4 == 5):
        return _Zstd(ahead)
    return ahead
