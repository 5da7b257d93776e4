"""Layer tables from entries: what the child process runs once a TOC, and the unpacking of plain layers at its end.

All names are filled into columns at once; what few have is done one by one. Memory is no object here, because the
process ends with the file written.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, compress, repeat
from pathlib import Path

from lazyfs.errors import TarInvalid, TocInvalid
from lazyfs.format.columns import Column, pick, write_columns
from lazyfs.format.entry import DROPPED_XATTRS, HIDDEN_AT_ROOT, LANDMARK, OPAQUE_MARKER, WHITEOUT_PREFIX, Kind
from lazyfs.format.listing import Listing
from lazyfs.format.namespace import Directory, Survivors
from lazyfs.format.table import (
    FLAG_IMPLICIT,
    FLAG_OPAQUE,
    FLAG_REPLACES,
    FRONT_COLUMNS,
    MAGIC,
    META,
    ROW_COLUMNS,
    VERSION,
    pack_xattrs,
)
from lazyfs.format.table_content import ContentColumns
from lazyfs.limits import MAX_TABLE_HEAP

_MAX_XATTRS = 0xFFFF  # of one entry; more doesn't fit into the count
_SECOND = 1_000_000_000  # nanoseconds
_DIR, _REG = Kind.DIR, Kind.REG
_IS_FEW = bytes(kind not in (Kind.DIR, Kind.REG) for kind in range(256))  # kinds of few rows
_MARKERS = OPAQUE_MARKER[:8]  # what all names begin with that are orders and no whiteouts


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a table keeps of its blob: form (FORM_*), size of the blob and end of its payload (bytes, blob space)."""

    form: int
    blob_size: int
    payload_end: int


def build_table(path: Path, facts: LayerFacts, listing: Listing) -> None:
    """Write the layer table of what a TOC lists to `path`. Blocking, about 3 µs an entry.

    Raise TocInvalid or TarInvalid when the entries contradict each other, StoreFull or StoreBroken when the file can't
    be written.
    """
    survivors = Survivors()
    survivors.put(listing.paths, listing.kinds, listing.links)
    write_table(path, facts, listing, survivors)


