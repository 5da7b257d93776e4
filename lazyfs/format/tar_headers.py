"""The pieces of a tar header block: numbers, checksum, PAX records and times, maps of sparse files.

Pure functions. All raise TarInvalid without an entry's name; the scanner, which knows the name, adds it. What is
accepted is what Go's archive/tar accepts, because that is what unpacks layers elsewhere.
Sources: POSIX.1-2017 pax (ustar and pax interchange formats), GNU tar manual (Basic Tar Format, Storing Sparse Files).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from lazyfs.errors import TarInvalid
from lazyfs.limits import MAX_EXTENSION

BLOCK = 512  # bytes; everything in a tar is laid on this grid
ZERO_BLOCK = bytes(BLOCK)
USTAR_MAGIC = b"ustar\0"
GNU_MAGIC = b"ustar  \0"
STAR_TRAILER = b"tar\0"

# name, mode+uid+gid, size, mtime, checksum, type, link, magic+version+uname+gname+major+minor, prefix+rest.
# Owners and the like are taken in one piece, because in a layer the same ones come again and again.
HEADER = struct.Struct("100s24s12s12s8sc100s88s167s")

_INT64 = 1 << 63
_OLD_SPARSE_RUNS = 4  # runs in the header block itself
_EXTENDED_SPARSE_RUNS = 21  # runs in each extension block
_NAMED = frozenset({b"path", b"linkpath", b"uname", b"gname"})
SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_OFFSET = b"GNU.sparse.offset"
_SPARSE_SIZE = b"GNU.sparse.numbytes"

Runs = tuple[tuple[int, int], ...]


def pad(size: int) -> int:
    """Return how many bytes bring `size` to the grid of 512."""
    return -size % BLOCK


def number(field: bytes) -> int:
    """Return a header's number: octal digits, or base 256 (signed, big endian) when the first bit is set."""
    text = field.strip(b" \0")
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            raise TarInvalid(f"the number {text!r} is not octal") from None
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        if field[0] & 0x40:
            value -= 1 << bits
        if not -_INT64 <= value < _INT64:
            raise TarInvalid("a number of the header is larger than 64 bits")
        return value
    text = text.partition(b"\0")[0]
    if not text:
        return 0
    if not text.isdigit():
        raise TarInvalid(f"the number {field!r} is neither octal nor base 256")
    return number(text)


def decimal(text: bytes, what: str) -> int:
    """Return a PAX record's decimal number, which must fit 64 bits."""
    digits = text[1:] if text[:1] in (b"-", b"+") else text
    if not digits.isdigit() or len(digits) > 20:
        raise TarInvalid(f"{what} is {text[:40]!r}, not a number")
    value = int(text)
    if not -_INT64 <= value < _INT64:
        raise TarInvalid(f"{what} is larger than 64 bits")
    return value


def seconds_to_ns(text: bytes) -> int:
    """Return a PAX time ("1700000000.123456789", "-1.5") in nanoseconds; digits beyond the ninth are cut off."""
    whole, _, fraction = text.partition(b".")
    value = decimal(whole, "a time") * 1_000_000_000
    if not fraction:
        return value
    if not fraction.isdigit():
        raise TarInvalid(f"a time is {text[:40]!r}, not a number")
    part = int(fraction[:9].ljust(9, b"0"))
    return value - part if whole.startswith(b"-") else value + part


@dataclass(frozen=True, slots=True)
class Owner:
    """What the middle fields of a header say."""

    mode: int
    uid: int
    gid: int
    uname: bytes
    gname: bytes
    rdev: tuple[int, int]
    is_gnu: bool
    is_ustar: bool


def owner(ids: bytes, rest: bytes) -> Owner:
    """Parse the 24 bytes of mode, uid and gid, and the 88 from the magic to the device number."""
    mode, uid, gid = number(ids[:8]), number(ids[8:16]), number(ids[16:])
    is_gnu = rest[:8] == GNU_MAGIC
    is_ustar = rest[:6] == USTAR_MAGIC
    if not is_gnu and not is_ustar:
        return Owner(mode, uid, gid, b"", b"", (0, 0), is_gnu=False, is_ustar=False)
    uname, gname = rest[8:40].partition(b"\0")[0], rest[40:72].partition(b"\0")[0]
    return Owner(mode, uid, gid, uname, gname, (number(rest[72:80]), number(rest[80:])), is_gnu, is_ustar)


