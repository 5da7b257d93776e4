"""Requests that readers wait for and that have become slow: found out here, cancelled, and the rest asked for anew.

One connection may crawl while the host is well: a bad path among several, a server that is going down. It is told from
a link that is slow as a whole by what the host's other requests get meanwhile. Where there are none, by what the host
gave lately, and then what this request gets is believed to be all that there is: none is cancelled for the same again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from lazyfs.chunks.frames import PIECE
from lazyfs.chunks.host import Ticket
from lazyfs.chunks.schedule import Scheduler

_LOOK = 0.25  # seconds between two looks
_SPAN = 1.0  # seconds over which a request is judged, at least
_TRIPS = 8  # round trips over which it is judged, at least
_PART = 0.1  # of the rate that others get: less is not an unfair share but something wrong
_WORTH = 2.0  # seconds that the rest must still take at this rate: less is not worth another request
_DOUBT = 30.0  # seconds in which one request that is alone may be held against what its host gave before
MOVES = 2  # times that one request is asked for anew


@dataclass(frozen=True, slots=True)
class Moment:
    """What had come at a time (seconds): bytes of the request, bytes of all requests to its host, and how many ran."""

    at: float
    came: int
    came_to_host: int
    running: int


@dataclass(eq=False, slots=True)
class Watched:
    """One request that a reader may wait for."""

    host: str
    ticket: Ticket
    wanted: Callable[[], bool]  # a reader waits for it
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    moments: deque[Moment] = field(default_factory=deque)

    @property
    def is_slow(self) -> bool:
        """Whether the request was cancelled because it was slow."""
        return self.scope.cancelled_caught


def part_of_others(before: Moment, now: Moment) -> tuple[float, float]:
    """Return the bytes a second that the request got between two moments at most, and those that each other one got."""
    seconds = now.at - before.at
    mine = now.came - before.came
    others = max(before.running, now.running) - 1
    theirs = (now.came_to_host - before.came_to_host - mine) / seconds / others if others else 0.0
    return (mine + PIECE) / seconds, theirs  # that much may have come and not be counted yet


class SlowRanges:
    """Watches requests while there are any. Belongs to one trio loop."""

    def __init__(self, scheduler: Scheduler, nursery: trio.Nursery) -> None:
        self._scheduler = scheduler
        self._nursery = nursery
        self._watched: set[Watched] = set()
        self._looking = False
        self._doubted: dict[str, float] = {}  # when that happened last, by host

    @contextmanager
    def watch(self, host: str, ticket: Ticket, wanted: Callable[[], bool]) -> Iterator[Watched]:
        """Cancel the body when its request has become slow while `wanted()`. See `Watched.is_slow` behind it."""
        one = Watched(host, ticket, wanted)
        self._watched.add(one)
        if not self._looking:
            self._looking = True
            self._nursery.start_soon(self._look)
        try:
            with one.scope:
                yield one
        finally:
            self._watched.discard(one)

    async def _look(self) -> None:
        try:
            while self._watched:
                await trio.sleep(_LOOK)
                for one in list(self._watched):
                    if self._has_become_slow(one):
                        one.ticket.flow.dropped = True  # its thread ends with the next bytes, if any come
                        one.scope.cancel()
        finally:
            self._looking = False

    def _has_become_slow(self, one: Watched) -> bool:
        flow, link = one.ticket.flow, self._scheduler.link(one.host)
        if not flow.answered:
            return False  # a registry may take its time, while it fetches what it is asked for
        now = Moment(trio.current_time(), flow.came, *self._scheduler.progress(one.host))
        one.moments.append(now)
        span = max(_SPAN, _TRIPS * link.round_trip)
        # The last moment before the span, or the last at which something of it had come: that piece took longer.
        while len(one.moments) > 1 and one.moments[1].at <= now.at - span and one.moments[1].came < now.came:
            one.moments.popleft()
        before = one.moments[0]
        if now.at - before.at < span or not one.wanted():
            return False
        mine, others = part_of_others(before, now)
        if (one.ticket.size - now.came) / mine < _WORTH:
            return False
        if others:
            return mine < _PART * others
        if now.running > 1 or mine >= _PART * link.rate:
            return False  # the others get nothing either, or there is nothing to hold against it
        if now.at - self._doubted.get(one.host, float("-inf")) < _DOUBT:
            return False
        self._doubted = {host: at for host, at in self._doubted.items() if now.at - at < _DOUBT}
        self._doubted[one.host] = now.at
        link.believe(mine)
        return True
