"""What podman's form needs besides content: a tar-split, and entries in the tar's own words.

podman 5 compares each header in the tar-split with the TOC and refuses the image when they differ. So where one of them
can't say what the other does, the tar-split is left out, and such a podman pulls that layer whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from indexer.frames import Content
from lazyfs.errors import TarInvalid, TocInvalid
from lazyfs.format.entry import Entry, Kind
from lazyfs.format.storage_write import Verbatim
from lazyfs.format.tar import TarItem
from lazyfs.format.tar_headers import BLOCK, GNU_MAGIC, seconds_to_ns
from lazyfs.format.tar_split import TarSplitWriter

_XATTR = b"SCHILY.xattr."
_USUAL = frozenset((b"\0", b"0", b"1", b"2", b"3", b"4", b"5", b"6"))


@dataclass(slots=True)
class TellingContent(Content):
    """A content with the entry that it came with; also of entries that have no content."""

    entry: Entry | None = None
    told: Verbatim | None = None


class Split:
    """Follows a stream for podman's sake. One thread's."""

    def __init__(self, level: int) -> None:
        self._writer: TarSplitWriter | None = TarSplitWriter(level)
        self._end = 0  # stream offset: of the last entry

    def plain(self, data: memoryview | bytes) -> None:
        """Take bytes that are no content."""
        if self._writer is not None:
            try:
                self._writer.plain(data)
            except TocInvalid:
                self.give_up()

    def skip(self, item: TarItem) -> None:
        """Take note of an entry that is left out of the result."""
        self._end = item.end

    def begin(self, item: TarItem, header: memoryview, content: Content | None, *, rewritten: bool) -> Content:
        """Take note of an entry whose `header` was just told as plain; return its content, or one in its place."""
        entry = item.entry
        told = Verbatim(entry.path, b"", entry.mode) if rewritten else _verbatim(item)
        if item.start != self._end or not (rewritten or _is_usual(item, header)):
            self.give_up()
        self._end = item.end
        if self._writer is not None:
            try:
                self._writer.begin(told.name, entry.size)
            except TocInvalid:
                self.give_up()
        if content is None:
            return TellingContent(entry=entry, told=told)
        assert isinstance(content, TellingContent)
        content.entry, content.told = entry, told
        return content

    def content(self, data: memoryview) -> None:
        """Take the next bytes of the entry's content."""
        if self._writer is not None:
            try:
                self._writer.content(data)
            except TocInvalid:
                self.give_up()

    def give_up(self) -> None:
        """Leave the tar-split out."""
        self._writer = None

    def finish(self) -> tuple[bytes | None, int]:
        """Return the tar-split, compressed, and its size before that; (None, 0) when it was left out."""
        if self._writer is None:
            return None, 0
        return self._writer.finish(), self._writer.raw_size


def _verbatim(item: TarItem) -> Verbatim:
    records = item.records or {}
    times = []
    for key in (b"atime", b"ctime"):
        try:
            times.append(seconds_to_ns(records[key]) if records.get(key) else None)
        except TarInvalid:
            times.append(None)
    return Verbatim(item.name, item.link, item.mode, *times)


def _is_usual(item: TarItem, header: memoryview) -> bool:
    """Tell whether a TOC can say all that podman reads from this header."""
    last = header[-BLOCK:]
    return (
        item.type_byte in _USUAL
        and item.mode >= 0
        and not (item.entry.kind is Kind.DIR and item.type_byte != b"5")
        and not (last[257:265] == GNU_MAGIC and bytes(last[345:369]).strip(b"\0 "))
        and not any(key.startswith(_XATTR) and not value for key, value in (item.records or {}).items())
    )
