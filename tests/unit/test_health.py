"""What is known of hosts: who is asked first, who is left alone and for how long, who is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DigestMismatch,
    LazyfsError,
    RegistryFault,
    RegistryTimeout,
    RegistryUnreachable,
    TooManyRequests,
)
from lazyfs.registry.health import Health
from lazyfs.registry.hops import Hop
from lazyfs.registry.http.rate_limits import LimitTeller, sentence

HOSTS = ["a", "b", "c"]
BLOB = "sha256:" + "1" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(clock=clock)


@pytest.mark.parametrize(
    ("error", "times"),
    [(RegistryTimeout("a", "x"), 1), (RegistryUnreachable("a", "x"), 1), (RegistryFault("a", "x", status=500), 3)],
)
def test_a_failing_host_is_asked_last_until_it_is_well(health: Health, error: LazyfsError, times: int) -> None:
    for _ in range(times - 1):
        health.note_error("a", BLOB, error)
    assert health.order(HOSTS, BLOB) == [0, 1, 2]
    health.note_error("a", BLOB, error)
    assert health.order(HOSTS, BLOB) == [1, 2, 0]
    assert not health.is_well("a")
    health.note_answer("a", BLOB, 0.1)
    assert not health.is_well("a")  # a header is no answer yet
    health.note_done("a")
    assert health.order(HOSTS, BLOB) == [0, 1, 2]


def test_it_is_tried_again_by_one_at_a_time_after_growing_pauses(health: Health, clock: Clock) -> None:
    pauses = []
    for _ in range(12):
        health.note_error("a", BLOB, RegistryTimeout("a", "x"))
        assert not health.take_probe("a")
        began = clock.now
        while not health.take_probe("a"):
            clock.now += 0.5
        assert not health.take_probe("a")
        health.probed("a")
        pauses.append(clock.now - began)
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert max(pauses) == 120.0


def test_not_having_something_is_no_fault(health: Health, clock: Clock) -> None:
    health.note_error("a", BLOB, BlobMissing("a", "x"))
    assert health.order(HOSTS, BLOB) == [1, 2, 0]
    assert health.order(HOSTS, "sha256:other") == [0, 1, 2]
    assert health.is_well("a")
    clock.now += 61
    assert health.order(HOSTS, BLOB) == [0, 1, 2]


@pytest.mark.parametrize(("asked", "waits"), [(7.0, 7.0), (0.0, 30.0), (1e9, 3600.0)])
def test_a_limited_host_is_not_asked_at_all(health: Health, clock: Clock, asked: float, waits: float) -> None:
    health.note_error("a", BLOB, TooManyRequests("a", "x", retry_after=asked))
    assert health.order(HOSTS, BLOB) == [1, 2]
    assert health.limited_for("a") == waits
    assert health.snapshot()["a"]["state"] == "rate limited"
    clock.now += waits
    assert health.order(HOSTS, BLOB) == [0, 1, 2]


def test_what_a_header_says_of_the_limit(health: Health) -> None:
    health.note_limit("a", 7, 0.0)
    health.note_limit("b", None, 20.0)
    assert health.snapshot()["a"]["remaining"] == 7
    assert health.limited_for("a") == 0
    assert health.limited_for("b") == 20


def test_lies_count_for_the_blob_at_once_and_for_all_after_three(health: Health, clock: Clock) -> None:
    health.note_lie("a", BLOB, "wrong")
    assert health.order(HOSTS, BLOB) == [1, 2, 0]
    assert health.order(HOSTS, "other") == [0, 1, 2]
    health.note_error("a", "other", DigestMismatch("it", "x", "y"))
    health.note_lie("a", "third", "wrong")
    assert health.order(HOSTS, "fourth") == [1, 2, 0]
    assert health.snapshot()["a"]["state"] == "distrusted"
    clock.now += 601
    assert health.order(HOSTS, "fourth") == [0, 1, 2]


def test_a_dead_host_comes_behind_one_that_lied_about_the_blob(health: Health) -> None:
    """Lies cost another fetch, a dead host costs seconds."""
    health.note_lie("a", BLOB, "wrong")
    health.note_error("b", BLOB, RegistryTimeout("b", "x"))
    assert health.order(["a", "b"], BLOB) == [0, 1]


def test_the_sources_of_a_wrong_blob(health: Health) -> None:
    health.note_body("a", BLOB, 10, 0.1)
    assert health.blame(BLOB, "wrong") == ["a"]
    health.note_body("b", BLOB, 10, 0.1)
    health.note_body("c", BLOB, 10, 0.1)
    assert health.blame(BLOB, "wrong") == ["b", "c"]
    assert not health.all_condemned(BLOB, HOSTS)  # b or c, nobody knows
    for host in ("b", "c"):
        health.note_body(host, BLOB, 10, 0.1)
        health.blame(BLOB, "wrong")
    assert health.all_condemned(BLOB, HOSTS)
    health.pardon(BLOB, HOSTS)
    assert [health.snapshot()[host]["lies"] for host in HOSTS] == [0, 0, 0]
    assert health.all_condemned(BLOB, HOSTS)
    health.reopen(BLOB)
    assert not health.all_condemned(BLOB, HOSTS)


def test_one_source_that_never_lied_keeps_the_others_guilty(health: Health) -> None:
    for host in ("a", "b"):
        health.note_lie(host, BLOB, "wrong")
    health.pardon(BLOB, HOSTS)
    assert health.snapshot()["a"]["lies"] == 1
    assert not health.all_condemned(BLOB, HOSTS)


def test_slow_is_relative_to_the_others(health: Health) -> None:
    assert health.floor(["b"]) == 16 << 10
    health.note_body("b", BLOB, 8_000_000, 1.0)
    assert health.floor(["b", "c"]) == 1_000_000
    health.note_body("b", BLOB, 10, 1.0)  # says nothing
    assert health.floor(["b", "c"]) == 1_000_000


def test_what_is_remembered_is_bounded(health: Health) -> None:
    for number in range(6000):
        health.note_lie(f"host{number}", f"blob{number}", "wrong")
    assert len(health.snapshot()) == 1024
    assert len(health._things) == 4096


@given(st.lists(st.tuples(st.sampled_from(HOSTS), st.integers(0, 6), st.floats(0, 100)), max_size=60))
def test_whatever_happens_each_host_is_asked_once_or_is_limited(events: list[tuple[str, int, float]]) -> None:
    clock = Clock()
    health = Health(clock=clock)
    errors: list[LazyfsError] = [
        RegistryTimeout("x", "x"),
        BadAnswer("x", "x"),
        BlobMissing("x", "x"),
        TooManyRequests("x", "x", retry_after=5.0),
        DigestMismatch("x", "y", "z"),
    ]
    for host, event, seconds in events:
        if event < len(errors):
            health.note_error(host, BLOB, errors[event])
        elif event == 5:
            health.note_done(host)
        clock.now += seconds
        order = health.order(HOSTS, BLOB)
        limited = [i for i, name in enumerate(HOSTS) if health.limited_for(name)]
        assert sorted(order + limited) == [0, 1, 2]


# -- telling


def hop(status: int, host: str = "a", retry_after: float = 0.0) -> Hop:
    return Hop("blob", host, "it", status, 0.0, 0.0, 0, retry_after)


def test_each_host_that_limits_is_told_once() -> None:
    hops: list[Hop] = []
    said: list[str] = []
    teller = LimitTeller(hops.append, said.append)
    for each in (hop(200), hop(429, retry_after=12.0), hop(429), hop(503), hop(429, "b")):
        teller(each)
    assert len(hops) == 5
    assert said == [sentence("a", 12.0), sentence("b", 0.0)]
    assert "a limits" in said[0] and "12 s" in said[0] and "login" in said[0]
    teller(hop(429, "c", 2000.0))  # nobody sits that out: the error tells, or another source answers
    assert len(said) == 2
    assert teller.remarks == [sentence("c", 2000.0)]
