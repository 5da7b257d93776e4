"""One computation a key at a time: late comers wait for the one under way and share its result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Flight(Generic[V]):
    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.value: V | None = None
        self.error: Exception | None = None


class SingleFlight(Generic[K, V]):
    """Share results by key within one trio loop.

    The first caller of a key computes. When it is cancelled the next waiter takes over, so that an impatient reader
    fails nobody but itself. An error is everybody's who waited; the next call tries anew.
    """

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: K) -> bool:
        """Tell whether a computation of `key` is under way."""
        return key in self._flights

    async def run(self, key: K, compute: Callable[[], Awaitable[V]]) -> V:
        """Return `compute()`'s result, computing it at most once at a time. A checkpoint where it waits."""
        while True:
            flight = self._flights.get(key)
            if flight is None:
                return await self._fly(key, compute)
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error
            if flight.value is not None:
                return flight.value

    async def _fly(self, key: K, compute: Callable[[], Awaitable[V]]) -> V:
        flight = self._flights[key] = _Flight[V]()
        try:
            flight.value = await compute()
            return flight.value
        except Exception as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.done.set()
