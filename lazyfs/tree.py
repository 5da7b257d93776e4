"""The tree of a chain: its layer tables merged into columns of its own, as a full unpack would leave them.

Layers are applied base first, the way an unpack does: whiteouts remove, opaque directories empty, a directory that no
entry names keeps the lower one's attributes, and where the lower layer has a symlink it is followed. Rows are ordered
like a table's: breadth first, children side by side and sorted.

A tree knows layers by their place in the chain, base first; node ids need the store's layer numbers and are made by the
mount. `own[row]` says that a file can't share its layer's inode, because some of its names are hidden here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from lazyfs.errors import TableInvalid, TocInvalid
from lazyfs.format.columns import Columns, write_columns
from lazyfs.format.entry import Kind
from lazyfs.format.table import FLAG_IMPLICIT, FLAG_OPAQUE, FLAG_REPLACES, LayerTable, Names

MAGIC = b"LZFTREE\0"
VERSION = 2
_MAX_SYMLINKS = 40  # the kernel's own limit for one path
_MAX_FOLLOWED = 10_000_000  # parts of symlinks' targets walked for one chain: seconds, where sane ones need none
_SHIFT = 32  # bits of a row in a leaf
_MASK = (1 << _SHIFT) - 1
_DIR, _HARDLINK, _WHITEOUT = int(Kind.DIR), int(Kind.HARDLINK), int(Kind.WHITEOUT)
_COLUMNS = {"parent": "I", "kind": "B", "layer": "H", "source": "I", "nlink": "I", "own": "B", "inode": "I",
            "first_child": "I", "child_count": "I"}  # fmt: skip


def tree_key(table_keys: Sequence[str]) -> str:
    """Return the name of a chain's tree: 64 hex digits over what its tables were made from, base first."""
    text = "\n".join((f"tree {VERSION}", *table_keys))
    return hashlib.sha256(text.encode()).hexdigest()


class Tree(Names):
    """A mapped tree. Immutable, thread-safe. IndexError means a row that does not exist."""

    parent: memoryview
    kind: memoryview
    layer: memoryview  # place in the chain, base first, of the layer that the row's attributes come from
    source: memoryview  # the row's inode in that layer's table
    nlink: memoryview
    own: memoryview
    inode: memoryview  # first row of this tree with the same inode

    def __init__(self, path: Path) -> None:
        """Map and check the file. Blocking. Raise TableInvalid: then merge the tables again."""
        self.path = path
        self._columns = Columns(path, MAGIC, VERSION)
        try:
            for name, code in _COLUMNS.items():
                setattr(self, name, self._columns.view(name, code))
            self.name_end = self._columns.view("name_end", "I")
            self.names = self._columns.view("names", "B")
        except BaseException:
            self._columns.close()
            raise
        self.rows = len(self.kind)
        if self.rows == 0 or len(self.name_end) != self.rows + 1:
            self._columns.close()
            raise TableInvalid(f"{path} has columns of unequal length")

    def close(self) -> None:
        """Unmap. The tree is unusable afterwards."""
        self._columns.close()

    def __repr__(self) -> str:
        return f"<Tree {self.path.name[:12]} {self.rows} rows>"


class _Dir:
    """A directory while layers are applied. Leaves are numbers, layer << 32 | row: half a million of them must fit."""

    __slots__ = ("at", "children", "layer", "parent", "row")

    def __init__(self, layer: int, row: int, parent: _Dir | None) -> None:
        self.layer = layer
        self.row = row
        self.parent = parent
        self.children: dict[bytes, _Dir | int] = {}
        self.at = 0  # row in the tree, in the end


def build_tree(path: Path, tables: Sequence[LayerTable]) -> None:
    """Merge `tables` (base first, at least one) and write the tree to `path`. Blocking, about 1.5 µs a row.

    Raise StoreFull or StoreBroken when the file can't be written, TocInvalid for a layer that no unpack could apply.
    """
    chain = _Chain(tables)
    for number in range(len(tables)):
        chain.apply(number)
    _write(path, chain.root, tables)


