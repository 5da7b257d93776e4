"""A bound on the bytes a second that one kind of request may ask for, whatever the host."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Pace:
    """The bytes a second that jobs of one priority may ask for: a request waits for the excess of those before it.

    They leave in the order in which they came. One that is cancelled or promoted meanwhile counts for nothing: those
    behind it move up. `rate`: bytes a second; `clock`: seconds, of any origin. Belongs to one trio loop.
    """

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._next = float("-inf")  # when the next request may leave
        # Who waits, and until when: only the first one's turn is known.
        self._line: dict[trio.Event, trio.CancelScope] = {}

    async def wait_for(self, promoted: trio.Event, size: int) -> bool:
        """Wait until a request of `size` bytes may leave, or is `promoted`; return whether it counts here."""
        if not self._line and self._next <= self._clock():
            self._note(size)
            return True
        scope = self._line[promoted] = trio.CancelScope()
        try:
            self._move_up()
            with scope:
                await promoted.wait()
            if scope.cancelled_caught:
                self._note(size)
        finally:
            del self._line[promoted]
            self._move_up()
        return scope.cancelled_caught

    def give_back(self, size: int) -> None:
        """Forget a request of `size` bytes that was cancelled before anything was asked for."""
        self._next = max(self._clock(), self._next - size / self._rate)
        self._move_up()

    def _note(self, size: int) -> None:
        self._next = max(self._clock(), self._next) + size / self._rate

    def _move_up(self) -> None:
        first = next(iter(self._line.values()), None)
        if first is not None:
            first.deadline = trio.current_time() + max(0.0, self._next - self._clock())
