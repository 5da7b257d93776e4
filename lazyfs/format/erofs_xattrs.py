"""Extended attributes in an EROFS image: each distinct one is stored once, in the shared area, and named by its place.

An image has few distinct ones, and inodes that only name them stay small. What no kernel would let an unpack set is
left out: names of no known namespace, and access control lists that are none.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from lazyfs.errors import TocInvalid
from lazyfs.format.entry import DROPPED_XATTRS

# prefix -> its number; those that end with a dot are followed by the rest of the name
_PREFIXES = (
    (b"user.", 1), (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"security.", 6),
)  # fmt: skip
_ENTRY = struct.Struct("<BBH")  # length of the name, number of the prefix, length of the value
_HEADER = struct.Struct("<IB7x")  # name filter (0: nothing is said), count of shared ones
_MAX_SHARED = 255  # that one inode can name
_MAX_VALUE = 0xFFFF  # bytes
_MAX_NAME = 255  # bytes, the prefix included
_ACL_VERSION = 2
_ACL_TAGS = frozenset({0x01, 0x02, 0x04, 0x08, 0x10, 0x20})
NO_XATTRS = b""


class Xattrs:
    """The shared area while it grows, and what each inode has of it."""

    def __init__(self) -> None:
        self.area = bytearray()
        self._places: dict[bytes, int] = {}

    def body(self, pairs: Mapping[bytes, bytes]) -> bytes:
        """Return what follows an inode with these attributes: b"" where none is left. Raise TocInvalid for a value that
        EROFS can't hold."""
        shared: list[int] = []
        own: list[bytes] = []
        for name, value in sorted(pairs.items()):
            entry = _entry(name, value)
            if entry and len(shared) < _MAX_SHARED:
                shared.append(self._share(entry))
            elif entry:
                own.append(entry)
        if not shared:
            return NO_XATTRS
        return _HEADER.pack(0, len(shared)) + struct.pack(f"<{len(shared)}I", *shared) + b"".join(own)

    def _share(self, entry: bytes) -> int:
        place = self._places.get(entry)
        if place is None:
            place = self._places[entry] = len(self.area) // 4
            self.area += entry
        return place


def body_count(body: bytes) -> int:
    """Return the number that an inode keeps of its attributes' size."""
    return (len(body) - _HEADER.size) // 4 + 1 if body else 0


def _entry(name: bytes, value: bytes) -> bytes:
    """Return an attribute as it is stored, a multiple of four bytes; b"" for one that is left out."""
    if name.startswith(DROPPED_XATTRS) or len(name) > _MAX_NAME:
        return b""
    prefix, number = next(((prefix, number) for prefix, number in _PREFIXES if name.startswith(prefix)), (b"", 0))
    rest = name[len(prefix) :]
    is_fit = bool(rest) if prefix.endswith(b".") else not rest and _is_acl(value)
    if not number or not is_fit:
        return b""
    if len(value) > _MAX_VALUE:
        raise TocInvalid(f"an extended attribute of {len(value)} bytes is more than EROFS holds")
    size = _ENTRY.size + len(rest) + len(value)
    return _ENTRY.pack(len(rest), number, len(value)) + rest + value + bytes(-size % 4)


def _is_acl(value: bytes) -> bool:
    """Tell whether the kernel will take a value as an access control list. A broken one would make its file useless."""
    if len(value) < 4 or (len(value) - 4) % 8 or struct.unpack_from("<I", value)[0] != _ACL_VERSION:
        return False
    return all(tag in _ACL_TAGS for tag, _, _ in struct.iter_unpack("<HHI", value[4:]))
