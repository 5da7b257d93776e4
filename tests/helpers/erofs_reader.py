"""A reader of EROFS metadata images, written from the format's documentation alone; it checks what it walks over."""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

BLOCK = 4096
_TYPES = {
    1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFCHR, 4: stat.S_IFBLK, 5: stat.S_IFIFO, 6: stat.S_IFSOCK,
    7: stat.S_IFLNK,
}  # fmt: skip
_PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 6: b"security."}


@dataclass(frozen=True)
class Inode:
    """All that an inode says. `extents`: (device, offset there, bytes) of a regular file's content, in order."""

    nid: int
    ino: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: tuple[int, int]
    link: bytes
    xattrs: dict[bytes, bytes]
    extents: tuple[tuple[int, int, int], ...]


class Image:
    """An image in memory. `names()` gives every path with its inode; b"" is the root. AssertionError: it is broken."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        assert len(raw) % BLOCK == 0
        magic, self.checksum, self.compat = struct.unpack_from("<III", raw, 1024)
        assert magic == 0xE0F5E1E2 and raw[1036] == 12 and raw[1037] == 0
        self.root, self.inodes = struct.unpack_from("<HQ", raw, 1038)
        self.blocks, self.meta_block, self.xattr_block = struct.unpack_from("<III", raw, 1060)
        self.uuid = raw[1072:1088]
        self.incompat, _, count, slot = struct.unpack_from("<IHHH", raw, 1104)
        assert self.blocks * BLOCK == len(raw)
        assert not any(raw[1114:1152])
        self.devices = [struct.unpack_from("<I", raw, 128 * (slot + number) + 64)[0] for number in range(count)]
        assert not any(struct.unpack_from("<I", raw, 128 * (slot + number) + 68)[0] for number in range(count))
        self._known: dict[int, Inode] = {}

    def names(self) -> dict[bytes, Inode]:
        """Walk the whole tree."""
        out = {b"": self.inode(self.root)}
        todo = [(b"", self.root, self.root)]
        while todo:
            path, nid, above = todo.pop()
            for name, (child, kind) in self._listed(nid, above).items():
                inode = self.inode(child)
                assert stat.S_IFMT(inode.mode) == _TYPES[kind]
                whole = path + b"/" + name if path else name
                out[whole] = inode
                if kind == 2:
                    todo.append((whole, child, nid))
        assert len(self._known) == self.inodes == len({inode.ino for inode in self._known.values()})
        return out

    def _listed(self, nid: int, above: int) -> dict[bytes, tuple[int, int]]:
        data = self._content(nid)
        out: dict[bytes, tuple[int, int]] = {}
        before = b""
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            (first,) = struct.unpack_from("<H", block, 8)
            assert 12 <= first < len(block) and first % 12 == 0
            entries = [struct.unpack_from("<QHBB", block, at) for at in range(0, first, 12)]
            ends = [entry[1] for entry in entries[1:]] + [len(block)]
            for (child, at, kind, zero), end in zip(entries, ends, strict=True):
                name = block[at:end] if end != len(block) else block[at:end].rstrip(b"\0")
                assert name and len(name) <= 255 and not zero and b"\0" not in name and b"/" not in name
                assert before < name, "names are sorted"
                before = name
                out[name] = child, kind
        assert out.pop(b".") == (nid, 2)
        assert out.pop(b"..") == (above, 2)
        return out

    def _at(self, nid: int) -> int:
        return int(self.meta_block * BLOCK + 32 * nid)

    def _fields(self, nid: int) -> tuple[int, ...]:
        return struct.unpack_from("<HHHHQIIIIqII", self.raw, self._at(nid))

    def _body(self, nid: int) -> int:
        count = self._fields(nid)[1]
        return 8 + 4 * count if count else 0

    def _content(self, nid: int) -> bytes:
        """Content that lies in the image itself."""
        layout, _, _, _, size, start, *_ = self._fields(nid)
        assert layout & 1
        whole = size if layout >> 1 == 0 else size & -BLOCK
        data = self.raw[start * BLOCK : start * BLOCK + whole] if whole else b""
        if layout >> 1 == 2:
            tail = size - whole
            at = self._at(nid) + 64 + self._body(nid)
            assert tail and at // BLOCK == (at + tail - 1) // BLOCK == (self._at(nid) + 63) // BLOCK
            data += self.raw[at : at + tail]
        assert len(data) == size
        return data

    def inode(self, nid: int) -> Inode:
        """Read one inode."""
        if nid in self._known:
            return self._known[nid]
        assert nid > 0
        layout, _, mode, zero, size, union, ino, uid, gid, mtime, fraction, nlink = self._fields(nid)
        assert layout & 1 and layout >> 1 in (0, 2, 4) and zero == 0 and fraction < 10**9
        kind = stat.S_IFMT(mode)
        rdev, link = (0, 0), b""
        extents: list[tuple[int, int, int]] = []
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = union >> 8 & 0xFFF, union & 0xFF | union >> 12 & 0xFFF00
        elif kind == stat.S_IFLNK:
            link = self._content(nid)
        elif kind == stat.S_IFREG:
            assert layout >> 1 == 4 and union & ~0x1F == 0x20
            chunk = BLOCK << (union & 0x1F)
            at = self._at(nid) + 64 + self._body(nid) + 7 & ~7
            for number in range(-(-size // chunk)):
                zero, device, block = struct.unpack_from("<HHI", self.raw, at + 8 * number)
                part = min(chunk, size - number * chunk)
                assert zero == 0 and 1 <= device <= len(self.devices)
                assert block + -(-part // BLOCK) <= self.devices[device - 1]
                extents.append((device - 1, block * BLOCK, part))
        found = self._known[nid] = Inode(
            nid, ino, mode, uid, gid, size, mtime * 10**9 + fraction, nlink, rdev, link, self._xattrs(nid),
            tuple(extents),
        )  # fmt: skip
        return found

    def _xattrs(self, nid: int) -> dict[bytes, bytes]:
        size = self._body(nid)
        if not size:
            return {}
        at = self._at(nid) + 64
        end = at + size
        count = self.raw[at + 4]
        shared = struct.unpack_from(f"<{count}I", self.raw, at + 12)
        out: dict[bytes, bytes] = {}
        for place in shared:
            self._entry(self.xattr_block * BLOCK + 4 * place, out)
        at += 12 + 4 * count
        while at < end:
            at = self._entry(at, out)
        assert at == end and out
        return out

    def _entry(self, at: int, out: dict[bytes, bytes]) -> int:
        name_size, prefix, size = struct.unpack_from("<BBH", self.raw, at)
        name = _PREFIXES[prefix] + self.raw[at + 4 : at + 4 + name_size]
        assert name not in out
        out[name] = self.raw[at + 4 + name_size : at + 4 + name_size + size]
        return at + (4 + int(name_size + size) + 3 & ~3)
