"""The TOC of a layer written: entries in blob order to JSON, the same entries to the same bytes everywhere."""

from __future__ import annotations

from base64 import b64encode

import msgspec

from lazyfs.digest import text as digest_text
from lazyfs.errors import TocInvalid
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.rfc3339 import TimeTable
from lazyfs.format.toc_json import LOST, MAX_ID, MAX_MAJOR, MAX_MINOR, TYPE_OF, TocItem, is_utf8
from lazyfs.limits import MAX_TOC, MAX_TOC_ITEMS


class TocWriter:
    """Collect entries in blob order with `add`, then take the JSON with `finish`. Not thread-safe.

    The same entries give the same bytes everywhere: fixed order of fields, no white space, sorted attributes. Holds
    the encoded form only, at most MAX_TOC bytes.
    """

    def __init__(self) -> None:
        self._out = bytearray(b'{"version":1,"entries":[')
        self._encode_into = msgspec.json.Encoder().encode_into
        self._times = TimeTable()
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}
        self._count = 0

    def add(self, entry: Entry, digest: bytes | None, chunks: list[Chunk]) -> None:
        """Append one entry. `digest` is the sha256 of a regular file's content, else None; `chunks` cover the content.

        A device number, owner or name that `parse_toc` would refuse raises TocInvalid here.
        """
        kind = entry.kind
        name, name_raw = _text(entry.path + b"/" if kind is Kind.DIR and entry.path else entry.path or b"./")
        type_name = TYPE_OF.get(kind)
        if type_name is None or entry.uid > MAX_ID or entry.gid > MAX_ID or min(entry.uid, entry.gid, entry.size) < 0:
            raise TocInvalid(f"{name[:200]!r} has a kind, owner or size that a TOC can't tell")
        item = TocItem(name, type_name, name_raw, mode=entry.mode & 0o7777, uid=entry.uid, gid=entry.gid)
        if entry.mtime_ns:
            item.modtime = self._times.format(entry.mtime_ns)
        if entry.uname and self._users.get(entry.uid) != entry.uname:
            item.user_name = self._users[entry.uid] = entry.uname
        if entry.gname and self._groups.get(entry.gid) != entry.gname:
            item.group_name = self._groups[entry.gid] = entry.gname
        if kind is Kind.SYMLINK or kind is Kind.HARDLINK:
            item.link_name, item.link_name_raw = _text(entry.link)
        elif kind is Kind.CHAR or kind is Kind.BLOCK:
            item.dev_major, item.dev_minor = entry.rdev
            if not (0 <= item.dev_major <= MAX_MAJOR and 0 <= item.dev_minor <= MAX_MINOR):
                raise TocInvalid(f"{name[:200]!r} is the device {entry.rdev}, which can't be")
        if entry.xattrs:
            self._add_xattrs(item, entry)
        if kind is not Kind.REG:
            self._put(item)
            return
        item.size = entry.size
        item.digest = digest_text(digest) if digest is not None else ""
        if sum(chunk.size for chunk in chunks) != entry.size:
            raise TocInvalid(f"{name[:200]!r} has chunks that don't make up its {entry.size} bytes")
        for number, chunk in enumerate(chunks):
            if number:
                item = TocItem(name, "chunk", name_raw)
            item.offset, item.inner_offset, item.chunk_offset = chunk.blob_offset, chunk.inner_offset, chunk.offset
            item.chunk_digest = digest_text(chunk.digest)
            if number < len(chunks) - 1:
                item.chunk_size = chunk.size
            self._put(item)
        if not chunks:
            self._put(item)

    def _add_xattrs(self, item: TocItem, entry: Entry) -> None:
        known: dict[str, bytes | None] = {}
        odd: dict[str, bytes] = {}
        for key, value in sorted(entry.xattrs):
            if is_utf8(key):
                known[key.decode()] = value
            else:
                odd[b64encode(key).decode()] = value
        item.xattrs, item.xattrs_raw = known or None, odd or None

    def _put(self, item: TocItem) -> None:
        out = self._out
        if self._count:
            out += b","
        self._count += 1
        self._encode_into(item, out, len(out))
        if len(out) > MAX_TOC or self._count > MAX_TOC_ITEMS:
            raise TocInvalid(f"the layer needs a TOC of more than {MAX_TOC} bytes or {MAX_TOC_ITEMS} entries")

    def finish(self) -> bytes:
        """Return the whole TOC. Nothing can be added afterwards."""
        self._out += b"]}"
        return bytes(self._out)


def _text(raw: bytes) -> tuple[str, bytes | None]:
    text = raw.decode("utf-8", "replace")
    return text, raw if LOST in text else None
