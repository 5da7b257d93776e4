"""The daemons that died: which of them crashed, whether that is a loop, and how long the next one has to wait.

The standard library alone, and what imports nothing else: the holder imports this, and must outlive everything else.
"""

from __future__ import annotations

import signal

from lazyfs.limits import CRASH_LOOP, CRASH_LOOP_WITHIN, HOPELESS_CRASHES, LONGEST_PAUSE, MANY_CRASHES
from lazyfs.mount.children import Child, oom_kills, reap

_PAUSE = 0.1  # seconds before the next one where one could not start, doubled each time


class Deaths:
    """What a holder remembers of them. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._crashes: list[float] = []
        self._oom_kills = oom_kills()  # of the machine, when a daemon died last
        self._dying: dict[int, float] = {}  # dead processes, some of whose threads may be left; when it seemed a crash
        self._failures = 0  # in a row, before they served

    @property
    def dying(self) -> set[int]:
        """The processes that are dead and not gone: some of their threads may be left."""
        return set(self._dying)

    def add_dying(self, pid: int) -> None:
        """Remember a process that is to be taken away, whatever it died of."""
        self._dying[pid] = 0.0

    def served(self) -> None:
        """Note that a daemon came to serve."""
        self._failures = 0

    def is_loop(self, now: float) -> bool:
        """Tell whether so many daemons crashed lately that what they were at may be to blame."""
        return len([at for at in self._crashes if at > now - CRASH_LOOP_WITHIN]) >= CRASH_LOOP

    def note(self, child: Child, now: float) -> float | None:
        """Note that the daemon that served has died. Return the seconds until the next one; None: it is hopeless."""
        before, self._oom_kills = self._oom_kills, oom_kills()
        self._crashes = [at for at in self._crashes if at > now - CRASH_LOOP_WITHIN]
        if child.signal != signal.SIGKILL or self._oom_kills != before:
            self._crashes.append(now)  # no request makes a daemon die by somebody's hand
        if child.pid and self._oom_kills == before:
            self._dying[child.pid] = now
        self._failures = 0 if child.serving else self._failures + 1
        if self._failures >= HOPELESS_CRASHES:
            return None
        again = max(self._failures, len(self._crashes) - MANY_CRASHES)  # one that serves and crashes at once
        return 0.0 if again <= 0 else min(_PAUSE * 2.0**again, LONGEST_PAUSE)

    def reap(self) -> None:
        """Take away who has gone, and look again at what seemed a crash: now it is known what ended it."""
        for pid in list(self._dying):
            number = reap(pid)
            if number is not None:
                crash = self._dying.pop(pid)
                if number == signal.SIGKILL and crash in self._crashes:
                    self._crashes.remove(crash)
