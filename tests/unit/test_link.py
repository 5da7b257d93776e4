"""What the scheduler makes of links that exist only in a model's time: full speed, and readers that are not delayed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.chunks.host import Priority
from lazyfs.chunks.link import Link
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.width import LEAST, Width
from lazyfs.units import KiB
from tests.helpers.modelled_link import HOST, ModelledLink, modelled

SLOW, MIDDLE, LONG = (0.1, 50.0), (0.02, 200.0), (0.1, 1000.0)  # seconds of a round trip, 10**6 bits a second


@asynccontextmanager
async def filled(
    monkeypatch: pytest.MonkeyPatch,
    link: tuple[float, float],
    seconds: float,
    *,
    connections: int = 8,
    fills: int = 1,
    most: float = 0.0,
) -> AsyncIterator[tuple[ModelledLink, Scheduler]]:
    """A link that background has been using for some seconds, and the scheduler that lets it."""
    async with modelled(monkeypatch, round_trip=link[0], mbit=link[1], most=most) as (model, nursery):
        scheduler = Scheduler(connections)
        for _ in range(fills):
            nursery.start_soon(model.fill, scheduler)
        await trio.sleep(seconds)
        yield model, scheduler


@pytest.mark.parametrize("link", [SLOW, MIDDLE, LONG])
async def test_background_fills_the_link_from_the_first_seconds(
    link: tuple[float, float], monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with filled(monkeypatch, link, 2) as (model, scheduler):
        assert model.carried >= 0.4 * 2 * model.rate
        await trio.sleep(2)
        before = model.carried
        await trio.sleep(4)
        assert model.carried - before >= 0.6 * 4 * model.rate, "also while it tries one place less"
        assert scheduler.statistics()[HOST].rate == pytest.approx(model.rate, rel=0.3)


async def test_slow_connections_get_more_places_than_a_slow_link(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with filled(monkeypatch, SLOW, 8, connections=16) as (_, scheduler):
        few = scheduler.places(HOST)
        assert few <= 8
    async with filled(monkeypatch, (0.02, 400), 10, connections=16, most=32) as (_, scheduler):
        assert scheduler.places(HOST) >= few + 1


@pytest.mark.parametrize("size", [64 << 10, 1 << 20])
@pytest.mark.parametrize("link", [SLOW, MIDDLE])
async def test_two_fills_delay_no_reader_by_more_than_a_round_trip(
    link: tuple[float, float], size: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Neither a read in the midst of others nor one after a pause, when background had the whole link."""
    chance = random.Random(size)
    async with filled(monkeypatch, link, 3, fills=2) as (model, scheduler):
        took = []
        for number in range(50):
            await trio.sleep(chance.uniform(1.2, 1.6) if number % 6 == 0 else chance.uniform(0, 0.3))
            took.append(await model.fetch(scheduler, Priority.DEMAND, size))
        assert sorted(took)[-2] <= 2 * model.round_trip + size / model.rate
        before = model.carried
        await trio.sleep(4)
        assert model.carried - before >= 0.5 * 4 * model.rate, "and afterwards background has the link again"


async def test_a_link_that_drops_to_a_tenth_is_known_soon(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with filled(monkeypatch, MIDDLE, 3) as (model, scheduler):
        assert scheduler.segment(HOST) > 64 * KiB
        model.rate /= 10
        await trio.sleep(5)
        assert scheduler.statistics()[HOST].rate == pytest.approx(model.rate, rel=0.4)
        assert scheduler.segment(HOST) == 64 * KiB, "the least there is"


def test_a_first_body_that_came_at_once_tells_only_what_the_link_gives_at_least() -> None:
    """It may have waited in the socket: 300 kB in a millisecond, of a link that gives 6 MB a second."""
    link = Link()
    link.ended(0.0, 0.1, 300_000, 0.001)
    assert 2_000_000 < link.rate <= 50 * 125_000
    assert link.bytes_in_a_round_trip <= 50 * 125_000 * 0.1
    quick = Link()
    quick.ended(0.0, 0.0005, 300_000, 0.001)
    assert quick.rate >= 25_000_000, "and enough of a quick one to begin with"


async def test_background_begins_with_what_a_long_link_carries_whatever_came_first(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with modelled(monkeypatch, round_trip=SLOW[0], mbit=SLOW[1]) as (model, nursery):
        scheduler = Scheduler(8)
        scheduler.observe(HOST, 0.1, 300_000, 0.001)
        nursery.start_soon(model.fill, scheduler)
        assert scheduler.segment(HOST) <= 1_000_000
        await trio.sleep(3)
        assert model.carried >= 0.4 * 3 * model.rate
        assert scheduler.statistics()[HOST].rate <= 1.3 * model.rate


def test_small_reads_say_nothing_against_a_link() -> None:
    link, came = Link(), 0
    link.ended(0.0, 0.02, 1 << 20, 0.1)
    before = link.rate
    for number in range(1000):
        link.look(number * 0.1, came, 4096, 1)
        came += 4096
        link.look(number * 0.1 + 0.02, came, 0, 0)
    assert link.rate == before


def test_the_shortest_round_trip_counts_until_it_is_old() -> None:
    link = Link()
    link.ended(0.0, 0.02, 0, 0.0)
    link.ended(1.0, 0.5, 0, 0.0)
    assert link.round_trip == 0.02
    for now in (40.0, 80.0):
        link.ended(now, 0.1, 0, 0.0)
    assert link.round_trip == 0.1


WINDOWS = st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 10), st.floats(0, 1)), max_size=60)


@given(WINDOWS, st.integers(1, 64))
def test_whatever_is_seen_the_width_stays_in_its_bounds(windows: list[tuple[float, float, float]], most: int) -> None:
    width = Width(most)
    for window in windows:
        before = width.places
        width.note(*window)
        assert LEAST <= width.places <= max(LEAST, most)
        assert abs(width.places - before) <= 1


def test_a_queue_without_a_gain_makes_it_narrower() -> None:
    width = Width(16)
    for _ in range(300):
        width.note(1e6, 0.02 * width.places**2, 0.02)
    assert width.places == LEAST
