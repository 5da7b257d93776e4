"""Layers that a mount fetches whole, seen from the loop: who waits for them, and who steps back meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from lazyfs.chunks.lines import Lines
from lazyfs.chunks.schedule import Scheduler
from lazyfs.limits import WHOLE_THREADS

T = TypeVar("T")

_LOOK = 0.2  # seconds between two looks at a host's readers


class WholeLayers:
    """Run the jobs that fetch whole layers. Belongs to one trio loop."""

    def __init__(self, scheduler: Scheduler, lines: Lines) -> None:
        self._scheduler = scheduler
        self._lines = lines
        self._limiter = trio.CapacityLimiter(WHOLE_THREADS)
        self._wanted: Counter[str] = Counter()

    @contextmanager
    def wanting(self, digest: str) -> Iterator[None]:
        """Count one more who waits for a layer: its fetch goes on for as long as there are two, or one who stays."""
        self._wanted[digest] += 1
        try:
            yield
        finally:
            self._wanted[digest] -= 1
            if not self._wanted[digest]:
                del self._wanted[digest]

    def keep_alive(self, digest: str) -> None:
        """Raise Cancelled in a worker thread of trio's when nobody waits for the layer any more."""
        if self._wanted[digest] <= 1:
            trio.from_thread.check_cancelled()

    async def run(self, host: str, job: Callable[[], T]) -> T:
        """Run `job` in a thread: a mount waits for it. Background steps back meanwhile, and it gives way to readers."""
        found: list[T] = []
        failed: list[Exception] = []
        with self._scheduler.mount_waits(host):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, host)
                    try:
                        found.append(await trio.to_thread.run_sync(job, limiter=self._limiter))
                    except Exception as error:  # raised below, or it would come out as a group
                        failed.append(error)
                    nursery.cancel_scope.cancel()
            except* trio.Cancelled:
                if not found:  # else it is there, and open: whoever asked has to give it back
                    raise
        if failed:
            raise failed[0]
        return found[0]

    async def _watch(self, host: str) -> None:
        try:
            while True:
                self._lines.set_readers(host, waiting=self._scheduler.has_readers(host))
                await trio.sleep(_LOOK)
        finally:
            self._lines.set_readers(host, waiting=False)
