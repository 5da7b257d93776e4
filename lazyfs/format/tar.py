"""A push parser for tar streams: blocks of any size in, entries with their stream offsets out.

It reads ustar, V7, GNU (long names, base-256 numbers, old sparse files), star and PAX. What an entry means follows Go's
archive/tar, because containerd and umoci are what a full unpack means. It never copies payload: only a header that
crosses two blocks is joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import MAX_NAME, MAX_PATH, Entry, Kind, clean_path
from lazyfs.format.tar_headers import (
    BLOCK,
    HEADER,
    SPARSE_MAP,
    STAR_TRAILER,
    ZERO_BLOCK,
    Owner,
    Runs,
    SparseMapReader,
    check_runs,
    checksum_holds,
    decimal,
    listed_runs,
    number,
    old_sparse_runs,
    old_sparse_size,
    owner,
    pad,
    pax_records,
    seconds_to_ns,
)
from lazyfs.limits import (
    MAX_EXTENSION,
    MAX_FILE_SIZE,
    MAX_HEADERS,
    MAX_TAR_ENTRIES,
    MAX_TAR_OWNERS,
    MAX_TAR_PARENTS,
    MAX_XATTRS,
)

MAX_OWNER = (1 << 32) - 2  # the kernel's largest uid; one more means "leave it" to chown
MAX_XATTR_VALUE = 1 << 16  # bytes; the kernel's XATTR_SIZE_MAX
FIRST_TIME = -62_135_596_800 * 10**9  # ns; the year 1, the first that RFC 3339 (and so a TOC) can write
LAST_TIME = 253_402_300_799 * 10**9 + 999_999_999  # ns; the last instant of the year 9999

# An attribute of an enum costs a tenth of a microsecond, ten times an entry.
_DIR, _REG, _SYMLINK, _CHAR, _BLOCK, _FIFO, _HARDLINK = (
    Kind.DIR, Kind.REG, Kind.SYMLINK, Kind.CHAR, Kind.BLOCK, Kind.FIFO, Kind.HARDLINK
)  # fmt: skip
_KINDS = {
    b"0": _REG, b"\0": _REG, b"7": _REG, b"S": _REG, b"1": _HARDLINK, b"2": _SYMLINK,
    b"3": _CHAR, b"4": _BLOCK, b"5": _DIR, b"6": _FIFO,
}  # fmt: skip
_EXTENSIONS = frozenset(b"xgLK")
XATTR = b"SCHILY.xattr."
_SPARSE_VERSIONS = {(b"0", b"0"): False, (b"0", b"1"): False, (b"1", b"0"): True}  # → whether the map lies in the data


@dataclass(slots=True)
class TarItem:
    """One entry and where it lies. All offsets are in the decompressed stream, in bytes."""

    entry: Entry
    start: int  # first header block, extension headers included
    payload: int  # first payload byte
    stored: int  # payload bytes in the stream
    end: int  # start of the next entry, padding included
    sparse: Runs | None = None  # (offset, size) data runs in the expanded file; None: not a sparse file
    name: bytes = b""  # as it stands in the tar, not cleaned
    link: bytes = b""  # the same
    mode: int = 0  # the header's number, type bits included where a writer put them there
    type_byte: bytes = b"0"
    records: dict[bytes, bytes] | None = None  # of its PAX header


@dataclass(slots=True)
class _Pending:
    """What extension headers said about the entry to come."""

    start: int = -1  # stream offset of the first of them; -1: none yet
    records: dict[bytes, bytes] = field(default_factory=dict)
    long_name: bytes = b""
    long_link: bytes = b""


class TarScanner:
    """Feed it a stream in order; it hands back each entry as soon as its headers are complete.

    Not thread-safe, never blocks. After an error it must not be used again.
    """

    def __init__(self, *, max_entries: int = MAX_TAR_ENTRIES) -> None:
        self.position = 0  # stream offset behind the last byte fed
        self.entries = 0
        self._max_entries = max_entries
        self._skip = 0  # payload and padding bytes still to pass over
        self._truncatable = 0  # of those, the padding that may be missing at the very end
        self._need = BLOCK  # bytes that the handler wants at once
        self._handler: Callable[[memoryview, int], TarItem | None] = self._on_header
        self._held = bytearray()  # a unit that crosses blocks
        self._pending = _Pending()
        self._zero_seen = False
        self._ended = False  # two zero blocks came; what follows is nobody's
        self._extension = b""  # type of the extension header whose payload is awaited
        self._item: TarItem | None = None  # a sparse file whose map is incomplete
        self._runs: list[tuple[int, int]] = []
        self._map = SparseMapReader()
        self._size = 0  # bytes of the awaited extension payload, without padding
        self._owners: dict[tuple[bytes, bytes], Owner] = {}  # seen ones: they repeat, and parsing them is half the work
        self._parents: set[bytes] = set()  # clean directory names seen

    @property
    def settled(self) -> int:
        """Stream offset before which every byte's role is known: where the entry with incomplete headers starts."""
        if self._pending.start >= 0:
            return self._pending.start
        return self.position - len(self._held)

    def feed(self, block: bytes | bytearray | memoryview) -> list[TarItem]:
        """Take the next bytes of the stream; return the entries whose headers ended in them, in stream order.

        Raise TarInvalid, with the entry's name where one is known, for a stream that can't be a layer.
        """
        items: list[TarItem] = []
        view = memoryview(block)
        base, size, at = self.position, len(view), 0
        self.position += size
        if self._ended:
            return items
        while True:
            if self._skip:
                step = min(self._skip, size - at)
                at += step
                self._skip -= step
                if self._skip:
                    break
            need = self._need
            if self._held:
                step = min(need - len(self._held), size - at)
                self._held += view[at : at + step]
                at += step
                if len(self._held) < need:
                    break
                unit, self._held = memoryview(self._held), bytearray()
            else:
                if size - at < need:
                    self._held += view[at:]
                    break
                unit = view[at : at + need]
                at += need
            item = self._handler(unit, base + at - need)
            if item is not None:
                items.append(item)
            elif self._ended:
                break
        return items

    def finish(self) -> None:
        """Raise TarInvalid when the stream stopped inside an entry; the padding behind the last one may be missing."""
        if self._ended:
            return
        if self._held or self._item is not None or self._pending.start >= 0:
            raise TarInvalid("it ends inside a header")
        if self._skip > self._truncatable:
            raise TarInvalid(f"it ends {self._skip - self._truncatable} bytes before the end of a file's content")

    # -- units ---------------------------------------------------------------------------------------------------------

    def _on_header(self, unit: memoryview, here: int) -> TarItem | None:
        fields = HEADER.unpack_from(unit)
        stored_sum = fields[4]
        if fields[0][0] == 0 and bytes(unit) == ZERO_BLOCK:
            if self._zero_seen:
                self._ended = True
                self._pending = _Pending()
            self._zero_seen = True
            return None
        if self._zero_seen:
            raise TarInvalid("something follows a single zero block")
        if not checksum_holds(unit, stored_sum):
            raise TarInvalid(f"the header at byte {here} has a wrong checksum: this is no tar, or a damaged one")
        kind_byte: bytes = fields[5]
        if kind_byte[0] in _EXTENSIONS:
            return self._begin_extension(kind_byte, fields, here)
        name: bytes = fields[0].partition(b"\0")[0]
        try:
            return self._entry(unit, fields, here)
        except TarInvalid as error:
            if error.entry:
                raise
            name = self._pending.records.get(b"path") or self._pending.long_name or name
            raise TarInvalid(error.message.removeprefix("tar stream: "), name[:MAX_NAME]) from None

    def _begin_extension(self, kind: bytes, fields: tuple[bytes, ...], here: int) -> TarItem | None:
        size = number(fields[2])
        if not 0 <= size <= MAX_EXTENSION:
            raise TarInvalid(f"the extension header at byte {here} has {size} bytes, more than {MAX_EXTENSION}")
        if self._pending.start < 0:
            self._pending.start = here
        if here + BLOCK + size - self._pending.start > MAX_HEADERS:
            raise TarInvalid(f"the extension headers at byte {self._pending.start} exceed {MAX_HEADERS} bytes")
        self._extension = kind
        self._expect(size + pad(size), self._on_extension)
        self._size = size
        if not size:
            self._on_extension(memoryview(b""), here + BLOCK)
        return None

    def _on_extension(self, unit: memoryview, here: int) -> TarItem | None:
        payload = bytes(unit[: self._size])
        self._expect(BLOCK, self._on_header)
        pending = self._pending
        if self._extension == b"g":
            # A reader that returns global headers to its caller forgets what came before them.
            self._pending = _Pending()
            self.entries += 1
            pax_records(payload)
        elif self._extension == b"x":
            pending.records = pax_records(payload)
        elif self._extension == b"L":
            pending.long_name = payload.partition(b"\0")[0]
        else:
            pending.long_link = payload.partition(b"\0")[0]
        return None

    def _on_old_sparse(self, unit: memoryview, here: int) -> TarItem | None:
        runs, more = old_sparse_runs(bytes(unit), extended=True)
        self._runs += runs
        item = self._item
        assert item is not None
        item.payload += BLOCK
        item.end += BLOCK
        if more:
            if here - item.start > MAX_EXTENSION:
                raise TarInvalid(f"its sparse map is longer than {MAX_EXTENSION} bytes", item.entry.path)
            return None
        return self._finish_sparse(item, self._runs)

    def _on_map(self, unit: memoryview, here: int) -> TarItem | None:
        item = self._item
        assert item is not None
        item.payload += BLOCK
        item.stored -= BLOCK
        if item.stored < 0:
            raise TarInvalid("its sparse map is longer than its content", item.entry.path)
        try:
            runs = self._map.feed(bytes(unit))
        except TarInvalid as error:
            raise TarInvalid(error.message.removeprefix("tar stream: "), item.entry.path) from None
        return None if runs is None else self._finish_sparse(item, runs)

    # -- entries -------------------------------------------------------------------------------------------------------

    def _expect(self, need: int, handler: Callable[[memoryview, int], TarItem | None]) -> None:
        self._need, self._handler = need, handler

    def _entry(self, unit: memoryview, fields: tuple[bytes, ...], here: int) -> TarItem | None:
        raw, ids, size_, mtime, _, kind_byte, raw_link, rest, tail = fields
        who = self._owners.get((ids, rest))
        if who is None:
            if len(self._owners) >= MAX_TAR_OWNERS:
                self._owners.clear()
            who = self._owners[ids, rest] = owner(ids, rest)
        name = raw.partition(b"\0")[0]
        link = raw_link.partition(b"\0")[0]
        size, mtime_ns = number(size_), number(mtime) * 1_000_000_000
        uid, gid, uname, gname = who.uid, who.gid, who.uname, who.gname
        if tail[0] and who.is_ustar:
            width = 131 if tail[163:] == STAR_TRAILER else 155
            name = tail[:width].partition(b"\0")[0] + b"/" + name
        pending = self._pending
        records: dict[bytes, bytes] | None = None
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if pending.start >= 0:
            start = pending.start
            records = pending.records
            if records:
                name = records.get(b"path") or name
                link = records.get(b"linkpath") or link
                uname, gname = records.get(b"uname") or uname, records.get(b"gname") or gname
                if value := records.get(b"size"):
                    size = decimal(value, "its size")
                if value := records.get(b"uid"):
                    uid = decimal(value, "its owner")
                if value := records.get(b"gid"):
                    gid = decimal(value, "its group")
                if value := records.get(b"mtime"):
                    mtime_ns = seconds_to_ns(value)
                xattrs = _xattrs(records)
            name, link = pending.long_name or name, pending.long_link or link
        else:
            start = here
        kind = _KINDS.get(kind_byte)
        if kind is None:
            raise TarInvalid(f"its type {kind_byte!r} can't be in a layer")
        if kind_byte == b"\0" and name.endswith(b"/"):
            kind = _DIR
        if size < 0 or size > MAX_FILE_SIZE:
            raise TarInvalid(f"its size {size} is absurd")
        stored = size if kind is _REG else 0
        runs: list[tuple[int, int]] | None = None
        wait: Callable[[memoryview, int], TarItem | None] | None = None
        if kind_byte == b"S":
            if not who.is_gnu:
                raise TarInvalid("it is a GNU sparse file without GNU's header")
            block = bytes(unit)
            size = old_sparse_size(block)
            runs, more = old_sparse_runs(block, extended=False)
            wait = self._on_old_sparse if more else None
        elif records:
            version = _sparse_version(records)
            if version is not None:
                if kind is not _REG:
                    raise TarInvalid("it is sparse and no regular file")
                name = records.get(b"GNU.sparse.name") or name
                if value := records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize"):
                    size = decimal(value, "its expanded size")
                if version:
                    runs, wait, self._map = [], self._on_map, SparseMapReader()
                else:
                    runs = listed_runs(records)
        told_link = link
        try:
            path = self._clean(name)
            if kind is _HARDLINK:
                link = clean_path(link, TarInvalid)
        except TarInvalid as error:
            raise TarInvalid(error.message.removeprefix("tar stream: "), name[:MAX_NAME]) from None
        entry = Entry(
            path,
            kind,
            who.mode & 0o7777,
            uid,
            gid,
            mtime_ns,
            size if kind is _REG else 0,
            link if kind in (_HARDLINK, _SYMLINK) else b"",
            who.rdev if kind in (_CHAR, _BLOCK) else (0, 0),
            xattrs,
            uname.decode("utf-8", "replace"),
            gname.decode("utf-8", "replace"),
        )
        _check(entry, name)
        self.entries += 1
        if self.entries > self._max_entries:
            raise TarInvalid(f"the layer has more than {self._max_entries} entries", name[:MAX_NAME])
        payload = here + BLOCK
        end = payload + stored + pad(stored)
        item = TarItem(entry, start, payload, stored, end, None, name, told_link, who.mode, kind_byte, records)
        if runs is None:
            return self._emit(item)
        if wait is None:
            return self._finish_sparse(item, runs)
        self._item, self._runs = item, runs
        pending.start = start
        self._expect(BLOCK, wait)
        return None

    def _clean(self, name: bytes) -> bytes:
        """Do what `clean_path` does, faster for a plain name in a directory that was clean before."""
        parent, _, base = name.rpartition(b"/")
        if parent in self._parents and 0 < len(base) <= MAX_NAME and base[0] != 0x2E and b"\0" not in base:
            return name
        path = clean_path(name, TarInvalid)
        if path == name and parent and len(parent) < MAX_PATH - MAX_NAME - 1:
            if len(self._parents) >= MAX_TAR_PARENTS:
                self._parents.clear()
            self._parents.add(parent)
        return path

    def _finish_sparse(self, item: TarItem, runs: list[tuple[int, int]]) -> TarItem:
        if not 0 <= item.entry.size <= MAX_FILE_SIZE:
            raise TarInvalid(f"its size {item.entry.size} is absurd", item.entry.path)
        try:
            item.sparse = check_runs(runs, item.entry.size, item.stored)
        except TarInvalid as error:
            raise TarInvalid(error.message.removeprefix("tar stream: "), item.entry.path) from None
        self._item, self._runs = None, []
        self._expect(BLOCK, self._on_header)
        return self._emit(item)

    def _emit(self, item: TarItem) -> TarItem:
        self._skip = item.end - item.payload
        self._truncatable = self._skip - item.stored
        if self._pending.start >= 0:
            self._pending = _Pending()
        return item


