"""The EROFS image of a tree: names and attributes of all its files; their content is on devices, one a layer.

Laid out as: superblock and device table, shared attributes, special inodes (the root first), ordinary inodes, blocks of
directories. The 1024 bytes that EROFS leaves free in front hold version, key and checksum of the file, so that the
daemon knows it for whole and its own before the kernel sees it. The same tree and key give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from lazyfs.errors import StoreBroken, TableInvalid
from lazyfs.format.checked import CHECKED
from lazyfs.format.checksum import checksum, file_checksum
from lazyfs.format.columns import write_parts
from lazyfs.format.erofs_dirs import TreeColumns
from lazyfs.format.erofs_inodes import Inodes, check_devices, device_layers
from lazyfs.format.erofs_layout import BLOCK, SUPER_AT, align_block, device_table_end, first_blocks
from lazyfs.format.table import LayerTable

__all__ = ["VERSION", "check", "device_layers", "write_erofs"]

VERSION = 3
_MAGIC = b"LZFEROFS"
_HEAD = struct.Struct("<8sI4x16s32sQ")  # magic, version, checksum of all with this field zero, key's digest, bytes
_SUM_AT = 16  # bytes in front of the checksum


def write_erofs(path: Path, tree: TreeColumns, tables: Sequence[LayerTable], key: str) -> None:
    """Write the image of `tree`, made of `tables` (base first), to `path`: whole or not at all. Blocking, about 1 µs a
    file, 100 bytes of memory and disk each.

    `key` is the tree's. Device number i is the data space of the layer at place `device_layers(tables)[i]`. Raise
    StoreFull or StoreBroken when the file can't be written, TocInvalid for a tree that EROFS can't show: layers of more
    than 16 TiB, attributes of more than 65,535 bytes. No fsync: a torn file fails its checksum and is made again.
    """
    if sys.byteorder != "little":
        raise StoreBroken("EROFS images need a little-endian machine")
    devices = check_devices(tables)
    inodes = Inodes(tree, tables)
    shared = bytes(inodes.xattrs.area)
    xattr_at = device_table_end(len(devices))
    meta_at = align_block(xattr_at + len(shared))
    pieces = inodes.ordinary()
    content_at = align_block(meta_at + inodes.special_size + sum(map(len, pieces)))
    special, content = inodes.special(content_at // BLOCK)
    front = first_blocks(
        inodes=inodes.count,
        blocks=(content_at + len(content)) // BLOCK,
        root=inodes.nids[0],
        meta_block=meta_at // BLOCK,
        xattr_block=xattr_at // BLOCK,
        uuid=hashlib.sha256(b"erofs " + key.encode()).digest()[:16],
        devices=devices,
    )
    parts: list[bytes | bytearray] = [front, shared, bytes(meta_at - xattr_at - len(shared)), special, *pieces]
    parts += [bytes(content_at - sum(map(len, parts))), content]
    _write(path, parts, key)


def _write(path: Path, parts: list[bytes | bytearray], key: str) -> None:
    front = parts[0]
    assert isinstance(front, bytearray)
    size = sum(map(len, parts))
    key_digest = hashlib.sha256(key.encode()).digest()
    _HEAD.pack_into(front, 0, _MAGIC, VERSION, b"", key_digest, size)
    _HEAD.pack_into(front, 0, _MAGIC, VERSION, checksum(parts), key_digest, size)
    write_parts(path, parts)


def check(path: Path, key: str) -> None:
    """Read a whole image and tell whether it is this version's, of this key, and undamaged.

    Blocking, about 0.1 ms a megabyte, unless `CHECKED` knows it. Raise TableInvalid when it is not, or is
    absent: then write it again.
    """
    try:
        with open(path, "rb", buffering=0, opener=_to_read) as handle:
            front = handle.read(SUPER_AT)
            if len(front) < SUPER_AT:
                raise TableInvalid(f"{path} is too short")
            magic, version, told, key_digest, size = _HEAD.unpack_from(front)
            found = os.fstat(handle.fileno())
            if magic != _MAGIC or version != VERSION or size != found.st_size:
                raise TableInvalid(f"{path} is of another kind or version, or cut short")
            if key_digest != hashlib.sha256(key.encode()).digest():
                raise TableInvalid(f"{path} is another tree's")
            if CHECKED.knows(found):
                return
            whole = file_checksum(handle.fileno(), 0, size, _SUM_AT)
    except OSError as error:
        raise TableInvalid(f"{path} can't be read: {error.strerror}") from None
    if whole != told:
        raise TableInvalid(f"{path} is damaged")
    CHECKED.note(found)


def _to_read(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
