"""A link that exists only in the time of a MockClock, and fetch jobs that cross it under the real scheduler.

    with in_model(monkeypatch):
        async with modelled(round_trip=0.1, mbit=50) as model:
            await model.fetch(scheduler, Priority.DEMAND, 1 << 20)

Requests take half a round trip to the server; its answers share the link piece by piece and arrive half a round trip
later. `most` bounds what one connection gets, as a small TCP window does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from lazyfs.chunks import schedule
from lazyfs.chunks.host import Priority
from lazyfs.chunks.link import Flow
from lazyfs.chunks.schedule import Scheduler

HOST = "registry"
PIECE = 64 << 10  # bytes that take the link in one go


class _Answer:
    """What the server still has to send of one request, and who waits for it."""

    def __init__(self, size: int, flow: Flow) -> None:
        self.left = size
        self.flow = flow
        self.done = trio.Event()
        self.first_byte = 0.0  # when it was here
        self.ready = 0.0  # when this connection may send again


class ModelledLink:
    """One direction of a link. `rate` (bytes a second) may change at any time."""

    def __init__(self, round_trip: float, mbit: float, most: float) -> None:
        self.round_trip = round_trip
        self.rate = mbit * 125_000
        self.most = most * 125_000
        self.carried = 0  # bytes
        self._answers: deque[_Answer] = deque()
        self._wake = trio.Event()
        self._way: deque[tuple[float, _Answer, int]] = deque()
        self._arriving = trio.Event()

    async def send(self) -> None:
        """Put pieces on the link, each answer in its turn."""
        while True:
            if not self._answers:
                self._wake = trio.Event()
                await self._wake.wait()
            answer = self._answers.popleft()
            if answer.ready > trio.current_time():
                self._answers.append(answer)
                await trio.sleep_until(min(one.ready for one in self._answers))
                continue
            size = min(PIECE, answer.left)
            await trio.sleep(size / self.rate)
            answer.left -= size
            answer.ready = trio.current_time() + (size / self.most - size / self.rate if self.most else 0.0)
            if answer.left:
                self._answers.append(answer)
            self._way.append((trio.current_time() + self.round_trip / 2, answer, size))
            self._arriving.set()

    async def arrive(self) -> None:
        """Hand pieces over after their time on the way."""
        while True:
            if not self._way:
                self._arriving = trio.Event()
                await self._arriving.wait()
            due, answer, size = self._way.popleft()
            await trio.sleep_until(due)
            answer.flow.count(trio.current_time(), size)
            self.carried += size
            if not answer.first_byte:
                answer.first_byte = trio.current_time()
            if not answer.left and not any(one is answer for _, one, _ in self._way):
                answer.done.set()

    async def _cross(self, scheduler: Scheduler, size: int, flow: Flow) -> None:
        began = trio.current_time()
        await trio.sleep(self.round_trip / 2)
        answer = _Answer(size, flow)
        self._answers.append(answer)
        self._wake.set()
        await answer.done.wait()
        body = trio.current_time() - flow.since
        scheduler.observe(HOST, answer.first_byte - began, flow.came - flow.first, body)

    async def fetch(self, scheduler: Scheduler, priority: Priority, size: int) -> float:
        """Fetch `size` bytes and return the seconds that it took."""
        began = trio.current_time()
        if priority is Priority.DEMAND:
            scheduler.note_demand(HOST)
        ticket = scheduler.ticket(HOST, priority)
        job: Any = lambda: self._cross(scheduler, size, ticket.flow)  # noqa: E731
        await scheduler.run(ticket, job, size)
        return trio.current_time() - began

    async def fill(self, scheduler: Scheduler) -> None:
        """Fetch in the background for ever, as the filler does for one layer."""
        under_way = 0
        changed = trio.Event()

        async def one(size: int) -> None:
            nonlocal under_way
            await self.fetch(scheduler, Priority.BACKGROUND, size)
            under_way -= 1
            changed.set()

        async with trio.open_nursery() as nursery:
            while True:
                quiet = scheduler.is_quiet(HOST)
                if under_way >= (scheduler.places(HOST) + 1 if quiet else 1):
                    changed = trio.Event()
                    await changed.wait()
                    continue
                under_way += 1
                nursery.start_soon(one, scheduler.segment(HOST))


@asynccontextmanager
async def modelled(
    monkeypatch: pytest.MonkeyPatch, *, round_trip: float, mbit: float, most: float = 0.0
) -> AsyncIterator[tuple[ModelledLink, trio.Nursery]]:
    """Run a link and a nursery for what uses it; both end with the body."""

    async def in_model(job: Callable[[], Awaitable[None]], limiter: trio.CapacityLimiter) -> None:
        await job()

    monkeypatch.setattr(schedule, "_in_thread", in_model)
    model = ModelledLink(round_trip, mbit, most)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model.send)
        nursery.start_soon(model.arrive)
        yield model, nursery
        nursery.cancel_scope.cancel()
