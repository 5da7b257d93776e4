"""When the daemon returns freed memory: after work, and in the midst of work that does not end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from lazyfs.mount import heap


async def trims(monkeypatch: pytest.MonkeyPatch, work: Callable[[float], float]) -> list[float]:
    """Return when memory was returned within two minutes; `work`: seconds of processor time before a look."""
    used, found = 0.0, []
    began = trio.current_time()

    def process_time() -> float:
        nonlocal used
        used += work(trio.current_time() - began)
        return used

    async def run_sync(job: object) -> None:
        assert job is heap.trim
        found.append(trio.current_time() - began)

    monkeypatch.setattr(time, "process_time", process_time)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    with trio.move_on_after(120):
        await heap.give_back()
    return found


async def test_after_work(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    assert await trims(monkeypatch, lambda at: float(10 < at < 20)) == [21]


async def test_in_the_midst_of_work_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    assert await trims(monkeypatch, lambda at: 1.0) == [33, 66, 99]


async def test_not_while_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    assert await trims(monkeypatch, lambda at: 0.0) == []


async def test_after_work_in_small_pieces(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    assert await trims(monkeypatch, lambda at: 0.012) == [15, 30, 45, 60, 75, 90, 105]