def write_table(path: Path, facts: LayerFacts, listing: Listing, survivors: Survivors) -> None:
    """Write a table of what is left of a listing. Same errors as `build_table`."""
    survivors.settle()
    rows = _Rows(survivors, listing)
    columns = rows.columns
    content = ContentColumns(listing, rows.sources, rows.kinds, form=facts.form, payload_end=facts.payload_end)
    data_size = content.fill(columns)
    meta = {
        "form": facts.form,
        "blob_size": facts.blob_size,
        "data_size": data_size,
        "payload_end": facts.payload_end,
        "landmark": rows.landmark,
        "dropped_xattrs": rows.dropped,
        "entries": rows.entries,
        "holes": content.holes,
    }
    columns["meta"] = array("q", [meta[name] for name in META])
    front = {name: column for name, column in columns.items() if name in FRONT_COLUMNS}
    rest = {name: column for name, column in columns.items() if name not in FRONT_COLUMNS}
    write_columns(path, MAGIC, VERSION, front, rest)


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

    `numbers` has the entry that each row is of; -1: none is. `sources`: the one that it has its attributes and content
    from, another one where a hard link has outlived its target's name.
    """

    def __init__(self, survivors: Survivors, listing: Listing) -> None:
        self.dropped = 0  # extended attributes
        self.landmark = 0  # blob offset
        self.kinds = b""  # by row
        self.entries = 0  # that are left, with those that get no row
        self.numbers: list[int] = []
        self._listing = listing
        self._survivors = survivors
        self._whiteouts: list[int] = []  # numbers
        self._col: dict[str, array] = {}  # type: ignore[type-arg]
        self.columns: dict[str, Column] = {}
        names = self._number(survivors.root)
        self.sources = self.numbers
        if survivors.inode:
            self.sources = [self._source(number) for number in self.numbers]
        self._plain()
        self.columns.update(self._col)
        self.columns.update(self._odd())
        self.columns.update(_name_columns(names))

    def _source(self, number: int) -> int:
        inode = self._survivors.inode.get(number, number)
        return inode if self._survivors.carrier.get(inode, number) == number else number

    def kind(self, number: int) -> Kind:
        """Return what a living entry is once all hard links are bound."""
        return self._listing.kinds[self._source(number)]

    # -- order

    def _number(self, root: Directory) -> list[bytes]:
        """Give every directory and entry its row; fill what the tree says. Return the names by row."""
        self._hide(root)
        numbers, parents, names = self.numbers, [0], [b""]
        numbers.append(root.number)
        dirs = [root]
        for here in dirs:  # grows while it is walked
            listed = sorted(here.children)
            first = bisect_left(listed, WHITEOUT_PREFIX)
            if first < len(listed) and listed[first].startswith(WHITEOUT_PREFIX):
                self._interpret(here)
                listed = sorted(here.children)
            names += listed
            parents += repeat(here.row, len(listed))
            children = [here.children[name] for name in listed]
            for at, child in enumerate(children) if Directory in set(map(type, children)) else ():
                if isinstance(child, Directory):
                    child.row = len(numbers) + at
                    children[at] = child.number
                    dirs.append(child)
            numbers += children  # type: ignore[arg-type]  # no directory is left in it
        count = len(numbers)
        self.entries += count - numbers.count(-1)
        col = self._col
        for column, code in ROW_COLUMNS.items():
            col[column] = array(code, bytes(array(code).itemsize * count))
        col["parent"], col["nlink"] = array("I", parents), array("I", [1]) * count
        flags, first_child, child_count, nlink = (col[n] for n in ("flags", "first_child", "child_count", "nlink"))
        at = 1
        for here in dirs:
            row = here.row
            flags[row], nlink[row] = here.flags | (FLAG_IMPLICIT if here.number < 0 else 0), 2
            if here.children:
                first_child[row], child_count[row] = at, len(here.children)
                at += len(here.children)
        for here in dirs[1:]:
            nlink[parents[here.row]] += 1
        return names

    def _hide(self, root: Directory) -> None:
        """Take out what only looks like files: landmarks and TOCs."""
        for name in HIDDEN_AT_ROOT & root.children.keys():
            number = root.children[name]
            if isinstance(number, int) and self.kind(number) is _REG:
                del root.children[name]
                self.entries += 1
                source, listing = self._source(number), self._listing
                if name == LANDMARK and listing.chunk_counts[source]:
                    self.landmark = listing.blob_offsets[sum(listing.chunk_counts[:source])]

    def _interpret(self, here: Directory) -> None:
        """Make whiteouts and markers in a directory what they stand for."""
        for name in [name for name in here.children if name.startswith(WHITEOUT_PREFIX)]:
            marker = here.children.pop(name)
            number = marker.number if isinstance(marker, Directory) else marker
            beside = here.children.get(name[len(WHITEOUT_PREFIX) :])
            if name.startswith(_MARKERS):
                self.entries += 1
                here.flags |= FLAG_OPAQUE if name == OPAQUE_MARKER else 0
            elif beside is None:
                self._whiteouts.append(number)
                here.children[name[len(WHITEOUT_PREFIX) :]] = number
            else:
                self.entries += 1
                if isinstance(beside, Directory):
                    beside.flags |= FLAG_OPAQUE | FLAG_REPLACES

    # -- attributes

    def _plain(self) -> None:
        col, listing, sources = self._col, self._listing, self.sources
        # What stands last is taken for directories that no entry names.
        kinds = pick([*listing.kinds, _DIR], sources)
        times = pick([*listing.mtimes, 0], sources)
        col["kind"] = array("B", kinds)
        col["mode"] = array("H", pick([*listing.modes, 0o755], sources))
        col["uid"] = array("I", pick([*listing.uids, 0], sources))
        col["gid"] = array("I", pick([*listing.gids, 0], sources))
        col["size"] = array("Q", pick([*listing.sizes, 0], sources))
        if any(times):
            col["mtime"] = array("q", [time // _SECOND for time in times])
            col["mtime_fraction"] = array("I", [time % _SECOND for time in times])
        if self._whiteouts:
            whiteouts = set(self._whiteouts)
            for row, number in enumerate(self.numbers):
                if number in whiteouts:
                    col["kind"][row] = Kind.WHITEOUT
                    col["mode"][row] = col["uid"][row] = col["gid"][row] = col["size"][row] = 0

    def _odd(self) -> dict[str, Column]:
        """Fill what few rows have. Return the heaps."""
        col, listing, sources, links = self._col, self._listing, self.sources, _Heap()
        kinds = self.kinds = bytes(col["kind"])
        xattr_heap = self._xattrs(kinds)
        hard: list[int] = []
        for row in compress(range(len(kinds)), kinds.translate(_IS_FEW)):
            kind = kinds[row]
            if kind == Kind.SYMLINK:
                link = listing.links.get(sources[row], b"")
                col["size"][row], col["aux"][row] = len(link), links.add(link)
            elif kind in (Kind.CHAR, Kind.BLOCK):
                major, minor = listing.rdevs.get(sources[row], (0, 0))
                col["aux"][row] = major << 32 | minor
            elif kind == Kind.HARDLINK:
                hard.append(row)
        if hard:
            self._link(hard)
        return {"links": bytes(links.data), "xattr_heap": bytes(xattr_heap.data)}

    def _xattrs(self, kinds: bytes) -> _Heap:
        heap, told = _Heap(), self._listing.xattrs
        for row, source in enumerate(self.sources) if told else ():
            xattrs = told.get(source)
            if xattrs is None or kinds[row] == Kind.WHITEOUT:
                continue
            kept = tuple(pair for pair in xattrs if not pair[0].startswith(DROPPED_XATTRS))
            self.dropped += len(xattrs) - len(kept)
            if len(kept) > _MAX_XATTRS or len(heap.data) > MAX_TABLE_HEAP:
                path = self._survivors.paths[source]
                raise TocInvalid(f"{path[:200]!r} is one too many for its extended attributes")
            if kept:
                self._col["xattr"][row] = heap.add(pack_xattrs(kept)) + 1
        return heap

    def _link(self, rows: list[int]) -> None:
        """Bind hard links to their targets' rows, and give them the targets' attributes."""
        col, survivors, numbers = self._col, self._survivors, self.numbers
        carriers = set(survivors.carrier.values())
        row_of = {number: row for row, number in enumerate(numbers) if number in carriers}
        for row in rows:
            carrier = survivors.carrier[survivors.inode[numbers[row]]]
            target = row_of.get(carrier)
            if target is None:
                raise TarInvalid(
                    f"is a hard link to {survivors.paths[carrier][:200]!r}, which is not in this layer",
                    survivors.paths[numbers[row]],
                )
            col["aux"][row] = target
            col["nlink"][target] += 1
        for row in rows:
            target = col["aux"][row]
            for column in ("mode", "uid", "gid", "mtime", "mtime_fraction", "size", "xattr", "nlink"):
                col[column][row] = col[column][target]


def _name_columns(names: list[bytes]) -> dict[str, Column]:
    joined = b"".join(names)
    if len(joined) > MAX_TABLE_HEAP:
        raise TocInvalid(f"the layer has more than {MAX_TABLE_HEAP} bytes of names")
    return {"name_end": array("I", accumulate(map(len, names), initial=0)), "names": joined}
