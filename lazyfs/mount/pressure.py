"""Memory is short: the cache of decoded chunks gives way, and grows back once there is room again.

What the kernel tells (Documentation/accounting/psi.rst, Documentation/admin-guide/cgroup-v2.rst): how long tasks of our
own cgroup stalled for want of memory, how long all of the node's did, and how often our cgroup went over `memory.high`
or met `memory.max`. A neighbour that thrashes under a limit of its own is no reason, so of the node only that counts
which stalls all tasks at once. Kernels without all this tell nothing, and then nothing happens.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from lazyfs.chunks.memory import MemoryCache
from lazyfs.limits import MAX_PRESSURE_FILE
from lazyfs.mount import heap
from lazyfs.units import MiB, format_size

log = logging.getLogger(__name__)

LEAST = 6 * MiB  # bytes that the cache keeps: a chunk of 1 MiB is still below the quarter that it takes, see memory.py
_LOOK = 2.0  # seconds between two looks
_OURS = 0.1  # of that time: our tasks stalled so long at least
_ALL = 0.05  # of that time: all tasks of the node did
_CALM = 30.0  # seconds without pressure before the cache grows
_STEPS = 8  # in which it grows back to its whole size, a step every _CALM / 3
_TOTAL = re.compile(r"^(some|full) [^\n]*\btotal=(\d{1,19})$", re.MULTILINE)  # µs
_EVENT = re.compile(r"^(?:high|max) (\d{1,19})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sources:
    """The kernel's files; None: there is none."""

    node: Path | None  # /proc/pressure/memory
    ours: Path | None  # memory.pressure of our cgroup, or of the nearest above it that has a bound on memory
    events: Path | None  # its memory.events


def find_sources(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Sources:
    """Return where this machine tells of pressure. Blocking, shortly."""
    node = proc / "pressure/memory"
    group = re.search(r"^0::/(.+)$", _read(proc / "self/cgroup"), re.MULTILINE)
    parts = group[1].split("/") if group else [".."]
    for root in (cgroups, cgroups / "unified") if ".." not in parts else ():
        # The group that accounts for our memory: under systemd that of the unit, and the daemon's own is within it.
        for depth in range(len(parts), 0, -1):
            directory = root.joinpath(*parts[:depth])
            if (directory / "memory.events").exists():
                return Sources(node, directory / "memory.pressure", directory / "memory.events")
    return Sources(node, None, None)


class Pressure:
    """Sets the bound of a memory cache by what the kernel tells. Not thread-safe; `look` reads three small files."""

    def __init__(self, cache: MemoryCache, sources: Sources, now: float) -> None:
        """`now` is time.monotonic(), as in `look`. The cache's bound of this moment is what it grows back to."""
        self._cache = cache
        self._sources = sources
        self._whole = cache.bound
        self._least = min(LEAST, cache.bound)
        self._looked = now
        self._calm_since = now
        self._before = self._told()

    def look(self, now: float) -> bool:
        """Halve the bound if there was pressure since the last look, else let it grow by a step when its time has come.

        Never below LEAST. Tell whether it was made smaller.
        """
        told, before, seconds = self._told(), self._before, now - self._looked
        self._before, self._looked = told, now
        if _is_short(before, told, seconds):
            self._calm_since = now
            smaller = max(self._least, self._cache.bound // 2)
            if smaller >= self._cache.bound:
                return False
            self._cache.resize(smaller)
            log.info("memory is short: the cache of chunks has %s now", format_size(smaller))
            return True
        if self._cache.bound < self._whole and now - self._calm_since >= _CALM:
            self._calm_since = now - _CALM * 2 / 3
            self._cache.resize(min(self._whole, self._cache.bound + self._whole // _STEPS + 1))
        return False

    def _told(self) -> dict[str, int]:
        """Return the kernel's counters of this moment, those that there are."""
        found = {}
        for name, path, kind in (("ours", self._sources.ours, "some"), ("all", self._sources.node, "full")):
            totals: dict[str, str] = dict(_TOTAL.findall(_read(path)))
            if kind in totals:
                found[name] = int(totals[kind])
        events = _EVENT.findall(_read(self._sources.events))
        if events:
            found["events"] = sum(map(int, events))
        return found


def _is_short(before: dict[str, int], now: dict[str, int], seconds: float) -> bool:
    grown = {name: now[name] - before[name] for name in now.keys() & before.keys()}
    most = seconds * 1e6
    return grown.get("events", 0) > 0 or grown.get("ours", 0) > _OURS * most or grown.get("all", 0) > _ALL * most


def _read(path: Path | None) -> str:
    """Return a file of the kernel's, "" for one that isn't there: cgroups come and go, and PSI can be switched off."""
    if path is None:
        return ""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(MAX_PRESSURE_FILE).decode("ascii", "replace")
    except OSError:
        return ""


async def watch(cache: MemoryCache) -> None:
    """Keep the cache's bound in line with what memory there is. Runs until cancelled; reads in threads."""
    sources = await trio.to_thread.run_sync(find_sources)
    watched = Pressure(cache, sources, time.monotonic())
    while True:
        await trio.sleep(_LOOK)
        if await trio.to_thread.run_sync(watched.look, time.monotonic()):
            await trio.to_thread.run_sync(heap.trim)
