"""The TOC of a layer read: JSON to (Entry, chunks), every rule of the format checked.

Source: specs/estargz.md section 2. A TOC is an attacker's input even when its digest is right: the digest proves who
wrote it, not that it makes sense.
"""

from __future__ import annotations

from base64 import b64decode
from binascii import unhexlify
from collections.abc import Iterator

import msgspec

from lazyfs.digest import EMPTY
from lazyfs.errors import TocInvalid
from lazyfs.format.entry import MAX_FILE, MAX_NAME, MAX_PATH, MAX_XATTRS, Chunk, Entry, Kind, clean_path
from lazyfs.format.rfc3339 import TimeTable
from lazyfs.format.toc_json import (
    HOLE,
    KINDS,
    LOST,
    MAX_CHUNK,
    MAX_ENTRIES,
    MAX_HOLES,
    MAX_ID,
    MAX_INNER,
    MAX_MAJOR,
    MAX_MINOR,
    MAX_TOC,
    MIN_HOLE,
    TocDocument,
    TocItem,
    is_utf8,
)
from lazyfs.format.zeros import ZeroDigests

# Made here, where one thread imports: two that make their first one of a type at once crash the process.
_DECODER = msgspec.json.Decoder(TocDocument)
_REG = Kind.REG  # an attribute of an enumeration takes longer to find than most else here
_ODD_STARTS = ("", ".", "/")
_FEW = max(Kind.DIR, Kind.REG)  # kinds above it are those of few entries


def parse_toc(raw: bytes, payload_end: int) -> Iterator[tuple[Entry, list[Chunk]]]:
    """Check a TOC and yield its entries in blob order, each with the chunks of its content (empty unless REG).

    `payload_end` is the blob offset behind the last frame; no chunk may start there or later. Landmarks and whiteouts
    are yielded like other files, the TOC's own tar entry is not in a TOC. Names may still occur twice: see
    `Namespace`. Pure; about 3 µs an entry, and the decoded JSON is held until the last one. Raise TocInvalid, possibly
    only after some entries.
    """
    if len(raw) > MAX_TOC:
        raise TocInvalid(f"the TOC has {len(raw)} bytes, more than the {MAX_TOC} allowed")
    # Each element costs at least one brace: bounds the memory of decoding before it starts.
    if raw.count(b"{") > 2 * MAX_ENTRIES:
        raise TocInvalid(f"the TOC has more than {MAX_ENTRIES} entries")
    try:
        toc = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TocInvalid(f"the TOC can't be decoded: {str(error)[:200]}") from None
    if toc.version != 1:
        raise TocInvalid(f"the TOC is of version {toc.version}, not 1")
    if len(toc.entries) > MAX_ENTRIES:
        raise TocInvalid(f"the TOC has more than {MAX_ENTRIES} entries")
    return _Reader(payload_end).read(toc.entries)


