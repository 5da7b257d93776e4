"""When to try again: temporary errors only, with growing pauses and jitter, never beyond the deadline."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lazyfs.errors import RegistryError, RegistryFault, TooManyRequests
from lazyfs.registry.http.rate_limits import sentence

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` in all; pauses start at `first` seconds, double up to `longest`, and half of each is random."""

    attempts: int = 5
    first: float = 0.1
    longest: float = 10.0
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform

    def run(self, action: Callable[[], T], deadline: float) -> T:
        """Return what `action` returns. Blocks. Raise its last error when that is permanent or time is up.

        A Retry-After of the registry is honoured: when it lies beyond the deadline the error is raised at once.
        """
        pause = self.first
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except RegistryError as error:
                if not error.temporary or attempt == self.attempts:
                    raise
                wait = self.uniform(pause / 2, pause)
                if isinstance(error, (TooManyRequests, RegistryFault)):
                    wait += error.retry_after
                if time.monotonic() + wait >= deadline:
                    raise
                if isinstance(error, TooManyRequests):
                    log.warning("%s", sentence(error.host, wait))
                log.info("attempt %d of %d failed, next in %.2f s: %s", attempt, self.attempts, wait, error)
            self.sleep(wait)
            pause = min(pause * 2, self.longest)
        raise AssertionError("unreachable: the last attempt returns or raises")
