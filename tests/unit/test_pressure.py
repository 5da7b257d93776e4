"""Under memory pressure the cache of chunks gives way, never below its least, and grows back when there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from lazyfs.chunks.memory import MemoryCache
from lazyfs.mount import pressure
from lazyfs.mount.pressure import LEAST, Pressure, Sources, find_sources
from lazyfs.units import MiB

WHOLE = 24 * MiB


class Machine:
    """A kernel's files, a cache and the watcher between them. Times in seconds, stalls in µs."""

    def __init__(self, place: Path, bound: int = WHOLE) -> None:
        self.group = place / "cgroup/system.slice/lazyfsd.service"
        self.proc = place / "proc"
        for directory in (self.group, self.proc / "self", self.proc / "pressure"):
            directory.mkdir(parents=True)
        (self.proc / "self/cgroup").write_text("1:name=x:/y\n0::/system.slice/lazyfsd.service\n")
        self.ours = self.all = self.events = 0
        self.tell()
        self.cache = MemoryCache(bound)
        for number in range(40):
            self.cache.put((1, number), bytes(500_000))
        self.now = 100.0
        self.watched = Pressure(self.cache, find_sources(self.proc, place / "cgroup"), self.now)

    def tell(self) -> None:
        line = "avg10=0.00 avg60=0.00 avg300=0.00 total="
        text = "some {0}{1}\nfull {0}{2}\n"
        (self.group / "memory.pressure").write_text(text.format(line, self.ours, 0))
        (self.proc / "pressure/memory").write_text(text.format(line, 10 * self.all + 5_000_000, self.all))
        (self.group / "memory.events").write_text(f"low 9\nhigh {self.events}\nmax 0\noom 0\noom_kill 0\n")

    def look(self, *, ours: int = 0, all_: int = 0, events: int = 0) -> bool:
        """Two seconds later, in which so much happened."""
        self.ours, self.all, self.events = self.ours + ours, self.all + all_, self.events + events
        self.tell()
        self.now += 2.0
        return self.watched.look(self.now)


@pytest.mark.parametrize("told", [{"ours": 300_000}, {"all_": 150_000}, {"events": 1}])
def test_each_kind_of_pressure_halves_the_bound_down_to_the_least(tmp_path: Path, told: dict[str, int]) -> None:
    machine = Machine(tmp_path)
    assert not machine.look(ours=100_000, all_=50_000)  # a little is none
    assert machine.cache.bound == WHOLE
    assert machine.look(**told)
    assert machine.cache.bound == WHOLE // 2 >= machine.cache.statistics().size
    assert machine.look(**told)
    assert machine.cache.bound == LEAST
    assert not machine.look(**told)
    assert machine.cache.bound == LEAST
    assert machine.cache.put((2, 0), bytes(MiB))  # the usual chunk still finds room


def test_it_grows_back_slowly_and_no_further_than_it_was(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.look(events=1)
    bounds = []
    for _ in range(100):
        machine.look()
        bounds.append(machine.cache.bound)
    assert bounds == sorted(bounds) and bounds[-1] == WHOLE
    assert bounds[13] == WHOLE // 2 < bounds[14]  # 30 s later
    assert bounds[14] <= WHOLE * 5 // 8 + 1
    for _ in range(20):
        machine.look()
    machine.look(events=1)
    machine.look()
    assert machine.cache.bound == WHOLE // 2


def test_a_cache_below_the_least_stays_as_it_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path, bound=MiB)
    assert not machine.look(events=1)
    assert machine.cache.bound == MiB


@pytest.mark.parametrize("text", ["", "some\n", "full avg10=x total=-5\n", "full total=" + "9" * 400, "\xff"])
def test_without_anything_to_read_nothing_happens(tmp_path: Path, text: str) -> None:
    cache = MemoryCache(WHOLE)
    found = find_sources(tmp_path, tmp_path)
    assert (found.ours, found.events) == (None, None)
    file = tmp_path / "file"
    for sources in (found, Sources(None, None, None), Sources(file, file, file)):
        watched = Pressure(cache, sources, 0.0)
        file.write_text(text)
        assert not watched.look(2.0)
        file.unlink()
        assert not watched.look(4.0)
    assert cache.bound == WHOLE


def test_the_group_above_counts_where_the_daemons_own_does_not(tmp_path: Path) -> None:
    """The holder gives lazyfsd a group of its own within the unit's, which has the bounds."""
    machine = Machine(tmp_path)
    (machine.group / "daemon").mkdir()
    (machine.group / "daemon/memory.pressure").write_text("some total=0\n")  # every group has one
    (machine.proc / "self/cgroup").write_text("0::/system.slice/lazyfsd.service/daemon\n")
    found = find_sources(machine.proc, tmp_path / "cgroup")
    assert (found.ours, found.events) == (machine.group / "memory.pressure", machine.group / "memory.events")
    (machine.proc / "self/cgroup").write_text("0::/system.slice/../lazyfsd.service\n")
    assert find_sources(machine.proc, tmp_path / "cgroup").events is None


async def test_the_watcher_sees_it_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path)
    monkeypatch.setattr(pressure, "_LOOK", 0.01)
    monkeypatch.setattr(pressure, "find_sources", lambda: find_sources(machine.proc, tmp_path / "cgroup"))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pressure.watch, machine.cache)
            while machine.cache.bound > LEAST:
                await trio.sleep(0.02)
                machine.events += 1
                machine.tell()
            nursery.cancel_scope.cancel()
