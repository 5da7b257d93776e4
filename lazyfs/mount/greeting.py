"""INIT, the first request of a FUSE connection, and its answer: what both sides can do, settled for its whole life.

Little more than the standard library: the holder imports this, and must outlive everything else. Layouts:
<linux/fuse.h>.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lazyfs.limits import MAX_BACKGROUND

INIT = 26
MAJOR = 7
MINOR = 39  # the newest whose answers are written here; a kernel that is older says so and gets its own
MINOR_LEAST = 23  # Linux 3.15; before it INIT's answer was shorter
MAX_WRITE = 4096  # bytes, the least that there is: nothing is written
MAX_READ_PAGES = 256  # of one read: 1 MiB
MAX_READAHEAD = 4 << 20  # bytes; the kernel takes the smaller of this and its own 128 KiB, see Session.tune

_ASYNC_READ = 1 << 0
_EXPORT_SUPPORT = 1 << 4  # "." and ".." are looked up: handles of files work without a path
_DO_READDIRPLUS = 1 << 13
_ASYNC_DIO = 1 << 15
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_CACHE_SYMLINKS = 1 << 23
_INIT_EXT = 1 << 30  # there are 32 flags more
_HAS_RESEND = 1 << 39  # requests that a dead daemon took can be had again
_WANTED = (
    _ASYNC_READ
    | _EXPORT_SUPPORT
    | _DO_READDIRPLUS
    | _ASYNC_DIO
    | _PARALLEL_DIROPS
    | _MAX_PAGES
    | _CACHE_SYMLINKS
    | _INIT_EXT
    | _HAS_RESEND
)

HEADER = struct.Struct("=IIQQIIIHH")  # of a request: length, opcode, number, node, uid, gid, thread, …
OUT = struct.Struct("=IiQ")  # of an answer: length, negative errno, number
_IN = struct.Struct("=IIII")
_U32 = struct.Struct("=I")
_BODY = struct.Struct("=IIIIHHIIHHI28x")


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the kernel's INIT says: its protocol and what it can do. `raw` is the request as it came."""

    raw: bytes
    unique: int
    major: int
    minor: int
    flags: int

    @property
    def can_resend(self) -> bool:
        """Whether a connection outlives its daemon: Linux 6.9."""
        return bool(self.flags & _HAS_RESEND)

    @property
    def is_known(self) -> bool:
        """Whether the kernel's protocol is one that we speak. Of a newer major it wants ours, and asks again."""
        return (self.major, self.minor) >= (MAJOR, MINOR_LEAST)


def decode(request: bytes) -> Greeting:
    """Decode INIT. Raise ValueError for another request, struct.error for one that is cut."""
    _, opcode, unique, *_ = HEADER.unpack_from(request)
    if opcode != INIT:
        raise ValueError(f"a connection began with request {opcode}")
    major, minor, _, low = _IN.unpack_from(request, HEADER.size)
    flags = low
    if low & _INIT_EXT:
        flags |= _U32.unpack_from(request, HEADER.size + _IN.size)[0] << 32
    return Greeting(request, unique, major, minor, flags)


def out_header(unique: int, size: int, error: int = 0) -> bytes:
    """Return the header of an answer with a body of `size` bytes, or of the errno `error`."""
    return OUT.pack(OUT.size + size, -error, unique)


def answer(greeting: Greeting) -> bytes:
    """Return the whole answer to INIT, with what serves us best."""
    flags = greeting.flags & _WANTED
    body = _BODY.pack(
        MAJOR, min(MINOR, greeting.minor), MAX_READAHEAD, flags & 0xFFFFFFFF, MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4,
        MAX_WRITE, 1, MAX_READ_PAGES, 0, flags >> 32,
    )  # fmt: skip
    return out_header(greeting.unique, len(body)) + body
