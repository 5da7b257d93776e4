"""What an exec will read is fetched ahead, but never what readers have fetched meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lazyfs.chunks.host import Priority
from lazyfs.format.table import NO_FRAME
from lazyfs.mount.ahead import _Job

FRAMES = [3, 3, 4, NO_FRAME, 6, 7, 9]  # of a file's chunks


class Layer:
    """A layer with one file. `here` are the frames in the store."""

    def __init__(self, *here: int) -> None:
        self.here = set(here)
        self.table = SimpleNamespace(chunk_frame=FRAMES, file_chunks=lambda row: range(len(FRAMES)))

    def frame_missing(self, frame: int) -> bool:
        return frame not in self.here


class Remote:
    """Brings what it is asked for, while readers fetch frames of their own."""

    def __init__(self, *meanwhile: int) -> None:
        self.asked: list[tuple[int, int]] = []
        self._meanwhile = meanwhile

    async def bring(self, layer: Layer, first: int, stop: int, priority: Priority) -> None:
        assert priority is Priority.PREFETCH
        self.asked.append((first, stop))
        layer.here |= {*range(first, stop), *self._meanwhile}


async def brought(layer: Any, remote: Any) -> list[tuple[int, int]]:
    await _Job(None, remote, None)._fetch(layer, 0)  # type: ignore[arg-type]
    asked: list[tuple[int, int]] = remote.asked
    return asked


async def test_neighbours_come_together_and_what_is_here_is_left_out() -> None:
    assert await brought(Layer(), Remote()) == [(3, 5), (6, 8), (9, 10)]
    assert await brought(Layer(4, 6), Remote()) == [(3, 4), (7, 8), (9, 10)]
    assert await brought(Layer(3, 4, 6, 7, 9), Remote()) == []


async def test_what_readers_fetched_meanwhile_is_not_asked_for_again() -> None:
    assert await brought(Layer(), Remote(6, 9)) == [(3, 5), (7, 8)]
