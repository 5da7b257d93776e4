"""zstd frames: exactly one frame in, its bytes out, nothing believed.

Sources: RFC 8878 section 3.1; specs/python-stack.md for what python-zstandard lets through (it returns the first of
several frames in silence, and an empty result for a frame that says it is empty).
"""

from __future__ import annotations

import zstandard

from lazyfs.errors import FrameInvalid
from lazyfs.limits import MAX_FRAME, MAX_ZSTD_WINDOW
from lazyfs.units import MiB

_MAGIC = b"\x28\xb5\x2f\xfd"
_RAW, _RLE, _COMPRESSED = 0, 1, 2
_CHECKSUM = 4  # bytes
_SLACK = 8 * MiB  # bytes behind what is wanted for which a frame is still decoded in one go


def frame_size(data: bytes | memoryview) -> int:
    """Return how many bytes of `data` its first zstd frame takes, by walking the headers of its blocks.

    Raise FrameInvalid when `data` does not begin with a frame or ends inside it. Pure; below a µs a block of 128 KiB.
    """
    if bytes(data[:4]) != _MAGIC:
        raise FrameInvalid(f"no zstd frame begins with {bytes(data[:4]).hex() or 'nothing'}")
    try:
        at = zstandard.frame_header_size(data)
        checksum = zstandard.get_frame_parameters(data).has_checksum
    except zstandard.ZstdError as error:
        raise FrameInvalid(f"a zstd frame's header is broken: {error}") from None
    total, last = len(data), False
    while not last:
        if at + 3 > total:
            raise FrameInvalid(f"a zstd frame ends early, after {total} bytes")
        header = data[at] | data[at + 1] << 8 | data[at + 2] << 16
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if kind > _COMPRESSED:
            raise FrameInvalid("a zstd frame holds a block of the reserved type")
        at += 3 + (1 if kind == _RLE else size)
    if checksum:
        at += _CHECKSUM
    if at > total:
        raise FrameInvalid(f"a zstd frame of {at} bytes ends early, after {total}")
    return at


class FrameDecoder:
    """A zstd context. It belongs to ONE thread: two threads in it crash the process."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)

    def decode(self, frame: bytes | memoryview, max_size: int = MAX_FRAME) -> bytes:
        """Return the bytes of the one frame that `frame` consists of. At most `max_size`; blocks (CPU, GIL released).

        A frame without content size in its header is decoded too (Go's streaming encoder writes such), in bounded
        memory. Raise FrameInvalid for trailing or missing bytes, more than `max_size`, or anything zstd refuses.
        """
        size = frame_size(frame)
        if size != len(frame):
            raise FrameInvalid(f"{len(frame) - size} bytes follow a zstd frame of {size}")
        return self._decode(frame, max_size)

    def decode_first(self, data: bytes | memoryview, max_size: int = MAX_FRAME) -> tuple[bytes, int]:
        """Return the bytes of the first frame in `data`, and how many bytes of `data` it takes. As `decode` otherwise.

        For ranges that reach to the next frame that a TOC names: frames of headers or dead files may lie between.
        """
        size = frame_size(data)
        return self._decode(data[:size], max_size), size

    def decode_prefix(self, data: bytes | memoryview, size: int) -> bytes:
        """Return `size` bytes or more of the beginning of the frame that `data` begins with. Blocks (CPU).

        `data` may hold more than the frame, or less if that suffices; what lies far behind the wanted bytes is neither
        decoded nor checked: the caller has a digest for what it takes. Memory: `size` and 8 MiB. Raise FrameInvalid.
        """
        try:
            promised = zstandard.frame_content_size(data)
        except zstandard.ZstdError as error:
            raise FrameInvalid(f"a zstd frame's header is broken: {error}") from None
        out = self._whole(data, promised) if 0 <= promised <= size + _SLACK else self._begin(data, size)
        if len(out) < size:
            raise FrameInvalid(f"a zstd frame holds {len(out)} bytes of the {size} wanted")
        return out

    def _whole(self, data: bytes | memoryview, promised: int) -> bytes:
        try:
            size = frame_size(data)
        except FrameInvalid:
            return self._begin(data, promised)  # its end may have been left out
        return self._decode(data[:size], promised)

    def _begin(self, data: bytes | memoryview, size: int) -> bytes:
        parts = []
        try:
            with self._context.stream_reader(data, read_across_frames=False, closefd=False) as reader:
                while size > 0 and (part := reader.read(min(MiB, size))):
                    parts.append(part)
                    size -= len(part)
        except zstandard.ZstdError as error:
            raise FrameInvalid(f"a zstd frame does not decode: {error}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _decode(self, frame: bytes | memoryview, max_size: int) -> bytes:
        try:
            promised = zstandard.frame_content_size(frame)
            if promised > max_size:
                raise FrameInvalid(f"a zstd frame claims {promised} bytes, more than the {max_size} allowed")
            if promised > 0:
                out = self._context.decompress(frame, max_output_size=promised, allow_extra_data=False)
            else:
                with self._context.stream_reader(frame, read_across_frames=False, closefd=False) as reader:
                    out = _read_all(reader, max_size)
        except zstandard.ZstdError as error:
            raise FrameInvalid(f"a zstd frame does not decode: {error}") from None
        if promised >= 0 and len(out) != promised:
            raise FrameInvalid(f"a zstd frame holds {len(out)} bytes and claims {promised}")
        return out


def _read_all(reader: zstandard.ZstdDecompressionReader, max_size: int) -> bytes:
    parts, size = [], 0
    while part := reader.read(min(MiB, max_size + 1 - size)):
        parts.append(part)
        size += len(part)
        if size > max_size:
            raise FrameInvalid(f"a zstd frame decodes to more than the {max_size} bytes allowed")
    return b"".join(parts)
