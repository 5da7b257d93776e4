"""Who may fetch when: limits by priority, promotion, and no slot lost whatever is cancelled when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.chunks.host import QUIET, STEP_BACK, Priority, Ticket
from lazyfs.chunks.schedule import Scheduler

DEMAND, PREFETCH, BACKGROUND = Priority
HOST = "registry"


class Jobs:
    """Jobs that run until they are told to end, and note the order in which they began."""

    def __init__(self, scheduler: Scheduler, nursery: trio.Nursery) -> None:
        self.scheduler = scheduler
        self.nursery = nursery
        self.began: list[str] = []
        self.running: dict[str, threading.Event] = {}
        self.over: set[str] = set()
        self.scopes: dict[str, trio.CancelScope] = {}
        self._token = trio.lowlevel.current_trio_token()

    def start(self, name: str, priority: Priority, host: str = HOST) -> Ticket:
        ticket = self.scheduler.ticket(host, priority)
        self.scopes[name] = trio.CancelScope()
        self.nursery.start_soon(self._run, name, ticket)
        return ticket

    async def _run(self, name: str, ticket: Ticket) -> None:
        with self.scopes[name]:
            await self.scheduler.run(ticket, self._job(name), 1 << 20)
        self.over.add(name)

    def _job(self, name: str) -> Callable[[], None]:
        gate = threading.Event()

        def begin() -> None:
            self.began.append(name)
            self.running[name] = gate

        def job() -> None:
            self._token.run_sync_soon(begin)
            assert gate.wait(10)

        return job

    def end(self, name: str) -> None:
        self.running.pop(name).set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                await trio.sleep(0.001)

    async def began_exactly(self, count: int) -> None:
        """Wait until so many have begun, and see that after that no other one does."""
        await self.until(lambda: len(self.began) >= count)
        for _ in range(20):
            await trio.sleep(0)
        assert len(self.began) == count

    async def began_are(self, *names: str) -> None:
        """Wait until these have begun, and see that after that no other one does."""
        await self.began_exactly(len(names))
        assert sorted(self.began) == sorted(names)

    def end_all(self) -> None:
        for name in list(self.running):
            self.end(name)


async def test_jobs_return_and_raise_what_they_do() -> None:
    scheduler = Scheduler(2)
    assert await scheduler.run(scheduler.ticket(HOST, DEMAND), lambda: 5, 10) == 5
    with pytest.raises(ZeroDivisionError):
        await scheduler.run(scheduler.ticket(HOST, DEMAND), lambda: 1 // 0, 10)
    assert scheduler.statistics()[HOST].running == 0


@pytest.mark.parametrize(("priority", "limit"), [(DEMAND, 8), (PREFETCH, 3), (BACKGROUND, 3)])
async def test_limits_leave_connections_for_demand(priority: Priority, limit: int) -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(Scheduler(8), nursery)
        for number in range(limit + 3):
            jobs.start(f"{number}", priority)
        await jobs.began_exactly(limit)
        assert jobs.scheduler.statistics()[HOST].waiting == 3
        if priority is not DEMAND:
            jobs.start("demand", DEMAND)
            await jobs.began_exactly(limit + 1)
            assert "demand" in jobs.running
            jobs.end("demand")
        while len(jobs.over) < limit + 3 + (priority is not DEMAND):
            jobs.end_all()
            await trio.sleep(0.001)
    assert jobs.scheduler.statistics()[HOST].running == 0


async def test_demand_overtakes_what_waits() -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(Scheduler(2), nursery)
        jobs.start("a", DEMAND)
        jobs.start("b", DEMAND)
        await jobs.began_are("a", "b")
        for name, priority in (("background", BACKGROUND), ("prefetch", PREFETCH), ("demand", DEMAND)):
            jobs.start(name, priority)
            await trio.testing.wait_all_tasks_blocked(0.01)
        jobs.end("a")
        await jobs.began_are("a", "b", "demand")
        jobs.end("b")
        await jobs.began_are("a", "b", "demand", "prefetch")
        jobs.end_all()
        await jobs.until(lambda: "background" in jobs.running)
        jobs.end_all()


async def test_background_steps_back_while_demand_is_recent() -> None:
    now = [0.0]
    scheduler = Scheduler(8, lambda: now[0])
    async with trio.open_nursery() as nursery:
        jobs = Jobs(scheduler, nursery)
        scheduler.note_demand(HOST)
        assert not scheduler.is_quiet(HOST)
        for number in range(3):
            jobs.start(f"{number}", BACKGROUND)
        await jobs.until(lambda: len(jobs.began) == 1)
        for _ in range(20):
            await trio.sleep(0)
        assert len(jobs.began) == 1
        now[0] += QUIET + 0.1
        assert scheduler.is_quiet(HOST)
        jobs.end_all()
        await jobs.until(lambda: len(jobs.running) == 2)
        jobs.end_all()
        await jobs.until(lambda: len(jobs.over) == 3)


@pytest.mark.parametrize(("round_trip", "goes_on"), [(0.001, True), (0.02, False)])
async def test_background_of_a_near_host_goes_on_beside_readers(round_trip: float, goes_on: bool) -> None:
    """What it brings sooner than readers ask for it, they need not ask for."""
    scheduler = Scheduler(8)
    assert scheduler.is_quiet(HOST)
    scheduler.note_demand(HOST)
    assert not scheduler.is_quiet(HOST)  # nobody knows yet how far it is
    scheduler.observe(HOST, round_trip, 1 << 20, 0.1)
    assert scheduler.is_quiet(HOST) is goes_on
    with scheduler.mount_waits(HOST):
        assert not scheduler.is_quiet(HOST)


async def test_background_steps_back_for_a_start_while_something_of_it_comes_and_not_for_ever() -> None:
    now = [0.0]
    scheduler = Scheduler(8, lambda: now[0])
    async with trio.open_nursery() as nursery:
        jobs = Jobs(scheduler, nursery)
        with scheduler.start_comes(HOST):
            assert scheduler.is_quiet(HOST), "nothing is asked for: it may be paced, or limited by the host"
            jobs.start("ahead", PREFETCH)
            await jobs.began_are("ahead")
            assert not scheduler.is_quiet(HOST) and scheduler.is_quiet("another")
            for number in range(3):
                jobs.start(f"{number}", BACKGROUND)
            await jobs.began_exactly(2)
            with scheduler.awaited(HOST):
                assert scheduler.is_quiet(HOST), "somebody waits for what background brings"
            assert not scheduler.is_quiet(HOST)
            now[0] += STEP_BACK + 0.1
            assert scheduler.is_quiet(HOST), "the request may hang"
            now[0] -= STEP_BACK
        assert scheduler.is_quiet(HOST)
        while len(jobs.over) < 4:
            jobs.end_all()
            await trio.sleep(0.001)


async def test_promoted_job_overtakes_and_may_use_the_last_connections() -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(Scheduler(3), nursery)
        tickets = [jobs.start("0", BACKGROUND)]
        await jobs.began_are("0")
        tickets += [jobs.start(f"{number}", BACKGROUND) for number in (1, 2, 3)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        tickets[3].promote(DEMAND)
        await jobs.began_are("0", "3")
        tickets[3].promote(DEMAND)
        tickets[0].promote(DEMAND)  # it runs: left alone
        jobs.end("3")
        jobs.end("0")
        await jobs.until(lambda: len(jobs.began) == 3)
        jobs.end_all()
        await jobs.until(lambda: len(jobs.began) == 4)
        jobs.end_all()
    assert sorted(jobs.began) == ["0", "1", "2", "3"]
    assert jobs.scheduler.statistics()[HOST].running == 0


async def test_promotion_before_the_run_takes_no_slot() -> None:
    scheduler = Scheduler(2)
    for _ in range(10):
        ticket = scheduler.ticket(HOST, BACKGROUND)
        ticket.promote(DEMAND)  # and whoever made it never runs it
    with trio.fail_after(5):
        assert await scheduler.run(scheduler.ticket(HOST, DEMAND), lambda: 1, 10) == 1
        ticket = scheduler.ticket(HOST, BACKGROUND)
        ticket.promote(DEMAND)
        assert ticket.priority is DEMAND
        assert await scheduler.run(ticket, lambda: 2, 10) == 2
    assert scheduler.statistics()[HOST].running == 0


async def test_a_rate_bounds_what_nobody_waits_for_and_no_reader() -> None:
    scheduler = Scheduler(8, rates={BACKGROUND: 1_000_000, PREFETCH: 1})
    began: list[float] = []

    async def fetch(host: str, priority: Priority, size: int) -> None:
        await scheduler.run(scheduler.ticket(host, priority), lambda: began.append(time.monotonic()), size)

    start = time.monotonic()
    await fetch("one", BACKGROUND, 100_000)
    await fetch("other", BACKGROUND, 100_000)  # the rate is the node's
    await fetch("one", BACKGROUND, 100_000)
    assert began[2] - start >= 0.199  # two clocks
    with trio.fail_after(10):
        await fetch(HOST, PREFETCH, 1_000_000)
        await fetch(HOST, DEMAND, 1_000_000)
        async with trio.open_nursery() as nursery:
            ticket = scheduler.ticket(HOST, PREFETCH)  # its turn is in eleven days
            nursery.start_soon(scheduler.run, ticket, lambda: began.append(time.monotonic()), 1_000_000)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(began) == 5
            ticket.promote(DEMAND)
    assert len(began) == 6 and scheduler.statistics()[HOST].running == 0


async def test_what_is_cancelled_before_it_leaves_delays_nobody_behind_it() -> None:
    """An image that is unmounted again: the next one's prefetch finds the link idle, and the rate unused."""
    scheduler = Scheduler(2, rates={PREFETCH: 1_000})  # one prefetch runs at a time
    gate, over = threading.Event(), trio.Event()
    large = 10**9  # bytes; their turn would take eleven days

    async def fetch(size: int, job: Callable[[], object] = int) -> None:
        await scheduler.run(scheduler.ticket(HOST, PREFETCH), job, size)

    async def last() -> None:
        await fetch(1)
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, 1, partial(gate.wait, 10))
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as first:
            for size in (large, large, 100):  # the one may leave soon, and waits for a connection; the others for it
                first.start_soon(fetch, size)
            with trio.fail_after(10):
                while scheduler.statistics()[HOST].waiting != 1:
                    await trio.sleep(0.001)
            nursery.start_soon(last)  # is there before the others go
            await trio.testing.wait_all_tasks_blocked(0.01)
            first.cancel_scope.cancel()
        gate.set()
        with trio.fail_after(10):
            await over.wait()
    assert scheduler.statistics()[HOST].running == 0


