"""Facts about the machine that a measurement was taken on, and when, to stand beside its figures."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """Return CPU model, cores, memory (bytes), kernel, Python and date; "" or 0 where /proc does not tell."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(_field("/proc/meminfo", "MemTotal").split()[0] or 0) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": now(),
    }


def now() -> str:
    """Return the time of day, UTC, to the second (ISO 8601)."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and of its children, those that ended and those that run."""
    ticks = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(") ")[2].split()
                if int(entry) == pid:
                    ticks += sum(map(int, fields[11:15]))  # user, system, and both of children that were waited for
                elif int(fields[1]) == pid:
                    ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def caches_dropped() -> int:
    """Return how often somebody made the kernel drop its caches since it started, of pages or of names."""
    names = ("drop_pagecache ", "drop_slab ")
    return sum(int(line.split()[1]) for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith(names))


def _field(path: str, name: str) -> str:
    try:
        text = Path(path).read_text()
    except OSError:
        return "0"
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0"
