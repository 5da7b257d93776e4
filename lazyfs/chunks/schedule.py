"""Who may fetch when: one scheduler a node, limits by host, demand before prefetch before background.

A job is one range request in a worker thread. Nothing that runs is cancelled for something more urgent; what waits is
overtaken, and can be promoted when a reader turns up for it. Background and prefetch never take a host's last
connections, so a demand read finds one free; a node's owner may bound their bytes a second, whatever the host.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import trio

from lazyfs.units import KiB

T = TypeVar("T")

QUIET = 1.0  # seconds without demand after which background may use the whole link
_FEW = 16 * KiB  # bytes that always fit into a round trip
_SMOOTHING = 0.3  # weight of the newest sample in the moving averages
_PATIENCE = 0.02  # seconds between looks while background waits for the end of demand
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

    __slots__ = ("_host", "entered", "granted", "priority", "promoted", "queued")

    def __init__(self, host: _Host, priority: Priority) -> None:
        self._host = host
        self.priority = priority
        self.granted = trio.Event()
        self.promoted = trio.Event()
        self.queued = False  # `run` was called
        self.entered = False  # it has left the queue: runs, is over, or was cancelled

    def promote(self, priority: Priority) -> None:
        """Raise the priority of a job that waits or is to come. One that runs is left alone."""
        if priority < self.priority and not self.entered:
            self.priority = priority
            self.promoted.set()
            if self.queued:  # a slot for a job that nobody runs yet would never come back
                self._host.push(self)
                self._host.grant()


class _Pace:
    """The bytes a second that jobs of one priority may ask for: a request waits for the excess of those before it."""

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._next = float("-inf")  # when the next request may leave

    def wait_for(self, size: int) -> float:
        """Note a request of `size` bytes. Return the seconds that it has to wait."""
        now = self._clock()
        begin = max(now, self._next)
        self._next = begin + size / self._rate
        return begin - now


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """A host's moment: jobs running and waiting, and the link as it was last seen (seconds, bytes a second)."""

    running: int
    waiting: int
    round_trip: float
    rate: float


