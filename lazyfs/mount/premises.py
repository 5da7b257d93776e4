"""The directory that a holder works in: it is the one holder there, and what a killed one left mounted goes.

The standard library and bounds alone: the holder imports this, and must outlive everything else.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import time

from lazyfs.limits import HOLDER_TIMEOUT

_MNT_DETACH = 0x2


def claim(directory: str) -> bool:
    """Be the one holder of a directory of sockets, until this process ends. Blocking, 5 s at most."""
    lock = os.open(f"{directory}/holder.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    until = time.monotonic() + HOLDER_TIMEOUT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return not _listens(f"{directory}/lazyfsd.sock")
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        ours.settimeout(1.0)
        try:
            ours.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
        return True


def clear_stale(mountpoint: str) -> None:
    """Take away what a holder that was killed left mounted. The caller has the directory's lock."""
    wanted = os.fsencode(mountpoint)
    for old, new in ((b"\\", b"\\134"), (b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        wanted = wanted.replace(old, new)
    with open("/proc/self/mountinfo", "rb") as handle:
        for line in handle.read().splitlines():
            fields, _, rest = line.partition(b" - ")
            if fields.split(b" ")[4] == wanted and rest.startswith(b"fuse.lazyfs "):
                ctypes.CDLL(None).umount2(os.fsencode(mountpoint), _MNT_DETACH)
