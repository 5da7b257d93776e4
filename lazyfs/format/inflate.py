"""Compressed layers as plain tar streams: gzip (any number of members), zstd (any number of frames), or as they are.

Told apart by magic, because media types lie: Docker's "tar.gzip" around zstd, OCI's "tar" around gzip. Output comes in
bounded pieces whatever the input claims. gzip is inflated by zlib-ng where that is installed, nearly twice as fast as
zlib and with the same answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any, Protocol

import zstandard

from lazyfs.errors import FrameInvalid
from lazyfs.limits import MAX_ZSTD_WINDOW
from lazyfs.units import KiB, MiB

STEP = MiB  # bytes; no piece of output is larger
_INPUT = 256 * KiB  # bytes of compressed input at a time
LONGEST_MAGIC = 8  # bytes

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"  # behind a first byte of 0x50 to 0x5f
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4"}


class Readable(Protocol):
    """What a stream must offer: up to `size` bytes, b"" at its end. Blocking."""

    def read(self, size: int, /) -> bytes: ...


class _Member(Protocol):
    """A gzip member being inflated, as zlib and zlib-ng have it."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def is_compressed(head: bytes) -> bool:
    """Tell from a stream's first 8 bytes (fewer: all of it) whether `decompress` yields more than the stream itself."""
    return head.startswith((_GZIP, _ZSTD)) or _is_skippable(head)


def decompress(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the decompressed bytes of a stream that comes in `blocks` of any size, in pieces of 1 MiB at most.

    The stream is taken to its end. Raise FrameInvalid for damage, and for compressions that no layer may have; a zstd
    stream cut short just ends, which its digest tells. Blocks as `blocks` does.
    """
    rest = iter(blocks)
    head = b""
    for block in rest:
        head += block
        if len(head) >= LONGEST_MAGIC:
            break
    whole = chain((head,), rest) if head else rest
    if head.startswith(_GZIP):
        yield from _gunzip(whole)
    elif is_compressed(head):
        yield from _unzstd(whole)
    else:
        for magic, name in _OTHERS.items():
            if head.startswith(magic):
                raise FrameInvalid(f"the layer is compressed with {name}, which is not allowed for layers")
        for block in whole:
            yield from (block[at : at + STEP] for at in range(0, len(block), STEP)) if len(block) > STEP else (block,)


def open_stream(stream: Readable) -> Readable:
    """Return a stream of the decompressed bytes, at most 1 MiB a read. Blocking; read() raises as `decompress`."""
    return _Pieces(decompress(_blocks(stream)))


def _blocks(stream: Readable) -> Iterator[bytes]:
    while block := stream.read(_INPUT):
        yield block


class _Pieces:
    """An iterator of blocks as a file to read from."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = b""

    def read(self, size: int = _INPUT, /) -> bytes:
        block = self._left or next(self._blocks, b"")
        self._left = block[size:]
        return block[:size] if self._left else block


def _is_skippable(head: bytes) -> bool:
    return head[1:4] == _SKIPPABLE and head[0] >> 4 == 5


def _inflater() -> tuple[Callable[[], _Member], type[Exception]]:
    """Return what begins a gzip member, and what it raises for a damaged one."""
    module: Any = zlib
    try:
        module = import_module("zlib_ng.zlib_ng")
    except ImportError:
        pass  # zlib comes with every Python
    return partial(module.decompressobj, 31), module.error


def _gunzip(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Members one after another. Zero padding behind the last one is tolerated, as gzip does."""
    begin, damage = _inflater()
    member = begin()
    begun = False  # whether this member has had a byte
    try:
        for block in blocks:
            data = block
            while data:
                if not begun:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                begun = True
                out = member.decompress(data, STEP)
                if member.eof:
                    data, member, begun = member.unused_data, begin(), False
                else:
                    data = member.unconsumed_tail
                if out:
                    yield out
    except damage as error:
        raise FrameInvalid(f"the layer's gzip stream is damaged: {error}") from None
    if begun:
        raise FrameInvalid("the layer's gzip stream ends too early")


def _unzstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    try:
        with decompressor.stream_reader(
            _Pieces(iter(blocks)),  # type: ignore[arg-type]
            read_size=_INPUT,
            read_across_frames=True,
        ) as reader:
            while out := reader.read(STEP):
                yield out
    except zstandard.ZstdError as error:
        raise FrameInvalid(f"the layer's zstd stream is damaged: {error}") from None
    except MemoryError:
        raise FrameInvalid(f"the layer's zstd stream wants a window of more than {MAX_ZSTD_WINDOW} bytes") from None