class _Host:
    """One registry host: its running jobs by priority, its queue, its link."""

    def __init__(self, connections: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._connections = max(2, connections)
        self._queue: list[tuple[int, int, Ticket]] = []
        self._sequence = 0
        self.running = [0, 0, 0]
        self.last_demand = float("-inf")
        self.mounts = 0  # whole layers that mounts wait for
        self.round_trip = 0.0
        self.rate = 0.0
        self.limiter = trio.CapacityLimiter(_THREADS * self._connections)

    @property
    def has_readers(self) -> bool:
        return self._clock() - self.last_demand <= QUIET or self.running[Priority.DEMAND] > 0

    @property
    def quiet(self) -> bool:
        return not self.has_readers and not self.mounts

    def push(self, ticket: Ticket) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (ticket.priority, self._sequence, ticket))

    def _limit(self, priority: Priority) -> int:
        """Connections that jobs of this priority and less urgent ones may hold together."""
        if priority is Priority.DEMAND:
            return self._connections
        if priority is Priority.PREFETCH:
            return max(1, self._connections - 2)
        return max(1, self._connections // 4) if self.quiet else 1

    def grant(self) -> None:
        """Let everything start that may."""
        while self._queue:
            _, _, ticket = self._queue[0]
            if ticket.entered:  # promoted meanwhile: this is its old place
                heapq.heappop(self._queue)
                continue
            if not all(sum(self.running[each:]) < self._limit(each) for each in Priority if each <= ticket.priority):
                return
            heapq.heappop(self._queue)
            ticket.entered = True
            self.running[ticket.priority] += 1
            ticket.granted.set()

    def statistics(self) -> HostStatistics:
        waiting = len({id(ticket) for _, _, ticket in self._queue if not ticket.entered})
        return HostStatistics(sum(self.running), waiting, self.round_trip, self.rate)


class Scheduler:
    """Run fetch jobs in worker threads by host and priority. Belongs to one trio loop."""

    def __init__(
        self,
        connections: int,
        clock: Callable[[], float] = trio.current_time,
        rates: Mapping[Priority, int] | None = None,
    ) -> None:
        """`connections`: to a host. `rates`: bytes a second that a priority may ask for, all hosts together; 0: any."""
        self._connections = connections
        self._clock = clock
        self._paces = {priority: _Pace(rate, clock) for priority, rate in (rates or {}).items() if rate}
        self._hosts: dict[str, _Host] = {}

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host(self._connections, self._clock)
        return host

    def ticket(self, host: str, priority: Priority) -> Ticket:
        """Make the queue place of a job to come, so that it can be promoted before it runs."""
        return Ticket(self._host(host), priority)

    def note_demand(self, host: str) -> None:
        """Tell that a reader waits for this host: background steps back for QUIET seconds."""
        self._host(host).last_demand = self._clock()

    def is_quiet(self, host: str) -> bool:
        """Tell whether no reader has waited for this host for a while, so that background may run at full speed."""
        return self._host(host).quiet

    def has_readers(self, host: str) -> bool:
        """Tell whether a reader waits for this host, or has a moment ago."""
        return self._host(host).has_readers

    @contextmanager
    def mount_waits(self, host: str) -> Iterator[None]:
        """Have background step back while a mount waits for something that is fetched past the scheduler."""
        state = self._host(host)
        state.mounts += 1
        try:
            yield
        finally:
            state.mounts -= 1

    async def until_calm(self, host: str, deadline: float) -> None:
        """Wait until no reader has waited for this host for a while, or until `deadline` (trio clock). A checkpoint."""
        state = self._host(host)
        while not state.quiet and self._clock() < deadline:
            await trio.sleep(_PATIENCE)
        await trio.lowlevel.checkpoint()

    def observe(self, host: str, first_byte: float, size: int, seconds: float) -> None:
        """Learn from a finished request: seconds to its first byte, bytes and seconds of its body."""
        state = self._host(host)
        state.round_trip += (first_byte - state.round_trip) * (_SMOOTHING if state.round_trip else 1.0)
        if seconds > 0 and size > 1 << 16:
            rate = size / seconds
            state.rate += (rate - state.rate) * (_SMOOTHING if state.rate else 1.0)

    def bytes_in_a_round_trip(self, host: str) -> int:
        """Return how many bytes cross the link in the time that another request would wait for its first one."""
        state = self._host(host)
        return max(_FEW, int(state.round_trip * state.rate))

    async def run(self, ticket: Ticket, job: Callable[[], T], size: int) -> T:
        """Run `job`, a request for `size` bytes, in a worker thread once the ticket's host has room and its priority's
        rate allows it. A ticket serves one run.

        Cancelling the wait gives the place back; a job that runs is abandoned only by its own deadline.
        """
        host = ticket._host
        pace = self._paces.get(ticket.priority)
        if pace is not None and (wait := pace.wait_for(size)):
            with trio.move_on_after(wait):
                await ticket.promoted.wait()  # a reader waits for it now
        ticket.queued = True
        host.push(ticket)
        host.grant()
        try:
            await ticket.granted.wait()
        except trio.Cancelled:
            if ticket.granted.is_set():
                self._leave(host, ticket)
            ticket.entered = True
            host.grant()  # drops it from the head of the queue
            raise
        try:
            # A job stalled in a request must not hold up the end of the daemon; its own deadline ends the thread.
            return await trio.to_thread.run_sync(job, limiter=host.limiter, abandon_on_cancel=True)
        finally:
            self._leave(host, ticket)

    def _leave(self, host: _Host, ticket: Ticket) -> None:
        if ticket.priority is Priority.DEMAND:
            host.last_demand = self._clock()
        host.running[ticket.priority] -= 1
        host.grant()

    def statistics(self) -> dict[str, HostStatistics]:
        """Return each host's numbers of this moment."""
        return {name: host.statistics() for name, host in self._hosts.items()}
