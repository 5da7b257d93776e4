"""A container's directory in the store: its writable layer, its bundle, and the lock that says its owner lives.

<root>/containers/<id>/{lock, upper, work, rootfs, config.json, files, volumes, pid, log.json, console}. The lock is
held by the command and by its supervisor; free means that the container is gone and the directory a leftover.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs import private
from lazyfs.config import Settings
from lazyfs.container import mounts
from lazyfs.errors import ContainerFailed, StoreBroken, StoreFull, StoreLocked, UsageError
from lazyfs.limits import GATE_TIMEOUT

_GATE = ".lock"


@dataclass(frozen=True, slots=True)
class ContainerDir:
    """A directory that we own as long as `lock` (a descriptor with flock) is open."""

    identity: str
    path: Path
    lock: int

    def at(self, name: str) -> Path:
        return self.path / name


def home(settings: Settings) -> Path:
    """Where containers lie: in the store, because their writable layers belong on a disk. No symlink is in the path.

    Runtimes refuse a root file system behind one, and a store that was moved to a larger disk often is.
    """
    return Path(os.path.realpath(settings.root), "containers")


def create(settings: Settings, name: str) -> ContainerDir:
    """Make the directory of a new container, called `name` or by 64 random bits, and lock it. Blocking.

    Raise UsageError when a container of that name runs, StoreFull or StoreBroken when the disk refuses.
    """
    base = home(settings)
    identity = name or os.urandom(8).hex()
    with _disk(base):
        private.make_directory(base)
        with _gate(base):
            path = base / identity
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                raise UsageError(
                    f"a container {identity!r} is there already", hint="choose another --name, or stop it first"
                ) from None
            lock = _lock(path)
        if lock is None:
            raise StoreLocked(f"the new directory {path} was locked by someone else")
        for part in ("upper", "work", "rootfs", "files", "volumes"):
            # The upper directory becomes the container's "/" and must be searchable for all its users.
            (path / part).mkdir(mode=0o755)
        return ContainerDir(identity, path, lock)


def any_left(settings: Settings) -> bool:
    """Return whether there are container directories at all, living or not: whether a sweep may find something."""
    try:
        return any(entry.is_dir(follow_symlinks=False) for entry in os.scandir(home(settings)))
    except OSError:
        return False


def leftovers(settings: Settings) -> Iterator[ContainerDir]:
    """Yield the directories that nobody holds any more, each locked by us; the caller removes them. Never waits.

    Raise StoreBroken, also when they lie in a directory that is not ours.
    """
    base = home(settings)
    if not base.is_dir():
        return
    with _disk(base):
        private.check_directory(base)
        try:
            with _gate(base, wait=False):
                found = [
                    ContainerDir(entry.name, Path(entry.path), lock)
                    for entry in os.scandir(base)
                    if entry.is_dir(follow_symlinks=False) and (lock := _lock(Path(entry.path))) is not None
                ]
        except StoreLocked:
            return  # someone creates or sweeps right now; the next one takes what is left
    yield from found


def remove(directory: ContainerDir) -> None:
    """Delete the directory and let go of its lock. Blocking.

    Should anything still be mounted below it, that is detached first: deleting through a mount would empty a volume.
    Raise StoreBroken when it can't be deleted; ContainerFailed when a mount can't be taken away.
    """
    try:
        remove_tree(directory.path)
    finally:
        os.close(directory.lock)


def remove_tree(path: Path) -> None:
    """Delete a directory of ours, stray mounts below it detached first. Raise StoreBroken, ContainerFailed."""
    import shutil  # only now: with its archive formats it would cost the start of a container some milliseconds

    raw = os.fsencode(path.resolve())
    for entry in mounts.below(raw):
        if os.geteuid() == 0:
            mounts.umount(entry.dir, lazy=True)
        else:
            mounts.umount_user(entry.dir, lazy=True)
    if mounts.below(raw):
        raise ContainerFailed(f"something is mounted below {path} and can't be taken away")
    try:
        shutil.rmtree(path, onerror=_open_up)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreBroken(f"{path} can't be removed: {error.strerror}") from None


def _open_up(function: Callable[..., Any], path: str, info: Any) -> None:
    # overlayfs leaves work/work with mode 000, and containers leave directories that even their owner can't list.
    import shutil

    error = info[1]
    if isinstance(error, FileNotFoundError):
        return
    if not isinstance(error, PermissionError) or function not in (os.open, os.scandir, os.lstat, os.unlink, os.rmdir):
        raise error
    parent = os.path.dirname(path)
    for target in (parent, path):
        if os.path.isdir(target) and not os.path.islink(target):
            os.chmod(target, 0o700)
    if function in (os.unlink, os.rmdir):
        function(path)
    else:
        shutil.rmtree(path, onerror=_open_up)  # the chmod above raises for what isn't ours, so this ends


def _lock(path: Path) -> int | None:
    handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _gate(base: Path, wait: bool = True) -> Iterator[None]:
    """Hold off others between making a directory and locking it; wait a few seconds at most. Raise StoreLocked."""
    deadline = time.monotonic() + (GATE_TIMEOUT if wait else 0.0)
    handle = os.open(base / _GATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreLocked(f"{base} is held by another lazyfs") from None
                time.sleep(0.002)
        yield
    finally:
        os.close(handle)


@contextmanager
def _disk(base: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"no space left for a container in {base}", hint="free some, or choose --root") from None
        raise StoreBroken(f"containers can't be kept in {base}: {error.strerror}") from None
