"""What interleaved pairs say: order, medians, spread, and how sure a ratio is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_RESAMPLES = 2000
_SURE = 0.95


def shuffled(items: Sequence[T], rounds: int, seed: int = 1) -> list[list[T]]:
    """Return `rounds` orders of the items: each round has all of them, so that a slow minute hits every one."""
    source = random.Random(seed)
    return [source.sample(list(items), len(items)) for _ in range(rounds)]


def upper_bound(ratios: Sequence[float], seed: int = 1) -> float:
    """Return what the median of the ratios is below with 95 % certainty, by bootstrap. Raise ValueError for none.

    A few pairs give no better bound than their largest ratio.
    """
    if not ratios:
        raise ValueError("no ratio is given")
    source = random.Random(seed)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[min(len(medians) - 1, int(_SURE * len(medians)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, least and greatest of some seconds."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "greatest": round(max(values), 3),
    }
