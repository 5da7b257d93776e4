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
    assert tally.evicted > 0, tally  # the store is smaller than what one round reads
    # Too few rounds for the drift of memory, but what the holder has open is the same after each.
    assert rounds[-1]["holder"]["fds"] <= rounds[0]["holder"]["fds"] + soak.SLACK, rounds
