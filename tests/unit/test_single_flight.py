"""One computation a key: shared results, shared errors, and nobody stuck when the one who computes goes away."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import ReadDeadline


async def test_callers_of_one_key_share_one_computation() -> None:
    single: SingleFlight[str, int] = SingleFlight()
    gate, calls, results = trio.Event(), [], []

    async def compute() -> int:
        calls.append(1)
        await gate.wait()
        return 7

    async def ask() -> None:
        results.append(await single.run("k", compute))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert "k" in single
        assert len(single) == 1
        gate.set()
    assert results == [7] * 20
    assert len(calls) == 1
    assert len(single) == 0


async def test_other_keys_do_not_wait() -> None:
    single: SingleFlight[int, int] = SingleFlight()
    gate = trio.Event()

    async def slow() -> int:
        await gate.wait()
        return 1

    async def quick() -> int:
        return 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(single.run, 1, slow)
        await trio.testing.wait_all_tasks_blocked()
        assert await single.run(2, quick) == 2
        gate.set()


async def test_error_is_everybodys_and_the_next_call_tries_anew() -> None:
    single: SingleFlight[str, int] = SingleFlight()
    gate, errors = trio.Event(), []

    async def fail() -> int:
        await gate.wait()
        raise ReadDeadline(1)

    async def ask() -> None:
        try:
            await single.run("k", fail)
        except ReadDeadline as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert len(errors) == 5

    async def good() -> int:
        return 3

    assert await single.run("k", good) == 3


@pytest.mark.parametrize("cancelled", [1, 4, 9])
async def test_next_waiter_takes_over_from_a_cancelled_one(cancelled: int) -> None:
    single: SingleFlight[str, int] = SingleFlight()
    gate, started, results = trio.Event(), [], []
    scopes: list[trio.CancelScope] = []

    async def compute(number: int) -> int:
        started.append(number)
        await gate.wait()
        return 5

    async def ask(number: int) -> None:
        with trio.CancelScope() as scope:
            scopes[number:number] = [scope]
            results.append(await single.run("k", lambda: compute(number)))

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(cancelled):
            scopes[started[-1]].cancel()  # whoever computes at the moment
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert results == [5] * (10 - cancelled)
    assert len(started) == cancelled + 1
    assert len(single) == 0