class _Chain:
    """The directories that the layers applied so far have left."""

    def __init__(self, tables: Sequence[LayerTable]) -> None:
        self.root = _Dir(0, 0, None)
        self._tables = tables
        self._followed = 0

    def apply(self, number: int) -> None:
        """Unpack one layer over what the lower ones left."""
        table = self._tables[number]
        flags, kinds, ends = table.flags, bytes(table.kind), table.name_end.tolist()
        first_child, child_count = table.first_child, table.child_count
        names, leaf = bytes(table.names), number << _SHIFT
        if not flags[0] & FLAG_IMPLICIT:
            self.root.layer, self.root.row = number, 0
        todo: list[tuple[_Dir, int]] = [(self.root, 0)]
        while todo:
            here, row = todo.pop()
            children = here.children
            if flags[row] & FLAG_OPAQUE:
                children.clear()
            first = first_child[row]
            for child in range(first, first + child_count[row]):
                kind = kinds[child]
                name = names[ends[child] : ends[child + 1]]
                if kind == _WHITEOUT:
                    children.pop(name, None)
                elif kind != _DIR:
                    children[name] = leaf | child
                else:
                    todo.append((self._directory(here, name, number, child), child))

    def _directory(self, here: _Dir, name: bytes, number: int, row: int) -> _Dir:
        """Return the directory that a layer's directory row comes to, made where there is none."""
        flags = self._tables[number].flags[row]
        found = None if flags & FLAG_REPLACES else here.children.get(name)
        implicit = bool(flags & FLAG_IMPLICIT)
        if isinstance(found, int) and implicit:
            found = self._follow(here, found, number, row)
        if not isinstance(found, _Dir):
            found = here.children[name] = _Dir(number, row, here)
        elif not implicit:
            found.layer, found.row = number, row
        return found

    def _follow(self, here: _Dir, leaf: int, number: int, row: int) -> _Dir | None:
        """Return the directory that a symlink leads to inside the root, made where it is missing (as by mkdir -p).

        None when `leaf` is no symlink, or leads to something that is no directory: then the new directory replaces it.
        New directories get the attributes of the implicit directory `row` of layer `number`.
        """
        at = here
        missing: list[bytes] = []
        step: _Dir | int | None = leaf
        todo: list[bytes] = []
        links = 0
        while True:
            if isinstance(step, int):
                table = self._tables[step >> _SHIFT]
                inode = table.inode(step & _MASK)
                if table.kind[inode] != Kind.SYMLINK:
                    return None
                target = table.link(inode)
                parts = target.split(b"/")
                links += 1
                self._followed += len(parts)
                if links > _MAX_SYMLINKS:
                    raise TocInvalid("a layer writes below a cycle of symbolic links")
                if self._followed > _MAX_FOLLOWED:
                    raise TocInvalid("a layer writes too often through symbolic links")
                if target.startswith(b"/"):
                    at = self.root
                todo.extend(reversed(parts))
            elif step is not None:
                at = step
            step = at
            if not todo:
                break
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if missing:
                    missing.pop()
                else:
                    step = at.parent or at
            elif missing or part not in at.children:
                missing.append(part)
            else:
                step = at.children[part]
        for part in missing:
            made = at.children[part] = _Dir(number, row, at)
            at = made
        return at


def _write(path: Path, root: _Dir, tables: Sequence[LayerTable]) -> None:
    places, parents, names = [root.layer << _SHIFT | root.row], [0], [b""]
    dirs = [root]
    for here in dirs:  # grows while it is walked
        children = here.children
        if children:
            listed = sorted(children)
            names += listed
            parents += [here.at] * len(listed)
            row = len(places)
            for name in listed:
                child = children[name]
                if child.__class__ is int:
                    places.append(child)
                else:
                    assert isinstance(child, _Dir)
                    child.at = row
                    places.append(child.layer << _SHIFT | child.row)
                    dirs.append(child)
                row += 1
    columns = _attributes(places, tables)
    rows = len(places)
    first_child, child_count = (array("I", bytes(4 * rows)) for _ in range(2))
    nlink, own = columns["nlink"], columns["own"]
    at = 1
    for here in dirs:
        nlink[here.at], own[here.at] = 2, 1
        if here.children:
            first_child[here.at], child_count[here.at] = at, len(here.children)
            at += len(here.children)
    for here in dirs[1:]:
        nlink[parents[here.at]] += 1
    columns.update(parent=array("I", parents), first_child=first_child, child_count=child_count)
    name_end = array("I", accumulate(map(len, names), initial=0))
    ordered = {name: columns[name] for name in _COLUMNS}
    write_columns(path, MAGIC, VERSION, {**ordered, "name_end": name_end, "names": b"".join(names)})


def _attributes(places: list[int], tables: Sequence[LayerTable]) -> dict[str, array[int]]:
    """Return what the rows are, from where they are in the tables; links of directories are left to the caller."""
    rows = len(places)
    layer = [place >> _SHIFT for place in places]
    source = [place & _MASK for place in places]
    kinds, links = [bytes(table.kind) for table in tables], [table.nlink.tolist() for table in tables]
    kind = array("B", [kinds[number][row] for number, row in zip(layer, source, strict=True)])
    nlink, own, inode = array("I", [1]) * rows, array("B", bytes(rows)), array("I", range(rows))
    # In the tables all names of an inode have its count of links: whoever has one is alone here too.
    several = [
        row
        for row, (number, at) in enumerate(zip(layer, source, strict=True))
        if links[number][at] != 1 and kind[row] != _DIR
    ]
    first_of: dict[tuple[int, int], int] = {}
    for row in several:
        table = tables[layer[row]]
        if kind[row] == _HARDLINK:
            source[row] = table.aux[source[row]]
            kind[row] = table.kind[source[row]]
        first = first_of.setdefault((layer[row], source[row]), row)
        if first != row:
            inode[row] = first
            nlink[first] += 1
    for row in several:
        nlink[row] = nlink[inode[row]]
        own[row] = nlink[row] != links[layer[row]][source[row]]
    return {
        "kind": kind, "layer": array("H", layer), "source": array("I", source), "nlink": nlink, "own": own,
        "inode": inode,
    }  # fmt: skip