class _Reader:
    """The state of one pass over a TOC: the file that waits for chunks, and the place in the blob."""

    def __init__(self, payload_end: int) -> None:
        self._payload_end = payload_end
        self._times = TimeTable()
        self._users: dict[int, str] = {}  # a user's name may be told at its first entry only
        self._groups: dict[int, str] = {}
        self._frame = -1  # blob offset of the frame of the last chunk
        self._inner_end = 0  # bytes of that frame's decompressed form that are taken
        self._end = 0  # blob offset before which the last file with an `endOffset` claims all frames
        self._zeros = ZeroDigests()
        self._holes = 0  # bytes of zeros so far

    def read(self, items: list[TocItem]) -> Iterator[tuple[Entry, list[Chunk]]]:
        number, total = 0, len(items)
        while number < total:
            item = items[number]
            try:
                if item.type == "chunk":
                    raise TocInvalid("is a chunk of no file")
                entry = self._entry(item)
                size = entry.size
                if not size:
                    chunks: list[Chunk] = []
                elif (
                    # Nearly all files: one chunk, which is all there is.
                    size <= MAX_CHUNK
                    and item.chunk_size in (0, size)
                    and not (item.chunk_offset or item.chunk_type or item.end_offset)
                ):
                    self._place(item, size)
                    whole, told = item.digest, item.chunk_digest or item.digest
                    chunks = [Chunk(0, size, item.offset, item.inner_offset, _digest(told))]
                    if whole and whole != told:
                        _digest(whole)
                else:
                    chunks = []
                    number = self._chunks(items, number, chunks)
            except TocInvalid as error:
                raise TocInvalid(f"entry {number} of the TOC, {item.name[:200]!r}: {error.message}") from None
            yield entry, chunks
            number += 1

    def _entry(self, item: TocItem) -> Entry:
        path = _path(item.name, item.name_raw)
        uid, gid, uname, gname = item.uid, item.gid, item.user_name, item.group_name
        if uid > MAX_ID or gid > MAX_ID:
            raise TocInvalid(f"has the owner {uid}:{gid}, which no file can have")
        if uname:
            self._users[uid] = uname
        elif self._users:
            uname = self._users.get(uid, "")
        if gname:
            self._groups[gid] = gname
        elif self._groups:
            gname = self._groups.get(gid, "")
        mtime_ns = self._times.parse(item.modtime) if item.modtime else 0
        kind, size = KINDS[item.type], 0
        if kind is _REG:
            size = item.size
            if size > MAX_FILE:
                raise TocInvalid(f"has the size {size}, more than any file")
            if not size and item.digest not in ("", EMPTY):
                raise TocInvalid("is empty, and its digest is not that of nothing")
        entry = Entry(path, kind, item.mode & 0o7777, uid, gid, mtime_ns, size, b"", (0, 0), (), uname, gname)
        if kind <= _FEW:  # directories and files: nearly all
            pass
        elif kind is Kind.SYMLINK:
            entry.link = _octets(item.link_name, item.link_name_raw)
            if not entry.link or len(entry.link) >= MAX_PATH or b"\0" in entry.link:
                raise TocInvalid("is a symlink whose target is empty, too long or holds a NUL byte")
        elif kind is Kind.HARDLINK:
            entry.link = _path(item.link_name, item.link_name_raw)
            if not entry.link:
                raise TocInvalid("is a hard link to nothing")
        elif kind is Kind.CHAR or kind is Kind.BLOCK:
            if item.dev_major > MAX_MAJOR or item.dev_minor > MAX_MINOR:
                raise TocInvalid(f"is the device {item.dev_major}:{item.dev_minor}, which can't be")
            entry.rdev = (item.dev_major, item.dev_minor)
        if item.xattrs or item.xattrs_raw:
            entry.xattrs = _xattrs(item)
        return entry

    def _chunks(self, items: list[TocItem], number: int, out: list[Chunk]) -> int:
        """Collect the chunks of the file at `number`; return the number of the last element that belongs to it."""
        file = items[number]
        size, done = file.size, 0
        while True:
            item = items[number]
            if item.chunk_type not in ("", "zeros"):
                raise TocInvalid(f"has a chunk of the unknown type {item.chunk_type[:20]!r}")
            chunk_size = item.chunk_size or size - done
            if item.chunk_offset != done or not 0 < chunk_size <= size - done:
                raise TocInvalid(f"its chunk of {chunk_size} at {item.chunk_offset} does not follow {done} of {size}")
            told = item.chunk_digest
            if not told and chunk_size == size:
                told = file.digest
            if item.chunk_type and chunk_size >= MIN_HOLE:
                self._hole(done, chunk_size, told, out)
            else:
                if chunk_size > MAX_CHUNK:
                    raise TocInvalid(f"has a chunk of {chunk_size} bytes, more than the {MAX_CHUNK} allowed")
                self._place(item, chunk_size)
                out.append(Chunk(done, chunk_size, item.offset, item.inner_offset, _digest(told)))
            done += chunk_size
            if done == size:
                break
            number += 1
            if number == len(items) or items[number].type != "chunk":
                raise TocInvalid(f"has chunks for {done} of its {size} bytes")
            if items[number].name not in (file.name, ""):
                raise TocInvalid(f"is followed by a chunk of {items[number].name[:200]!r}")
        if file.digest and file.digest != told:
            _digest(file.digest)
        if file.end_offset:
            self._bound(file.end_offset, out)
        return number

    def _hole(self, offset: int, size: int, told: str, out: list[Chunk]) -> None:
        """Add a run of zeros, which nobody fetches, in pieces that are no trouble to read."""
        self._holes += size
        if self._holes > MAX_HOLES:
            raise TocInvalid(f"is one too many for the {MAX_HOLES} bytes of zeros that a layer may claim")
        if told and _digest(told) != self._zeros.digest(size):
            raise TocInvalid(f"has a chunk of {size} zeros whose digest is not that of zeros")
        for start in range(0, size, HOLE):
            piece = min(HOLE, size - start)
            out.append(Chunk(offset + start, piece, -1, 0, self._zeros.digest(piece)))

    def _bound(self, end: int, chunks: list[Chunk]) -> None:
        """Check what a file says of the end of its frames: no other may begin before it."""
        last = max((chunk.blob_offset for chunk in chunks), default=-1)
        if not max(last, self._end - 1) < end <= self._payload_end:
            raise TocInvalid(f"its last frame begins at {last} and claims to end at {end}")
        self._end = end

    def _place(self, item: TocItem, size: int) -> None:
        """Check that a chunk lies behind the one before it: content of one stream can't overlap."""
        at, inner = item.offset, item.inner_offset
        if at >= self._payload_end:
            raise TocInvalid(f"its content at {at} lies behind the last frame's end, {self._payload_end}")
        if at < self._end:
            raise TocInvalid(f"its content at {at} lies in another file's, which ends at {self._end}")
        if inner > MAX_INNER:
            raise TocInvalid(f"its content lies {inner} bytes into a frame, more than {MAX_INNER}")
        if at < self._frame or (at == self._frame and inner < self._inner_end):
            raise TocInvalid(f"its content at {at}+{inner} is not in blob order")
        self._frame, self._inner_end = at, inner + size


