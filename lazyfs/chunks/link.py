"""What the link to a host gives, as seen from the bytes that cross it: a round trip, and a rate. Pure; no clock.

The rate is that of all requests together, taken over windows. A window in which too little was asked for says only what
the link gives at least; one in which enough was asked for all the time says what it gives. So does a first body that
came at once: how fast is not known, for it may have waited in the socket. Until a window has found the link's end the
rate is then a beginning, and whoever fills the link may ask for more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lazyfs.units import KiB

_FEW = 16 * KiB  # bytes that always fit into a round trip
_SPAN = 0.1  # seconds of a window at least: shorter ones would measure how sockets hand on what they have buffered
_TRIPS = 2  # round trips of a window at least: bytes come in bursts of one
_WINDOWS = 4  # full windows that are remembered; the best of them counts, so that one bad moment is no slow link
_FULL = 1.05  # round trips of bytes that must have been asked for, on average, for the link to have been full
_AGE = 30.0  # seconds after which the shortest round trip seen is forgotten, for the way there may have changed
_SOME = 64 * KiB  # bytes from which on one request alone gives a first idea of the rate
_BODY = 0.01  # seconds, and a round trip: a shorter body says nothing, for it may have waited in the socket
_GREW = 1.5  # times the rate before: a window that brought as much has not found the link's end


@dataclass(frozen=True, slots=True)
class Window:
    """What one window saw: bytes a second, and whether enough was asked for to call that the link's rate."""

    rate: float
    full: bool


class Flow:
    """The bytes of one request that have come so far. One thread counts, any may look."""

    __slots__ = ("answered", "came", "dropped", "first", "since")

    def __init__(self) -> None:
        self.came = 0
        self.first = 0  # bytes that came together with the answer's header, or right behind it
        self.since = 0.0  # when they were here (time.monotonic())
        self.answered = False  # the answer's header is here
        self.dropped = False  # nobody wants the rest: whoever counts should end

    def count(self, now: float, size: int) -> None:
        """Note bytes that have come."""
        if not self.came:
            self.first, self.since = size, now
        self.came += size


class Link:
    """One host's link. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._shortest = [float("inf"), float("inf")]  # first bytes in this period and in the one before
        self._period = float("-inf")  # when this one began
        self._rates: deque[float] = deque(maxlen=_WINDOWS)
        self.begins = False  # the rate is what the link gives at least, perhaps far less than it could
        self._began: float | None = None  # the window under way
        self._came_before = 0
        self._looked = 0.0
        self._asked = 0
        self._asked_seconds = 0.0  # bytes under way, times seconds
        self._alone = False  # less than two requests were under way at some time

    @property
    def round_trip(self) -> float:
        """Seconds from a request to its first byte when nothing is in its way, 0 while that isn't known."""
        shortest = min(self._shortest)
        return 0.0 if shortest == float("inf") else shortest

    @property
    def rate(self) -> float:
        """Bytes a second, 0 while that isn't known."""
        return max(self._rates, default=0.0)

    @property
    def bytes_in_a_round_trip(self) -> int:
        """How many bytes cross the link in the time that another request would wait for its first one."""
        return max(_FEW, int(self.round_trip * self.rate))

    def ended(self, now: float, first_byte: float, size: int, seconds: float) -> None:
        """Learn from a finished request: seconds to its first byte, bytes and seconds of its body."""
        if now - self._period > _AGE:
            self._shortest = [float("inf"), self._shortest[0]]
            self._period = now
        self._shortest[0] = min(self._shortest[0], first_byte)
        long = seconds >= max(_BODY, self.round_trip)
        if not self._rates and size > _SOME and not long:
            self._rates.append(size / max(_BODY, first_byte + seconds))
            self.begins = True
        elif long and (size / seconds > self.rate if self._rates else size > _SOME):
            self._rates.append(size / seconds)

    def believe(self, rate: float) -> None:
        """Forget the rates that were seen: the link gives this much now."""
        self._rates.clear()
        self._rates.append(rate)
        self.begins = False

    def look(self, now: float, came: int, asked: int, requests: int) -> Window | None:
        """Tell what is going on: bytes that have come so far in all, bytes and requests that are under way.

        To be called whenever a request begins or ends or some of its bytes are here. Return a window that ended.
        """
        window: Window | None = None
        if self._began is None:
            if came > self._came_before and requests:
                self._begin(now, came, requests)  # behind a byte: the wait for the first one is no part of it
        else:
            self._asked_seconds += self._asked * (now - self._looked)
            seconds = now - self._began
            if seconds >= max(_SPAN, _TRIPS * self.round_trip):
                window = self._end((came - self._came_before) / seconds, self._asked_seconds / seconds)
                self._begin(now, came, requests)
            self._alone = self._alone or requests < 2
            if not requests:
                self._began = None
        if self._began is None:
            self._came_before = came
        self._looked, self._asked = now, asked
        return window

    def _begin(self, now: float, came: int, requests: int) -> None:
        self._began, self._came_before = now, came
        self._asked_seconds = 0.0
        self._alone = requests < 2

    def _end(self, rate: float, asked: float) -> Window:
        # With one request at a time the link rests for a round trip after each, however large they are.
        full = not self._alone and asked >= _FULL * self.round_trip * self.rate
        if full and rate < _GREW * self.rate:
            self.begins = False
        if full or rate > self.rate:
            self._rates.append(rate)
        return Window(rate, full)