async def test_a_rate_keeps_the_order_and_what_is_promoted_takes_none_of_it() -> None:
    scheduler = Scheduler(8, rates={PREFETCH: 100, BACKGROUND: 1})
    began: list[str] = []

    async def fetch(name: str, ticket: Ticket, size: int) -> None:
        await scheduler.run(ticket, lambda: began.append(name), size)

    async with trio.open_nursery() as nursery:
        with trio.fail_after(10):
            await fetch("background", scheduler.ticket(HOST, BACKGROUND), 10**6)
            await fetch("first", scheduler.ticket(HOST, PREFETCH), 20)  # 0.2 s
            sizes = {
                "wanted": (PREFETCH, 10**6),
                "second": (PREFETCH, 10),
                "third": (PREFETCH, 10),
                "known": (BACKGROUND, 10),
            }
            tickets = {}
            for name, (priority, size) in sizes.items():
                tickets[name] = scheduler.ticket(HOST, priority)
                nursery.start_soon(fetch, name, tickets[name], size)
                await trio.testing.wait_all_tasks_blocked()
            tickets["known"].promote(PREFETCH)  # behind the others, at their rate
            tickets["wanted"].promote(DEMAND)
            while len(began) < 6:
                await trio.sleep(0.001)
    assert began == ["background", "first", "wanted", "second", "third", "known"]


