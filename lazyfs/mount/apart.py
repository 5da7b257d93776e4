"""Work that outlives whoever asked for it: requests to hosts that don't answer, and layers that are half made.

A caller with a deadline leaves at the deadline. The thread that does its work can't be stopped, so it ends on its own,
by the deadline of its request, and counts against its host until then.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import LazyfsError, RegistryError
from lazyfs.limits import HOST_THREADS, HOST_WHOLE, MAX_APART_HOSTS

log = logging.getLogger(__name__)

T = TypeVar("T")


class Links:
    """Threads by host, so that a host that doesn't answer holds up nobody else's. Belongs to one trio loop."""

    def __init__(self) -> None:
        self._limiters: dict[str, trio.CapacityLimiter] = {}

    def limiter(self, host: str, threads: int = HOST_THREADS) -> trio.CapacityLimiter:
        """Return the limit of what is asked of a host at a time."""
        if len(self._limiters) >= MAX_APART_HOSTS and host not in self._limiters:
            self._limiters = {name: one for name, one in self._limiters.items() if one.borrowed_tokens}
        return self._limiters.setdefault(host, trio.CapacityLimiter(threads))

    def whole(self, host: str) -> trio.CapacityLimiter:
        """Return the limit of a host's layers that are fetched in full at a time, to be held by a task."""
        return self.limiter(f"whole layers of {host}", HOST_WHOLE)

    async def ask(self, host: str, request: Callable[[], T]) -> T:
        """Return what `request` returns, from a thread that is left behind when we are cancelled. A checkpoint."""
        return await trio.to_thread.run_sync(request, abandon_on_cancel=True, limiter=self.limiter(host))

    async def share(self, flights: SingleFlight[object, T], key: object, host: str, request: Callable[[], T]) -> T:
        """Do as `ask`, once for all who want the same; a failure of somebody else's request is not ours yet."""
        asked = False

        async def ask() -> T:
            nonlocal asked
            asked = True
            return await self.ask(host, request)

        try:
            return await flights.run(key, ask)
        except RegistryError:
            if asked:
                raise
        return await self.ask(host, request)


class _Job(Generic[T]):
    __slots__ = ("done", "error", "given_up", "scope", "value")

    def __init__(self, *, given_up: bool) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.value: list[T] = []
        self.error: Exception | None = None
        self.given_up = given_up


class Apart:
    """Run work in tasks of the daemon's own, whose results are given back where nobody is left to take them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def run(
        self, work: Callable[[], Awaitable[T]], give_back: Callable[[T], Awaitable[None]], *, persist: bool = False
    ) -> T:
        """Return what `work` returns. When we are cancelled it is cancelled too, unless it is to `persist`; what it
        brings yet is given back.
        """
        job = _Job[T](given_up=False)
        self._nursery.start_soon(self._work, job, work, give_back)
        try:
            await job.done.wait()
        except trio.Cancelled:
            job.given_up = True
            if not persist:
                job.scope.cancel()
            for value in job.value:
                self._nursery.start_soon(self._give_back, give_back, value)
            raise
        if job.error is not None:
            raise job.error
        return job.value[0]

    def begin(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start work that nobody waits for. Doesn't wait; failures are logged."""
        self._nursery.start_soon(self._work, _Job[None](given_up=True), work, None)

    async def _work(
        self, job: _Job[T], work: Callable[[], Awaitable[T]], give_back: Callable[[T], Awaitable[None]] | None
    ) -> None:
        try:
            with job.scope:
                job.value.append(await work())
        except Exception as error:  # for whoever waits
            job.error = error
            if job.given_up:
                level = logging.INFO if isinstance(error, LazyfsError) else logging.ERROR
                log.log(level, "work that nobody waits for failed: %s: %s", type(error).__name__, error)
        if job.given_up and give_back is not None:
            with trio.CancelScope(shield=True):
                for value in job.value:
                    await self._give_back(give_back, value)
        job.done.set()

    @staticmethod
    async def _give_back(give_back: Callable[[T], Awaitable[None]], value: T) -> None:
        try:
            await give_back(value)
        except Exception:  # the daemon and its readers go on
            log.exception("what nobody waits for could not be given back")
