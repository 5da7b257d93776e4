"""Who hears of what is read and fetched of a layer, for traces. Nobody, most of the time."""

from __future__ import annotations

from typing import Protocol


class Witness(Protocol):
    """Called from the loop, so it must be quick. `layer` is a layer's number, times are of `time.monotonic`."""

    def demanded(self, layer: int, chunk: int) -> None:
        """A reader wants a chunk now."""
        ...

    def waited(self, layer: int, chunk: int, seconds: float) -> None:
        """A reader has got a chunk that was not here when it was demanded, after so long."""
        ...

    def requested(
        self, layer: int, blob_offset: int, size: int, priority: int, began: float, first: float, ended: float
    ) -> None:
        """A range of a blob was fetched; `first` is when its first byte came."""
        ...
