"""The TOC of a layer read: JSON to a listing, every rule of the format checked.

Source: specs/estargz.md section 2. A TOC is an attacker's input even when its digest is right: the digest proves who
wrote it, not that it makes sense.

A TOC is decoded in blocks of some hundred items, and each block goes column by column into the listing while the
processor's caches hold it: half a million items, all at once, take as long to get at as to check. Attributes are read
here, content by `Content`.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator, Sequence
from mmap import mmap

import msgspec

from lazyfs.digest import EMPTY
from lazyfs.errors import TocInvalid
from lazyfs.format.entry import MAX_NAME, MAX_PATH, Kind, clean_path
from lazyfs.format.listing import Listing
from lazyfs.format.rfc3339 import TimeTable
from lazyfs.format.toc_content import Content
from lazyfs.format.toc_json import KINDS, LOST, MAX_ID, MAX_MAJOR, MAX_MINOR, TocDocument, TocItem, TocOutline, is_utf8
from lazyfs.limits import MAX_FILE_SIZE, MAX_TOC, MAX_TOC_ITEMS, MAX_XATTRS

# Made here, where one thread imports: two that make their first one of a type at once crash the process.
_WHOLE = msgspec.json.Decoder(TocDocument)
_OUTLINE = msgspec.json.Decoder(TocOutline)
_ITEMS = msgspec.json.Decoder(list[TocItem])
_BLOCK = 128 << 10  # bytes of JSON
_BORDER = re.compile(rb'\}[ \t\r\n]*(,)[ \t\r\n]*\{[ \t\r\n]*"name"[ \t\r\n]*:')
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_ORDINARY = frozenset({"dir", "reg"})
_EMPTY = ("", EMPTY)
_ODD_STARTS = ("", ".", "/")
_ODD_NAMES = (b"/./", b"/../", b"/.\0", b"/..\0")  # each name is between "\0/" and "\0"
_LOST = LOST.encode()


def parse_toc(raw: bytes | mmap, payload_end: int) -> Listing:
    """Check a TOC and return its entries in blob order, each with the chunks of its content (none unless REG).

    `payload_end` is the blob offset behind the last frame; no chunk may start there or later. Landmarks and whiteouts
    are listed like other files, the TOC's own tar entry is not in a TOC. Names may still occur twice: see
    `Survivors`. Pure; about 3 µs an entry. Raise TocInvalid.
    """
    if len(raw) > MAX_TOC:
        raise TocInvalid(f"the TOC has {len(raw)} bytes, more than the {MAX_TOC} allowed")
    try:
        return _read(_blocks(raw), payload_end)
    except _UNREADABLE:
        return _read(iter([_decoded(raw)]), payload_end)


def _blocks(raw: bytes | mmap) -> Iterator[list[TocItem]]:
    """Yield a TOC's items, some hundred at once, all chunks of a file together. Raise _UNREADABLE or TocInvalid.

    No text holds a quote that a name might begin with, so what looks like a border is one, or lies deep inside of an
    item: then that can't be decoded.
    """
    outline = _OUTLINE.decode(raw)
    _check_version(outline.version)
    text, start, count = memoryview(outline.entries), 0, 0
    held: list[TocItem] = []
    opening = closing = b""
    while start < len(text):
        border = _BORDER.search(text, start + _BLOCK)
        stop, closing = (border.start(1), b"]") if border is not None else (len(text), b"")
        items = _ITEMS.decode(_decodable(b"".join((opening, text[start:stop], closing))))
        count += len(items)
        _check_count(count)
        if items and items[0].type != "chunk":
            yield held
            held = items
        else:
            held += items
        opening, start = b"[", stop + 1
    yield held


def _decoded(raw: bytes | mmap) -> list[TocItem]:
    """Return a TOC's items decoded at once. Raise TocInvalid, in the words of who decodes."""
    try:
        toc = _WHOLE.decode(_decodable(raw[:]))
    except _UNREADABLE as error:
        raise TocInvalid(f"the TOC can't be decoded: {str(error)[:200]}") from None
    _check_version(toc.version)
    _check_count(len(toc.entries))
    return toc.entries


def _decodable(text: bytes) -> bytes:
    """Return the same. Raise TocInvalid where its items would take too much memory."""
    # Each item costs at least one brace, and a block is too short for too many.
    if len(text) > 2 * MAX_TOC_ITEMS and text.count(b"{") > 2 * MAX_TOC_ITEMS:
        raise TocInvalid(f"the TOC has more than {MAX_TOC_ITEMS} entries")
    return text


def _check_version(version: int) -> None:
    if version != 1:
        raise TocInvalid(f"the TOC is of version {version}, not 1")


def _check_count(items: int) -> None:
    if items > MAX_TOC_ITEMS:
        raise TocInvalid(f"the TOC has more than {MAX_TOC_ITEMS} entries")


def _read(blocks: Iterator[list[TocItem]], payload_end: int) -> Listing:
    reader = _Reader(payload_end)
    for items in blocks:
        reader.read(items)
    return reader.listing


