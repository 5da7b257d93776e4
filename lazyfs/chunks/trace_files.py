"""The files of a node's traces: what it has learned of images, and the starts that somebody recorded.

    <root>/traces/<manifest hex>      what starts of an image read, as this node learned it
    <root>/traces/records/<name>      one recorded start each

Nothing is believed of what lies there. Both directories are bounded; the files that were used longest ago go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from pathlib import Path
from uuid import uuid4

from lazyfs import digest as digests
from lazyfs.chunks.private_files import OwnedFd, open_directory, open_root, read_whole, replace_file, translate
from lazyfs.errors import LazyfsError, TraceInvalid
from lazyfs.format import trace as traces
from lazyfs.format.trace import Trace
from lazyfs.limits import MAX_RECORDS, MAX_TRACE, MAX_TRACE_BYTES, MAX_TRACE_FILES

log = logging.getLogger(__name__)

_DIRECTORY, _RECORDS = "traces", "records"


class TraceFiles:
    """A store's traces. Thread-safe; every call blocks on the local disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def load(self, manifest: str) -> Trace | None:
        """Return what is known of an image's starts, None where that is nothing. Never raises.

        A file that is damaged, or of another image, is removed.
        """
        try:
            directory = self._open(create=False)
            if directory is None:
                return None
            name = digests.hex_of(manifest)
            raw = read_whole(directory, name, MAX_TRACE)
            if raw is None:
                self._remove(directory, name)  # too large, a link, or none at all
                return None
            try:
                found = traces.decode(raw)
                if found.manifest != manifest:
                    raise TraceInvalid(f"it is of {found.manifest}")
            except TraceInvalid as error:
                log.warning("the learned trace of %s is removed: %s", manifest, error)
                self._remove(directory, name)
                return None
            with contextlib.suppress(OSError):  # a disk that is read-only keeps it as it is
                os.utime(name, dir_fd=directory.number, follow_symlinks=False)
            return found
        except (LazyfsError, OSError) as error:
            log.info("the trace of %s can't be read: %s", manifest, error)
            return None

    def save(self, trace: Trace) -> None:
        """Keep what was learned of an image, in the place of what was known. Raise StoreError, TraceInvalid."""
        raw = traces.encode(trace)
        directory = self._open(create=True)
        assert directory is not None
        replace_file(directory, digests.hex_of(trace.manifest), raw)
        _bound(directory, MAX_TRACE_FILES, MAX_TRACE_BYTES)

    def drop(self, manifest: str) -> None:
        """Forget what was learned of an image. Never raises."""
        try:
            directory = self._open(create=False)
            if directory is not None:
                self._remove(directory, digests.hex_of(manifest))
        except LazyfsError as error:
            log.info("the trace of %s can't be removed: %s", manifest, error)

    def record(self, trace: Trace) -> Path:
        """Write a recorded start to a file of its own and return its path. Raise StoreError, TraceInvalid."""
        raw = traces.encode(trace)
        directory = self._open(create=True)
        assert directory is not None
        records = open_directory(directory, _RECORDS, create=True)
        assert records is not None
        moment = time.strftime("%Y%m%d-%H%M%S")
        name = f"{moment}-{digests.hex_of(trace.manifest)[:12]}-{uuid4().hex[:4]}"
        replace_file(records, name, raw)
        _bound(records, MAX_RECORDS, MAX_RECORDS * MAX_TRACE)
        return self._root / _DIRECTORY / _RECORDS / name

    def _open(self, *, create: bool) -> OwnedFd | None:
        return open_directory(open_root(os.fspath(self._root)), _DIRECTORY, create=create)

    def _remove(self, directory: OwnedFd, name: str) -> None:
        try:
            os.unlink(name, dir_fd=directory.number)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.info("the trace %s can't be removed: %s", name, error.strerror)


def _bound(directory: OwnedFd, files: int, size: int) -> None:
    """Remove the files that were used longest ago, beyond two bounds. Raise StoreError."""
    found: list[tuple[int, int, str]] = []
    try:
        for name in os.listdir(directory.number):
            try:
                entry = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
            except FileNotFoundError:
                continue  # another thread was quicker
            if not stat.S_ISDIR(entry.st_mode):
                found.append((entry.st_mtime_ns, entry.st_size, name))
        total = 0
        for number, (_, each, name) in enumerate(sorted(found, reverse=True)):
            total += each
            if number >= files or total > size:
                try:
                    os.unlink(name, dir_fd=directory.number)
                except FileNotFoundError:
                    continue
    except OSError as error:
        raise translate(error, "the store's directory of traces") from None
