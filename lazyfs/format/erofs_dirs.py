"""Directories of an EROFS image: blocks of sorted entries followed by their names, made from a tree's columns.

The tree has a directory's children side by side and sorted, and so their names too: a block is a slice of entries and
a slice of names. What is computed for each name is one number, its offset in its block, by columns.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from itertools import islice, pairwise
from operator import sub
from typing import Protocol

from lazyfs.errors import TocInvalid
from lazyfs.format.entry import MAX_NAME, Kind
from lazyfs.format.erofs_layout import (
    BLOCK,
    DIRENT,
    FT_BLOCK,
    FT_CHAR,
    FT_DIR,
    FT_FIFO,
    FT_REG,
    FT_SYMLINK,
)

_SIZE = DIRENT.size
_DOTS = 2 * _SIZE + 3  # bytes of "." and ".." with their names
_TYPES = bytes.maketrans(
    bytes((Kind.DIR, Kind.REG, Kind.SYMLINK, Kind.CHAR, Kind.BLOCK, Kind.FIFO)),
    bytes((FT_DIR, FT_REG, FT_SYMLINK, FT_CHAR, FT_BLOCK, FT_FIFO)),
)


class TreeColumns(Protocol):
    """What is used of a tree: see `lazyfs.tree.Tree`."""

    rows: int
    parent: memoryview
    kind: memoryview
    layer: memoryview
    source: memoryview
    nlink: memoryview
    inode: memoryview
    first_child: memoryview
    child_count: memoryview
    name_end: memoryview
    names: memoryview


class Directories:
    """All directories of a tree: their sizes first (`sizes` by row), and their content once all nids are known.

    Raise TocInvalid for a name that no directory can have.
    """

    def __init__(self, tree: TreeColumns) -> None:
        self._tree = tree
        self._name_at = array("H")  # by row, the offset of its name in its block
        self._cuts: dict[int, list[int]] = {}  # directories of several blocks: the rows that begin one, and the end
        self._mixed: dict[int, list[list[int]]] = {}  # those with names before "..": their blocks, row by row
        self._entries = bytearray()
        self.sizes: dict[int, int] = {}
        self._measure()

    def _measure(self) -> None:
        tree, ends, names = self._tree, self._tree.name_end.tolist(), self._tree.names
        # So every block has room for a name at least: with one that fits none its directory would never end.
        if max(map(sub, islice(ends, 1, None), ends)) > MAX_NAME:
            raise TocInvalid(f"the image has a name of more than {MAX_NAME} bytes")
        first_child, child_count = tree.first_child.tolist(), tree.child_count.tolist()
        name_at, sizes = self._name_at, self.sizes
        name_at.append(0)  # the root has no name
        row = bytes(tree.kind).find(Kind.DIR)
        kinds = bytes(tree.kind)
        while row >= 0:
            count = child_count[row]
            if not count:
                sizes[row] = _DOTS
            else:
                first = first_child[row]
                start = ends[first]
                size = _DOTS + _SIZE * count + ends[first + count] - start
                if names[start] <= 0x2E and bytes(names[start : ends[first + 1]]) < b"..":
                    sizes[row] = self._measure_mixed(row, first, count)
                    name_at.extend([0] * count)
                elif size <= BLOCK:
                    sizes[row] = size
                    base = _SIZE * count + _DOTS - start
                    name_at.extend([base + end for end in ends[first : first + count]])
                else:
                    sizes[row] = self._measure_large(row, ends)
            row = kinds.find(Kind.DIR, row + 1)

    def _measure_large(self, row: int, ends: list[int]) -> int:
        first = self._tree.first_child[row]
        last = first + self._tree.child_count[row]
        cuts, dots, size = [first], _DOTS, 0
        while first < last:
            room = BLOCK - dots + _SIZE * first + ends[first]
            high = min(last, first + BLOCK // _SIZE) + 1
            cut = bisect_right(range(high), room, first, high, key=lambda at: _SIZE * at + ends[at]) - 1
            base = _SIZE * (cut - first) + dots - ends[first]
            self._name_at.extend([base + end for end in ends[first:cut]])
            size += BLOCK if cut < last else base + ends[cut]
            cuts.append(cut)
            first, dots = cut, 0
        self._cuts[row] = cuts
        return size

    def _measure_mixed(self, row: int, first: int, count: int) -> int:
        """Cut a directory in which "." and ".." don't come first. Their rows stand as -1 and -2."""
        rows = list(range(first, first + count))
        name = self._name
        for dots in (-1, -2):
            rows.insert(bisect_right(rows, name(dots), key=name), dots)
        blocks: list[list[int]] = []
        taken = BLOCK
        for one in rows:
            need = _SIZE + len(name(one))
            if taken + need > BLOCK:
                blocks.append([])
                taken = 0
            blocks[-1].append(one)
            taken += need
        self._mixed[row] = blocks
        return (len(blocks) - 1) * BLOCK + taken

    def _name(self, row: int) -> bytes:
        if row < 0:
            return b"." * -row
        ends = self._tree.name_end
        return bytes(self._tree.names[ends[row] : ends[row + 1]])

    def number(self, nids: array[int]) -> None:
        """Take the nid of every row; the content can be asked for from now on."""
        self._entries = bytearray(_SIZE * len(nids))
        words = memoryview(self._entries)
        words.cast("I")[:: _SIZE // 4] = memoryview(nids)
        words.cast("H")[4 :: _SIZE // 2] = memoryview(self._name_at)
        words[10::_SIZE] = memoryview(bytes(self._tree.kind).translate(_TYPES))

    def content(self, row: int, nid: int, above: int) -> bytes:
        """Return a directory's content: whole blocks, and a rest. `above`: nid of its parent."""
        tree = self._tree
        if row in self._mixed:
            return self._mixed_content(row, nid, above)
        first, count = tree.first_child[row], tree.child_count[row]
        cuts = self._cuts.get(row) or (first, first + count)
        ends, entries, names = tree.name_end, self._entries, tree.names
        start, end = cuts[0], cuts[1]
        at = _SIZE * (end - start + 2)
        parts: list[bytes | bytearray | memoryview] = [
            DIRENT.pack(nid, at, FT_DIR) + DIRENT.pack(above, at + 1, FT_DIR),
            entries[_SIZE * start : _SIZE * end],
            b"...",
            names[ends[start] : ends[end]],
        ]
        if len(cuts) == 2:
            return b"".join(parts)
        blocks = [b"".join(parts)]
        for start, end in pairwise(cuts[1:]):
            blocks.append(b"".join((entries[_SIZE * start : _SIZE * end], names[ends[start] : ends[end]])))
        return b"".join([*(block.ljust(BLOCK, b"\0") for block in blocks[:-1]), blocks[-1]])

    def _mixed_content(self, row: int, nid: int, above: int) -> bytes:
        blocks = []
        for rows in self._mixed[row]:
            at = _SIZE * len(rows)
            entries, names = [], []
            for one in rows:
                name = self._name(one)
                if one < 0:
                    entries.append(DIRENT.pack(nid if one == -1 else above, at, FT_DIR))
                else:
                    entry = bytearray(self._entries[_SIZE * one : _SIZE * one + _SIZE])
                    entry[8:10] = at.to_bytes(2, "little")
                    entries.append(bytes(entry))
                names.append(name)
                at += len(name)
            blocks.append(b"".join((*entries, *names)))
        return b"".join([*(block.ljust(BLOCK, b"\0") for block in blocks[:-1]), blocks[-1]])
