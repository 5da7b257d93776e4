"""One registry host: its jobs by priority, those that wait, and what was seen of its link."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import trio

from lazyfs.chunks.link import Flow, Link
from lazyfs.chunks.width import Width
from lazyfs.units import KiB, MiB

QUIET = 1.0  # seconds without demand after which background may use the whole link
STEP_BACK = 60.0  # seconds for which background lets what a start is known to read go first
SEGMENT = 4 * MiB  # bytes of one background request at most: a larger one saves nothing and wakes nobody sooner
_LEAST_SEGMENT = 64 * KiB  # bytes of one on a link so slow that more of them would delay a reader by much
_FIRST_SEGMENT = 256 * KiB  # bytes of one while nothing is known of the link: 40 ms at 50 Mbit/s
_NEAR = 0.005  # seconds of a round trip; below it not the link is what counts but the work that each request makes
_NEAR_TRIP = 0.05  # seconds of bytes that are asked for there as if they were a round trip's
_PART = 0.45  # round trips of bytes in one background request: three or four of them keep a link busy
# Round trips of bytes in all of them. A reader who turns up has his bytes after two round trips and their own time:
# what had been asked for before has arrived by then.
_ALL = 1.55
_BEGINNING = 4.0  # the same while the link is known to give at least so much: each round trip brings more
_UNEVEN = 0.4  # background requests are larger and smaller than that by up to this part, in turn
_GOLDEN = 0.6180339887  # steps of this part of a circle never fall together
_SHARE = 0.5  # round trips of bytes that background has under way at most while somebody reads
CALM = 0.5  # seconds for which background waits for the end of demand requests that are under way
SPARED = 2  # connections of a host that only demand may take
# Threads for each connection: those of cancelled jobs run on until their own deadline and must not stop new ones, nor
# pile up without a bound.
_THREADS = 4


class Priority(IntEnum):
    """Why a byte is fetched; smaller is more urgent."""

    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2


class Ticket:
    """A job's place in the queue of a host. `promote` moves it forward while it waits."""

    __slots__ = ("entered", "flow", "granted", "host", "priority", "promoted", "queued", "size")

    def __init__(self, host: Host, priority: Priority) -> None:
        self.host = host
        self.priority = priority
        self.granted = trio.Event()
        self.promoted = trio.Event()
        self.queued = False  # `run` was called
        self.entered = False  # it has left the queue: runs, is over, or was cancelled
        self.flow = Flow()  # what has come of it
        self.size = 0  # bytes that it asks for

    def promote(self, priority: Priority) -> None:
        """Raise the priority of a job that waits or is to come. One that runs is left alone."""
        if priority < self.priority and not self.entered:
            self.priority = priority
            self.promoted.set()
            if self.queued:  # a slot for a job that nobody runs yet would never come back
                self.host.push(self)
                self.host.grant()


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """A host's moment: jobs running and waiting, places for those that nobody waits for, and the link as it was last
    seen (seconds, bytes a second)."""

    running: int
    waiting: int
    places: int
    round_trip: float
    rate: float


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What is fetched ahead of a start: until when it goes first, and for how long its host is to be left alone."""

    end: float
    limited_for: Callable[[], float]


class Host:
    """One registry host: its running jobs by priority, its queue, its link."""

    def __init__(self, connections: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._connections = max(2, connections)
        self._queue: list[tuple[int, int, Ticket]] = []
        self._sequence = 0
        self._active: set[Ticket] = set()
        self._came = 0  # bytes of jobs that are over
        self._saturated = False  # all places were taken whenever this window was looked at
        self._segments = 0  # sizes given out
        self._trips: list[float] = []  # seconds to the first bytes in this window
        self.running = [0, 0, 0]
        self.last_demand = float("-inf")
        self._last_background = float("-inf")  # when the last such job began
        self.mounts = 0  # whole layers that mounts wait for
        self.starts: list[Start] = []
        self.awaited = 0  # who wait for background work
        self.link = Link()
        self.width = Width(connections)
        self.limiter = trio.CapacityLimiter(_THREADS * self._connections)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is lost with this host but what was seen of its link."""
        return not (self._queue or self._active or any(self.running) or self.mounts or self.starts or self.awaited)

    @property
    def has_readers(self) -> bool:
        return self._clock() - self.last_demand <= QUIET or self.running[Priority.DEMAND] > 0

    @property
    def quiet(self) -> bool:
        return (self.is_near or not self.has_readers) and not self.steps_back

    @property
    def is_near(self) -> bool:
        """Whether the host is so near that nothing is in a reader's way for long: bytes that were asked for are here
        before he notices, and what he wants next comes sooner in large requests than when he asks for it."""
        return 0 < self.link.round_trip < _NEAR

    @property
    def steps_back(self) -> bool:
        """Whether background leaves the link to a mount, or to a start.

        A start whose bytes are only to come has no need of it, nor one whose host limits it or hangs; and it is not for
        those who wait for background work themselves.
        """
        if self.mounts or self.awaited or not self.running[Priority.PREFETCH]:
            return self.mounts > 0
        now = self._clock()
        return any(now < start.end and not start.limited_for() for start in self.starts)

    @property
    def places(self) -> int:
        """Jobs that nobody waits for and that may run together."""
        return max(1, min(self.width.places, self._connections - SPARED))

    @property
    def free(self) -> int:
        """Connections that no job holds."""
        return self._connections - sum(self.running)

    @property
    def share(self) -> int:
        """Bytes that background may have under way while somebody reads. One job may have more: a frame is whole."""
        if self.link.round_trip < _NEAR:
            return _FIRST_SEGMENT
        return max(_LEAST_SEGMENT, int(_SHARE * self.link.bytes_in_a_round_trip))

    def segment(self) -> int:
        """Bytes that the next background request should ask for."""
        if not self.quiet:
            return self.share
        if not self.link.rate:
            return _FIRST_SEGMENT
        trip = self.link.round_trip if self.link.round_trip >= _NEAR else _NEAR_TRIP
        # Requests of one size that begin together share the link, end together, and then it rests for a round trip.
        self._segments += 1
        uneven = 1 + _UNEVEN * (2 * (self._segments * _GOLDEN % 1) - 1)
        begins = self.link.begins
        part = _BEGINNING / self.places if begins else min(_PART, _ALL / self.places)
        least = _FIRST_SEGMENT if begins else _LEAST_SEGMENT
        return max(least, min(SEGMENT, int(uneven * part * self.link.rate * trip)))

    def push(self, ticket: Ticket) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (ticket.priority, self._sequence, ticket))

    def _has_room(self, ticket: Ticket) -> bool:
        if sum(self.running) >= self._connections:
            return False
        if ticket.priority is Priority.DEMAND:
            return True
        if sum(self.running[Priority.PREFETCH :]) >= self.places:
            return False
        if ticket.priority is Priority.PREFETCH or self.quiet:
            return True
        if (self.running[Priority.DEMAND] or self.steps_back) and self._clock() - self._last_background < CALM:
            return False
        if not self.running[Priority.BACKGROUND]:
            return True
        under_way = sum(left(one) for one in self._active if one.priority is Priority.BACKGROUND)
        return under_way + ticket.size <= self.share

    def grant(self) -> None:
        """Let everything start that may."""
        while self._queue:
            _, _, ticket = self._queue[0]
            if ticket.entered:  # promoted meanwhile: this is its old place
                heapq.heappop(self._queue)
                continue
            if not self._has_room(ticket):
                break
            heapq.heappop(self._queue)
            ticket.entered = True
            self.running[ticket.priority] += 1
            if ticket.priority is Priority.BACKGROUND:
                self._last_background = self._clock()
            self._active.add(ticket)
            ticket.granted.set()
        self.look()

    def leave(self, ticket: Ticket) -> None:
        """Note that a job is over."""
        now = self._clock()
        if ticket.priority is Priority.DEMAND:
            self.last_demand = now
        self.running[ticket.priority] -= 1
        self._active.discard(ticket)
        self._came += ticket.flow.came
        self.grant()

    def ended(self, first_byte: float, size: int, seconds: float) -> None:
        """Learn from a finished request."""
        self._trips.append(first_byte)
        self.link.ended(self._clock(), first_byte, size, seconds)

    def progress(self) -> tuple[int, int]:
        """Return the bytes that have come so far, and how many jobs run."""
        return self._came + sum(ticket.flow.came for ticket in self._active), len(self._active)

    def look(self) -> None:
        """Let the link and the width see what is going on."""
        came, running = self.progress()
        asked = sum(map(left, self._active))
        if sum(self.running[Priority.PREFETCH :]) < self.places:
            self._saturated = False
        window = self.link.look(self._clock(), came, asked, running)
        if window is None:
            return
        if self.link.begins:
            self.width.wait()
        elif self._saturated and self._trips:
            self.width.note(window.rate, sum(self._trips) / len(self._trips), self.link.round_trip)
        self._saturated = True
        self._trips = []

    def statistics(self) -> HostStatistics:
        waiting = len({id(ticket) for _, _, ticket in self._queue if not ticket.entered})
        return HostStatistics(sum(self.running), waiting, self.places, self.link.round_trip, self.link.rate)


def left(ticket: Ticket) -> int:
    """Return how many bytes of a job's request have not come yet."""
    return max(0, ticket.size - ticket.flow.came)