def _sparse_version(records: dict[bytes, bytes]) -> bool | None:
    """Whether the sparse map lies in the data (format 1.0) or in the records (0.0, 0.1). None: not a sparse file."""
    key = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    if key == (b"", b""):
        return False if records.get(SPARSE_MAP) else None
    return _SPARSE_VERSIONS.get(key)


def _xattrs(records: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    # An empty value means "none" in a PAX record: Go's archive/tar, and so every full unpack, leaves it out.
    found = sorted((key[len(XATTR) :], value) for key, value in records.items() if value and key.startswith(XATTR))
    if not found:
        return ()
    if sum(len(key) + len(value) for key, value in found) > MAX_XATTRS:
        raise TarInvalid(f"its extended attributes take more than {MAX_XATTRS} bytes")
    for key, value in found:
        if not key or len(key) > MAX_NAME or len(value) > MAX_XATTR_VALUE:
            raise TarInvalid(f"its extended attribute {key[:40]!r} is one that no file system takes")
    return tuple(found)


def _check(entry: Entry, name: bytes) -> None:
    """Refuse what no file system could hold, naming the entry."""
    if not 0 <= entry.uid <= MAX_OWNER or not 0 <= entry.gid <= MAX_OWNER:
        reason = f"its owner {entry.uid}:{entry.gid} is none that a kernel knows"
    elif not FIRST_TIME <= entry.mtime_ns <= LAST_TIME:
        reason = "its time lies outside of the years 1 to 9999"
    elif not entry.path and entry.kind is not _DIR:
        reason = "it would take the place of the root directory"
    elif entry.kind is _SYMLINK and not 0 < len(entry.link) < MAX_PATH:
        reason = "its link target is empty or too long"
    elif entry.rdev != (0, 0) and not (0 <= entry.rdev[0] < 1 << 12 and 0 <= entry.rdev[1] < 1 << 20):
        reason = f"its device number {entry.rdev[0]}:{entry.rdev[1]} is out of range"
    else:
        return
    raise TarInvalid(reason, name[:MAX_NAME])