def checksum_holds(block: memoryview, stored: bytes) -> bool:
    """Tell whether a 512-byte header has the sum that its 8-byte field `stored` says, over unsigned or signed bytes."""
    digits = stored.strip(b" \0").partition(b"\0")[0]
    try:
        wanted = int(digits, 8) if digits.isdigit() else -1
    except ValueError:
        return False
    # Adler-32's low half is 1 + the sum of the bytes modulo 65521: exact for 256 bytes, and 20 times faster than sum().
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    others = total - sum(stored) + 8 * 0x20
    if others == wanted:
        return True
    # Old Sun tars summed signed chars: each byte above 127 counts 256 less.
    high = sum(1 for byte in block if byte > 127) - sum(1 for byte in stored if byte > 127)
    return others - 256 * high == wanted


def pax_records(payload: bytes) -> dict[bytes, bytes]:
    """Return the records of a PAX header, the last of each key. Sparse format 0.0's pairs become 0.1's one map."""
    out: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at, end = 0, len(payload)
    while at < end:
        space = payload.find(b" ", at, at + 12)
        length = payload[at:space] if space > 0 else b""
        if not length.isdigit():
            raise TarInvalid("a PAX record has no length")
        stop = at + int(length)
        if stop > end or stop <= space + 1 or payload[stop - 1] != 0x0A:
            raise TarInvalid("a PAX record has a wrong length")
        key, equals, value = payload[space + 1 : stop - 1].partition(b"=")
        if not equals or not key or b"\0" in key or (key in _NAMED and b"\0" in value):
            raise TarInvalid("a PAX record is malformed")
        if key in (_SPARSE_OFFSET, _SPARSE_SIZE):
            if key != (_SPARSE_SIZE if len(sparse) % 2 else _SPARSE_OFFSET) or b"," in value:
                raise TarInvalid("its sparse map is out of order")
            sparse.append(value)
        else:
            out[key] = value
        at = stop
    if sparse:
        out[SPARSE_MAP] = b",".join(sparse)
    return out


def old_sparse_runs(block: bytes, extended: bool) -> tuple[list[tuple[int, int]], bool]:
    """Return the data runs in a GNU sparse header block (or extension block), and whether another block follows."""
    at, count = (0, _EXTENDED_SPARSE_RUNS) if extended else (386, _OLD_SPARSE_RUNS)
    runs: list[tuple[int, int]] = []
    for i in range(count):
        field = block[at + 24 * i : at + 24 * i + 24]
        if field[0] == 0:
            break
        runs.append((number(field[:12]), number(field[12:])))
    return runs, block[at + 24 * count] > 0


def old_sparse_size(block: bytes) -> int:
    """Return the expanded size in a GNU sparse header block."""
    return number(block[483:495])


def listed_runs(records: dict[bytes, bytes]) -> list[tuple[int, int]]:
    """Return the data runs of PAX sparse formats 0.0 and 0.1, which list them in records."""
    count = decimal(records.get(b"GNU.sparse.numblocks", b""), "the number of its sparse runs")
    text = records.get(SPARSE_MAP, b"")
    words = text.split(b",") if text else []
    if len(words) != 2 * count:
        raise TarInvalid("its sparse map has another length than declared")
    numbers = [decimal(word, "a sparse run") for word in words]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class SparseMapReader:
    """Reads the map of PAX sparse format 1.0, which lies before the data in whole blocks of newline-ended numbers."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._rest = b""
        self._size = 0

    def feed(self, block: bytes) -> list[tuple[int, int]] | None:
        """Take the next 512 bytes. Return the runs when the map is complete, None when another block belongs to it."""
        self._size += len(block)
        if self._size > MAX_EXTENSION:
            raise TarInvalid(f"its sparse map is longer than {MAX_EXTENSION} bytes")
        *words, self._rest = (self._rest + block).split(b"\n")
        for word in words:
            self._numbers.append(decimal(word, "a number of its sparse map"))
            if self._numbers[0] < 0:
                raise TarInvalid("its sparse map has a negative length")
            if len(self._numbers) == 1 + 2 * self._numbers[0]:
                found = self._numbers[1:]
                return list(zip(found[::2], found[1::2], strict=True))
        if len(self._rest) > 20:
            raise TarInvalid("its sparse map holds no number")
        return None


def check_runs(runs: list[tuple[int, int]], size: int, stored: int) -> Runs:
    """Return the non-empty runs, which must ascend, lie within `size` and take exactly `stored` bytes."""
    at = total = 0
    for offset, length in runs:
        if offset < at or length < 0 or offset + length > size:
            raise TarInvalid("its sparse map overlaps or leaves the file")
        at = offset + length
        total += length
    if total != stored:
        raise TarInvalid(f"its sparse map names {total} bytes and the archive holds {stored}")
    return tuple(run for run in runs if run[1])
