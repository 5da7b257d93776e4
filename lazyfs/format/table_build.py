"""Layer tables from entries: what the child process runs once a TOC, and the unpacking of plain layers at its end.

Python objects a file are fine here, because the process ends with the file written.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from lazyfs.errors import TarInvalid, TocInvalid
from lazyfs.format.columns import Column, write_columns
from lazyfs.format.entry import (
    DROPPED_XATTRS,
    HIDDEN_AT_ROOT,
    LANDMARK,
    OPAQUE_MARKER,
    WHITEOUT_PREFIX,
    Chunk,
    Entry,
    Kind,
)
from lazyfs.format.namespace import Live, Namespace
from lazyfs.format.table import (
    FLAG_IMPLICIT,
    FLAG_OPAQUE,
    FLAG_REPLACES,
    FORM_PLAIN,
    MAGIC,
    META,
    NO_FRAME,
    ROW_COLUMNS,
    VERSION,
    pack_xattrs,
)
from lazyfs.units import PAGE

_MAX_DATA = 1 << 46  # bytes of data space: far above any layer, far below what overflows an offset
_MAX_HEAP = 1 << 30  # bytes of distinct extended attributes, and of names; the column of offsets ends at 4 GiB
_MAX_XATTRS = 0xFFFF  # of one entry; more doesn't fit into the count
_DIR, _REG = Kind.DIR, Kind.REG
_FEW = max(Kind.DIR, Kind.REG)  # kinds above it are those of few rows
_NO_ENTRY = Entry(b"", Kind.DIR, 0o755, 0, 0, 0)  # stands for directories that no entry names


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a table keeps of its blob: form (FORM_*), size of the blob and end of its payload (bytes, blob space)."""

    form: int
    blob_size: int
    payload_end: int


class _Dir:
    """A directory to be. A child that is none is the number of its survivor: leaves have no object of their own."""

    __slots__ = ("children", "flags", "live", "row")

    def __init__(self, live: int) -> None:
        self.live = live  # index in the list of survivors; -1 when no entry names it
        self.flags = FLAG_IMPLICIT if live < 0 else 0
        self.children: dict[bytes, _Dir | int] = {}
        self.row = 0


def build_table(path: Path, facts: LayerFacts, pairs: Iterable[tuple[Entry, list[Chunk]]]) -> None:
    """Write the layer table of `pairs` (in TOC order) to `path`. Blocking, about 15 µs an entry.

    Raise TocInvalid or TarInvalid when the entries contradict each other, StoreFull or StoreBroken when the file can't
    be written.
    """
    namespace: Namespace[list[Chunk]] = Namespace()
    for entry, chunks in pairs:
        namespace.add(entry, chunks)
    write_table(path, facts, namespace.finish())


def write_table(path: Path, facts: LayerFacts, survivors: list[Live[list[Chunk]]]) -> None:
    """Write a table of what a namespace left. Same errors as `build_table`."""
    entries = [live.entry for live in survivors]
    root, landmark = _grow(survivors, entries)
    rows = _Rows(root, entries)
    columns = rows.columns
    data_size = _fill_chunks(columns, rows.row_of, survivors, entries, facts)
    meta = {
        "form": facts.form,
        "blob_size": facts.blob_size,
        "data_size": data_size,
        "payload_end": facts.payload_end,
        "landmark": landmark,
        "dropped_xattrs": rows.dropped,
        "entries": len(survivors),
    }
    columns["meta"] = array("q", [meta[name] for name in META])
    write_columns(path, MAGIC, VERSION, columns)


def _grow(survivors: list[Live[list[Chunk]]], entries: list[Entry]) -> tuple[_Dir, int]:
    """Make the tree, whiteouts interpreted and landmarks taken out. Return (root, landmark's blob offset or 0).

    `entries` are the survivors'; a whiteout's is replaced by one of its own kind.
    """
    root = _Dir(-1)
    whiteouts: list[tuple[_Dir, bytes, int]] = []
    landmark = 0
    above, node = b"", root  # the directory of the entry before: most often this one's too
    for number, entry in enumerate(entries):
        path, is_dir = entry.path, entry.kind is _DIR
        parent, _, name = path.rpartition(b"/")
        if not parent:
            if path in HIDDEN_AT_ROOT and entry.kind is _REG:
                if path == LANDMARK and survivors[number].tag:
                    landmark = survivors[number].tag[0].blob_offset
                continue
            if not path:
                root.live, root.flags = number, root.flags & ~FLAG_IMPLICIT
                continue
        if parent != above:
            above, node = parent, _directory(root, parent)
        if name.startswith(WHITEOUT_PREFIX):
            if name == OPAQUE_MARKER:
                node.flags |= FLAG_OPAQUE
            elif not name.startswith(OPAQUE_MARKER[:8]) and len(name) > len(WHITEOUT_PREFIX):
                whiteouts.append((node, name[len(WHITEOUT_PREFIX) :], number))
            continue
        child = _Dir(number) if is_dir else number
        known = node.children.setdefault(name, child)
        if known is not child:
            if not is_dir or isinstance(known, int) or known.live >= 0:
                raise TocInvalid(f"the name {path[:200]!r} occurs twice")
            known.live, known.flags = number, known.flags & ~FLAG_IMPLICIT
    for holder, name, number in whiteouts:
        beside = holder.children.get(name)
        if beside is None:
            entries[number] = Entry(entries[number].path, Kind.WHITEOUT, 0, 0, 0, entries[number].mtime_ns)
            holder.children[name] = number
        elif isinstance(beside, _Dir):
            beside.flags |= FLAG_OPAQUE | FLAG_REPLACES
    return root, landmark


