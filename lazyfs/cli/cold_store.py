"""A store for one start alone: empty at its beginning, gone at its end, or swept by the next one where that was killed.

    <TMPDIR, else /var/tmp>/lazyfs-cold-<random>/{store, run}

The directory is locked (flock) by the command that uses it and by its container's supervisor; free means a leftover.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.cli.output import Output
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, UsageError
from lazyfs.limits import COLD_STOP_TIMEOUT

_PREFIX = "lazyfs-cold-"
_MOST = 16  # leftovers that are removed in one go
_TRIES = 5  # directories that are made until one is ours: whoever sweeps may take a new one for a leftover
_POLL = 0.05  # seconds


@contextlib.contextmanager
def cold_store(settings: Settings, out: Output) -> Iterator[Settings]:
    """Yield the settings of an empty store, which is removed behind it; those that killed commands left go before.

    Blocking. Raise UsageError where none can be made.
    """
    # On a disk: a start may read more than memory has.
    base = Path(os.environ.get("TMPDIR") or "/var/tmp")
    _sweep(settings, base, out)
    try:
        place, lock = _make(base)
    except OSError as error:
        raise UsageError(f"no directory for a cold store can't be made: {error.strerror}", hint="set TMPDIR") from None
    try:
        yield _at(settings, place)
    finally:
        _remove(settings, place, out)
        os.close(lock)


def _at(settings: Settings, place: Path) -> Settings:
    return dataclasses.replace(settings, root=place / "store", run=place / "run")


def _make(base: Path) -> tuple[Path, int]:
    """Make a directory and lock it; return it and the lock's descriptor. Raise OSError."""
    for _ in range(_TRIES):
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _lock(place)
        if lock is not None:
            return place, lock
    raise BlockingIOError(None, "others remove what is made there")


def _lock(place: Path) -> int | None:
    """Lock a directory of ours that nobody holds; None where it is another's, no directory, or gone. Never waits."""
    try:
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(handle)
        ours = found.st_uid == os.geteuid() and not found.st_mode & 0o022
        if ours and os.path.samestat(found, os.lstat(place)):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _sweep(settings: Settings, base: Path, out: Output) -> None:
    """Remove the stores of commands that were killed. Blocking."""
    from lazyfs.cli.run import sweep_leftovers

    for place in sorted(base.glob(f"{_PREFIX}*"))[:_MOST]:
        lock = _lock(place)
        if lock is None:
            continue
        try:
            sweep_leftovers(_at(settings, place))
            _remove(settings, place, out)
        except LazyfsError as error:
            out.warn(f"{place} is not removed: {error}")
        finally:
            os.close(lock)


def _remove(settings: Settings, place: Path, out: Output) -> None:
    """End the daemons of a store and delete it. Blocking, half a minute at most; a warning tells what is left."""
    from lazyfs.container.directory import remove_tree

    try:
        _stop_daemons(_at(settings, place))
        remove_tree(place)
    except LazyfsError as error:
        out.warn(f"{place} is not removed: {error}")


def _stop_daemons(settings: Settings) -> None:
    """Ask the daemons of a store to end, and wait for it."""
    from lazyfs import control_client

    deadline = time.monotonic() + COLD_STOP_TIMEOUT
    for path in control_client.sockets(settings):
        with contextlib.suppress(LazyfsError), control_client.connect(path) as daemon:
            pid = int(daemon.greeting.get("pid") or 0)
            daemon.call("stop", timeout=COLD_STOP_TIMEOUT)
            while pid > 0 and not _is_gone(pid) and time.monotonic() < deadline:
                time.sleep(_POLL)


def _is_gone(pid: int) -> bool:
    """Tell whether a process has ended. One that we have started stays in /proc until it is waited for."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path("/proc", str(pid)).exists()
