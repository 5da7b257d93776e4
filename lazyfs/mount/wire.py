"""The messages of a FUSE connection, as far as a read-only file system needs them: decoded, encoded, no I/O.

Layouts: <linux/fuse.h>, protocol 7. The kernel is trusted, so a message that is cut is a bug and raises struct.error.
All integers are in the machine's order. A request is a header of 40 bytes and a body, an answer one of 16 and a body.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from enum import IntEnum

from lazyfs.mount import greeting
from lazyfs.mount.forest import Attributes, NoSuchName
from lazyfs.mount.greeting import HEADER, OUT

# Longest request: the kernel refuses a shorter buffer than 8 KiB, and nothing is ever written, names are at most 4 KiB.
REQUEST_SIZE = 64 * 1024


class Op(IntEnum):
    """Requests that are answered, or that want no answer; ENOSYS is the answer to all others."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    INIT = greeting.INIT
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


# OPEN's and OPENDIR's flags.
DIRECT_IO = 1 << 0
KEEP_CACHE = 1 << 1
CACHE_DIR = 1 << 3

RESENT = 1 << 63  # of a request's number: it was taken by a daemon that died
_NOTIFY_RESEND = 7

HEADER_SIZE = HEADER.size
_ATTR = "QQQQQQIIIIIIIIII"
_ENTRY = struct.Struct("=QQQQII" + _ATTR)
_ATTR_OUT = struct.Struct("=QII" + _ATTR)
_DIRENT = struct.Struct("=QQII")
_READ = struct.Struct("=QQI")
_OPEN = struct.Struct("=QIi")
_SIZE = struct.Struct("=II")
_STATFS = struct.Struct("=QQQQQIIII24x")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_BLOCK = 512  # bytes of an st_blocks unit
_BLKSIZE = 4096
_S = 1_000_000_000  # nanoseconds


def decode_header(request: memoryview) -> tuple[int, int, int, int]:
    """Return (opcode, number, node, thread) of a request. `thread` is that of the caller in our pid namespace, or 0."""
    _, opcode, unique, node, _, _, pid, _, _ = HEADER.unpack_from(request)
    return opcode, unique, node, pid


def name_in(body: memoryview) -> bytes:
    """Return the name of LOOKUP: bytes up to a NUL."""
    return bytes(body[:-1])


def read_in(body: memoryview) -> tuple[int, int, int]:
    """Return (handle, offset, size) of READ, READDIR and READDIRPLUS."""
    handle, offset, size = _READ.unpack_from(body)
    return handle, offset, size


def xattr_in(body: memoryview) -> tuple[int, bytes]:
    """Return (room, name) of GETXATTR; LISTXATTR has no name. With no room the size alone is asked for."""
    return _U32.unpack_from(body)[0], bytes(body[8:-1])


def interrupted_in(body: memoryview) -> int:
    """Return the number of the request whose caller got a signal."""
    return int(_U64.unpack_from(body)[0])


RESEND = OUT.pack(OUT.size, _NOTIFY_RESEND, 0)  # have all requests again that were taken and not answered


def entry_out(found: Attributes, entry_timeout: int, attr_timeout: int) -> bytes:
    """Return the answer to LOOKUP. Times in seconds for which the kernel may keep name and attributes."""
    return _ENTRY.pack(found.node, 0, entry_timeout, attr_timeout, 0, 0, *_attr(found))


def absent_out(entry_timeout: int) -> bytes:
    """Return the answer that there is no such name, which the kernel may keep: a negative entry."""
    return _ENTRY.pack(0, 0, entry_timeout, *(0,) * (3 + 16))


def attr_out(found: Attributes, attr_timeout: int) -> bytes:
    """Return the answer to GETATTR."""
    return _ATTR_OUT.pack(attr_timeout, 0, 0, *_attr(found))


def _attr(found: Attributes) -> tuple[int, ...]:
    seconds, nanoseconds = divmod(found.mtime_ns, _S)
    seconds &= (1 << 64) - 1  # signed in the kernel
    rdev = _encode_device(found.rdev)
    return (
        found.node, found.size, -(-found.size // _BLOCK), seconds, seconds, seconds, nanoseconds, nanoseconds,
        nanoseconds, found.mode, found.nlink, found.uid, found.gid, rdev, _BLKSIZE, 0,
    )  # fmt: skip


def _encode_device(rdev: int) -> int:
    """Return a dev_t in the kernel's 32 bits: 12 of major, 20 of minor, the minor's upper bits above the major."""
    if not rdev:
        return 0
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


def open_out(handle: int, flags: int) -> bytes:
    """Return the answer to OPEN and OPENDIR."""
    return _OPEN.pack(handle, flags, 0)


def value_out(value: bytes, room: int) -> bytes:
    """Return the answer to GETXATTR and LISTXATTR: the value, or its size where no room was offered.

    Raise NoSuchName (ERANGE) for a value that is longer than its room.
    """
    if not room:
        return _SIZE.pack(len(value), 0)
    if len(value) > room:
        raise NoSuchName(errno.ERANGE)
    return value


def statfs_out(*, block: int, blocks: int, files: int, name_length: int) -> bytes:
    """Return the answer to STATFS: nothing is free. `block` in bytes."""
    return _STATFS.pack(blocks, 0, 0, files, 0, block, name_length, block, 0)


class Listing:
    """An answer to READDIR or READDIRPLUS of at most `room` bytes, an entry at a time."""

    def __init__(self, room: int, *, plus: bool) -> None:
        self._room = room
        self._plus = plus
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: bytes, found: Attributes, cookie: int, entry_timeout: int, attr_timeout: int) -> bool:
        """Add a name; `cookie` is where to go on behind it. Return False, and add nothing, when there is no room."""
        entry = entry_out(found, entry_timeout, attr_timeout) if self._plus else b""
        dirent = _DIRENT.pack(found.node, cookie, len(name), stat.S_IFMT(found.mode) >> 12)
        size = len(entry) + len(dirent) + len(name)
        padding = -size % 8
        if self._size + size + padding > self._room:
            return False
        self._parts += (entry, dirent, name, bytes(padding))
        self._size += size + padding
        return True

    def encode(self) -> bytes:
        return b"".join(self._parts)
