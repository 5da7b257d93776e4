"""All mounted trees under one root directory: what FUSE sees, without FUSE. Node ids, names, attributes.

Besides the trees, and in no listing, the root has a directory with the data space of each layer as one file, for the
`erofs` driver: `.data/<layer number>`, and a file for that driver's self-test.

Node id = number << 40 | row. The number is a layer's, for files that look the same in every image, or a tree's, for
directories and for files whose link count differs there. The kernel's root (id 1) lists the trees by name. Numbers are
persisted in the catalog before the kernel hears of them, so any id resolves without a lookup before it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from lazyfs.chunks.layer import ServedLayer
from lazyfs.format.entry import FILE_TYPE, LINK_MODE, Kind
from lazyfs.format.table import LayerTable
from lazyfs.tree import Tree
from lazyfs.units import PAGE

SHIFT = 40
MASK = (1 << SHIFT) - 1
ROOT_ID = 1  # FUSE_ROOT_ID; number 0, so no layer or tree collides with it
DATA_ID = MASK  # the directory of data spaces
PROBE_ID = MASK - 1  # the file of the self-test
DATA_ROW = MASK  # in place of a row: the layer's data space; no table has so many rows
DATA_NAME = b".data"
PROBE_NAME = b"probe"
PROBE_SIZE = (1 << 20) + 2 * PAGE  # bytes
PROBE_GOOD = PROBE_SIZE - PAGE  # bytes of it that can be read; reads of the last page fail


class NoSuchName(Exception):
    """A name, node or attribute that does not exist. Carries the errno: an answer, not a failure."""

    def __init__(self, code: int = errno.ENOENT) -> None:
        super().__init__(code)
        self.errno = code


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells. Sizes in bytes, time in nanoseconds, `rdev` a dev_t."""

    node: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Everybody's owner when an ordinary user's containers can't have any other (`squash`)."""

    uid: int
    gid: int


@dataclass(eq=False, slots=True)
class Planted:
    """A tree in the forest: its number, its name in the root directory, its layers base first."""

    number: int
    name: bytes
    tree: Tree
    layers: tuple[ServedLayer, ...]
    users: int = 0  # mounts of it

    def ensure_names(self) -> None:
        """Check the names of the tree and its layers, before a look-up would. Blocking. Raise TableInvalid."""
        self.tree.ensure_names()
        for layer in self.layers:
            layer.table.ensure_names()