def _directory(root: _Dir, path: bytes) -> _Dir:
    node = root
    for part in path.split(b"/") if path else ():
        found = node.children.get(part)
        if found is None:
            found = node.children[part] = _Dir(-1)
        elif isinstance(found, int):
            raise TocInvalid(f"{path[:200]!r} has children and is not a directory")
        node = found
    return node


class _Heap:
    """Byte strings laid end to end, equal ones once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._known: dict[bytes, int] = {}

    def add(self, item: bytes) -> int:
        at = self._known.get(item)
        if at is None:
            at = self._known[item] = len(self.data)
            self.data += item
        return at


class _Rows:
    """The rows in their order, breadth first and sorted, and all their columns but those of content.

    What every row has is filled column by column; only what few have, row by row.
    """

    def __init__(self, root: _Dir, entries: list[Entry]) -> None:
        self.dropped = 0  # extended attributes
        self.row_of = [-1] * len(entries)  # by survivor; -1: it has none
        self._entries = entries
        self._by_row: list[Entry] = []
        self._col: dict[str, array] = {}  # type: ignore[type-arg]
        self.columns: dict[str, Column] = {}
        names = self._number(root)
        self._plain()
        self.columns.update(self._col)
        self.columns.update(self._odd())
        self.columns.update(_name_columns(names))

    def _number(self, root: _Dir) -> list[bytes]:
        """Give every directory and entry its row; fill what the tree says. Return the names by row."""
        lives, parents, names = [root.live], [0], [b""]
        dirs = [root]
        for here in dirs:  # grows while it is walked
            children = here.children
            if children:
                listed = sorted(children)
                names += listed
                parents += [here.row] * len(listed)
                row = len(lives)
                for name in listed:
                    child = children[name]
                    if child.__class__ is int:
                        lives.append(child)
                    else:
                        assert isinstance(child, _Dir)
                        child.row = row
                        lives.append(child.live)
                        dirs.append(child)
                    row += 1
        count = len(lives)
        col = self._col
        for column, code in ROW_COLUMNS.items():
            col[column] = array(code, bytes(array(code).itemsize * count))
        col["parent"], col["nlink"] = array("I", parents), array("I", [1]) * count
        flags, first_child, child_count, nlink = (col[n] for n in ("flags", "first_child", "child_count", "nlink"))
        at = 1
        for here in dirs:
            row = here.row
            flags[row], nlink[row] = here.flags, 2
            if here.children:
                first_child[row], child_count[row] = at, len(here.children)
                at += len(here.children)
        for here in dirs[1:]:
            nlink[parents[here.row]] += 1
        row_of, entries = self.row_of, self._entries
        for row, live in enumerate(lives):
            if live >= 0:
                row_of[live] = row
        self._by_row = [entries[live] if live >= 0 else _NO_ENTRY for live in lives]
        return names

    def _plain(self) -> None:
        col, by_row = self._col, self._by_row
        col["kind"] = array("B", [entry.kind for entry in by_row])
        col["mode"] = array("H", [entry.mode & 0o7777 for entry in by_row])
        col["uid"] = array("I", [entry.uid for entry in by_row])
        col["gid"] = array("I", [entry.gid for entry in by_row])
        times = [entry.mtime_ns for entry in by_row]
        col["mtime"] = array("q", [time // 1_000_000_000 for time in times])
        col["mtime_fraction"] = array("I", [time % 1_000_000_000 for time in times])
        col["size"] = array("Q", [entry.size if entry.kind is _REG else 0 for entry in by_row])

    def _odd(self) -> dict[str, Column]:
        """Fill what few rows have. Return the heaps."""
        col, by_row = self._col, self._by_row
        links, xattr_heap = _Heap(), _Heap()
        for row, entry in enumerate(by_row):
            if entry.xattrs:
                kept = tuple(pair for pair in entry.xattrs if not pair[0].startswith(DROPPED_XATTRS))
                self.dropped += len(entry.xattrs) - len(kept)
                if len(kept) > _MAX_XATTRS or len(xattr_heap.data) > _MAX_HEAP:
                    raise TocInvalid(f"{entry.path[:200]!r} is one too many for its extended attributes")
                if kept:
                    col["xattr"][row] = xattr_heap.add(pack_xattrs(kept)) + 1
        hard: list[int] = []
        for row, kind in enumerate(col["kind"]):
            if kind <= _FEW:  # directories and files: nearly all
                continue
            entry = by_row[row]
            if kind == Kind.SYMLINK:
                col["size"][row], col["aux"][row] = len(entry.link), links.add(entry.link)
            elif kind in (Kind.CHAR, Kind.BLOCK):
                col["aux"][row] = entry.rdev[0] << 32 | entry.rdev[1]
            elif kind == Kind.HARDLINK:
                hard.append(row)
        if hard:
            self._link(hard)
        return {"links": bytes(links.data), "xattr_heap": bytes(xattr_heap.data)}

    def _link(self, rows: list[int]) -> None:
        """Bind hard links to their targets' rows, and give them the targets' attributes."""
        col, by_row = self._col, self._by_row
        wanted = {by_row[row].link for row in rows}
        by_path = {
            entry.path: row
            for row, entry in enumerate(by_row)
            if entry is not _NO_ENTRY and entry.path in wanted and entry.kind is not Kind.HARDLINK
        }
        for row in rows:
            entry = by_row[row]
            target = by_path.get(entry.link)
            if target is None:
                raise TarInvalid(f"is a hard link to {entry.link[:200]!r}, which is not in this layer", entry.path)
            col["aux"][row] = target
            col["nlink"][target] += 1
        for row in rows:
            target = col["aux"][row]
            for column in ("mode", "uid", "gid", "mtime", "mtime_fraction", "size", "xattr", "nlink"):
                col[column][row] = col[column][target]


def _name_columns(names: list[bytes]) -> dict[str, Column]:
    joined = b"".join(names)
    if len(joined) > _MAX_HEAP:
        raise TocInvalid(f"the layer has more than {_MAX_HEAP} bytes of names")
    return {"name_end": array("I", accumulate(map(len, names), initial=0)), "names": joined}


def _fill_chunks(
    columns: dict[str, Column],
    row_of: list[int],
    survivors: list[Live[list[Chunk]]],
    entries: list[Entry],
    facts: LayerFacts,
) -> int:
    col: dict[str, array] = columns  # type: ignore[type-arg, assignment]
    data_offsets, first_chunks, chunk_counts = ([0] * len(col["size"]) for _ in range(3))
    frame_start, frame_first = array("Q"), array("I")
    frame, frame_at = -1, -2  # the last one: its number, and where it starts
    offsets: list[int] = []
    frames: list[int] = []
    kept: list[Chunk] = []
    add_offset, add_frame = offsets.append, frames.append
    is_plain = facts.form == FORM_PLAIN
    count = data_offset = 0
    for (whole, chunks), entry, row in zip(survivors, entries, row_of, strict=True):
        if not chunks:
            if entry.size and entry.kind is _REG:
                raise TocInvalid(f"{entry.path[:200]!r} has chunks up to 0 of its {entry.size} bytes")
            continue
        if whole.kind is not _REG:
            continue
        size, last = whole.size, chunks[-1]
        if last.offset + last.size != size:
            raise TocInvalid(f"{entry.path[:200]!r} has chunks up to {last.offset + last.size} of its {size} bytes")
        if row < 0 or entry.kind is not _REG:
            continue  # markers and landmarks have content too, and nobody can read it
        # A plain layer was written to its data space before anybody knew which of its names survive.
        base = chunks[0].blob_offset if is_plain else data_offset
        data_offsets[row], first_chunks[row], chunk_counts[row] = base, count, len(chunks)
        for chunk in chunks:
            start = chunk.blob_offset
            if start == frame_at:
                add_frame(frame)
            elif start < 0 or is_plain:
                add_frame(NO_FRAME)
            else:
                if start < frame_at:
                    raise TocInvalid(f"{entry.path[:200]!r} is not in blob order")
                frame, frame_at = frame + 1, start
                frame_start.append(start)
                frame_first.append(count)
                add_frame(frame)
            add_offset(base + chunk.offset)
            count += 1
        kept += chunks
        data_offset = (base + size + PAGE - 1) & -PAGE
        if data_offset > _MAX_DATA:
            raise TocInvalid(f"the layer claims more than {_MAX_DATA} bytes of content")
    col["data_offset"], col["first_chunk"] = array("Q", data_offsets), array("I", first_chunks)
    col["chunk_count"] = array("I", chunk_counts)
    # A frame ends where the next one in the TOC begins: headers of empty entries may lie in between, in frames of their
    # own, so a reader decodes the first frame of the range and no more.
    ends = array("Q", [*frame_start[1:], facts.payload_end]) if frame_start else array("Q")
    columns.update(
        chunk_data_offset=array("Q", offsets),
        chunk_size=array("I", [chunk.size for chunk in kept]),
        chunk_frame=array("I", frames),
        chunk_inner=array("Q", [chunk.inner_offset for chunk in kept]),
        chunk_digest=b"".join([chunk.digest for chunk in kept]),
        frame_blob_offset=frame_start,
        frame_blob_end=ends,
        frame_first_chunk=frame_first,
    )
    return data_offset
