"""Pieces of a blob cut into frames for its whole check."""

from __future__ import annotations

from lazyfs.chunks.frames import decoder
from lazyfs.chunks.whole import WholeCheck
from lazyfs.errors import FrameInvalid
from lazyfs.limits import MAX_FRAME
from lazyfs.units import MiB

_LARGEST = MAX_FRAME + MAX_FRAME // 128 + MiB  # compressed bytes that a frame of MAX_FRAME may take


def feed_frames(whole: WholeCheck, data: bytes, last: bool) -> bytes:
    """Give the check the whole frames in `data`, which begins with one; return what is left. Blocking.

    `last`: the extent ends with `data`. Gzip members are taken in pieces of any size, and nothing of them is left.
    Raise FrameInvalid for something else than frames, or a zstd one that decodes to over MAX_FRAME.
    """
    if whole.is_gzip:
        whole.feed_members(data, last)
        return b""
    view = memoryview(data)
    while view:
        try:
            decoded, used = decoder().decode_first(view, MAX_FRAME)
        except FrameInvalid:
            if last or len(view) > _LARGEST:
                raise
            break  # most likely it ends in the next piece
        whole.feed_frame(view[:used], decoded)
        view = view[used:]
    return bytes(view)
