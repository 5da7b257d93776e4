"""`perf.soak`: what it calls a drift, what it can't tell, and what it finds left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perf import soak


@pytest.mark.parametrize(
    ("what", "values", "found"),
    [
        ("memory", [100] * 5, None),
        ("memory", [], None),
        ("memory", [100, 102, 98, 101, 99, 100], (101, -1.5)),
        ("memory", [100, 100, 105, 110, 120, 122], (100, 21)),
        ("fds", [44, 66, 50, 60, 66, 52], (55, -3)),
        ("fds", [40, 42, 44, 46, 48, 50], (41, 7)),
    ],
)
def test_drift_is_from_the_first_third_to_the_last(
    what: str, values: list[int], found: tuple[float, float] | None
) -> None:
    assert soak.drift(values, what) == found


def rounds(count: int = 9, **grow: int) -> list[dict[str, Any]]:
    """Return what so many rounds noted, in which what is named WHO_WHAT grew by so much each time."""
    start = {"memory": 8_000_000, "fds": 16, "threads": 4}
    return [
        {
            who: {what: base + number * grow.get(f"{who}_{what}", 0) for what, base in start.items()}
            for who in ("holder", "daemon", "spares")
        }
        for number in range(count)
    ]


def test_few_rounds_are_said_to_tell_nothing() -> None:
    (said,) = soak.leaks(rounds(5), calm=True)
    assert "nothing is known of any drift: 5 rounds" in said


@pytest.mark.parametrize("who", ["holder", "daemon", "spares"])
@pytest.mark.parametrize(("what", "step"), [("memory", 100_000), ("fds", 1), ("threads", 1)])
def test_what_grows_is_a_leak(who: str, what: str, step: int) -> None:
    grown = rounds(**{f"{who}_{what}": step})
    (said,) = soak.leaks(grown, calm=True)
    assert said.startswith(f"{what} of {who}: ")
    assert bool(soak.leaks(grown, calm=False)) == (who == "holder")  # the others' end with each kill


def test_what_stays_is_none() -> None:
    assert soak.leaks(rounds(), calm=True) == []
    assert soak.leaks(rounds(holder_memory=-1000, daemon_memory=10_000), calm=True) == []  # 0.75 %


def test_what_a_daemon_that_shows_nothing_does_not_have_is_a_stranger(tmp_path: Path) -> None:
    assert soak.strangers(tmp_path) == []
    for name in ("mnt", "erofs", "attached"):
        (tmp_path / name).mkdir()
    for name in ("lazyfsd.sock", "lazyfsd.log", "holder.lock"):
        (tmp_path / name).touch()
    assert soak.strangers(tmp_path) == []
    (tmp_path / "erofs/tree").mkdir()
    (tmp_path / "attached/record.json").touch()
    (tmp_path / "solo-1.sock").touch()
    assert soak.strangers(tmp_path) == ["attached/record.json", "erofs/tree", "solo-1.sock"]


@pytest.mark.parametrize(
    ("evicted", "count", "code"), [(1, 9, 0), (0, 9, 1), (1, 5, 1)], ids=["good", "nothing-evicted", "short"]
)
def test_the_end_is_1_where_nothing_was_shown(
    evicted: int, count: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "run", lambda *_, **__: (soak.Tally(rounds=count, evicted=evicted), rounds(count)))
    monkeypatch.setattr("sys.argv", ["soak"])
    assert soak.main() == code
    assert '"what": "soak"' in capsys.readouterr().out
