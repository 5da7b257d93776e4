"""What a daemon leaves to the next one: whole after any end, and never without bound."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.mount import inheritance
from lazyfs.mount.inheritance import Inheritance

NAMES = st.sampled_from(["mount:a", "mount:b", "chain:c", "logins:0"])
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3)
CHANGES = st.lists(st.tuples(NAMES, st.none() | VALUES), max_size=30)


def apply(to: Inheritance, changes: list[tuple[str, dict[str, str] | None]]) -> dict[str, Any]:
    expected: dict[str, Any] = {}
    for name, value in changes:
        if value is None:
            to.remove(name)
            expected.pop(name, None)
        else:
            to.put(name, value)
            expected[name] = value
    return expected


@given(before=CHANGES, after=CHANGES, cut=st.integers(0, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_next_one_has_all_that_was_written_to_its_end(
    memory: int,
    before: list[tuple[str, dict[str, str] | None]],
    after: list[tuple[str, dict[str, str] | None]],
    cut: int,
) -> None:
    os.ftruncate(memory, 0)
    os.ftruncate(memory, 4096)
    expected = apply(Inheritance(memory), before)
    whole = os.fstat(memory).st_size
    # Killed in the midst of one more line: it is as if that had not begun.
    os.pwrite(memory, b'{"put": "mount:z", "value": {"half": "of it"}}'[:cut], whole)
    second = Inheritance(memory)
    assert second.values("") == expected
    for name, value in after:
        second.put(name, value) if value is not None else second.remove(name)
    assert Inheritance(memory).values("") == second.values("")
    assert second.values("mount:") == {k: v for k, v in second.values("").items() if k.startswith("mount:")}


@given(before=CHANGES, after=CHANGES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_who_follows_sees_each_change_and_writes_nothing(
    memory: int,
    before: list[tuple[str, dict[str, str] | None]],
    after: list[tuple[str, dict[str, str] | None]],
) -> None:
    os.ftruncate(memory, 0)
    os.ftruncate(memory, 4096)
    ours = Inheritance(memory)
    apply(ours, before)
    size = os.fstat(memory).st_size
    standby = Inheritance(memory, follows=True)
    assert standby.values("") == ours.values("") and not standby.look() and os.fstat(memory).st_size == size
    apply(ours, after)
    assert standby.look() == (os.fstat(memory).st_size != size)
    assert standby.values("") == ours.values("")
    standby.own()
    standby.put("mount:last", {})
    assert Inheritance(memory, follows=True).values("") == {**ours.values(""), "mount:last": {}}


def test_lines_that_are_out_of_date_are_given_back(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inheritance, "_SLACK", 64 * 1024)
    ours = Inheritance(memory)
    ours.put("mount:stays", {"it": "is"})
    for number in range(2000):
        ours.put("chain:x", {"number": number, "padding": "x" * 500})
    assert os.fstat(memory).st_blocks * 512 < 256 * 1024  # of a megabyte that was written
    assert Inheritance(memory).values("") == {
        "mount:stays": {"it": "is"}, "chain:x": {"number": 1999, "padding": "x" * 500}
    }  # fmt: skip


def test_the_board_outlives_who_wrote_on_it(memory: int) -> None:
    ours = Inheritance(memory)
    assert ours.trial() == (0, 0, 0)
    ours.set_trial(7 << 40 | 3, 4096, 2)
    assert Inheritance(memory).trial() == (7 << 40 | 3, 4096, 2)


def test_without_a_holder_nothing_is_left() -> None:
    ours = Inheritance(None)
    ours.put("mount:a", {})
    ours.set_trial(5)
    assert ours.values("mount:") == {"mount:a": {}} and ours.trial() == (0, 0, 0)
