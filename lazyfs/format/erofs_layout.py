"""EROFS on disk, as far as a metadata image needs it: field layouts, flags, checksum.

Field orders are those of the kernel's documentation (filesystems/erofs). All numbers are little-endian; a block has
4096 bytes; a nid is an inode's place in the metadata area, in units of 32 bytes, and its inode number.
"""

from __future__ import annotations

import struct

BLOCK = 4096  # bytes
BLOCK_BITS = 12
SLOT = 32  # bytes; inodes lie on this grid
SUPER_AT = 1024  # bytes in front of the superblock, that EROFS leaves to others
SUPER_MAGIC = 0xE0F5E1E2
NULL_BLOCK = 0xFFFFFFFF  # a chunk or file without content
MAX_BLOCKS = 0xFFFFFFFF  # of one device: 16 TiB

# Features. All of them are in every kernel since 5.16.
_COMPAT = 0x1 | 0x2  # superblock checksum; times are mtimes
_INCOMPAT = 0x4 | 0x8  # chunked files, device table

FLAT_PLAIN, FLAT_INLINE, CHUNKED = 0, 2, 4  # where an inode's content is
EXTENDED = 1  # version of the 64-byte inode; or'ed with the layout shifted by one
INODE_BYTES = 64
CHUNK_BITS = 31  # of blocks in a chunk, the most there is: 8 TiB
CHUNK_SHIFT = CHUNK_BITS + BLOCK_BITS
CHUNK_FORMAT = 0x20 | CHUNK_BITS  # 0x20: indexes of eight bytes, which name a device

# format, xattr count, mode, 0, size, union, ino, uid, gid, mtime, mtime_nsec, nlink, 16 reserved bytes
INODE = struct.Struct("<HHHHQIIIIqII16x")
CHUNK_INDEX = struct.Struct("<HHI")  # 0, device (1 is the first), block in it
DIRENT = struct.Struct("<QHBx")  # nid, offset of the name in its block, type
FT_REG, FT_DIR, FT_CHAR, FT_BLOCK, FT_FIFO, FT_SYMLINK = 1, 2, 3, 4, 5, 7

# magic, checksum, compat, block bits, slots, root nid, inodes, time, nsec, blocks, metadata block, xattr block, uuid,
# volume name, incompat, 0, devices, device table's slot, directory block bits, 39 bytes of zeros
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHB37x")
_DEVICE = struct.Struct("<64sII56x")  # tag, blocks, where it is mapped (0: nowhere, it has its own addresses)
DEVICES_AT = SUPER_AT + _SUPER.size  # bytes; a multiple of a slot of the device table
_CRC_POLY = 0x82F63B78


def first_blocks(
    *, inodes: int, blocks: int, root: int, meta_block: int, xattr_block: int, uuid: bytes, devices: list[int]
) -> bytearray:
    """Return the image's first blocks: superblock and device table, with nothing in front.

    `blocks` of the image, `root` a nid below 65536, `devices` their sizes in blocks. `device_table_end` tells the size.
    """
    out = bytearray(device_table_end(len(devices)))
    _SUPER.pack_into(
        out, SUPER_AT, SUPER_MAGIC, 0, _COMPAT, BLOCK_BITS, 0, root, inodes, 0, 0, blocks, meta_block, xattr_block,
        uuid, b"lazyfs", _INCOMPAT, 0, len(devices), DEVICES_AT // _DEVICE.size, 0,
    )  # fmt: skip
    for number, size in enumerate(devices):
        _DEVICE.pack_into(out, DEVICES_AT + number * _DEVICE.size, b"layer-%d" % number, size, 0)
    struct.pack_into("<I", out, SUPER_AT + 4, crc32c(out[SUPER_AT:BLOCK]))
    return out


def device_table_end(devices: int) -> int:
    """Return where superblock and device table end, in bytes, rounded up to a block."""
    return align_block(DEVICES_AT + devices * _DEVICE.size)


def align_block(size: int) -> int:
    """Round bytes up to a whole block."""
    return (size + BLOCK - 1) & -BLOCK


def device_number(major: int, minor: int) -> int:
    """Return a device's number as the kernel keeps it in 32 bits."""
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


def crc32c(data: bytes | bytearray) -> int:
    """Return the CRC-32C of `data` from all ones, not inverted at the end. About 0.1 µs a byte: for a block."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC_TABLE[(value ^ byte) & 0xFF]
    return value


def _crc_row(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_CRC_POLY if value & 1 else 0)
    return value


_CRC_TABLE = tuple(_crc_row(byte) for byte in range(256))
