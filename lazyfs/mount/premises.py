"""What a holder holds: the directory it works in, where it is the one holder, and the FUSE connection mounted there.

systemd keeps the connection and the estate beyond the holder's own end, where it started it (sd_pid_notify_with_fds(3),
sd_listen_fds(3)): it kills all that is left of a unit whose main process was killed, and the next holder goes on.

The standard library and bounds alone: the holder imports this, and must outlive everything else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import time

from lazyfs import notify
from lazyfs.limits import HOLDER_TIMEOUT, INIT_TIMEOUT
from lazyfs.mount import greeting as greetings

_LEAST = 8192  # bytes of a buffer that the kernel reads a request into
BOARD = 4096  # bytes in front of what daemons leave to each other, see mount.inheritance
_GREETING_AT, _GREETING_MOST = 2048, 1024  # where on it the kernel's INIT stands, its size before it; bytes
_SIZE = struct.Struct("=I")
_FUSE, _ESTATE = "lazyfs-fuse", "lazyfs-estate"  # names of what systemd keeps
_LISTEN_FDS = 3  # the first fd that systemd gives back
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
        ours.settimeout(HOLDER_TIMEOUT)
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
                ctypes.CDLL(None).umount2(os.fsencode(mountpoint), _MNT_DETACH | _MNT_FORCE)


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


def keep(fuse: int, greeting: bytes) -> int:
    """Make the estate, and have systemd keep it and the connection. Return its fd. Doesn't block. Raise OSError."""
    estate = os.memfd_create(_ESTATE, os.MFD_CLOEXEC)
    os.ftruncate(estate, BOARD)
    os.pwrite(estate, _SIZE.pack(len(greeting)) + greeting, _GREETING_AT)
    notify.tell(f"FDSTORE=1\nFDNAME={_FUSE}", fuse)
    notify.tell(f"FDSTORE=1\nFDNAME={_ESTATE}", estate)
    return estate


def kept() -> tuple[int, int, bytes] | None:
    """Return the connection, the estate and the kernel's INIT that a holder before us left to systemd.

    None: there is none, or nothing is mounted by it any more. Doesn't block. Called once.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "")
    if not ours or not count.isdigit() or len(names) != int(count):
        return None
    found: dict[str, int] = {}
    for fd, name in enumerate(names, _LISTEN_FDS):
        os.set_inheritable(fd, False)
        if name in found:
            os.close(found[name])  # of an earlier holder: the last one counts
        found[name] = fd
    if _FUSE in found and _ESTATE in found and _is_mounted(found[_FUSE]):
        told = os.pread(found[_ESTATE], _SIZE.size + _GREETING_MOST, _GREETING_AT)
        size = _SIZE.unpack_from(told)[0] if len(told) > _SIZE.size else 0
        if 0 < size <= len(told) - _SIZE.size:
            return found[_FUSE], found[_ESTATE], told[_SIZE.size : _SIZE.size + size]
    for fd in found.values():
        os.close(fd)
    forget()
    return None


def forget() -> None:
    """Have systemd keep nothing any more: a connection that it kept would never end."""
    for name in (_FUSE, _ESTATE):
        notify.tell(f"FDSTOREREMOVE=1\nFDNAME={name}")


def _is_mounted(fuse: int) -> bool:
    if not stat.S_ISCHR(os.fstat(fuse).st_mode):
        return False
    poll = select.poll()
    poll.register(fuse, 0)
    return not poll.poll(0)  # POLLERR: it was unmounted


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
