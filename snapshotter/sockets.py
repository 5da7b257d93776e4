"""The socket that containerd dials, and the locks that keep two snapshotters from one root or one address."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from lazyfs import private
from lazyfs.errors import StoreBroken, StoreFull, StoreLocked, UsageError
from lazyfs.limits import SOCKET_TIMEOUT

_MAX_PATH = 107  # bytes of a Unix socket's path


class Lock:
    """A file that one process holds. Released when that ends, however it does."""

    def __init__(self, path: Path, what: str) -> None:
        """Take the lock. `what` is the subject of the sentence. Raise StoreLocked, StoreFull, StoreBroken."""
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno == errno.EWOULDBLOCK:
                raise StoreLocked(
                    f"{what} is in use by another lazyfs-snapshotter", hint="one a node is enough"
                ) from None
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (StoreFull if full else StoreBroken)(f"the lock {path} can't be taken: {error.strerror}") from None

    def close(self) -> None:
        """Release it. The file stays: whoever waits for it must not lock one that was removed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def make_room(address: Path) -> Lock:
    """Make the socket's directory (0700) and remove a stale socket; return the lock on the address. Blocking, seconds.

    Raise StoreLocked when somebody listens there, UsageError for an address that can't be, StoreBroken.
    """
    if len(os.fsencode(address)) > _MAX_PATH:
        raise UsageError(
            f"the socket {address} has a path longer than {_MAX_PATH} bytes", hint="use a shorter --address"
        )
    try:
        address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = address.parent.stat()
    except OSError as error:
        raise UsageError(f"the socket's directory {address.parent} can't be made: {error.strerror}") from None
    if directory.st_uid != os.geteuid() or directory.st_mode & 0o022:
        raise UsageError(
            f"the socket's directory {address.parent} belongs to another user or can be written by others",
            hint="whoever listens there gives containers their files: use a directory of your own",
        )
    loose = private.find_loose(address.parent.resolve()) or private.find_foreign_link(address.parent)
    if loose is not None:
        raise UsageError(
            f"{loose}, where the socket's directory {address.parent} lies, is in other users' hands",
            hint="whoever listens there gives containers their files: use a directory of your own",
        )
    lock = Lock(address.with_name(address.name + ".lock"), f"the socket {address}")
    try:
        _remove_stale(address)
    except BaseException:
        lock.close()
        raise
    return lock


def _remove_stale(address: Path) -> None:
    try:
        found = os.lstat(address)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"{address} is there and is no socket", hint="remove it, or use another --address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(SOCKET_TIMEOUT)
        try:
            probe.connect(os.fspath(address))
        except ConnectionRefusedError:
            address.unlink(missing_ok=True)  # whoever made it is dead
            return
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"the socket {address} is in use: {error.strerror or error}") from None
    raise StoreLocked(f"the socket {address} is in use", hint="stop who listens there, or use another --address")
