"""A memory cgroup of a test's own, of either version.

with memory_group(4 << 20) as group:
    group.take(pid)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")
_PATIENCE = 10.0  # seconds for the kernel to let go of an empty group


class MemoryGroup:
    """A group whose members may take `limit` bytes together before the kernel kills one."""

    def __init__(self, path: Path, limit: int, *, old: bool) -> None:
        self._path = path
        self._old = old
        (path / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))

    def take(self, pid: int) -> None:
        """Have a process in the group; what it has already counts where it was."""
        (self._path / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """Return how many members the kernel has killed."""
        facts = self._path / ("memory.oom_control" if self._old else "memory.events")
        words = dict(line.split() for line in facts.read_text().splitlines())
        return int(words.get("oom_kill", 0))


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """Yield a group of `limit` bytes. It goes with the `with`; whoever is in it then goes back to the top."""
    old = (_TOP / "memory" / "memory.limit_in_bytes").exists()
    top = _TOP / "memory" if old else _TOP
    if not old:
        with contextlib.suppress(OSError):  # it is on already, or a process in the top group forbids it
            (top / "cgroup.subtree_control").write_text("+memory")
    path = top / f"lazyfs-test-{os.getpid()}"
    path.mkdir()
    try:
        yield MemoryGroup(path, limit, old=old)
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it ended meanwhile
                (top / "cgroup.procs").write_text(pid)
        _remove(path)


def _remove(path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