class _Reader:
    """The state of one pass over a TOC's items, block by block."""

    def __init__(self, payload_end: int) -> None:
        self.listing = Listing()
        self._content = Content(self.listing, payload_end)
        self._times = TimeTable()
        self._users: dict[int, str] = {}  # a user's name may be told at its first entry only
        self._groups: dict[int, str] = {}
        self._items = 0  # in the blocks before
        self._entry = 0  # of the block: that is looked at

    def read(self, items: list[TocItem]) -> None:
        """Add a block of items. Raise TocInvalid."""
        heads: Sequence[int] = range(len(items))
        types = [item.type for item in items]
        if "chunk" in types:
            heads = [number for number, kind in enumerate(types) if kind != "chunk"]
        content = self._content
        content.number = -1
        try:
            if len(heads) == len(items):
                self._attributes(items, types)
            else:
                self._attributes([items[number] for number in heads], [types[number] for number in heads])
            content.read(items, types)
        except TocInvalid as error:
            number = content.number if content.number >= 0 else heads[self._entry]
            name = items[number].name[:200]
            raise TocInvalid(f"entry {self._items + number} of the TOC, {name!r}: {error.message}") from None
        self._items += len(items)

    def _attributes(self, entries: list[TocItem], types: Sequence[str]) -> None:
        """Add all but the content of entries. Raise TocInvalid; `_entry` tells of which."""
        if not entries:
            return
        out, self._entry = self.listing, 0
        uids, gids = [item.uid for item in entries], [item.gid for item in entries]
        sizes = [item.size if kind == "reg" else 0 for item, kind in zip(entries, types, strict=True)]
        self._judge(entries, uids, gids, sizes)
        paths, times = self._paths(entries), self._mtimes([item.modtime for item in entries])
        if not _ORDINARY.issuperset(types):
            for self._entry, item in enumerate(entries):
                if item.type not in _ORDINARY:
                    self._few(item, KINDS[item.type])
        for self._entry in [number for number, item in enumerate(entries) if item.xattrs or item.xattrs_raw]:
            out.xattrs[len(out) + self._entry] = _xattrs(entries[self._entry])
        _carry(self._users, out.unames, len(out), uids, [item.user_name for item in entries])
        _carry(self._groups, out.gnames, len(out), gids, [item.group_name for item in entries])
        out.kinds += [KINDS[kind] for kind in types]
        out.modes += [item.mode & 0o7777 for item in entries]
        out.uids += uids
        out.gids += gids
        out.mtimes += times
        out.sizes += sizes
        out.paths += paths

    def _judge(self, entries: list[TocItem], uids: list[int], gids: list[int], sizes: list[int]) -> None:
        """Hold owners and sizes against the rules."""
        empty = [number for number, item in enumerate(entries) if not item.size and item.digest not in _EMPTY]
        if not empty and max(uids) <= MAX_ID and max(gids) <= MAX_ID and max(sizes) <= MAX_FILE_SIZE:
            return
        for self._entry, item in enumerate(entries):
            if item.uid > MAX_ID or item.gid > MAX_ID:
                raise TocInvalid(f"has the owner {item.uid}:{item.gid}, which no file can have")
            if item.type == "reg" and item.size > MAX_FILE_SIZE:
                raise TocInvalid(f"has the size {item.size}, more than any file")
            if item.type == "reg" and not item.size and item.digest not in _EMPTY:
                raise TocInvalid("is empty, and its digest is not that of nothing")

    def _paths(self, entries: list[TocItem]) -> list[bytes]:
        paths = [item.name.encode() for item in entries]
        joined = b"\0/".join([b"", *paths, b""])
        if (
            joined.count(b"\0") == len(paths) + 1
            and joined.find(b"//") < 0
            and (joined.find(b"/.") < 0 or all(joined.find(odd) < 0 for odd in _ODD_NAMES))
            and (joined.isascii() or joined.find(_LOST) < 0)
            and max(map(len, paths)) <= MAX_NAME
            and not [True for item in entries if item.name_raw is not None]
        ):  # nothing to be cleaned in any
            return [path.removesuffix(b"/") for path in paths]
        for self._entry, item in enumerate(entries):
            paths[self._entry] = _path(item.name, item.name_raw)
        return paths

    def _mtimes(self, texts: list[str]) -> list[int]:
        times = [0] * len(texts)
        if any(texts):
            parse = self._times.parse
            for self._entry, text in enumerate(texts):
                if text:
                    times[self._entry] = parse(text)
        return times

    def _few(self, item: TocItem, kind: Kind) -> None:
        """Read what an entry leads to that is neither directory nor file."""
        out, number = self.listing, len(self.listing) + self._entry
        if kind is Kind.SYMLINK:
            link = _octets(item.link_name, item.link_name_raw)
            if not link or len(link) >= MAX_PATH or b"\0" in link:
                raise TocInvalid("is a symlink whose target is empty, too long or holds a NUL byte")
            out.links[number] = link
        elif kind is Kind.HARDLINK:
            link = _path(item.link_name, item.link_name_raw)
            if not link:
                raise TocInvalid("is a hard link to nothing")
            out.links[number] = link
        elif kind is Kind.CHAR or kind is Kind.BLOCK:
            if item.dev_major > MAX_MAJOR or item.dev_minor > MAX_MINOR:
                raise TocInvalid(f"is the device {item.dev_major}:{item.dev_minor}, which can't be")
            out.rdevs[number] = (item.dev_major, item.dev_minor)


def _carry(known: dict[int, str], out: dict[int, str], number: int, owners: list[int], names: list[str]) -> None:
    """Note the owners' names of entries from `number` on, which may be told at an owner's first entry only."""
    if known or any(names):
        for at, (owner, name) in enumerate(zip(owners, names, strict=True), number):
            if name:
                known[owner] = name
            found = known.get(owner)
            if found:
                out[at] = found


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