async def test_hosts_do_not_wait_for_each_other() -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(Scheduler(2), nursery)
        for number in range(4):
            jobs.start(f"stuck {number}", DEMAND, "stuck")
        await jobs.until(lambda: len(jobs.began) == 2)
        jobs.start("free", DEMAND, "other")
        await jobs.until(lambda: "free" in jobs.began)
        while len(jobs.over) < 5:
            jobs.end_all()
            await trio.sleep(0.001)


async def test_cancelled_jobs_do_not_hold_up_new_ones() -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(Scheduler(2), nursery)
        for name in ("a", "b"):
            jobs.start(name, DEMAND)
        await jobs.began_are("a", "b")
        for name in ("a", "b"):
            jobs.scopes[name].cancel()  # their threads are still in a request that nobody wants any more
        jobs.start("c", DEMAND)
        await jobs.until(lambda: "c" in jobs.began)
        jobs.end_all()
    assert jobs.scheduler.statistics()[HOST].running == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(list(Priority))),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("end"), st.integers(0, 30)),
        st.tuples(st.just("promote"), st.integers(0, 30)),
        st.tuples(st.just("turn"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.integers(2, 6))
def test_no_slot_is_lost_and_no_limit_passed(steps: list[tuple[str, int]], connections: int) -> None:
    async def scenario() -> None:
        scheduler = Scheduler(connections)
        async with trio.open_nursery() as nursery:
            jobs = Jobs(scheduler, nursery)
            tickets: list[Ticket] = []
            for what, value in steps:
                if what == "start":
                    tickets.append(jobs.start(f"{len(tickets)}", Priority(value)))
                elif what == "turn":
                    await trio.sleep(0.0005)
                elif value < len(tickets):
                    if what == "cancel":
                        jobs.scopes[f"{value}"].cancel()
                    elif what == "end" and f"{value}" in jobs.running:
                        jobs.end(f"{value}")
                    elif what == "promote":
                        tickets[value].promote(DEMAND)
                running = scheduler._host(HOST).running
                assert min(running) >= 0
                assert sum(running) <= connections
                assert sum(running[PREFETCH:]) <= max(1, connections - 2)
            with trio.fail_after(10):
                while len(jobs.over) < len(tickets):
                    jobs.end_all()
                    await trio.sleep(0.0005)
            jobs.end_all()
            await trio.sleep(0)
            jobs.end_all()
        assert scheduler._host(HOST).running == [0, 0, 0]
        assert scheduler.statistics()[HOST].waiting == 0

    trio.run(scenario)
