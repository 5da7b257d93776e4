"""Readers that take a piece every so many bytes: an index in pages, a column in rows, one tensor of each layer.

Over a network each piece would cost a round trip. Three pieces of one size at equal distances make a pattern; what
would come next is named then, a few pieces at first and more while they are taken. One that is not taken ends it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from lazyfs.limits import MAX_PATTERNS, MAX_STRIDE_BYTES, MAX_STRIDE_LAYERS
from lazyfs.units import KiB, MiB

_FAR = 64 * MiB  # bytes between two pieces at most: beyond, three at equal distances may be chance
_LARGEST = (
    512 * KiB
)  # bytes of a piece: larger ones are the kernel's, which reads ahead in order, and asks out of order
_SPARSE = 4  # times a piece's bytes from one to the next at least; what is denser is better fetched whole
_RECENT = 4  # reads of a layer among which a pattern is looked for: two readers may take turns; of more it is chance
_FIRST = 2  # pieces ahead to begin with; doubled each time one is taken
_MOST = 8  # pieces ahead: with one for each connection all are under way together


@dataclass(slots=True)
class _Pattern:
    """Pieces of `size` bytes, `stride` from one's begin to the next one's, within [0, limit) of the data space."""

    stride: int
    size: int
    limit: int
    ahead: int  # pieces beyond the one that was taken last
    named: int  # pieces beyond it that have been named already


class Strides:
    """Patterns by layer, in data space. Not thread-safe; never blocks."""

    def __init__(self) -> None:
        self._recent: OrderedDict[int, deque[tuple[int, int]]] = OrderedDict()
        self._expected: OrderedDict[tuple[int, int], _Pattern] = OrderedDict()

    def expects(self, layer: int, begin: int) -> bool:
        """Tell whether a read that begins here was foreseen."""
        return (layer, begin) in self._expected

    def note(self, layer: int, begin: int, end: int, limit: int, floor: int = 0) -> list[tuple[int, int]]:
        """Note a read of [begin, end) in a file that begins at `floor` or later, and ends at `limit` or later.

        Return each [begin, end) to fetch ahead.
        """
        size = end - begin
        pattern = self._expected.pop((layer, begin), None)
        if pattern is not None and pattern.size == size:
            pattern.named = max(0, pattern.named - 1)
            pattern.ahead = min(2 * pattern.ahead, _MOST, max(1, MAX_STRIDE_BYTES // size))
        else:
            pattern = self._find(layer, begin, size, limit, floor)
            if pattern is None:
                return []
        self._expected[layer, begin + pattern.stride] = pattern
        while len(self._expected) > MAX_PATTERNS:
            self._expected.popitem(last=False)
        out = []
        while pattern.named < pattern.ahead:
            first = begin + (pattern.named + 1) * pattern.stride
            if first < 0 or first + size > pattern.limit:
                break
            pattern.named += 1
            out.append((first, first + size))
        return out

    def _find(self, layer: int, begin: int, size: int, limit: int, floor: int) -> _Pattern | None:
        if size > _LARGEST:
            return None
        recent = self._recent.pop(layer, None)
        if recent is None:
            recent = deque(maxlen=_RECENT)
        self._recent[layer] = recent
        while len(self._recent) > MAX_STRIDE_LAYERS:
            self._recent.popitem(last=False)
        found = None
        in_order = (begin - size, size) in recent or (begin + size, size) in recent  # every other of them, too
        for before, _ in [one for one in recent if one[1] == size and not in_order]:
            stride = begin - before
            third = before - stride
            if _SPARSE * size <= abs(stride) <= _FAR and (third, size) in recent and min(third, before) >= floor:
                found = _Pattern(stride, size, limit, min(_FIRST, max(1, MAX_STRIDE_BYTES // size)), 0)
        if found is None:
            recent.append((begin, size))
        else:
            recent.clear()
        return found
