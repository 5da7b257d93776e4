"""What a trace asks for, as ranges of blobs: in its order, a window at a time, neighbours and small gaps in one range.

A trace is a stranger's hint: files that are gone, chunks that don't exist and layers of other images are passed over,
and nothing is asked for twice. So however large a trace is, no more comes of it than the image.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from lazyfs.chunks.frames import needed
from lazyfs.chunks.layer import ServedLayer
from lazyfs.format.entry import Kind
from lazyfs.format.table import NO_FRAME, LayerTable
from lazyfs.format.trace import Read, Trace
from lazyfs.limits import MAX_FRAMES

_LOOK = 2000  # reads of a trace that are looked up in one go
_PIECE = 256 << 10  # compressed bytes of a range that is cut no further
_FREE_GAP = 16 << 10  # bytes; another request costs more than such a gap
_GAP_FRAMES = MAX_FRAMES  # of a gap at most: tiny ones cost more than the bytes that they take


@dataclass(frozen=True, slots=True)
class Range:
    """Frames [first, stop) of a layer."""

    layer: ServedLayer
    first: int
    stop: int


@dataclass(slots=True)
class _Found:
    """A window as it is put together: the missing frames by layer, and their bytes."""

    frames: dict[int, list[int]] = field(default_factory=dict)  # by the layer's place
    size: int = 0


class Plan:
    """A trace's frames, from the first to the last. One thread at a time; looks at the local disk's records alone."""

    def __init__(self, trace: Trace, layers: Iterable[ServedLayer], coming: Iterable[Range] = ()) -> None:
        """`coming`: frames that need not be asked for any more."""
        lazy = {layer.digest: layer for layer in layers if not layer.is_plain}
        self._layers = [lazy.get(digest) for digest in trace.layers]
        self._seen = [bytearray(0 if layer is None else layer.table.frame_count) for layer in self._layers]
        for one in coming:
            self._mark(one)
        self._rows: dict[tuple[int, bytes], int | None] = {}
        self._frames = self._in_order(trace.reads)
        self.over = False  # there is no further window

    def next(self, size: int, gap: int, side_by_side: int) -> list[Range]:
        """Return the ranges of the next frames that are missing, about `size` compressed bytes, one frame at least.

        Sorted by layer and blob offset. Gaps of less than `gap` bytes are fetched too where there were more ranges
        than `side_by_side` otherwise. Blocking, some milliseconds; [] is not the end of the trace, `over` is.
        """
        found = _Found()
        for looked, at in enumerate(self._frames):
            if at is not None:
                place, frame = at
                layer = self._layers[place]
                assert layer is not None
                if layer.frame_missing(frame):
                    found.frames.setdefault(place, []).append(frame)
                    found.size += needed(layer.table, frame)
            if found.size >= size or looked >= _LOOK:
                break
        else:
            self.over = True
        piece = max(size // side_by_side, _PIECE)
        return self._ranges(found, gap, side_by_side, piece)

    # -- which frames

    def _in_order(self, reads: Sequence[Read]) -> Iterator[tuple[int, int] | None]:
        """Yield (layer's place, frame) of each frame once, and None for a read that leads to no further one."""
        for read in reads:
            yield None
            layer = self._layers[read.layer] if read.layer < len(self._layers) else None
            row = None if layer is None else self._row(read.layer, layer.table, read.path)
            if layer is None or row is None:
                continue
            seen = self._seen[read.layer]
            first, stop = _frames(layer.table, row, read.offset, read.size)
            while (frame := seen.find(0, first, stop)) >= 0:
                seen[frame] = 1
                yield read.layer, frame

    def _row(self, place: int, table: LayerTable, path: bytes) -> int | None:
        """Return the row of the regular file at a path of a layer, None where there is none."""
        key = place, path
        if key not in self._rows:
            self._rows[key] = _file(table, path)
        return self._rows[key]

    # -- as ranges

    def _ranges(self, found: _Found, gap: int, side_by_side: int, piece: int) -> list[Range]:
        ranges: list[Range] = []
        for place, frames in sorted(found.frames.items()):
            layer = self._layers[place]
            assert layer is not None
            ranges += [Range(layer, first, stop) for first, stop in _runs(layer.table, sorted(frames))]
        gaps = sorted(
            (size, number)
            for number, (one, other) in enumerate(pairwise(ranges))
            if (size := _gap(one, other, max(gap, _FREE_GAP))) is not None
        )
        merged: set[int] = set()
        for size, number in gaps:
            if size < _FREE_GAP or len(ranges) - len(merged) > side_by_side:
                merged.add(number)
        out: list[Range] = []
        for number, one in enumerate(ranges):
            if out and number - 1 in merged:
                self._mark(Range(one.layer, out[-1].stop, one.first))
                out[-1] = Range(one.layer, out[-1].first, one.stop)
            else:
                out.append(one)
        return [part for one in out for part in _pieces(one, piece)]

    def _mark(self, one: Range) -> None:
        """Note that frames are asked for: the trace may want them later."""
        for place, layer in enumerate(self._layers):
            if layer is one.layer:
                self._seen[place][one.first : one.stop] = b"\1" * (one.stop - one.first)


def credible(trace: Trace, layers: Iterable[ServedLayer]) -> Trace:
    """Return a trace without the reads that lead to no chunk of these layers that an earlier one didn't lead to.

    So it tells of no more chunks than there are, whoever wrote it. Reads of layers that are not among these stay.
    Blocking, some tenths of a second for a large one; in any thread, while the layers are held.
    """
    known = {layer.digest: layer for layer in layers}
    seen = {digest: bytearray(layer.table.chunk_count) for digest, layer in known.items()}
    rows: dict[tuple[str, bytes], int | None] = {}

    def is_new(read: Read) -> bool:
        digest = trace.layers[read.layer]
        layer = known.get(digest)
        if layer is None:
            return True
        key = digest, read.path
        if key not in rows:
            rows[key] = _file(layer.table, read.path)
        row = rows[key]
        if row is None:
            return False
        first, stop = _chunks(layer.table, row, read.offset, read.size)
        if seen[digest].find(0, first, stop) < 0:
            return False
        seen[digest][first:stop] = b"\1" * (stop - first)
        return True

    return replace(trace, reads=tuple(filter(is_new, trace.reads)))


def _file(table: LayerTable, path: bytes) -> int | None:
    """Return the row of the regular file at a path, None where there is none."""
    row = table.find(path)
    row = None if row is None else table.inode(row)
    return row if row is not None and table.kind[row] == Kind.REG else None


def _chunks(table: LayerTable, row: int, offset: int, size: int) -> tuple[int, int]:
    """Return the chunks [first, stop) with bytes [offset, offset + size) of a file, cut at its end. Quick."""
    end = min(offset + size, table.size[row])
    if offset >= end:
        return 0, 0
    base, chunks = table.data_offset[row], table.file_chunks(row)
    starts = table.chunk_data_offset
    first = max(bisect_right(starts, base + offset, chunks.start, chunks.stop) - 1, chunks.start)
    stop = bisect_left(starts, base + end, chunks.start, chunks.stop)
    return (first, stop) if first < stop else (0, 0)


def _frames(table: LayerTable, row: int, offset: int, size: int) -> tuple[int, int]:
    """Return the frames [first, stop) with bytes [offset, offset + size) of a file, cut at its end. Quick."""
    first, stop = _chunks(table, row, offset, size)
    if first >= stop:
        return 0, 0
    frame = table.chunk_frame[first]
    if frame == NO_FRAME:
        frame = bisect_right(table.frame_first_chunk, first)  # a hole: what follows it
    return frame, bisect_left(table.frame_first_chunk, stop)


def _runs(table: LayerTable, frames: list[int]) -> list[tuple[int, int]]:
    """Return sorted frames as runs [first, stop). A run ends where much follows in an extent that no name leads to."""
    out: list[tuple[int, int]] = []
    for frame in frames:
        if out and out[-1][1] == frame and _dead(table, frame - 1) < _FREE_GAP:
            out[-1] = out[-1][0], frame + 1
        else:
            out.append((frame, frame + 1))
    return out


def _dead(table: LayerTable, frame: int) -> int:
    """Return the bytes of a frame's extent that hold none of its chunks."""
    return int(table.frame_blob_end[frame] - table.frame_blob_offset[frame]) - needed(table, frame)


def _gap(one: Range, other: Range, limit: int) -> int | None:
    """Return the bytes between two ranges; None for `limit` or more, and where something in between is here."""
    if one.layer is not other.layer or other.first - one.stop > _GAP_FRAMES:
        return None
    table = one.layer.table
    begin = int(table.frame_blob_offset[one.stop - 1]) + needed(table, one.stop - 1)
    size = int(table.frame_blob_offset[other.first]) - begin
    return size if size < limit and all(map(one.layer.frame_missing, range(one.stop, other.first))) else None


def _pieces(one: Range, size: int) -> Iterator[Range]:
    """Cut a range into pieces of about `size` compressed bytes, which one request can have."""
    table, first = one.layer.table, one.first
    while first < one.stop:
        stop = first + 1
        end = table.frame_blob_offset[first] + size
        while stop < min(one.stop, first + MAX_FRAMES) and table.frame_blob_end[stop] <= end:
            stop += 1
        yield Range(one.layer, first, stop)
        first = stop
