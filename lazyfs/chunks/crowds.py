"""Where readers want many small frames close together: one request for a stretch of them is cheaper than one for each.

Writers that give each small file a frame of its own (podman, stargz by default) make a tree of thousands of them; read
one after another, each would cost a round trip. What is taken along never takes longer than the round trips it saves.
"""

from __future__ import annotations

from collections import OrderedDict

from lazyfs.limits import MAX_STRETCHES
from lazyfs.units import KiB

STRETCH = 256 * KiB  # compressed bytes; what one request takes along at most
_ENOUGH = 3  # frames that were asked for in a stretch, from which on others of it are taken along


class Crowds:
    """Count what readers miss, by layer and stretch of its blob. Not thread-safe; never blocks."""

    def __init__(self) -> None:
        self._missed: OrderedDict[tuple[int, int], int] = OrderedDict()

    def note(self, layer: int, blob_offset: int) -> bool:
        """Count a frame that was asked for and was not here. Tell whether to take its neighbours along.

        Beside a crowded stretch the first one is enough: that is a directory being walked.
        """
        stretch = blob_offset // STRETCH
        missed = self._missed.pop((layer, stretch), 0) + 1
        if any(self._missed.get((layer, beside), 0) >= _ENOUGH for beside in (stretch - 1, stretch + 1)):
            missed = max(missed, _ENOUGH)
        self._missed[layer, stretch] = missed
        if len(self._missed) > MAX_STRETCHES:
            self._missed.popitem(last=False)
        return missed >= _ENOUGH
