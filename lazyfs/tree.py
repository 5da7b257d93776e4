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
from pathlib import Path

from lazyfs.errors import TableInvalid, TocInvalid
from lazyfs.format.columns import Columns, write_columns
from lazyfs.format.entry import Kind
from lazyfs.format.table import FLAG_IMPLICIT, FLAG_OPAQUE, FLAG_REPLACES, LayerTable, Names

MAGIC = b"LZFTREE\0"
VERSION = 2
_MAX_SYMLINKS = 40  # the kernel's own limit for one path
_MAX_FOLLOWED = 10_000_000  # parts of symlinks' targets walked for one chain: seconds, where sane ones need none
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
    """A directory while layers are applied. Leaves are (layer, row) tuples: half a million of them must fit."""

    __slots__ = ("children", "layer", "parent", "row")

    def __init__(self, layer: int, row: int, parent: _Dir | None) -> None:
        self.layer = layer
        self.row = row
        self.parent = parent
        self.children: dict[bytes, _Dir | tuple[int, int]] = {}


def build_tree(path: Path, tables: Sequence[LayerTable]) -> None:
    """Merge `tables` (base first, at least one) and write the tree to `path`. Blocking, about 3 µs a row.

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
        if not table.flags[0] & FLAG_IMPLICIT:
            self.root.layer, self.root.row = number, 0
        todo: list[tuple[_Dir, int]] = [(self.root, 0)]
        while todo:
            here, row = todo.pop()
            if table.flags[row] & FLAG_OPAQUE:
                here.children.clear()
            for child in table.children(row):
                name, kind = table.name(child), table.kind[child]
                if kind == Kind.WHITEOUT:
                    here.children.pop(name, None)
                elif kind != Kind.DIR:
                    here.children[name] = (number, child)
                else:
                    todo.append((self._directory(here, name, number, child), child))

    def _directory(self, here: _Dir, name: bytes, number: int, row: int) -> _Dir:
        """Return the directory that a layer's directory row comes to, made where there is none."""
        flags = self._tables[number].flags[row]
        found = None if flags & FLAG_REPLACES else here.children.get(name)
        implicit = bool(flags & FLAG_IMPLICIT)
        if isinstance(found, tuple) and implicit:
            found = self._follow(here, found, number, row)
        if not isinstance(found, _Dir):
            found = here.children[name] = _Dir(number, row, here)
        elif not implicit:
            found.layer, found.row = number, row
        return found

    def _follow(self, here: _Dir, leaf: tuple[int, int], number: int, row: int) -> _Dir | None:
        """Return the directory that a symlink leads to inside the root, made where it is missing (as by mkdir -p).

        None when `leaf` is no symlink, or leads to something that is no directory: then the new directory replaces it.
        New directories get the attributes of the implicit directory `row` of layer `number`.
        """
        at = here
        missing: list[bytes] = []
        step: _Dir | tuple[int, int] | None = leaf
        todo: list[bytes] = []
        links = 0
        while True:
            if isinstance(step, tuple):
                table = self._tables[step[0]]
                inode = table.inode(step[1])
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
    columns = {name: array(code) for name, code in _COLUMNS.items()}
    names, name_end = bytearray(), array("I", [0])
    rows: list[tuple[_Dir | tuple[int, int], int, bytes]] = [(root, 0, b"")]
    first_of: dict[tuple[int, int], int] = {}
    for row, (node, parent, name) in enumerate(rows):  # grows while it is walked
        names += name
        name_end.append(len(names))
        columns["parent"].append(parent)
        if isinstance(node, _Dir):
            layer, source, inode = node.layer, node.row, row
            columns["first_child"].append(len(rows) if node.children else 0)
            columns["child_count"].append(len(node.children))
            columns["nlink"].append(2 + sum(isinstance(child, _Dir) for child in node.children.values()))
            columns["own"].append(1)
            rows.extend((node.children[child], row, child) for child in sorted(node.children))
        else:
            layer, source = node[0], tables[node[0]].inode(node[1])
            inode = first_of.setdefault((layer, source), row)
            columns["first_child"].append(0)
            columns["child_count"].append(0)
            columns["nlink"].append(1)
            columns["own"].append(0)
            if inode != row:
                columns["nlink"][inode] += 1
        columns["kind"].append(tables[layer].kind[source])
        columns["layer"].append(layer)
        columns["source"].append(source)
        columns["inode"].append(inode)
    for row in range(len(rows)):
        if columns["kind"][row] != Kind.DIR:
            inode = columns["inode"][row]
            columns["nlink"][row] = columns["nlink"][inode]
            table = tables[columns["layer"][row]]
            columns["own"][row] = columns["nlink"][inode] != table.nlink[columns["source"][row]]
    write_columns(path, MAGIC, VERSION, {**columns, "name_end": name_end, "names": names})