def _digest(text: str) -> bytes:
    try:
        raw = unhexlify(text[7:])
    except ValueError:
        raw = b""
    if len(raw) == 32 and f"sha256:{raw.hex()}" == text:  # unhexlify takes capitals too
        return raw
    raise TocInvalid(f"has content without a sha256 digest for it: {text[:80]!r}")


def _path(text: str, raw: bytes | None) -> bytes:
    """Return the cleaned bytes of a name. Raise TocInvalid as `clean_path` does."""
    # Nearly all names have nothing to be cleaned, and in text that is found out four times faster than in bytes.
    if (
        raw is None
        and text.isascii()
        and len(text) <= MAX_NAME
        and "/." not in text
        and "//" not in text
        and "\0" not in text
        and text[:1] not in _ODD_STARTS
    ):
        return text.removesuffix("/").encode()
    return clean_path(_octets(text, raw), TocInvalid)


def _octets(text: str, raw: bytes | None) -> bytes:
    if raw is None:
        if LOST in text:  # other writers have no word for it, and the tar has another name
            raise TocInvalid("has a name whose bytes its writer could not keep")
        return text.encode()
    if raw.decode("utf-8", "replace") != text or LOST not in text:
        raise TocInvalid(f"has the raw name {raw[:200]!r}, which is not what {text[:200]!r} stands for")
    return raw


def _xattrs(item: TocItem) -> tuple[tuple[bytes, bytes], ...]:
    pairs = {name.encode(): value or b"" for name, value in (item.xattrs or {}).items()}
    for coded, value in (item.xattrs_raw or {}).items():
        try:
            name = b64decode(coded, validate=True)
        except ValueError:
            raise TocInvalid(f"has an extended attribute whose name {coded[:80]!r} is not base64") from None
        if is_utf8(name):
            raise TocInvalid(f"has the raw attribute name {name[:80]!r}, which needs none")
        pairs[name] = value
    if any(not name or len(name) > 255 or b"\0" in name for name in pairs):
        raise TocInvalid("has an extended attribute whose name no file system takes")
    if sum(len(name) + len(value) for name, value in pairs.items()) > MAX_XATTRS:
        raise TocInvalid(f"has more than {MAX_XATTRS} bytes of extended attributes")
    return tuple(sorted(pairs.items()))
