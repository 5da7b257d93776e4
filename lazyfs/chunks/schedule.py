"""Who may fetch when: one scheduler a node, limits by host, demand before prefetch before background.

A job is one range request in a worker thread. Nothing that runs is cancelled for something more urgent; what waits is
overtaken, and can be promoted when a reader turns up for it. Background and prefetch get as many places as make them
faster (`width`), never a host's last connections, so that a demand read finds one free. Background asks for little more
than the link holds, and while somebody reads for half a round trip of bytes: what is under way delays a reader, for
links carry bytes in turn. A node's owner may bound the bytes a second of both, whatever the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import trio

from lazyfs.chunks.host import CALM, SPARED, STEP_BACK, Host, HostStatistics, Priority, Start, Ticket
from lazyfs.chunks.link import Link
from lazyfs.chunks.pace import Pace
from lazyfs.limits import MAX_LINK_HOSTS

T = TypeVar("T")


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
        self._paces = {priority: Pace(rate, clock) for priority, rate in (rates or {}).items() if rate}
        self._hosts: dict[str, Host] = {}

    def _host(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= MAX_LINK_HOSTS:  # a registry may redirect to any number of them
                self._hosts = {known: one for known, one in self._hosts.items() if not one.is_idle}
            host = self._hosts[name] = Host(self._connections, self._clock)
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

    def is_awaited(self, host: str) -> bool:
        """Tell whether somebody waits for what background brings from this host."""
        return self._host(host).awaited > 0

    def places(self, host: str) -> int:
        """Return how many requests that nobody waits for run together: whoever has more gains nothing by asking."""
        return self._host(host).places

    def room(self, host: str) -> int:
        """Return how many more requests could run now and leave connections for whoever waits next."""
        state = self._host(host)
        return state.free - SPARED

    def segment(self, host: str) -> int:
        """Return how many bytes a background request to this host should ask for now."""
        return self._host(host).segment()

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

    @contextmanager
    def start_comes(self, host: str, limited_for: Callable[[], float] = float) -> Iterator[None]:
        """Have background step back whenever prefetch requests run, for STEP_BACK seconds at most.

        `limited_for`: for how many seconds the host wants to be left alone, so that they only wait.
        """
        starts, start = self._host(host).starts, Start(self._clock() + STEP_BACK, limited_for)
        starts.append(start)
        try:
            yield
        finally:
            starts.remove(start)

    @contextmanager
    def awaited(self, host: str) -> Iterator[None]:
        """Have background not step back for starts: somebody waits for what it brings."""
        state = self._host(host)
        state.awaited += 1
        try:
            yield
        finally:
            state.awaited -= 1

    def observe(self, host: str, first_byte: float, size: int, seconds: float) -> None:
        """Learn from a finished request: seconds to its first byte, bytes and seconds of its
        body, but for what came with that byte."""
        self._host(host).ended(first_byte, size, seconds)

    def look(self, ticket: Ticket) -> None:
        """Tell that some bytes of a running job are here, see `Ticket.flow`."""
        ticket.host.look()

    def link(self, host: str) -> Link:
        """Return what is known of the link to a host."""
        return self._host(host).link

    def progress(self, host: str) -> tuple[int, int]:
        """Return how many bytes have come from a host so far, and how many requests are under way."""
        return self._host(host).progress()

    def bytes_in_a_round_trip(self, host: str) -> int:
        """Return how many bytes cross the link in the time that another request would wait for its first one."""
        return self._host(host).link.bytes_in_a_round_trip

    async def run(self, ticket: Ticket, job: Callable[[], T], size: int) -> T:
        """Run `job`, a request for `size` bytes, in a worker thread once the ticket's host has room and its priority's
        rate allows it. A ticket serves one run.

        Cancelling the wait gives the place back; a job that runs is abandoned only by its own deadline.
        """
        host = ticket.host
        counted: Pace | None = None
        while counted is None and (pace := self._paces.get(ticket.priority)) is not None:
            ticket.promoted = trio.Event()
            if await pace.wait_for(ticket.promoted, size):  # else it is more urgent now, with a rate of its own
                counted = pace
        ticket.queued = True
        ticket.size = size
        host.push(ticket)
        host.grant()
        try:
            while not ticket.granted.is_set():
                # What stands in the way of background may pass without an event: see CALM and QUIET.
                with trio.move_on_after(CALM if ticket.priority is Priority.BACKGROUND else float("inf")):
                    await ticket.granted.wait()
                host.grant()
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            if ticket.granted.is_set():
                host.leave(ticket)
            ticket.entered = True
            host.grant()  # drops it from the head of the queue
            if counted is not None:
                counted.give_back(size)
            raise
        try:
            # A job stalled in a request must not hold up the end of the daemon; its own deadline ends the thread.
            result = await _in_thread(job, host.limiter)
            ticket.flow.came = ticket.flow.came or size  # of a job that does not count
            return result
        finally:
            host.leave(ticket)

    def statistics(self) -> dict[str, HostStatistics]:
        """Return each host's numbers of this moment."""
        return {name: host.statistics() for name, host in self._hosts.items()}


async def _in_thread(job: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    return await trio.to_thread.run_sync(job, limiter=limiter, abandon_on_cancel=True)
