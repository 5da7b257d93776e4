"""Layer tables from entries: what the child process runs once a TOC, and the unpacking of plain layers at its end.

Python objects a file are fine here, because the process ends with the file written.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
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
    CHUNK_COLUMNS,
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
from lazyfs.units import align

_MAX_DATA = 1 << 46  # bytes of data space: far above any layer, far below what overflows an offset
_MAX_HEAP = 1 << 30  # bytes of distinct extended attributes, and of names; the column of offsets ends at 4 GiB
_MAX_XATTRS = 0xFFFF  # of one entry; more doesn't fit into the count


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a table keeps of its blob: form (FORM_*), size of the blob and end of its payload (bytes, blob space)."""

    form: int
    blob_size: int
    payload_end: int


class _Node:
    """One row to be. `children` only for directories."""

    __slots__ = ("children", "entry", "flags", "live", "row")

    def __init__(self, entry: Entry | None, live: int) -> None:
        self.entry = entry
        self.live = live  # index in the list of survivors; -1 for implicit directories
        self.flags = FLAG_IMPLICIT if entry is None else 0
        self.children: dict[bytes, _Node] = {}
        self.row = 0

    @property
    def kind(self) -> Kind:
        return Kind.DIR if self.entry is None else self.entry.kind


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
    root, landmark = _grow(survivors)
    rows = _number(root)
    columns: dict[str, Column] = {
        name: array(code, bytes(_width(code) * len(rows))) for name, code in ROW_COLUMNS.items()
    }
    dropped = _fill_rows(columns, rows, survivors)
    data_size = _fill_chunks(columns, rows, survivors, facts)
    meta = {
        "form": facts.form,
        "blob_size": facts.blob_size,
        "data_size": data_size,
        "payload_end": facts.payload_end,
        "landmark": landmark,
        "dropped_xattrs": dropped,
        "entries": len(survivors),
    }
    columns["meta"] = array("q", [meta[name] for name in META])
    write_columns(path, MAGIC, VERSION, columns)


def _width(code: str) -> int:
    return array(code).itemsize


def _grow(survivors: list[Live[list[Chunk]]]) -> tuple[_Node, int]:
    """Make the tree, whiteouts interpreted and landmarks taken out. Return (root, landmark's blob offset or 0)."""
    root = _Node(None, -1)
    whiteouts: list[tuple[_Node, bytes, int]] = []
    landmark = 0
    above, node = b"", root  # the directory of the entry before: most often this one's too
    for number, live in enumerate(survivors):
        entry = live.entry
        if entry.path in HIDDEN_AT_ROOT and entry.kind is Kind.REG:
            if entry.path == LANDMARK and live.tag:
                landmark = live.tag[0].blob_offset
            continue
        if not entry.path:
            root.entry, root.live, root.flags = entry, number, root.flags & ~FLAG_IMPLICIT
            continue
        parent, _, name = entry.path.rpartition(b"/")
        if parent != above:
            above, node = parent, _directory(root, parent)
        if name.startswith(WHITEOUT_PREFIX):
            if name == OPAQUE_MARKER:
                node.flags |= FLAG_OPAQUE
            elif not name.startswith(OPAQUE_MARKER[:8]) and len(name) > len(WHITEOUT_PREFIX):
                whiteouts.append((node, name[len(WHITEOUT_PREFIX) :], number))
            continue
        known = node.children.get(name)
        if known is None:
            node.children[name] = _Node(entry, number)
        elif known.entry is None and entry.kind is Kind.DIR:
            known.entry, known.live, known.flags = entry, number, known.flags & ~FLAG_IMPLICIT
        else:
            raise TocInvalid(f"the name {entry.path[:200]!r} occurs twice")
    for holder, name, number in whiteouts:
        beside = holder.children.get(name)
        if beside is None:
            entry = survivors[number].entry
            holder.children[name] = _Node(Entry(entry.path, Kind.WHITEOUT, 0, 0, 0, entry.mtime_ns), number)
        elif beside.kind is Kind.DIR:
            beside.flags |= FLAG_OPAQUE | FLAG_REPLACES
    return root, landmark


def _directory(root: _Node, path: bytes) -> _Node:
    node = root
    for part in path.split(b"/") if path else ():
        found = node.children.get(part)
        if found is None:
            found = node.children[part] = _Node(None, -1)
        elif found.kind is not Kind.DIR:
            raise TocInvalid(f"{path[:200]!r} has children and is not a directory")
        node = found
    return node


def _number(root: _Node) -> list[tuple[_Node, int, bytes]]:
    """Give every node its row, breadth first and sorted. Return (node, parent's row, name) by row."""
    rows = [(root, 0, b"")]
    for node, _, _ in rows:  # grows while it is walked
        if node.children:
            first = len(rows)
            for offset, name in enumerate(sorted(node.children)):
                child = node.children[name]
                child.row = first + offset
                rows.append((child, node.row, name))
    return rows


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


