"""One name in a layer, and the chunks of its content: the values that every format is read into and written from."""

from __future__ import annotations

import stat
from enum import IntEnum

import msgspec

from lazyfs.errors import FormatError

MAX_PATH = 4096  # bytes; PATH_MAX
MAX_NAME = 255  # bytes; NAME_MAX
WHITEOUT_PREFIX = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
LANDMARK = b".prefetch.landmark"
NO_LANDMARK = b".no.prefetch.landmark"
LANDMARK_CONTENT = b"\x0f"
TOC_NAME = b"stargz.index.json"
# Attributes an image must not bring along: overlayfs would take them as orders about our own layers.
DROPPED_XATTRS = (b"trusted.", b"user.overlay.")
# As regular files only: under a directory or a symlink of such a name anything may lie.
HIDDEN_AT_ROOT = frozenset({LANDMARK, NO_LANDMARK, TOC_NAME})
_ODD_STARTS = (b".", b"/")


class Kind(IntEnum):
    """What an entry is. The numbers are stored in layer tables: append only."""

    DIR = 1
    REG = 2
    SYMLINK = 3
    CHAR = 4
    BLOCK = 5
    FIFO = 6
    HARDLINK = 7
    WHITEOUT = 8


# The type bits of st_mode by kind, of what a tree shows.
FILE_TYPE: dict[int, int] = {
    Kind.DIR: stat.S_IFDIR, Kind.REG: stat.S_IFREG, Kind.SYMLINK: stat.S_IFLNK, Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO,
}  # fmt: skip
LINK_MODE = 0o777  # Linux gives symlinks no other, whatever their tar header says


class Entry(msgspec.Struct, gc=False):  # half a million are made at once: a third of a dataclass's time
    """One entry of a tar or TOC. Paths are bytes, cleaned: no slash at the ends, no "." or ".."; b"" is the root.

    Whiteouts are still ordinary files named `.wh.*` here; the layer table interprets them.
    """

    path: bytes
    kind: Kind
    mode: int  # permission bits, setuid, setgid, sticky: 07777
    uid: int
    gid: int
    mtime_ns: int  # nanoseconds since the epoch, may be negative
    size: int = 0  # REG: bytes of content; else 0
    link: bytes = b""  # SYMLINK: the target verbatim; HARDLINK: cleaned path of the target in the same layer
    rdev: tuple[int, int] = (0, 0)  # CHAR, BLOCK: major, minor
    xattrs: tuple[tuple[bytes, bytes], ...] = ()  # sorted by name
    uname: str = ""
    gname: str = ""


class Chunk(msgspec.Struct, gc=False):
    """A verified range of one file's content. `blob_offset` is where its frame starts; -1: a hole, zeros, no frame."""

    offset: int  # in the file
    size: int  # bytes, uncompressed
    blob_offset: int  # in the blob
    inner_offset: int  # bytes from the start of the decompressed frame
    digest: bytes  # sha256 of the uncompressed bytes, 32 bytes


def clean_path(raw: bytes, error: type[FormatError]) -> bytes:
    """Return an archive's name without leading "/" and "./", trailing "/", "//" and "." components.

    Raise `error` for a name that leads out of the root, is too long or holds a NUL: these are attacks, not typos.
    """
    path = raw[2:] if raw.startswith(b"./") else raw
    if path.endswith(b"/"):
        path = path[:-1]
    # Nearly all names: nothing else in them to be cleaned, and too short to be too long.
    if (
        len(path) <= MAX_NAME
        and path.find(b"/.") < 0  # with bytes twice as fast as `in`
        and path.find(b"//") < 0
        and path.find(b"\0") < 0
        and path[:1] not in _ODD_STARTS
        and path[-1:] != b"/"
    ):
        return path
    shown = raw[:200].decode("utf-8", "backslashreplace")
    if b"\0" in raw:
        raise error(f"the name {shown!r} holds a NUL byte")
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise error(f"the name {shown!r} leads out of the root")
    path = b"/".join(parts)
    if len(path) >= MAX_PATH or any(len(part) > MAX_NAME for part in parts):
        raise error(f"the name {shown!r}… is longer than a file system takes")
    return path
