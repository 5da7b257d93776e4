"""Entries that can't be carried over as they are: sparse files become ordinary ones, with a header of our own.

containerd's unpacker refuses GNU's sparse types and TOCs have no word for them. The new header is PAX, and depends on
the entry alone. Source: POSIX.1-2017 pax, ustar interchange format.
"""

from __future__ import annotations

from collections.abc import Iterator

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import Entry
from lazyfs.format.tar import TarItem
from lazyfs.format.tar_headers import BLOCK, HEADER, pad
from lazyfs.limits import MAX_HOLES
from lazyfs.units import KiB

_ZEROS = bytes(256 * KiB)
_MAX_OCTAL_ID = 0o7777777
_MAX_OCTAL_SIZE = 0o77777777777


def must_rewrite(item: TarItem) -> bool:
    """Tell whether an entry's bytes can't go into the converted layer unchanged."""
    return item.sparse is not None


def regular_header(entry: Entry) -> bytes:
    """Return the header blocks of a regular file, with a PAX header before them where ustar can't say it all."""
    records: dict[bytes, bytes] = {}
    seconds, fraction = divmod(entry.mtime_ns, 1_000_000_000)
    if len(entry.path) > 100 or not entry.path.isascii():
        records[b"path"] = entry.path
    if entry.size > _MAX_OCTAL_SIZE:
        records[b"size"] = b"%d" % entry.size
    for key, value in ((b"uid", entry.uid), (b"gid", entry.gid)):
        if value > _MAX_OCTAL_ID:
            records[key] = b"%d" % value
    for key, name in ((b"uname", entry.uname.encode()), (b"gname", entry.gname.encode())):
        if len(name) > 32 or not name.isascii():
            records[key] = name
    if fraction or not 0 <= seconds <= _MAX_OCTAL_SIZE:
        records[b"mtime"] = _pax_time(entry.mtime_ns)
    for key, value_bytes in entry.xattrs:
        records[b"SCHILY.xattr." + key] = value_bytes
    header = _ustar(entry, b"0", entry.path if entry.path.isascii() else b"", entry.size, seconds)
    if not records:
        return header
    payload = b"".join(_record(key, value) for key, value in sorted(records.items()))
    plain = Entry(b"", entry.kind, 0o644, 0, 0, 0)
    return _ustar(plain, b"x", b"PaxHeader", len(payload), 0) + payload + bytes(pad(len(payload))) + header


def _pax_time(mtime_ns: int) -> bytes:
    sign = b"-" if mtime_ns < 0 else b""
    seconds, fraction = divmod(abs(mtime_ns), 1_000_000_000)
    return sign + b"%d" % seconds + (b".%09d" % fraction).rstrip(b"0").rstrip(b".")


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    if len(str(length)) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value if 0 <= value < 8 ** (width - 1) else 0)


def _ustar(entry: Entry, kind: bytes, name: bytes, size: int, seconds: int) -> bytes:
    ids = _octal(entry.mode, 8) + _octal(entry.uid, 8) + _octal(entry.gid, 8)
    rest = b"ustar\x0000" + _name(entry.uname) + _name(entry.gname) + _octal(0, 8) + _octal(0, 8)
    fields = [name[:100], ids, _octal(size, 12), _octal(seconds, 12), b" " * 8, kind, b"", rest, b""]
    total = sum(HEADER.pack(*fields))
    fields[4] = b"%06o\0 " % total
    block: bytes = HEADER.pack(*fields)
    assert len(block) == BLOCK
    return block


def _name(name: str) -> bytes:
    raw = name.encode()
    return (raw if len(raw) <= 32 and raw.isascii() else b"").ljust(32, b"\0")


class Expander:
    """Turns the stored bytes of a sparse file into its whole content. `holes` counts the zeros it added so far."""

    def __init__(self, item: TarItem, holes: int) -> None:
        assert item.sparse is not None
        self.holes = holes + item.entry.size - item.stored
        if self.holes > MAX_HOLES:
            raise TarInvalid(f"sparse files of more than {MAX_HOLES} bytes can't be converted", item.entry.path)
        self._runs = list(reversed(item.sparse))
        self._size = item.entry.size
        self._at = 0  # in the expanded file
        self._run_left = 0

    def expand(self, stored: memoryview) -> Iterator[memoryview]:
        """Yield the content up to the end of `stored`, the next bytes from the archive."""
        at = 0
        while at < len(stored):
            if not self._run_left:
                offset, self._run_left = self._runs.pop()
                yield from self._zeros(offset)
            step = min(self._run_left, len(stored) - at)
            yield stored[at : at + step]
            at += step
            self._at += step
            self._run_left -= step

    def finish(self) -> Iterator[memoryview]:
        """Yield the zeros behind the last run, and the padding's are not among them."""
        return self._zeros(self._size)

    def _zeros(self, end: int) -> Iterator[memoryview]:
        zeros = memoryview(_ZEROS)
        while self._at < end:
            step = min(end - self._at, len(zeros))
            self._at += step
            yield zeros[:step]
