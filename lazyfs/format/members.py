"""gzip members: one after another as they stream by, or the beginning of one, in bounded memory.

Source: RFC 1952 section 2.2. zlib-ng inflates at twice the speed of zlib; a cold read waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zlib_ng import zlib_ng

from lazyfs.errors import FrameInvalid
from lazyfs.units import KiB, MiB

STEP = MiB  # bytes; no piece of output is larger
_GZIP = 31  # window bits: a gzip header, whatever the window
_FIRST = 4 * KiB  # compressed bytes given to a new member at once: what it does not take is copied
_LARGEST = 256 * KiB  # the same, in the middle of a long member


class MemberDecoder:
    """The beginning of one gzip member. Stateless and thread-safe, the counterpart of `codec.FrameDecoder`."""

    def decode_prefix(self, data: bytes | memoryview, size: int) -> bytes:
        """Return the first `size` bytes of the member that `data` begins with. Blocks (CPU, GIL released).

        `data` may hold more than the member, or less if that suffices; the rest of it is neither decoded nor checked:
        the caller has a digest for what it takes. Raise FrameInvalid.
        """
        member = zlib_ng.decompressobj(_GZIP)
        try:
            out: bytes = member.decompress(data, size) if size else b""
        except zlib_ng.error as error:  # type: ignore[misc]  # the stub takes it for an instance
            raise FrameInvalid(f"a gzip member does not decode: {error}") from None
        if len(out) < size:
            raise FrameInvalid(f"a gzip member holds {len(out)} bytes of the {size} wanted")
        return out


class MemberStream:
    """Any number of gzip members fed in pieces of any size. One at a time; it may move from thread to thread."""

    def __init__(self) -> None:
        self._member: Any = None  # a decompressobj; None: at a boundary
        self._step = _FIRST

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes fed so far are whole members."""
        return self._member is None

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield what `data` decodes to, in pieces of 1 MiB at most; take all of it. Members' CRC and size are checked.

        Raise FrameInvalid for anything that is no member, padding included.
        """
        view = memoryview(data)
        at = 0
        try:
            while at < len(view):
                if self._member is None:
                    self._member, self._step = zlib_ng.decompressobj(_GZIP), _FIRST
                part: bytes | memoryview = view[at : at + self._step]
                at += len(part)
                self._step = min(2 * self._step, _LARGEST)
                while True:
                    out = self._member.decompress(part, STEP)
                    if out:
                        yield out
                    if self._member.eof:
                        at -= len(self._member.unused_data)
                        self._member = None
                        break
                    part = self._member.unconsumed_tail
                    if not part and len(out) < STEP:
                        break
        except zlib_ng.error as error:  # type: ignore[misc]  # the stub takes it for an instance
            raise FrameInvalid(f"a gzip member does not decode: {error}") from None
