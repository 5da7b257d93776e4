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
from lazyfs.format.table import FLAG_IMPLICIT, FLAG_OPAQUE, LayerTable, child_row, name_of

MAGIC = b"LZFTREE\0"
VERSION = 1
_MAX_SYMLINKS = 40
_COLUMNS = {"parent": "I", "kind": "B", "layer": "H", "source": "I", "nlink": "I", "own": "B", "inode": "I",
            "first_child": "I", "child_count": "I"}  # fmt: skip


def tree_key(table_keys: Sequence[str]) -> str:
    """Return the name of a chain's tree: 64 hex digits over what its tables were made from, base first."""
    text = "\n".join((f"tree {VERSION}", *table_keys))
    return hashlib.sha256(text.encode()).hexdigest()


class Tree:
    """A mapped tree. Immutable, thread-safe. IndexError means a row that does not exist."""

    parent: memoryview
    kind: memoryview
    layer: memoryview  # place in the chain, base first, of the layer that the row's attributes come from
    source: memoryview  # the row's inode in that layer's table
    nlink: memoryview
    own: memoryview
    inode: memoryview  # first row of this tree with the same inode
    first_child: memoryview
    child_count: memoryview

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

    def name(self, row: int) -> bytes:
        return name_of(self, row)

    def child(self, row: int, name: bytes) -> int | None:
        """Return the row of `name` in directory `row`, or None."""
        return child_row(self, row, name)

    def children(self, row: int) -> range:
        """Rows of a directory's children, sorted by name (bytes)."""
        first = self.first_child[row]
        return range(first, first + self.child_count[row])

    def find(self, path: bytes) -> int | None:
        """Return the row at a cleaned path (b"" is the root), following nothing; None: no such name."""
        row = 0
        for part in path.split(b"/") if path else ():
            found = child_row(self, row, part)
            if found is None:
                return None
            row = found
        return row

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
    root = _Dir(0, 0, None)
    for number, table in enumerate(tables):
        if number and not table.flags[0] & FLAG_IMPLICIT:
            root.layer, root.row = number, 0
        _apply(root, number, tables)
    _write(path, root, tables)


def _apply(root: _Dir, number: int, tables: Sequence[LayerTable]) -> None:
    """Unpack one layer over what the lower ones left."""
    table = tables[number]
    todo: list[tuple[_Dir, int]] = [(root, 0)]
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
                found = here.children.get(name)
                implicit = bool(table.flags[child] & FLAG_IMPLICIT)
                if isinstance(found, tuple) and implicit:
                    found = _follow(root, here, found, tables)
                if not isinstance(found, _Dir):
                    found = here.children[name] = _Dir(number, child, here)
                elif not implicit:
                    found.layer, found.row = number, child
                todo.append((found, child))


def _follow(root: _Dir, here: _Dir, leaf: tuple[int, int], tables: Sequence[LayerTable]) -> _Dir | None:
    """Return the directory that a symlink leads to inside the root; None when `leaf` is no such symlink."""
    todo: list[bytes] = []
    followed = 0
    at: _Dir = here
    step: _Dir | tuple[int, int] | None = leaf
    while True:
        if isinstance(step, tuple):
            table = tables[step[0]]
            row = table.inode(step[1])
            if table.kind[row] != Kind.SYMLINK:
                return None
            followed += 1
            if followed > _MAX_SYMLINKS:
                raise TocInvalid("a layer writes below a cycle of symbolic links")
            target = table.link(row)
            if target.startswith(b"/"):
                at = root
            todo.extend(target.split(b"/")[::-1])
        elif step is None:
            return None
        else:
            at = step
        while todo and todo[-1] in (b"", b"."):
            todo.pop()
        if not todo:
            return at
        part = todo.pop()
        step = (at.parent or at) if part == b".." else at.children.get(part)


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
