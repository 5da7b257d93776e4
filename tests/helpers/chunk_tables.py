"""A layer table in memory with only what the store needs, and the bytes that it promises."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lazyfs.format.table import FORM_ZSTD_CHUNKED, NO_FRAME
from lazyfs.units import align


@dataclass
class ChunkTable:
    """Files of the given chunks laid out in data space: every file on a page, its chunks end to end."""

    content: list[bytes] = field(default_factory=list)  # of each chunk
    chunk_data_offset: list[int] = field(default_factory=list)
    chunk_size: list[int] = field(default_factory=list)
    chunk_frame: list[int] = field(default_factory=list)
    data_size: int = 0
    form: int = FORM_ZSTD_CHUNKED
    path: Path = Path("table")
    digest: str = ""

    @property
    def chunk_count(self) -> int:
        return len(self.content)

    @property
    def holes(self) -> int:
        return self.chunk_frame.count(NO_FRAME)

    def chunk_digest(self, chunk: int) -> bytes:
        return hashlib.sha256(self.content[chunk]).digest()

    def add_file(self, chunks: Sequence[bytes], *, hole: bool = False) -> None:
        self.data_size = align(self.data_size)
        for chunk in chunks:
            self.content.append(chunk)
            self.chunk_data_offset.append(self.data_size)
            self.chunk_size.append(len(chunk))
            self.chunk_frame.append(NO_FRAME if hole else 0)
            self.data_size += len(chunk)


def noise(seed: object, size: int) -> bytes:
    """Return `size` bytes that no two seeds share."""
    return hashlib.shake_128(repr(seed).encode()).digest(size)


def table_of(*files: Sequence[int], seed: object = 0) -> ChunkTable:
    """Make a table of files given as lists of their chunks' sizes."""
    table = ChunkTable(digest="sha256:" + hashlib.sha256(repr((seed, files)).encode()).hexdigest())
    for index, sizes in enumerate(files):
        table.add_file([noise((seed, index, number), size) for number, size in enumerate(sizes)])
    return table