class Forest:
    """Trees and layers by number. One thread changes it (the trio loop); look-ups are pure and never block.

    With `solo` the kernel's root is the root of the one tree, not a list of trees.
    """

    def __init__(self, *, solo: bool = False, squash: Owner | None = None) -> None:
        self._trees: dict[int, Planted] = {}
        self._by_name: dict[bytes, Planted] = {}
        self._layers: dict[int, ServedLayer] = {}
        self._solo: Planted | None = None
        self._is_solo = solo
        self._squash = squash

    # -- planting

    def plant(self, planted: Planted) -> None:
        """Make a tree and its layers visible."""
        for layer in planted.layers:
            self._layers[layer.number] = layer
        self._trees[planted.number] = planted
        self._by_name[planted.name] = planted
        if self._is_solo:
            self._solo = planted

    def uproot(self, planted: Planted) -> list[ServedLayer]:
        """Take a tree away. Return the layers that no other tree holds. Open files of it give EIO from now on."""
        self._trees.pop(planted.number, None)
        self._by_name.pop(planted.name, None)
        if self._solo is planted:
            self._solo = None
        held = {layer.number for other in self._trees.values() for layer in other.layers}
        gone = [layer for layer in planted.layers if layer.number not in held]
        for layer in gone:
            self._layers.pop(layer.number, None)
        return list({layer.number: layer for layer in gone}.values())

    def find_tree(self, name: bytes) -> Planted | None:
        return self._by_name.get(name)

    def trees(self) -> list[Planted]:
        return list(self._trees.values())

    def layers(self) -> list[ServedLayer]:
        return list(self._layers.values())

    def layer(self, number: int) -> ServedLayer | None:
        return self._layers.get(number)

    # -- resolving

    def _in_tree(self, node: int) -> tuple[Planted, int] | None:
        """Return (tree, row) of a node that belongs to a tree; None for layers' nodes and the list of trees."""
        if node == ROOT_ID:
            return (self._solo, 0) if self._solo is not None else None
        planted = self._trees.get(node >> SHIFT)
        if planted is None:
            return None
        row = node & MASK
        if row >= planted.tree.rows:
            raise NoSuchName(errno.ESTALE)
        return planted, row

    def is_list(self, node: int) -> bool:
        """Tell whether a node is the list of trees or that of data spaces: directories that change."""
        return node in (ROOT_ID, DATA_ID) and self._solo is None

    def data_layer(self, node: int) -> ServedLayer | None:
        """Return the layer whose data space a node is; None: it is none, or of a layer that is gone."""
        return self._layers.get(node >> SHIFT) if node & MASK == DATA_ROW else None

    def source(self, node: int) -> tuple[ServedLayer, int]:
        """Return the layer and the row in its table that carry a node's content and attributes. ESTALE: unknown id."""
        found = self._in_tree(node)
        if found is not None:
            planted, row = found
            return planted.layers[planted.tree.layer[row]], planted.tree.source[row]
        layer, row = self._layers.get(node >> SHIFT), node & MASK
        if layer is None or row >= layer.table.rows or layer.table.kind[row] not in FILE_TYPE:
            raise NoSuchName(errno.ESTALE)
        return layer, row

    def _directory(self, node: int) -> tuple[Planted, int]:
        """Return (tree, row) of a directory of a tree. Raise NoSuchName: ENOTDIR, or ESTALE for an unknown id."""
        found = self._in_tree(node)
        if found is None:
            self.source(node)
            raise NoSuchName(errno.ENOTDIR)
        if found[0].tree.kind[found[1]] != Kind.DIR:
            raise NoSuchName(errno.ENOTDIR)
        return found

    def node_of(self, planted: Planted, row: int) -> int:
        """Return the id of a tree's row: the layer's where it can be shared, the tree's own otherwise."""
        tree = planted.tree
        if row == 0 and planted is self._solo:
            return ROOT_ID
        if tree.own[row]:
            return planted.number << SHIFT | tree.inode[row]
        return planted.layers[tree.layer[row]].number << SHIFT | tree.source[row]

    # -- names

    def lookup(self, parent: int, name: bytes) -> int:
        """Return the id of a name in a directory. Raise NoSuchName."""
        if self.is_list(parent):
            return self._listed(parent, name)
        planted, row = self._directory(parent)
        child = planted.tree.child(row, name)
        if child is None:
            raise NoSuchName
        return self.node_of(planted, child)

    def _listed(self, parent: int, name: bytes) -> int:
        if parent == DATA_ID:
            if name == PROBE_NAME:
                return PROBE_ID
            number = int(name) if name.isdigit() and len(name) < 10 else 0
            if number not in self._layers:
                raise NoSuchName
            return number << SHIFT | DATA_ROW
        if name == DATA_NAME and not self._is_solo:
            return DATA_ID
        listed = self._by_name.get(name)
        if listed is None:
            raise NoSuchName
        return listed.number << SHIFT

    def parent_of(self, node: int) -> int:
        """Return the id of a directory's parent; the parent of the kernel's root is itself. Raise NoSuchName."""
        if self.is_list(node):
            return ROOT_ID
        planted, row = self._directory(node)
        return self.node_of(planted, planted.tree.parent[row]) if row else ROOT_ID

    def list_from(self, node: int, start: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield (name, node id, cookie of the next one) of a directory from cookie `start` (0: the first).

        Directories are sorted; the list of trees, which may change between two calls, is in the order of their numbers.
        """
        if node == DATA_ID:
            return
        if self.is_list(node):
            for number in sorted(number for number in self._trees if number >= start):
                yield self._trees[number].name, number << SHIFT, number + 1
            return
        planted, row = self._directory(node)
        children = planted.tree.children(row)
        for position in range(start, len(children)):
            child = children[position]
            yield planted.tree.name(child), self.node_of(planted, child), position + 1

    # -- attributes

    def attributes(self, node: int) -> Attributes:
        """Return a node's attributes. Raise NoSuchName (ESTALE) for an id that nobody has."""
        if self.is_list(node):
            if node == DATA_ID:
                return Attributes(DATA_ID, stat.S_IFDIR | 0o700, 2, 0, 0, 0, 0, 0)
            return Attributes(ROOT_ID, stat.S_IFDIR | 0o755, 2 + len(self._trees), 0, 0, 0, 0, 0)
        if node == PROBE_ID:
            return Attributes(PROBE_ID, stat.S_IFREG | 0o400, 1, 0, 0, PROBE_SIZE, 0, 0)
        data = self.data_layer(node)
        if data is not None:
            size = -(-data.table.data_size // PAGE) * PAGE
            return Attributes(node, stat.S_IFREG | 0o400, 1, 0, 0, size, 0, 0)
        layer, row = self.source(node)
        found = self._in_tree(node)
        table = layer.table
        nlink = found[0].tree.nlink[found[1]] if found is not None else table.nlink[row]
        return self._attributes(node, table, row, nlink)

    def _attributes(self, node: int, table: LayerTable, row: int, nlink: int) -> Attributes:
        kind = Kind(table.kind[row])
        owner = self._squash
        return Attributes(
            node,
            FILE_TYPE[kind] | (LINK_MODE if kind == Kind.SYMLINK else table.mode[row]),
            nlink,
            table.uid[row] if owner is None else owner.uid,
            table.gid[row] if owner is None else owner.gid,
            table.size[row] if kind in (Kind.REG, Kind.SYMLINK) else 0,
            table.mtime_ns(row),
            os.makedev(*table.rdev(row)) if kind in (Kind.CHAR, Kind.BLOCK) else 0,
        )

    def link(self, node: int) -> bytes:
        """Return a symlink's target. Raise NoSuchName (EINVAL) for anything else."""
        layer, row = self.source(node)
        if layer.table.kind[row] != Kind.SYMLINK:
            raise NoSuchName(errno.EINVAL)
        return layer.table.link(row)

    def xattrs(self, node: int) -> dict[bytes, bytes]:
        """Return a node's extended attributes."""
        if self.is_list(node) or node == PROBE_ID or node & MASK == DATA_ROW:
            return {}
        layer, row = self.source(node)
        return layer.table.xattrs(row)
