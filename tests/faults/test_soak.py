"""Some of the soak of `perf.soak`, which runs for hours elsewhere: every byte right, nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import soak

pytestmark = [pytest.mark.fuse, pytest.mark.faults, pytest.mark.slow]

SECONDS = 40.0


def test_half_a_minute_of_everything(scratch: Path) -> None:
    tally, rounds = soak.run(scratch, SECONDS, 7, calm=False)
    assert (tally.wrong, tally.left) == ([], [])
    assert tally.rounds == len(rounds) >= 1
    assert tally.reads >= 30 and tally.kills + tally.upgrades >= 1 and tally.faults >= 1, tally  # a busy machine


@pytest.mark.parametrize(
    ("values", "grown"), [([100] * 5, 0.0), ([100, 102, 98, 101, 99, 100], 0.0), ([100, 100, 105, 110, 120, 120], 0.2)]
)
def test_drift_is_from_the_first_third_to_the_last(values: list[int], grown: float) -> None:
    assert soak.drift(values) == pytest.approx(grown, abs=0.02)
