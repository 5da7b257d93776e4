"""What whole layers may take of a host: how many are unpacked at a time, and how many connections they add.

Each layer that is fetched whole has one connection of its own. More make it faster where the link is long or the server
slow; they are lent one by one, never the last two of a host, and not while a reader of another image waits.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK = 0.25  # seconds between two looks whether somebody still wants what waits for its turn
_LEAST = 2  # layers side by side at least: one decodes while the other's bytes come


class Lines:
    """Places and connections by host. Thread-safe."""

    def __init__(self, connections: int, processors: int | None = None) -> None:
        """`connections`: what one host may have at a time. `processors`: None for this machine's."""
        cores = processors or len(os.sched_getaffinity(0))
        self._most = connections - 2
        self._places = max(_LEAST, min(cores + 1, self._most))
        self._changed = threading.Condition()
        self._unpacking: Counter[str] = Counter()
        self._lent: Counter[str] = Counter()
        self._waiting: dict[str, list[tuple[int, int]]] = {}
        self._sequence = 0
        self._read_from: frozenset[str] = frozenset()

    @contextmanager
    def place(self, host: str, size: int, alive: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold one of the host's places for unpacking a layer of `size` bytes; the largest that waits comes first.

        Blocks while other layers of the host are being unpacked, each of which has deadlines of its own. `alive` is
        called now and then meanwhile; what it raises ends the wait.
        """
        with self._changed:
            self._sequence += 1
            mine = -size, self._sequence
            queue = self._waiting.setdefault(host, [])
            heapq.heappush(queue, mine)
            try:
                while self._unpacking[host] >= self._places or queue[0] != mine:
                    self._changed.wait(_LOOK)
                    alive()
            finally:
                queue.remove(mine)
                heapq.heapify(queue)
                self._changed.notify_all()
            self._unpacking[host] += 1
        try:
            yield
        finally:
            with self._changed:
                self._unpacking[host] -= 1
                self._changed.notify_all()

    def take(self, host: str) -> bool:
        """Take one more connection to a host, to be given back. False: it has enough, or a reader waits for it."""
        with self._changed:
            if host in self._read_from or self._unpacking[host] + self._lent[host] >= self._most:
                return False
            self._lent[host] += 1
            return True

    def give_back(self, host: str) -> None:
        """Give one connection back."""
        with self._changed:
            self._lent[host] -= 1

    def is_calm(self, host: str) -> bool:
        """Tell whether no reader waits for the host, so that connections may be kept."""
        return host not in self._read_from

    def set_readers(self, host: str, *, waiting: bool) -> None:
        """Tell whether readers of images that are mounted already wait for the host."""
        with self._changed:
            self._read_from = self._read_from | {host} if waiting else self._read_from - {host}
