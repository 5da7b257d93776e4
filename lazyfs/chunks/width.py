"""How many requests that nobody waits for a host gets at a time: as many as make the sum of them faster. Pure.

One more is tried from time to time while all places are taken and more wait. It stays if the rate grew with it; else it
goes again, as does one where requests wait ever longer for their first byte and the rate is the same without it.
"""

from __future__ import annotations

LEAST = 2  # one request's round trip is hidden behind the other's body
_FIRST = 3  # to begin with: with two, each would have to be as large as a whole round trip of bytes
_GAIN = 1.05  # times the rate before: what one more must bring to stay
_CROWDED = 2.0  # times the round trip that first bytes may take; beyond that requests stand in a queue
_SETTLE = 1  # windows after a change that are not looked at: requests from before are still under way
_BEGUN = 3  # such windows behind a link's beginning, whose requests are larger
_LOOK = 4  # windows that are looked at together
_REST = 10  # such looks between two tries that brought nothing
_SHORT_REST = 1  # behind the first of them: rates of a link that was hardly used say little
_DROP = 0.5  # of the rate before: less is another link, or another load on it, and what was found out is void


class Width:
    """The number of places, in [LEAST, most]. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self.most = max(LEAST, most)
        self.places = min(_FIRST, self.most)
        self._before = 0.0  # the rate before the change that is being tried
        self._step = 0  # that change: 1, -1, or none
        self._skip = _SETTLE
        self._rest = 0
        self._next_rest = _SHORT_REST
        self._rates: list[float] = []
        self._waits: list[float] = []

    def note(self, rate: float, first_byte: float, round_trip: float) -> None:
        """Tell of a window in which all places were taken and more requests waited.

        `rate`: bytes a second of all together; `first_byte`: seconds that requests took to it, and `round_trip` the
        least that they ever take.
        """
        if self._skip:
            self._skip -= 1
            return
        self._rates.append(rate)
        self._waits.append(first_byte)
        if len(self._rates) < _LOOK:
            return
        rate, wait = sum(self._rates) / _LOOK, sum(self._waits) / _LOOK
        self._rates, self._waits = [], []
        crowded = wait > _CROWDED * round_trip > 0
        if self._step > 0 and rate < self._before * _GAIN:
            self._change(-1, trying=False)
            self._next_rest = _REST
        elif self._step < 0 and rate < self._before / _GAIN:
            self._change(1, trying=False)
        elif crowded and self.places > LEAST and (self._step < 0 or not self._rest):
            self._before = max(rate, self._before if self._step else 0.0)
            self._change(-1, trying=True)
        elif self._step > 0 or not self._rest or rate < self._before * _DROP:
            self._before = rate
            if crowded or self.places == self.most:
                self._step, self._rest = 0, _REST
            else:
                self._change(1, trying=True)
        else:
            self._step = 0
            self._rest -= 1

    def wait(self) -> None:
        """Look at nothing yet: what is asked for changes by itself, and would be taken for a change of the places."""
        self._skip, self._rates, self._waits = _BEGUN, [], []

    def _change(self, step: int, *, trying: bool) -> None:
        self.places = min(self.most, max(LEAST, self.places + step))
        self._step = step if trying else 0
        self._skip = _SETTLE
        self._rest = self._next_rest
