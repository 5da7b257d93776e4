"""Keep the store within its bound: least recently used segments go first, pinned layers stay.

What nobody has asked for yet (background, prefetch) is spare: it is kept up to the low-water mark, and pushes out only
segments of layers that nobody uses. So it never costs a reader what he has read, however small the disk.

A segment's chunks are forgotten before their blocks are freed, so that nobody is promised bytes that are going. Whoever
reads at that moment sees a miss: the hash decides, not the order of events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from lazyfs.chunks.layer_files import LayerFiles
from lazyfs.chunks.shape import SEGMENT
from lazyfs.errors import StoreError
from lazyfs.limits import ADMIT_TIMEOUT, EVICTION_TIMEOUT

log = logging.getLogger(__name__)

LOW_WATER = 0.9  # of the bound: where an eviction stops, and what is spare
SPARE_WATER = 0.8  # of the bound: where an eviction for the sake of what is spare stops
HOPELESS_FOR = 10.0  # seconds until an eviction that could free nothing is tried again
WHOLE_LAYER = -1
_RESERVE = SEGMENT // 16  # bytes for what the file system adds to a file (extent blocks), found at the next scan


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A segment that could go; WHOLE_LAYER: a layer directory without data. The least goes first."""

    last_use: int  # seconds since the epoch
    mounted: bool
    digest: str
    segment: int


class Shelf(Protocol):
    """What the evictor needs of the store."""

    def digests(self) -> list[str]: ...
    def borrow(self, digest: str) -> AbstractContextManager[LayerFiles | None]: ...
    def is_mounted(self, digest: str) -> bool: ...
    def used_elsewhere(self, digest: str) -> bool: ...
    def directory_usage(self, digest: str) -> int: ...
    def remove_layer(self, digest: str) -> bool: ...


