"""How a layer's chunks fall into segments, which are evicted together."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lazyfs.units import MiB

SEGMENT = 4 * MiB  # bytes of data space that are evicted together


class Layout(Protocol):
    """What the store needs of a layer table to lay chunks out. Bytes, in data space; offsets ascend."""

    @property
    def chunk_count(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    @property
    def chunk_data_offset(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """How a layer's chunks fall into segments: a chunk belongs to where it starts; empty segments are left out."""

    chunk_count: int
    data_size: int  # bytes of the data space
    first_chunk: array[int]  # of each segment
    data_offset: array[int]  # where that chunk starts

    def chunks(self, segment: int) -> tuple[int, int]:
        """Return a segment's first chunk and the one behind its last."""
        after = segment + 1
        return self.first_chunk[segment], self.first_chunk[after] if after < len(self.first_chunk) else self.chunk_count

    def extent(self, segment: int) -> tuple[int, int]:
        """Return where a segment's first chunk starts and where the next segment's does. Data space."""
        after = segment + 1
        end = self.data_offset[after] if after < len(self.data_offset) else self.data_size
        return self.data_offset[segment], end


def shape_of(layout: Layout) -> Shape:
    """Cut a layer's chunks into segments. Bisects, so it costs microseconds a segment, not a chunk."""
    first, starts = array("I"), array("Q")
    offsets, count = layout.chunk_data_offset, layout.chunk_count
    chunk = 0
    while chunk < count:
        offset = offsets[chunk]
        first.append(chunk)
        starts.append(offset)
        chunk = bisect_left(offsets, (offset // SEGMENT + 1) * SEGMENT, chunk + 1, count)
    return Shape(count, layout.data_size, first, starts)