def _fill_rows(
    columns: dict[str, Column], rows: list[tuple[_Node, int, bytes]], survivors: list[Live[list[Chunk]]]
) -> int:
    col: dict[str, array] = columns  # type: ignore[type-arg, assignment]
    links, xattr_heap, dropped = _Heap(), _Heap(), 0
    names, name_end = bytearray(), array("I", [0])
    row_of = {node.live: row for row, (node, _, _) in enumerate(rows) if node.live >= 0}
    by_path = {
        live.entry.path: row_of[i]
        for i, live in enumerate(survivors)
        if live.entry.kind is not Kind.HARDLINK and i in row_of
    }
    links_to: dict[int, int] = {}
    for row, (node, parent, name) in enumerate(rows):
        names += name
        if len(names) > _MAX_HEAP:
            raise TocInvalid(f"the layer has more than {_MAX_HEAP} bytes of names")
        name_end.append(len(names))
        col["parent"][row], col["flags"][row], col["kind"][row] = parent, node.flags, node.kind
        if node.kind is Kind.DIR:
            children = node.children.values()
            if children:
                col["first_child"][row] = min(child.row for child in children)
                col["child_count"][row] = len(children)
            col["nlink"][row] = 2 + sum(child.kind is Kind.DIR for child in children)
        else:
            col["nlink"][row] = 1
        entry = node.entry
        if entry is None:
            col["mode"][row] = 0o755
            continue
        col["mode"][row], col["uid"][row], col["gid"][row] = entry.mode & 0o7777, entry.uid, entry.gid
        col["mtime"][row], col["mtime_fraction"][row] = divmod(entry.mtime_ns, 1_000_000_000)
        kept = tuple(pair for pair in entry.xattrs if not pair[0].startswith(DROPPED_XATTRS))
        dropped += len(entry.xattrs) - len(kept)
        if kept:
            if len(kept) > _MAX_XATTRS or len(xattr_heap.data) > _MAX_HEAP:
                raise TocInvalid(f"{entry.path[:200]!r} is one too many for its extended attributes")
            col["xattr"][row] = xattr_heap.add(pack_xattrs(kept)) + 1
        if entry.kind is Kind.REG:
            col["size"][row] = entry.size
        elif entry.kind is Kind.SYMLINK:
            col["size"][row], col["aux"][row] = len(entry.link), links.add(entry.link)
        elif entry.kind in (Kind.CHAR, Kind.BLOCK):
            col["aux"][row] = entry.rdev[0] << 32 | entry.rdev[1]
        elif entry.kind is Kind.HARDLINK:
            target = by_path.get(entry.link)
            if target is None:
                raise TarInvalid(f"is a hard link to {entry.link[:200]!r}, which is not in this layer", entry.path)
            col["aux"][row] = target
            links_to[row] = target
    for target in links_to.values():
        col["nlink"][target] += 1
    for row, target in links_to.items():
        for column in ("mode", "uid", "gid", "mtime", "mtime_fraction", "size", "xattr", "nlink"):
            col[column][row] = col[column][target]
    columns.update(name_end=name_end, names=names, links=bytes(links.data), xattr_heap=bytes(xattr_heap.data))
    return dropped


def _fill_chunks(
    columns: dict[str, Column],
    rows: list[tuple[_Node, int, bytes]],
    survivors: list[Live[list[Chunk]]],
    facts: LayerFacts,
) -> int:
    col: dict[str, array] = columns  # type: ignore[type-arg, assignment]
    row_of = {node.live: row for row, (node, _, _) in enumerate(rows) if node.live >= 0}
    out: dict[str, array] = {name: array(code) for name, code in CHUNK_COLUMNS.items()}  # type: ignore[type-arg]
    digests = bytearray()
    frame_start, frame_first = array("Q"), array("I")
    data_offset = 0
    add_offset, add_size = out["chunk_data_offset"].append, out["chunk_size"].append
    add_frame, add_inner = out["chunk_frame"].append, out["chunk_inner"].append
    for number, live in enumerate(survivors):
        row = row_of.get(number)
        end = live.tag[-1].offset + live.tag[-1].size if live.tag else 0
        if live.entry.kind is Kind.REG and end != live.entry.size:
            raise TocInvalid(f"{live.entry.path[:200]!r} has chunks up to {end} of its {live.entry.size} bytes")
        if row is None or live.entry.kind is not Kind.REG or rows[row][0].kind is not Kind.REG or not live.tag:
            continue  # markers and landmarks have content too, and nobody can read it
        # A plain layer was written to its data space before anybody knew which of its names survive.
        base = live.tag[0].blob_offset if facts.form == FORM_PLAIN else data_offset
        col["data_offset"][row], col["first_chunk"][row] = base, len(out["chunk_size"])
        col["chunk_count"][row] = len(live.tag)
        for chunk in live.tag:
            if chunk.blob_offset < 0 or facts.form == FORM_PLAIN:
                frame = NO_FRAME
            else:
                if not frame_start or frame_start[-1] != chunk.blob_offset:
                    if frame_start and frame_start[-1] > chunk.blob_offset:
                        raise TocInvalid(f"{live.entry.path[:200]!r} is not in blob order")
                    frame_start.append(chunk.blob_offset)
                    frame_first.append(len(out["chunk_size"]))
                frame = len(frame_start) - 1
            add_offset(base + chunk.offset)
            add_size(chunk.size)
            add_frame(frame)
            add_inner(max(chunk.inner_offset, 0))
            digests += chunk.digest
        data_offset = align(base + live.entry.size)
        if data_offset > _MAX_DATA:
            raise TocInvalid(f"the layer claims more than {_MAX_DATA} bytes of content")
    # A frame ends where the next one in the TOC begins: headers of empty entries may lie in between, in frames of their
    # own, so a reader decodes the first frame of the range and no more.
    ends = array("Q", [*frame_start[1:], facts.payload_end]) if frame_start else array("Q")
    columns.update(out)
    columns.update(
        chunk_digest=bytes(digests), frame_blob_offset=frame_start, frame_blob_end=ends, frame_first_chunk=frame_first
    )
    return data_offset
