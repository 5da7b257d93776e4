"""Fetching what a trace tells of before anybody reads it: as prefetch, in the trace's order, in few large ranges.

Nobody waits for it, so it never fails: what can't be had is left to the readers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from lazyfs.chunks.frames import frame_wanted, needed
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Scheduler
from lazyfs.errors import LazyfsError, TableInvalid
from lazyfs.format.trace import Trace
from lazyfs.mount.plan import Plan, Range
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

_WINDOW = 512 * KiB, 1 * MiB, 8 * MiB  # compressed bytes of one: at least, while nothing is known of the link, at most
_WINDOW_SECONDS = 0.1  # how long one takes: within it the order is that of the blobs
_GAP = 64 * KiB  # bytes between two ranges that are worth fetching while nothing is known of the link
_MOST_GAP = 1 * MiB  # bytes of one at most, whatever the link is said to hold: nobody has asked for them
_WELCOME = 5.0  # seconds between looks while a host wants to be left alone


class Replay:
    """One trace, fetched for the layers of one image. `asked` hears of the compressed bytes of each request.

    `room`: uncompressed bytes that may be brought; where the store is small more would push out what is read. `coming`:
    what is on its way already; it is waited for. `copy` copies frames from `first` to `stop` that other layers have;
    blocking.
    """

    def __init__(
        self,
        remote: Remote,
        scheduler: Scheduler,
        trace: Trace,
        layers: Sequence[ServedLayer],
        room: int,
        asked: Callable[[int], None],
        coming: Sequence[Range] = (),
        copy: Callable[[ServedLayer, int, int], None] | None = None,
    ) -> None:
        self._remote = remote
        self._scheduler = scheduler
        self._plan = Plan(trace, layers, coming)
        self._coming = coming
        self._hosts = {layer.host: layer for layer in layers}
        self._room = room
        self._asked = asked
        self._copy = copy
        self._under_way = 0  # ranges
        self._landed = trio.Event()
        self._given_up: set[int] = set()  # numbers of layers
        self._limiter, self._copying = trio.CapacityLimiter(1), trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Fetch what is missing. A checkpoint, until the last range is here; never raises a LazyfsError."""
        host = min(self._hosts, default="")
        with contextlib.ExitStack() as stack:
            for each, layer in self._hosts.items():  # background is for later
                stack.enter_context(self._scheduler.start_comes(each, layer.limited_for))
            async with trio.open_nursery() as nursery:
                while not self._plan.over and self._room > 0:
                    job = partial(self._plan.next, *self._window(host), self._scheduler.places(host))
                    try:
                        window = await trio.to_thread.run_sync(job, limiter=self._limiter)
                    except TableInvalid as error:  # found by the first look at its names
                        log.warning("what is known of a start can't be fetched: %s", error)
                        break
                    for one in window:
                        await self._until_welcome(one.layer)
                        await self._until_wanted(host)
                        nursery.start_soon(self._bring, one)
                for one in self._coming:
                    self._under_way += 1
                    await self._bring(one)

    def _window(self, host: str) -> tuple[int, int]:
        """Return the bytes of the next window, and of a gap in it that costs as much as one of several requests."""
        found = self._scheduler.statistics().get(host)
        least, first, most = _WINDOW
        if found is None or not found.rate:
            return first, _GAP
        size = max(least, min(most, int(found.rate * (_WINDOW_SECONDS + 2 * found.round_trip))))
        gap = self._scheduler.bytes_in_a_round_trip(host) // self._scheduler.places(host)
        return size, min(gap, _MOST_GAP)

    async def _until_welcome(self, layer: ServedLayer) -> None:
        """Wait while the layer's host limits how often it may be asked: readers need what it still allows."""
        while (wait := layer.limited_for()) > 0:
            await trio.sleep(min(wait, _WELCOME))

    async def _until_wanted(self, host: str) -> None:
        """Wait until the host has a place for a further range, or one at least waits for none. Count that one.

        So the link is never idle, and what comes is near the trace's order.
        """
        while self._under_way > self._scheduler.places(host):
            await self._landed.wait()
        self._under_way += 1

    async def _bring(self, one: Range) -> None:
        try:
            if self._copy is not None and one not in self._coming:
                job = partial(self._copy, one.layer, one.first, one.stop)
                await trio.to_thread.run_sync(job, limiter=self._copying)
            stop = one.first
            while (run := _absent(one, stop)) and self._room > 0 and one.layer.number not in self._given_up:
                first, stop = run
                self._note(one.layer, first, stop)
                await self._remote.bring(one.layer, first, stop, Priority.PREFETCH)
                if one.layer.frame_missing(stop - 1):
                    log.debug("the store keeps nothing: layer=%s", one.layer.digest)
                    self._room = 0
        except LazyfsError as error:
            log.info("what a trace asks for is left to readers: layer=%s error=%s", one.layer.digest, error)
            self._given_up.add(one.layer.number)
        finally:
            self._under_way -= 1
            self._landed.set()
            self._landed = trio.Event()

    def _note(self, layer: ServedLayer, first: int, stop: int) -> None:
        table = layer.table
        for frame in range(first, stop):
            self._room -= frame_wanted(table, frame)
            if not self._remote.is_coming(layer, table.frame_first_chunk[frame]):
                self._asked(needed(table, frame))


def _absent(one: Range, at: int) -> tuple[int, int] | None:
    """Return the first run of a range's frames from `at` on that are not here; some may have come since the plan."""
    while at < one.stop and not one.layer.frame_missing(at):
        at += 1
    stop = at
    while stop < one.stop and one.layer.frame_missing(stop):
        stop += 1
    return (at, stop) if stop > at else None
