"""Who used the machine's processors between two looks, and for how long they had nothing to do. From /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")  # a second
_IDLE = (3, 4)  # places in /proc/stat: idle, and idle while a disk is waited for
_STOLEN = 7  # what the host of a virtual machine gave to others
_FIELDS = 8


@dataclass(frozen=True, slots=True)
class Process:
    """Ticks of one process and of those children that ended and were waited for."""

    parent: int
    own: int
    waited_for: int


@dataclass(frozen=True, slots=True)
class Look:
    """All processes, and the machine's ticks since its start by kind."""

    processes: Mapping[int, Process]
    machine: tuple[int, ...]


def look() -> Look:
    """Look at all processes. Blocking, some milliseconds."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1 : 1 + _FIELDS]
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(") ")[2].split()
                own, waited_for = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
                found[int(entry)] = Process(int(fields[1]), own, waited_for)
    return Look(found, tuple(map(int, words)))


def idle_share(before: Look, after: Look) -> float:
    """Return which part of the processors' time was idle."""
    spent = _spent(before, after)
    return sum(spent[place] for place in _IDLE) / max(1, sum(spent))


def busy_seconds(before: Look, after: Look) -> float:
    """Return the processor seconds that anybody on this machine used."""
    spent = _spent(before, after)
    return (sum(spent) - sum(spent[place] for place in (*_IDLE, _STOLEN))) / _TICK


def stolen_seconds(before: Look, after: Look) -> float:
    """Return the processor seconds that this machine would have used, had its host not given them to others."""
    return _spent(before, after)[_STOLEN] / _TICK


def used_seconds(before: Look, after: Look, roots: Iterable[int]) -> float:
    """Return the processor seconds of these processes, and of children that were waited for meanwhile."""
    return sum(_ticks(before, after, pid) for pid in roots) / _TICK


def below(found: Look, roots: Iterable[int]) -> set[int]:
    """Return the processes that descend from these, without them."""
    start = set(roots)
    known = set(start)
    while True:
        more = {pid for pid, process in found.processes.items() if process.parent in known} - known
        if not more:
            return known - start
        known |= more


def _spent(before: Look, after: Look) -> tuple[int, ...]:
    return tuple(later - earlier for earlier, later in zip(before.machine, after.machine, strict=True))


def _ticks(before: Look, after: Look, pid: int) -> int:
    then, now = before.processes.get(pid), after.processes.get(pid)
    if now is None:
        return 0
    return now.own + now.waited_for - (then.own + then.waited_for if then else 0)