class Budget:
    """The bytes that the store takes and may take: at most one segment over the bound. Thread-safe.

    `used` is an estimate between two scans, about the truth or above it.
    """

    def __init__(self, bound: int, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.bound = max(0, bound)
        self.used = 0
        self.written = 0  # bytes that were ever counted as written
        self.passed_by = 0  # writes not made for want of room
        self._monotonic = monotonic
        self._changed = threading.Condition()
        self._hopeless_until = 0.0
        self._spare_hopeless_until = 0.0
        self._spare_asked = 0  # bytes of a spare write that waits for an eviction
        self.wake: Callable[[], None] = lambda: None  # set by the evictor

    @property
    def over(self) -> bool:
        return self.used > self.bound

    @property
    def spare_bound(self) -> int:
        """Bytes in use up to which what is spare may be written."""
        return int(self.bound * LOW_WATER)

    def admit(self, size: int) -> bool:
        """Tell whether `size` bytes may be written now. Waits ADMIT_TIMEOUT at most for an eviction to make room."""
        limit = self.bound + SEGMENT - _RESERVE
        if self.used + size <= limit:
            return True
        self.wake()
        deadline = self._monotonic() + ADMIT_TIMEOUT
        with self._changed:
            while self.bound and self.used + size > limit:
                now = self._monotonic()
                if now >= deadline or now < self._hopeless_until or not self._changed.wait(deadline - now):
                    break
            if self.bound and self.used + size <= limit:
                return True
            self.passed_by += 1
            return False

    def admit_spare(self, size: int) -> bool:
        """Tell whether `size` bytes that nobody has asked for may be written now; if so, count them as written.

        Else `freed` takes them back. Waits ADMIT_TIMEOUT at most for an eviction of what nobody uses.
        """
        deadline = self._monotonic() + ADMIT_TIMEOUT
        asked = False
        while True:
            with self._changed:
                if self.used + size <= self.spare_bound:
                    self.used += size
                    self.written += size
                    return True
                now = self._monotonic()
                if not self.bound or now >= deadline or self._is_hopeless(now):
                    self.passed_by += 1
                    return False
                if asked:
                    self._changed.wait(deadline - now)
                    continue
                self._spare_asked = size
            asked = True
            self.wake()

    @property
    def takes_spare(self) -> bool:
        """Whether what is spare is likely to be kept: there is room, or an eviction may make it."""
        return self.bound > 0 and (self.used < self.spare_bound or not self._is_hopeless(self._monotonic()))

    def _is_hopeless(self, now: float) -> bool:
        return now < max(self._spare_hopeless_until, self._hopeless_until)

    def take_spare_asked(self) -> int:
        """Return how many bytes a spare write waits for, once; 0: none does."""
        with self._changed:
            asked, self._spare_asked = self._spare_asked, 0
            return asked

    def note_written(self, size: int) -> None:
        """Count bytes that were written; over the bound an eviction starts beside the caller."""
        with self._changed:
            self.used += size
            self.written += size
        if self.over:
            self.wake()

    def set_used(self, used: int, written: int) -> None:
        """Put the truth in place of the estimate; `written` as it was when the count of `used` began.

        What was written since then may be in that count or not: it is added, and the next count finds it once.
        """
        with self._changed:
            self.used = used + self.written - written
            self._changed.notify_all()

    def freed(self, size: int) -> None:
        """Count bytes that an eviction freed, and let waiting writers look again."""
        with self._changed:
            self.used = max(0, self.used - size)
            self._changed.notify_all()

    def set_hopeless(self) -> None:
        """Note that nothing more can be evicted: for a while writes don't wait and no eviction is tried."""
        with self._changed:
            self._hopeless_until = self._monotonic() + HOPELESS_FOR
            self._changed.notify_all()

    def set_spare_hopeless(self) -> None:
        """Note that all that is here is in use: for a while what is spare is passed by at once."""
        with self._changed:
            self._spare_hopeless_until = self._monotonic() + HOPELESS_FOR
            self._changed.notify_all()

    @property
    def hopeless(self) -> bool:
        return self._monotonic() < self._hopeless_until


class Evictor:
    """Frees least recently used segments until the low-water mark. One pass at a time, in a thread of its own."""

    def __init__(self, shelf: Shelf, budget: Budget, pinned: Callable[[], frozenset[str]]) -> None:
        self._shelf = shelf
        self._budget = budget
        self._pinned = pinned  # may raise StoreError: then nothing is evicted, for the pins are not known
        self._running = threading.Lock()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.rests = False  # another daemon evicts
        self.evicted = 0  # bytes freed since the start
        budget.wake = self.wake

    def wake(self) -> None:
        """Start a pass unless one is running or would be in vain. Doesn't block."""
        with self._start:
            if (
                self._closed
                or self.rests
                or self._budget.hopeless
                or (self._thread is not None and self._thread.is_alive())
            ):
                return
            thread = threading.Thread(target=self.run, name="lazyfs-evict", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: writes are passed by until there is one
                log.warning("no eviction can be started: %s", error)
                self._budget.set_hopeless()
                return
            self._thread = thread

    def close(self, timeout: float = EVICTION_TIMEOUT) -> None:
        """Start no more passes and wait `timeout` seconds at most for the running one, which stops early."""
        with self._start:
            self._closed = True
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def scan(self) -> int:
        """Count what the store takes on disk. Blocking: a few stats a layer. Return bytes."""
        written = self._budget.written
        used = sum(self._shelf.directory_usage(digest) for digest in self._shelf.digests())
        self._budget.set_used(used, written)
        return used

    def run(self) -> int:
        """Make one pass. Blocking. Return the bytes freed: 0 when the store is within its bound. Never raises."""
        with self._running:
            used, bound = self.scan(), self._budget.bound
            spare = self._budget.take_spare_asked() if used <= bound else 0
            if used <= bound and (not spare or used + spare <= self._budget.spare_bound):
                return 0
            target = int(bound * (SPARE_WATER if spare else LOW_WATER))
            try:
                pinned = self._pinned()
            except StoreError as error:
                log.warning("nothing is evicted while the pins are not known: %s", error)
                self._budget.set_hopeless()
                return 0
            freed = self._pass(pinned, lambda freed: self._budget.used <= target, idle=spare > 0)
            used = self.scan()
            if spare and used + spare > self._budget.spare_bound and not self._closed:
                log.info("the store takes %d bytes, all in use: what nobody has read yet is not kept", used)
                self._budget.set_spare_hopeless()
            elif used > bound and not self._closed:
                log.warning("the store takes %d bytes, the bound is %d", self._budget.used, self._budget.bound)
                self._budget.set_hopeless()
            return freed

    def free(self, size: int) -> int:
        """Free `size` bytes for something that the disk has no room for, whatever the bound. Blocking.

        Return the bytes freed, fewer where there is no more that may go. Never raises.
        """
        with self._running:
            try:
                pinned = self._pinned()
            except StoreError as error:
                log.warning("nothing is evicted while the pins are not known: %s", error)
                return 0
            return self._pass(pinned, lambda freed: freed >= size)

    def _pass(self, pinned: frozenset[str], enough: Callable[[int], bool], *, idle: bool = False) -> int:
        freed = 0
        for candidate in self._candidates(pinned, idle=idle):
            if enough(freed) or self._closed:
                break
            size = self._evict(candidate)
            freed += size
            self._budget.freed(size)
        self.evicted += freed
        return freed

    def _candidates(self, pinned: frozenset[str], *, idle: bool) -> Iterator[Candidate]:
        """`idle`: only of layers that nobody uses."""
        found: list[Candidate] = []
        for digest in self._shelf.digests():
            if digest in pinned:
                continue
            mounted = self._shelf.is_mounted(digest)
            if idle and (mounted or self._shelf.used_elsewhere(digest)):
                continue
            with self._shelf.borrow(digest) as files:
                segments = files.segments_with_data() if files is not None else []
                found += [Candidate(use, mounted, digest, segment) for segment, use in segments]
                if not segments and not mounted:
                    found.append(Candidate(files.last_use() if files else 0, mounted, digest, WHOLE_LAYER))
        found.sort()
        return iter(found)

    def _evict(self, candidate: Candidate) -> int:
        digest, freed, empty = candidate.digest, 0, True
        with self._shelf.borrow(digest) as files:
            if files is not None and candidate.segment != WHOLE_LAYER:
                freed = files.evict(candidate.segment)
                empty = files.disk_usage() == 0
        if empty and not self._shelf.is_mounted(digest):
            rest = self._shelf.directory_usage(digest)
            if self._shelf.remove_layer(digest):
                freed += rest
        return freed
