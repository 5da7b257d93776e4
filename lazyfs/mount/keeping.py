"""Layers that were made ready for a chain, held open for some minutes: until the chain is mounted, or is not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import trio

from lazyfs.limits import KEPT_FOR, MAX_KEPT_LAYERS
from lazyfs.mount.layers import Layers
from lazyfs.mount.prepared import Prepared

_LOOK = 15.0  # seconds between looks for what has been held long enough


class Keeping:
    """Holds each layer once. Belongs to one trio loop."""

    def __init__(self, layers: Layers, now: Callable[[], float] = trio.current_time) -> None:
        self._layers = layers
        self._now = now
        self._kept: OrderedDict[str, tuple[Prepared, float]] = OrderedDict()  # with the time when it is dropped

    def __len__(self) -> int:
        return len(self._kept)

    async def keep(self, prepared: Prepared) -> None:
        """Take over one hold of a layer. A checkpoint where another one goes for it."""
        digest = prepared.layer.digest
        gone = [self._kept.pop(digest)[0]] if digest in self._kept else []
        self._kept[digest] = prepared, self._now() + KEPT_FOR
        while len(self._kept) > MAX_KEPT_LAYERS:
            gone.append(self._kept.popitem(last=False)[1][0])
        await self._layers.drop([one.layer for one in gone])

    async def release(self, digests: Iterable[str]) -> None:
        """Let these layers go, as far as they are kept here. A checkpoint where one goes."""
        gone = [self._kept.pop(digest)[0] for digest in set(digests) if digest in self._kept]
        await self._layers.drop([one.layer for one in gone])

    async def watch(self) -> None:
        """Let go of layers whose time is over. Runs until cancelled."""
        while True:
            await trio.sleep(_LOOK)
            now = self._now()
            await self.release([digest for digest, (_, until) in self._kept.items() if until <= now])
