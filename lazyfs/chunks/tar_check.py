"""A layer's tar headers held against its table, entry by entry as they stream by.

What counts is what a full unpack leaves behind: of a name that occurs twice the last, nothing of a directory that was
replaced by something else, parents that are symlinks followed. `Namespace` works that out for a TOC with every entry at
hand; here memory is two numbers a row, and only entries that differ from their row so far are kept.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from lazyfs.chunks.zero_runs import ZeroRuns
from lazyfs.errors import TocMismatch
from lazyfs.format.entry import (
    DROPPED_XATTRS,
    HIDDEN_AT_ROOT,
    OPAQUE_MARKER,
    WHITEOUT_PREFIX,
    Entry,
    Kind,
)
from lazyfs.format.table import FLAG_IMPLICIT, FLAG_OPAQUE, NO_FRAME, LayerTable
from lazyfs.format.tar import XATTR, TarItem
from lazyfs.limits import MAX_CHECK_PARENTS, MAX_HELD_ENTRIES, MAX_SYMLINKS

_SECOND = 1_000_000_000
_NOT_SEEN = -1
_LATE_PASSES = 4  # over what is held at the end; longer chains of links to later links are refused


@dataclass(frozen=True, slots=True)
class _Held:
    """An entry that is what its path names now, and not what the table says of it. Offsets are in the tar stream."""

    entry: Entry  # HARDLINK only when its target has not come yet
    start: int
    payload: int
    why: str
    linked: bool = False  # came as a hard link


class TarCheck:
    """Feed it tar items in stream order with `add`; `finish` says whether table and tar tell the same tree.

    Not thread-safe. Both raise TocMismatch. The table must stay open until then.
    """

    def __init__(self, table: LayerTable, layer: str) -> None:
        self._table = table
        self._layer = layer
        # By row, while what the tar has at its path is what the row says: where the inode's headers and content start.
        self._start = array("q", [_NOT_SEEN]) * table.rows
        self._payload = array("q", [_NOT_SEEN]) * table.rows
        self._opaque: set[int] = set()  # directories that hold an opaque marker
        self._removed: set[int] = set()  # directories with a whiteout beside them, which makes them opaque too
        self._hidden: set[bytes] = set()  # of HIDDEN_AT_ROOT, those that are there
        self._held: dict[bytes, _Held] = {}
        self._held_below: Counter[bytes] = Counter()  # directory -> held entries anywhere under it
        self._parents: dict[bytes, tuple[bytes, int | None]] = {}  # as written -> as resolved, and its row
        self._adopted = False  # a hard link stands in the table as the file itself
        self._kill_budget = 8 * table.rows + 100_000  # rows; bounds the work that replaced directories can cause

    def add(self, item: TarItem) -> None:
        """Take the next entry of the stream. About 20 µs."""
        entry, start, payload = item.entry, item.start, item.payload
        path = entry.path
        if item.sparse is not None:
            raise self._mismatch(path, "is sparse in the tar, so its content lies in no frame as it is")
        if item.records and (bare := _without_value(item.records)):
            entry = replace(entry, xattrs=(*entry.xattrs, *bare))
        if not path:
            self._compare(b"", 0, entry, start, payload, linked=False)
            return
        written, _, name = path.rpartition(b"/")
        parent, parent_row = self._directory(written, entry)
        if parent != written:
            path = parent + b"/" + name if parent else name
        if name.startswith(WHITEOUT_PREFIX):
            self._mark(path, name, parent_row, entry, start)
            return
        if path in HIDDEN_AT_ROOT and self._hide(path, entry.kind):
            return
        row = None if parent_row is None else self._table.child(parent_row, name)
        linked = entry.kind is Kind.HARDLINK
        if linked:
            target = self._target(entry)
            if target is None:
                self._replace(path, row)
                self._hold(path, row, _Held(entry, start, payload, "is a hard link to nothing in the tar", linked))
                return
            entry, start, payload = replace(target.entry, path=path), target.start, target.payload
        if entry.kind is not Kind.DIR:
            self._replace(path, row)
        self._compare(path, row, entry, start, payload, linked=linked)

    def _compare(self, path: bytes, row: int | None, entry: Entry, start: int, payload: int, *, linked: bool) -> None:
        why = self._difference(row, entry, start, linked=linked)
        if why or row is None:
            self._hold(path, row, _Held(entry, start, payload, why, linked))
        else:
            self._adopted |= linked and self._table.kind[row] != Kind.HARDLINK
            self._settle(path, row, start, payload)

    def _difference(self, row: int | None, entry: Entry, start: int, *, linked: bool) -> str:
        table = self._table
        if row is None:
            return "is in the tar and not in the TOC"
        told = table.kind[row]
        if told == Kind.HARDLINK:
            if not linked:
                return "is a hard link in the TOC and none in the tar"
            return "" if start == self._start[table.inode(row)] else "is a hard link to another file in the TOC"
        if told != entry.kind:
            return f"is of kind {Kind(told).name} in the TOC and {entry.kind.name} in the tar"
        if table.flags[row] & FLAG_IMPLICIT:
            return "has attributes in the tar and no entry in the TOC"
        if table.mode[row] != entry.mode & 0o7777:
            return f"has the mode {table.mode[row]:o} in the TOC and {entry.mode & 0o7777:o} in the tar"
        if (table.uid[row], table.gid[row]) != (entry.uid, entry.gid):
            return f"belongs to {table.uid[row]}:{table.gid[row]} in the TOC and {entry.uid}:{entry.gid} in the tar"
        if not _same_time(table.mtime_ns(row), entry.mtime_ns):
            return "has another time in the TOC than in the tar"
        kind = entry.kind
        if kind is Kind.REG and table.size[row] != entry.size:
            return f"has {table.size[row]} bytes in the TOC and {entry.size} in the tar"
        if kind is Kind.SYMLINK and table.link(row) != entry.link:
            return "leads elsewhere in the TOC than in the tar"
        if kind in (Kind.CHAR, Kind.BLOCK) and table.rdev(row) != entry.rdev:
            return "is another device in the TOC than in the tar"
        if table.xattr[row] or entry.xattrs:
            # Attributes without a value are there for some programs that read tars with Go's library, for others not.
            kept = {key: value for key, value in entry.xattrs if not key.startswith(DROPPED_XATTRS)}
            if {key: b"" for key, value in kept.items() if not value} | table.xattrs(row) != kept:
                return "has other extended attributes in the TOC than in the tar"
        return ""

    def _hide(self, path: bytes, kind: Kind) -> bool:
        """Tell whether the table leaves out what comes to one of the hidden names. A full unpack doesn't."""
        if kind is not Kind.REG:
            self._hidden.discard(path)
            return False
        row = self._table.child(0, path)
        self._replace(path, row)
        if row is not None:
            self._start[row] = _NOT_SEEN
        self._forget(path)
        self._hidden.add(path)
        self._parents.clear()
        return True

    def _mark(self, path: bytes, name: bytes, parent_row: int | None, entry: Entry, start: int) -> None:
        """Take a whiteout or an opaque marker; as in the table, a whiteout beside a directory makes that opaque."""
        table = self._table
        marked = self._removed
        if name == OPAQUE_MARKER:
            row, marked = parent_row, self._opaque
        elif name.startswith(OPAQUE_MARKER[:8]) or name == WHITEOUT_PREFIX:
            return  # aufs's own bookkeeping
        else:
            row = None if parent_row is None else table.child(parent_row, name[len(WHITEOUT_PREFIX) :])
            if row is not None and table.kind[row] not in (Kind.WHITEOUT, Kind.DIR):
                return  # the layer has a file of that name: it wins
        if row is None:
            self._hold(path, None, _Held(entry, start, start, "removes a name in the tar and not in the TOC"))
        elif table.kind[row] == Kind.WHITEOUT:
            self._settle(path, row, start, start)
        elif table.flags[row] & FLAG_OPAQUE:
            marked.add(row)
            self._forget(path)
        else:
            self._hold(path, None, _Held(entry, start, start, "makes a directory opaque in the tar and not in the TOC"))

    # -- what the paths name at this point of the stream

    def _directory(self, written: bytes, entry: Entry) -> tuple[bytes, int | None]:
        """Return the real path of a directory, symlinks followed, and its row (None: the table has none)."""
        if not written:
            return b"", 0
        known = self._parents.get(written)
        if known is None:
            if len(self._parents) >= MAX_CHECK_PARENTS:
                self._parents.clear()
            known = self._parents[written] = self._walk(written, entry)
        return known

    def _walk(self, written: bytes, entry: Entry) -> tuple[bytes, int | None]:
        todo = written.split(b"/")[::-1]
        here: list[bytes] = []
        rows: list[int | None] = [0]
        followed = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if here:
                    here.pop()
                    rows.pop()
                continue
            if not here and part in self._hidden:
                raise self._mismatch(entry.path, "lies below something that is no directory in the tar")
            above = rows[-1]
            row = None if above is None else self._table.child(above, part)
            kind, link = self._now(b"/".join([*here, part]) if self._held else b"", row)
            if kind is Kind.SYMLINK:
                followed += 1
                if followed > MAX_SYMLINKS:
                    raise self._mismatch(entry.path, "lies below a cycle of symbolic links in the tar")
                if link.startswith(b"/"):
                    here, rows = [], [0]
                todo.extend(link.split(b"/")[::-1])
            elif kind in (None, Kind.DIR):
                here.append(part)
                rows.append(row)
            else:
                raise self._mismatch(entry.path, "lies below something that is no directory in the tar")
        return b"/".join(here), rows[-1]

    def _now(self, path: bytes, row: int | None) -> tuple[Kind | None, bytes]:
        """Return kind and link target of what the tar has put at a path so far; None: nothing, or a late hard link."""
        held = self._held.get(path) if self._held else None
        if held is not None:
            return (None if held.entry.kind is Kind.HARDLINK else held.entry.kind), held.entry.link
        if row is None or self._start[row] == _NOT_SEEN or self._table.kind[row] == Kind.WHITEOUT:
            return None, b""
        inode = self._table.inode(row)
        kind = Kind(self._table.kind[inode])
        return kind, self._table.link(inode) if kind is Kind.SYMLINK else b""

    def _lookup(self, link: Entry) -> tuple[bytes, int | None]:
        """Return real path and row of a hard link's target."""
        written, _, name = link.link.rpartition(b"/")
        parent, parent_row = self._directory(written, link)
        row = None if parent_row is None else self._table.child(parent_row, name)
        return (parent + b"/" + name if parent else name), row

    def _target(self, link: Entry) -> _Held | None:
        """Return what a hard link's target names now; None when that is nothing (yet)."""
        path, row = self._lookup(link)
        held = self._held.get(path)
        if held is not None:
            return None if held.entry.kind is Kind.HARDLINK else held
        kind, target = self._now(path, row)
        if kind is None or row is None:
            return None
        if kind is Kind.DIR:
            raise self._mismatch(link.path, "is a hard link to a directory in the tar")
        table, inode = self._table, self._table.inode(row)
        entry = Entry(path, kind, table.mode[inode], table.uid[inode], table.gid[inode], table.mtime_ns(inode))
        entry.link = target
        if kind is Kind.REG:
            entry.size = table.size[inode]
        elif kind in (Kind.CHAR, Kind.BLOCK):
            entry.rdev = table.rdev(inode)
        entry.xattrs = tuple(sorted(table.xattrs(inode).items()))
        return _Held(entry, self._start[row], self._payload[row], "")

    # -- changes

    def _settle(self, path: bytes, row: int, start: int, payload: int) -> None:
        self._start[row], self._payload[row] = start, payload
        self._forget(path)
        if self._table.kind[row] in (Kind.SYMLINK, Kind.HARDLINK):
            self._parents.clear()

    def _hold(self, path: bytes, row: int | None, held: _Held) -> None:
        if row is not None:
            self._start[row] = _NOT_SEEN
        if path not in self._held:
            if len(self._held) >= MAX_HELD_ENTRIES:
                self._raise_held()
            for above in _ancestors(path):
                self._held_below[above] += 1
        self._held[path] = held
        self._parents.clear()

    def _forget(self, path: bytes) -> None:
        if self._held and self._held.pop(path, None) is not None:
            self._parents.clear()
            for above in _ancestors(path):
                self._held_below[above] -= 1
                if not self._held_below[above]:
                    del self._held_below[above]

    def _replace(self, path: bytes, row: int | None) -> None:
        """Something that is no directory comes to `path`: what was below is gone, and is due again in the table."""
        if path in self._held_below:
            below = path + b"/"
            for gone in [known for known in self._held if known.startswith(below)]:
                self._forget(gone)
        if row is not None and self._table.kind[row] == Kind.DIR:
            self._parents.clear()
            todo = [row]
            while todo:
                at = todo.pop()
                self._start[at] = _NOT_SEEN
                self._opaque.discard(at)
                if at != row:
                    self._removed.discard(at)
                children = self._table.children(at)
                self._kill_budget -= len(children) + 1
                if self._kill_budget < 0:
                    raise self._mismatch(path, "is one of too many directories that the tar replaces")
                todo.extend(children)

    # -- the verdict

    def finish(self, frame_raw: Sequence[int], zeros: ZeroRuns | None = None) -> None:
        """Raise TocMismatch unless table and tar tell the same tree.

        `frame_raw` has, by frame of the table, where its bytes start in the tar stream; -1: no frame began there.
        `zeros` knows where the stream held zeros; None: holes are not accepted.
        Blocks for about 2 µs a row and chunk.
        """
        table = self._table
        self._bind_late()
        if self._held:
            self._raise_held()
        starts: set[int] = set()
        for row in range(table.rows):
            kind, flags, start = table.kind[row], table.flags[row], self._start[row]
            if start == _NOT_SEEN and not flags & FLAG_IMPLICIT:
                raise self._mismatch(table.path_of(row), "is in the TOC and not in the tar")
            if flags & FLAG_OPAQUE and row not in self._opaque and row not in self._removed:
                raise self._mismatch(table.path_of(row), "is opaque in the TOC and not in the tar")
            if kind == Kind.HARDLINK:
                if start != self._start[table.inode(row)]:
                    raise self._mismatch(table.path_of(row), "is a hard link to another file in the TOC")
            elif kind == Kind.REG:
                self._check_chunks(row, frame_raw, zeros)
            if self._adopted and kind not in (Kind.HARDLINK, Kind.WHITEOUT, Kind.DIR):
                if start in starts:
                    raise self._mismatch(table.path_of(row), "is a hard link in the tar and none in the TOC")
                starts.add(start)

    def _check_chunks(self, row: int, frame_raw: Sequence[int], zeros: ZeroRuns | None) -> None:
        """Check that each chunk's bytes are the very ones that a full unpack writes there."""
        table = self._table
        origin = self._payload[row] - table.data_offset[row]
        for chunk in table.file_chunks(row):
            frame = table.chunk_frame[chunk]
            if frame == NO_FRAME:
                start = origin + table.chunk_data_offset[chunk]
                if zeros is None or not zeros.holds(start, table.chunk_size[chunk]):
                    raise self._mismatch(table.path_of(row), "has a hole in the TOC and no zeros there in the tar")
                continue
            begin = frame_raw[frame]
            if begin == _NOT_SEEN or begin + table.chunk_inner[chunk] != origin + table.chunk_data_offset[chunk]:
                raise self._mismatch(table.path_of(row), "has its content elsewhere in the TOC than in the tar")

    def _bind_late(self) -> None:
        """Settle links that came before what they lead to. No full unpack takes such a tar, but `Namespace` does."""
        for _ in range(_LATE_PASSES):
            for path, held in reversed(list(self._held.items())):
                entry, start, payload = held.entry, held.start, held.payload
                if entry.kind is Kind.HARDLINK:
                    target = self._target(entry)
                    if target is None:
                        continue
                    entry, start, payload = replace(target.entry, path=path), target.start, target.payload
                written, _, name = path.rpartition(b"/")
                _, parent_row = self._directory(written, entry)
                row = None if parent_row is None else self._table.child(parent_row, name)
                if row is not None and (held.entry.kind is Kind.HARDLINK or self._table.kind[row] == Kind.HARDLINK):
                    self._compare(path, row, entry, start, payload, linked=held.linked)

    def _raise_held(self) -> None:
        path, held = next(iter(self._held.items()))
        raise self._mismatch(path, held.why)

    def _mismatch(self, path: bytes, why: str) -> TocMismatch:
        shown = path[:300].decode("utf-8", "backslashreplace") or "/"
        return TocMismatch(self._layer, f"{shown!r} {why}")


def _same_time(told: int, actual: int) -> bool:
    """Compare times in nanoseconds. stargz's writers round a TOC's times half up to whole seconds."""
    return told == actual or (told % _SECOND == 0 and (actual + _SECOND // 2) // _SECOND * _SECOND == told)


def _without_value(records: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return the extended attributes of a PAX header that have no value; the scanner leaves them out."""
    return [(key[len(XATTR) :], b"") for key, value in records.items() if not value and key.startswith(XATTR)]


def _ancestors(path: bytes) -> list[bytes]:
    out = []
    cut = path.find(b"/")
    while cut >= 0:
        out.append(path[:cut])
        cut = path.find(b"/", cut + 1)
    return out
