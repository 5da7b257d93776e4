"""What a holder holds: the directory it works in, where it is the one holder, and the FUSE connection mounted there.

The standard library and bounds alone: the holder imports this, and must outlive everything else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import time

from lazyfs.limits import HOLDER_TIMEOUT, INIT_TIMEOUT
from lazyfs.mount import greeting as greetings

_LEAST = 8192  # bytes of a buffer that the kernel reads a request into
_MS_RDONLY = 0x1
_MNT_FORCE, _MNT_DETACH = 0x1, 0x2  # force: whoever waits for an answer gets an error


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


def mount(mountpoint: str) -> tuple[int, bytes] | None:
    """Mount a connection, and answer INIT. Blocking, 10 s at most. Return its fd and the kernel's INIT.

    None: the kernel can't hand a connection over. Raise OSError, or ValueError for an INIT without sense.
    """
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    target = os.fsencode(mountpoint)
    if libc.mount(b"lazyfs", target, b"fuse.lazyfs", ctypes.c_ulong(_MS_RDONLY), options.encode()) != 0:
        number = ctypes.get_errno()
        os.close(fuse)
        raise OSError(number, os.strerror(number), mountpoint)
    try:
        found = greetings.decode(_first_request(fuse))
        if not found.can_resend or not found.is_known:
            unmount(mountpoint, fuse)
            return None
        os.write(fuse, greetings.answer(found))
    except BaseException:
        unmount(mountpoint, fuse)
        raise
    return fuse, found.raw


def unmount(mountpoint: str, fuse: int) -> None:
    """Take the mount and its connection away: whoever waits for an answer gets an error."""
    ctypes.CDLL(None).umount2(os.fsencode(mountpoint), _MNT_DETACH | _MNT_FORCE)
    os.close(fuse)


def _first_request(fuse: int) -> bytes:
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    if not poll.poll(INIT_TIMEOUT * 1000):
        raise OSError(errno.ETIMEDOUT, "the kernel does not begin the FUSE connection")
    return os.read(fuse, _LEAST)
