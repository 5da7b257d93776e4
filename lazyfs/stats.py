"""Counters that cost next to nothing where things happen; whoever is asked for metrics reads them off.

Prometheus' own client is imported only for an answer: its import takes as long as a start may take (70 ms, 2.5 MB).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping

from lazyfs.limits import MAX_SERIES, MAX_STAT_HOSTS

# Prometheus' form of a histogram: (upper bound, how many were no longer) up to +Inf, and the sum of all in seconds.
Buckets = tuple[list[tuple[str, float]], float]

OTHER = "other"

# Seconds: a read from memory takes 0.1 ms, one over a network a round trip, and one of a dead registry its deadline.
READ_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
REQUEST_BOUNDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
CALL_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0)


class Histogram:
    """Times in fixed buckets. Not thread-safe: a read of the kernel counts itself, in less than 1 µs (measured)."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds`: the largest seconds of each bucket, ascending; one more holds what is longer."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def note(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self._counts)

    def buckets(self) -> Buckets:
        """Return the numbers of this moment."""
        told: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            so_far += count
            told.append((bound, float(so_far)))
        return told, self._sum


class Counts:
    """Numbers that only grow, by the values of their labels. Thread-safe."""

    def __init__(self, most: int = MAX_SERIES) -> None:
        """`most`: how many are told apart; further ones share the one whose labels are all "other"."""
        self._most = most
        self._lock = threading.Lock()
        self._all: dict[tuple[str, ...], float] = {}

    def add(self, number: float, *labels: str) -> None:
        """Add to one of them."""
        with self._lock:
            key = _bounded(self._all, labels, self._most)
            self._all[key] = self._all.get(key, 0) + number

    def read(self) -> dict[tuple[str, ...], float]:
        """Return all of them as they are now."""
        with self._lock:
            return dict(self._all)


class Histograms:
    """Histograms by the values of their labels. Thread-safe."""

    def __init__(self, bounds: tuple[float, ...], most: int = MAX_SERIES) -> None:
        """`most`: as for Counts."""
        self._bounds = bounds
        self._most = most
        self._lock = threading.Lock()
        self._all: dict[tuple[str, ...], Histogram] = {}

    def note(self, seconds: float, *labels: str) -> None:
        """Count one."""
        with self._lock:
            key = _bounded(self._all, labels, self._most)
            if key not in self._all:
                self._all[key] = Histogram(self._bounds)
            self._all[key].note(seconds)

    def read(self) -> dict[tuple[str, ...], Buckets]:
        """Return all of them as they are now."""
        with self._lock:
            return {key: each.buckets() for key, each in self._all.items()}


def _bounded(known: Mapping[tuple[str, ...], object], labels: tuple[str, ...], most: int) -> tuple[str, ...]:
    return labels if labels in known or len(known) < most else (OTHER,) * len(labels)


class Names:
    """Names of which the first `most` are kept apart; all later ones are "other". Thread-safe."""

    def __init__(self, most: int = MAX_STAT_HOSTS) -> None:
        self._most = most
        self._known: set[str] = set()

    def bounded(self, name: str) -> str:
        """Return the name to count under."""
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)  # two threads at once may keep one more: no harm
        return name
