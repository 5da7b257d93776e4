"""Tar streams that read like the tree they make, for every dialect and oddity that a layer may hold.

    tar_of(dir_("d"), file("d/a", b"x", mode=0o4755), symlink("l", "d/a"), whiteout("old"))

Every builder returns the bytes of one entry, so `tar_of` only lays them end to end, and a test can damage any of them.
Written by hand because `tarfile` can't make half of what is needed here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack

BLOCK = 512
MTIME_NS = 1_700_000_000 * 10**9
Style = Literal["pax", "gnu", "ustar", "v7"]
Sparseness = Literal["gnu", "0.0", "0.1", "1.0"]
Name = str | bytes


class Attributes(TypedDict, total=False):
    """What any entry can have. `style` is the dialect; numbers and names that it can't hold go into its extensions."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    uname: str
    gname: str
    xattrs: dict[Name, bytes]
    style: Style
    pax: Sequence[tuple[bytes, bytes]]  # further PAX records, as they are


def octets(name: Name) -> bytes:
    return name.encode() if isinstance(name, str) else name


def pad(data: bytes) -> bytes:
    """Fill up to whole blocks with zeros."""
    return data + bytes(-len(data) % BLOCK)


def pax_record(key: Name, value: bytes) -> bytes:
    """One "<length> <key>=<value>\\n" record; the length counts its own digits."""
    rest = b" " + octets(key) + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def number(value: int, width: int) -> bytes:
    """Octal with a NUL where it fits, else GNU's base-256, which holds negative numbers too."""
    if 0 <= value < 8 ** (width - 1):
        return f"{value:0{width - 1}o}".encode() + b"\0"
    coded = bytearray(value.to_bytes(width, "big", signed=True))
    coded[0] |= 0x80
    return bytes(coded)


def header(
    name: bytes,
    kind: bytes,
    size: int = 0,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    uname: bytes = b"",
    gname: bytes = b"",
    device: tuple[int, int] = (0, 0),
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """One header block, fields cut at their widths. `tail`, when given, is all that lies behind the devices."""
    block = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            number(mode, 8),
            number(uid, 8),
            number(gid, 8),
            number(size, 12),
            number(mtime, 12),
            b" " * 8,
            kind,
            link[:100].ljust(100, b"\0"),
            magic.ljust(8, b"\0"),
            uname[:32].ljust(32, b"\0"),
            gname[:32].ljust(32, b"\0"),
            number(device[0], 8) if magic.strip(b"\0") else bytes(8),
            number(device[1], 8) if magic.strip(b"\0") else bytes(8),
            (tail or prefix[:155]).ljust(167, b"\0"),
        )
    )
    return with_checksum(block)


def with_checksum(block: bytes) -> bytes:
    """Put the right checksum into a header block."""
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + f"{total:06o}\0 ".encode() + block[156:]


