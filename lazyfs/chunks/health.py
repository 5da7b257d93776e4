"""Whether the cache disk is worth asking. A full or failing disk is passed by for a while; reads never notice."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

RETRY_AFTER = 10.0  # seconds without a write after one that failed
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO})


class DiskHealth:
    """The state "passed by": entered by a failed write, left by the next one that works. Thread-safe, never blocks."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._retry_at = 0.0
        self.reason = ""  # why writes are passed by; empty: they are not
        self.failures = 0  # writes that failed
        self.passed_by = 0  # writes that were not tried

    def may_write(self) -> bool:
        """Tell whether to try a write now. False is counted as a write passed by."""
        if not self.reason:
            return True
        with self._lock:
            now = self._monotonic()
            if now >= self._retry_at:
                self._retry_at = now + RETRY_AFTER  # one writer tries, the others go on passing by
                return True
            self.passed_by += 1
            return False

    def failed(self, error: OSError) -> None:
        """Note a failed write. Only errors of the disk as a whole make it passed by; logged once a change of state."""
        with self._lock:
            self.failures += 1
            if error.errno not in _DISK:
                log.info("a chunk could not be written to the cache: %s", error.strerror or error)
                return
            self._retry_at = self._monotonic() + RETRY_AFTER
            reason = os.strerror(error.errno)
            if self.reason != reason:
                self.reason = reason
                log.warning("the cache is passed by, reads are served from memory: %s", reason)

    def worked(self) -> None:
        """Note a write that worked."""
        if self.reason:
            with self._lock:
                if self.reason:
                    self.reason = ""
                    log.warning("the cache disk takes writes again")
