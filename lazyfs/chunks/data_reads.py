"""Reads of a layer's data space under way, and their end before the mount that made them goes.

Data spaces are the devices of EROFS mounts. Who takes the last of such a mount away waits in the kernel until its reads
have ended: where it can't be killed, and with a lock held that each sync(2) of the machine wants. So they end before.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import trio

from lazyfs.errors import MountFailed

T = TypeVar("T")


class DataReads:
    """Those of one layer that wait for bytes. Belongs to the trio loop. `ending`: mounts of it that are taken away."""

    __slots__ = ("_under_way", "ending")

    def __init__(self) -> None:
        self._under_way: dict[trio.CancelScope, trio.Event] = {}
        self.ending = 0

    async def run(self, read: Coroutine[Any, Any, T], is_shared: Callable[[], bool] = lambda: False) -> T:
        """Return what `read` returns. A checkpoint. Raise what it raises, or MountFailed after `end`.

        It may begin long after it came, behind many others: then what `end` has ended is not begun (unless `is_shared`:
        others may want it).
        """
        if self.ending and not is_shared():
            read.close()
            raise refusal()
        scope, done = trio.CancelScope(), trio.Event()
        self._under_way[scope] = done
        try:
            with scope:
                return await read
        finally:
            del self._under_way[scope]
            done.set()
        raise refusal()

    async def end(self, *, shared: bool) -> None:
        """Return when the reads of this moment have ended. They are made to, unless others may want them (`shared`).

        A checkpoint; reads end by their own deadline.
        """
        for scope, done in list(self._under_way.items()):
            if not shared:
                scope.cancel()
            await done.wait()


def refusal() -> MountFailed:
    """Return the error of a read whose mount is being taken away."""
    return MountFailed("the mount that it is read through is being taken away")