def pax_header(records: Sequence[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """An extension header (`g` for a global one) and its records."""
    body = b"".join(pax_record(key, value) for key, value in records)
    return header(b"PaxHeaders/x", kind, len(body)) + pad(body)


def _entry(
    kind: bytes,
    name: Name,
    data: bytes,
    attributes: Attributes,
    *,
    default_mode: int,
    link: Name = b"",
    device: tuple[int, int] = (0, 0),
    size: int | None = None,
    tail: bytes = b"",
) -> bytes:
    path, target = octets(name), octets(link)
    style = attributes.get("style", "pax")
    mode, uid, gid = attributes.get("mode", default_mode), attributes.get("uid", 0), attributes.get("gid", 0)
    mtime_ns = attributes.get("mtime_ns", MTIME_NS)
    uname, gname = attributes.get("uname", "").encode(), attributes.get("gname", "").encode()
    size = len(data) if size is None else size
    out, prefix, records = b"", b"", list(attributes.get("pax", ()))
    seconds, fraction = divmod(mtime_ns, 10**9)
    magic = {"pax": b"ustar\x0000", "ustar": b"ustar\x0000", "gnu": b"ustar  \0", "v7": b""}[style]
    if style == "pax":
        records += [(b"SCHILY.xattr." + octets(key), value) for key, value in attributes.get("xattrs", {}).items()]
        if len(path) > 100:
            records.append((b"path", path))
        if len(target) > 100:
            records.append((b"linkpath", target))
        for key, value in ((b"uid", uid), (b"gid", gid)):
            if value >= 8**7:
                records.append((key, str(value).encode()))
        if size >= 8**11:
            records.append((b"size", str(size).encode()))
        if fraction or not 0 <= seconds < 8**11:
            records.append((b"mtime", _decimal(mtime_ns)))
        uid, gid = (0 if value >= 8**7 else value for value in (uid, gid))
        size_field = 0 if size >= 8**11 else size
        seconds = seconds if 0 <= seconds < 8**11 else 0
    else:
        if "xattrs" in attributes or fraction:
            raise ValueError(f"{style} headers hold no extended attributes and no fractions of a second")
        size_field = size
        if style == "gnu":
            for long, letter in ((target, b"K"), (path, b"L")):
                if len(long) > 100:
                    out += header(b"././@LongLink", letter, len(long) + 1, magic=magic) + pad(long + b"\0")
        elif style == "ustar" and len(path) > 100:
            cut = path.rindex(b"/", 0, 156)
            prefix, path = path[:cut], path[cut + 1 :]
    if records:
        out += pax_header(records)
    out += header(
        path,
        kind,
        size_field,
        mode=mode,
        uid=uid,
        gid=gid,
        mtime=seconds,
        link=target,
        uname=uname,
        gname=gname,
        device=device,
        magic=magic,
        prefix=prefix,
        tail=tail,
    )
    return out + pad(data)


def _decimal(value_ns: int) -> bytes:
    """A PAX time: what GNU tar and Go write, the sign in front of a fraction that counts away from zero."""
    sign, value = ("-", -value_ns) if value_ns < 0 else ("", value_ns)
    seconds, fraction = divmod(value, 10**9)
    return (f"{sign}{seconds}.{fraction:09}".rstrip("0").rstrip(".")).encode()


def file(name: Name, data: bytes = b"", **attributes: Unpack[Attributes]) -> bytes:
    return _entry(b"0", name, data, attributes, default_mode=0o644)


def old_file(name: Name, data: bytes = b"", kind: bytes = b"\0", **attributes: Unpack[Attributes]) -> bytes:
    """A regular file under another type: NUL (V7), or `7` (contiguous)."""
    return _entry(kind, name, data, attributes, default_mode=0o644)


def dir_(name: Name, **attributes: Unpack[Attributes]) -> bytes:
    path = octets(name)
    return _entry(b"5", path if path.endswith(b"/") else path + b"/", b"", attributes, default_mode=0o755)


def symlink(name: Name, target: Name, **attributes: Unpack[Attributes]) -> bytes:
    return _entry(b"2", name, b"", attributes, default_mode=0o777, link=target)


def hardlink(name: Name, target: Name, **attributes: Unpack[Attributes]) -> bytes:
    return _entry(b"1", name, b"", attributes, default_mode=0o644, link=target)


def char(name: Name, major: int, minor: int, **attributes: Unpack[Attributes]) -> bytes:
    return _entry(b"3", name, b"", attributes, default_mode=0o666, device=(major, minor))


def block(name: Name, major: int, minor: int, **attributes: Unpack[Attributes]) -> bytes:
    return _entry(b"4", name, b"", attributes, default_mode=0o660, device=(major, minor))


def fifo(name: Name, **attributes: Unpack[Attributes]) -> bytes:
    return _entry(b"6", name, b"", attributes, default_mode=0o644)


def whiteout(name: Name, **attributes: Unpack[Attributes]) -> bytes:
    """Remove `name` of the layers below."""
    directory, slash, last = octets(name).rpartition(b"/")
    return file(directory + slash + b".wh." + last, **attributes)


def opaque(directory: Name, **attributes: Unpack[Attributes]) -> bytes:
    """Hide all that the layers below have in `directory`."""
    return file(octets(directory).rstrip(b"/") + b"/.wh..wh..opq", **attributes)


def declared(name: Name, size: int, **attributes: Unpack[Attributes]) -> bytes:
    """The header of a file of `size` bytes, and none of them."""
    return _entry(b"0", name, b"", attributes, default_mode=0o644, size=size)


def global_pax(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A header that speaks of all later entries; Go, and so containerd, passes it by."""
    return pax_header(records, b"g")


def raw(data: bytes) -> bytes:
    """Bytes as they are."""
    return data


Runs = Sequence[tuple[int, bytes]]


def expand(runs: Runs, size: int) -> bytes:
    """The content of a sparse file."""
    out = bytearray(size)
    for offset, data in runs:
        out[offset : offset + len(data)] = data
    return bytes(out)


def sparse(name: Name, runs: Runs, size: int, form: Sparseness = "1.0", **attributes: Unpack[Attributes]) -> bytes:
    """A file of `size` bytes with data only in `runs`, in any of GNU tar's four ways to say so."""
    stored = b"".join(data for _, data in runs)
    spans = [(offset, len(data)) for offset, data in runs]
    if not spans or sum(spans[-1]) < size:
        spans.append((size, 0))
    if form == "gnu":
        return _old_sparse(name, spans, size, stored, attributes)
    records: list[tuple[bytes, bytes]] = list(attributes.get("pax", ()))
    path = octets(name)
    directory, slash, last = path.rpartition(b"/")
    shown = directory + slash + b"GNUSparseFile.0/" + last
    if form == "0.0":
        shown = path
        records += [(b"GNU.sparse.size", _number(size)), (b"GNU.sparse.numblocks", _number(len(spans)))]
        for offset, length in spans:
            records += [(b"GNU.sparse.offset", _number(offset)), (b"GNU.sparse.numbytes", _number(length))]
    elif form == "0.1":
        listed = b",".join(_number(value) for span in spans for value in span)
        records += [(b"GNU.sparse.size", _number(size)), (b"GNU.sparse.numblocks", _number(len(spans)))]
        records += [(b"GNU.sparse.map", listed), (b"GNU.sparse.name", path)]
    else:
        records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
        records += [(b"GNU.sparse.name", path), (b"GNU.sparse.realsize", _number(size))]
        lines = [len(spans), *(value for span in spans for value in span)]
        stored = pad(b"".join(_number(value) + b"\n" for value in lines)) + stored
    both: Attributes = {**attributes, "pax": records}
    return _entry(b"0", shown, stored, both, default_mode=0o644)


def _number(value: int) -> bytes:
    return str(value).encode()


def _spans(spans: Sequence[tuple[int, int]], count: int) -> bytes:
    coded = b"".join(number(offset, 12) + number(length, 12) for offset, length in spans[:count])
    return coded.ljust(count * 24, b"\0")


def _old_sparse(name: Name, spans: list[tuple[int, int]], size: int, stored: bytes, attributes: Attributes) -> bytes:
    tail = bytes(41) + _spans(spans, 4) + (b"\1" if len(spans) > 4 else b"\0") + number(size, 12)
    extensions, rest = b"", spans[4:]
    while rest:
        extensions += (_spans(rest, 21) + (b"\1" if len(rest) > 21 else b"\0")).ljust(BLOCK, b"\0")
        rest = rest[21:]
    gnu: Attributes = {**attributes, "style": "gnu"}
    whole = _entry(b"S", name, b"", gnu, default_mode=0o644, size=len(stored), tail=tail)
    return whole + extensions + pad(stored)


def tar_of(*entries: bytes, end: bool = True) -> bytes:
    """Lay entries end to end; `end` adds the two zero blocks that a tar ends with."""
    return b"".join(entries) + (bytes(2 * BLOCK) if end else b"")


def capability(bits: int = 1 << 13) -> bytes:
    """The value of security.capability: version 2, effective, the given permitted bits (CAP_NET_RAW)."""
    return struct.pack("<IIIII", 0x02000001, bits, 0, 0, 0)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The value of system.posix_acl_access: version 2, then (tag, permissions, id) each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY_IN_PARTICULAR = 0xFFFFFFFF  # the id of ACL entries that need none
ACL_ONE_USER = (
    (1, 6, NOBODY_IN_PARTICULAR),  # owner
    (2, 4, 1000),  # user 1000
    (4, 4, NOBODY_IN_PARTICULAR),  # group
    (16, 4, NOBODY_IN_PARTICULAR),  # mask
    (32, 0, NOBODY_IN_PARTICULAR),  # others
)
