"""Disk space held back, so that records can be removed on a full disk: removing is what frees it."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

SIZE = 1 << 20  # bytes: the database writes some tens of them for a removal, in pages


class Reserve:
    """A file of SIZE bytes beside the database. Not thread-safe: the store's lock is around it. Raises nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = False
        self.hold()

    def hold(self) -> None:
        """Take the space, where it isn't held and there is some."""
        if self._held:
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        try:
            os.posix_fallocate(fd, 0, SIZE)
            self._held = True
        except OSError as error:
            log.info("no space is held back for removals: %s", error.strerror)
        finally:
            os.close(fd)
        if not self._held:
            self.release()

    def release(self) -> None:
        """Give the space back to the disk."""
        self._held = False
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
