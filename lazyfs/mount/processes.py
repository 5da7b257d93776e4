"""A client's process, beyond the connection that it had: known again, and waited for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio


@dataclass(frozen=True, slots=True)
class Process:
    """A process. `began`: ticks since the machine's start, which tell it from a later one of the same number."""

    pid: int
    began: int


def find(pid: int) -> Process | None:
    """Return a process that is there, None where it isn't. Reads /proc, which doesn't block."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            fields = handle.read().rpartition(b")")[2].split()
        return Process(pid, int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


async def wait(process: Process) -> None:
    """Return when a process has ended. A checkpoint; no deadline: it may live for weeks."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        await trio.lowlevel.checkpoint()
        return
    try:
        if find(process.pid) == process:
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
