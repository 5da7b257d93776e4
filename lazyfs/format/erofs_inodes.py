"""Inodes of an EROFS image, made from a tree's columns and those of its layers' tables.

There are two areas. In the first each inode has the size it needs: directories, symlinks, devices, and files that are
special. The second has the ordinary files of one layer after the other, 96 bytes each, and is filled column by column:
nothing is done file by file, which makes the image of half a million files in under a second.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Sequence
from itertools import compress, islice
from operator import ne, not_, sub
from typing import NamedTuple

from lazyfs.errors import TocInvalid
from lazyfs.format.entry import FILE_TYPE, LINK_MODE, Kind
from lazyfs.format.erofs_dirs import Directories, TreeColumns
from lazyfs.format.erofs_layout import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_FORMAT,
    CHUNK_INDEX,
    CHUNK_SHIFT,
    CHUNKED,
    EXTENDED,
    FLAT_INLINE,
    FLAT_PLAIN,
    INODE,
    INODE_BYTES,
    MAX_BLOCKS,
    NULL_BLOCK,
    SLOT,
    align_block,
    device_number,
)
from lazyfs.format.erofs_xattrs import NO_XATTRS, Xattrs, body_count
from lazyfs.format.table import LayerTable

_STRIDE = 96  # bytes of an ordinary file: an inode, one chunk index, and what is lost up to the next slot
_TOO_MANY = "the image has too many files for one EROFS image"
_IS_REG = bytes(kind == Kind.REG for kind in range(256))
_IS_NOT = bytes(not value for value in range(256))
_REG_MODE = bytes(value | stat.S_IFREG >> 8 for value in range(256))  # of a mode's upper byte
_ALIKE = 1 << CHUNK_SHIFT  # bytes; a file with more needs more than one chunk index


def device_layers(tables: Sequence[LayerTable]) -> list[int]:
    """Return the places in the chain, base first, of the layers that have a device, in the order of the devices."""
    return [place for place, table in enumerate(tables) if table.data_size]


class Inodes:
    """The inodes of a tree. `place` gives each its nid; `special`, `blocks` and `ordinary` make the bytes."""

    def __init__(self, tree: TreeColumns, tables: Sequence[LayerTable]) -> None:
        self.xattrs = Xattrs()
        self.nids = array("I", bytes(4 * tree.rows))
        self._tree = tree
        self._tables = tables
        self._device = {place: number + 1 for number, place in enumerate(device_layers(tables))}
        self._directories = Directories(tree)
        self._special: list[int] = []  # rows in the first area
        self._extents: list[tuple[int, int, int]] = []  # of each: place, see `_extent`
        self._body: dict[int, bytes] = {}  # row -> attributes
        self._bodies: dict[tuple[int, int], bytes] = {}
        self._ordinary: list[list[_Run]] = []  # by layer
        self.count = 0
        self.special_size = 0  # bytes
        self._place()

    def _place(self) -> None:
        self._sort_out()
        at = SLOT  # no inode has the number 0: readdir(3) takes it for a removed name
        for row in self._special:
            head, tail = self._extent(row)
            if tail and (at + INODE_BYTES - 1) // BLOCK != (at + head + tail - 1) // BLOCK:
                at = align_block(at)
            if at // SLOT > NULL_BLOCK:
                raise TocInvalid(_TOO_MANY)
            self._extents.append((at, head, tail))
            self.nids[row] = at // SLOT
            at += (head + tail + SLOT - 1) & -SLOT
        self.special_size = align_block(at)
        nid, step = self.special_size // SLOT, _STRIDE // SLOT
        ordinary = sum(run.files for runs in self._ordinary for run in runs)
        if nid + step * ordinary > NULL_BLOCK:
            raise TocInvalid(_TOO_MANY)
        nids = self.nids
        for runs in self._ordinary:
            for run in runs:
                end = nid + step * run.files
                nids[run.row : run.row + run.files] = array("I", range(nid, end, step))
                nid = end
        self.count = len(self._special) + ordinary
        for row, first in self._links:
            nids[row] = nids[first]
        self._directories.number(nids)

    def _sort_out(self) -> None:
        """Divide the rows: special ones, ordinary files by layer, and further names of the same inode."""
        tree, every = self._tree, range(self._tree.rows)
        is_ordinary = bytearray(bytes(tree.kind).translate(_IS_REG))
        self._links = []
        if tree.inode != memoryview(array("I", every)):
            self._links = [(row, first) for row, first in enumerate(tree.inode.tolist()) if first != row]
        for row, _ in self._links:
            is_ordinary[row] = 0
        layers, sources = tree.layer.tolist(), tree.source.tolist()
        odd = [self._odd(table) for table in self._tables]
        if any(odd):
            for row in compress(every, is_ordinary):
                place = layers[row]
                if sources[row] in odd[place] and self._is_special(row, place):
                    is_ordinary[row] = 0
        self._ordinary = _runs(layers, sources, is_ordinary, len(self._tables))
        for row, _ in self._links:
            is_ordinary[row] = 1
        self._special = list(compress(every, is_ordinary.translate(_IS_NOT)))

    def _odd(self, table: LayerTable) -> frozenset[int]:
        """Return the rows of a table that an ordinary file can't be of, whatever else is true of them."""
        with_xattrs = table.xattr.tobytes().strip(b"\0")
        if not with_xattrs and table.data_size <= _ALIKE:
            return frozenset()
        columns = zip(table.xattr, table.size, strict=True)
        return frozenset(row for row, (xattr, size) in enumerate(columns) if xattr or size > _ALIKE)

    def _is_special(self, row: int, place: int) -> bool:
        table, source = self._tables[place], self._tree.source[row]
        xattr = table.xattr[source]
        return bool(xattr and self._attributes(row, place, xattr)) or table.size[source] > _ALIKE

    def _attributes(self, row: int, layer: int, xattr: int) -> bytes:
        """Return (and keep) the attributes of a row, which has the set number `xattr` of its table."""
        body = self._bodies.get((layer, xattr))
        if body is None:
            table = self._tables[layer]
            body = self._bodies[layer, xattr] = self.xattrs.body(table.xattrs(self._tree.source[row]))
        if body:
            self._body[row] = body
        return body

    def _extent(self, row: int) -> tuple[int, int]:
        """Return how many bytes a special inode takes: with attributes and indexes, and of content right behind them.

        That content may not lie in two blocks, and not in another one than the inode.
        """
        tree = self._tree
        kind, layer, source = tree.kind[row], tree.layer[row], tree.source[row]
        table = self._tables[layer]
        xattr = table.xattr[source]
        head = INODE_BYTES
        if xattr:
            head += len(self._attributes(row, layer, xattr))
        if kind == Kind.DIR:
            tail = self._directories.sizes[row] % BLOCK
        elif kind == Kind.SYMLINK:
            tail = table.size[source]
        elif kind == Kind.REG:
            return _chunks_at(head) + CHUNK_INDEX.size * _chunk_count(table.size[source]), 0
        else:
            tail = 0
        return head, tail if head + tail <= BLOCK else 0

    # -- bytes

    def special(self, first_block: int) -> tuple[bytearray, bytearray]:
        """Return the first area, and the blocks of content that its inodes name, which begin at block `first_block`."""
        tree, tables, nids = self._tree, self._tables, self.nids
        out, blocks = bytearray(self.special_size), bytearray()
        for number, (row, (at, _, tail)) in enumerate(zip(self._special, self._extents, strict=True), 1):
            kind, table, source = tree.kind[row], tables[tree.layer[row]], tree.source[row]
            body = self._body.get(row, NO_XATTRS)
            mode = LINK_MODE if kind == Kind.SYMLINK else table.mode[source]
            head = INODE_BYTES + len(body)
            layout, union, size, rest = FLAT_PLAIN, 0, 0, b""
            if kind in (Kind.DIR, Kind.SYMLINK):
                if kind == Kind.DIR:
                    content = self._directories.content(row, nids[row], nids[tree.parent[row]])
                else:
                    content = table.link(source)
                size = len(content)
                whole = size
                if tail:
                    layout, whole = FLAT_INLINE, size - tail
                    rest = content[whole:]
                if whole:
                    union = first_block + len(blocks) // BLOCK
                    blocks += content[:whole]
                    blocks += bytes(-len(blocks) % BLOCK)
            elif kind == Kind.REG:
                layout, union, size = CHUNKED, CHUNK_FORMAT, table.size[source]
                rest = bytes(_chunks_at(head) - head) + self._chunks(tree.layer[row], table.data_offset[source], size)
            elif kind != Kind.FIFO:
                union = device_number(*table.rdev(source))
            INODE.pack_into(
                out, at, layout << 1 | EXTENDED, body_count(body), FILE_TYPE[kind] | mode, 0, size,
                union, number, table.uid[source], table.gid[source], table.mtime[source], table.mtime_fraction[source],
                tree.nlink[row],
            )  # fmt: skip
            if body:
                out[at + INODE_BYTES : at + head] = body
            if rest:
                out[at + head : at + head + len(rest)] = rest
        return out, blocks

    def _chunks(self, layer: int, offset: int, size: int) -> bytes:
        """Return the chunk indexes of a file at `offset` of its layer's data space."""
        if not size:
            return CHUNK_INDEX.pack(0, 0, NULL_BLOCK)
        first, step = offset >> BLOCK_BITS, _ALIKE >> BLOCK_BITS
        return b"".join(
            CHUNK_INDEX.pack(0, self._device[layer], first + number * step) for number in range(_chunk_count(size))
        )

    def ordinary(self) -> list[bytearray]:
        """Return the second area in pieces."""
        out, number = [], len(self._special) + 1
        for layer, runs in enumerate(self._ordinary):
            if runs:
                out.append(self._of_layer(layer, runs, number))
                number += len(out[-1]) // _STRIDE
        return out

    def _of_layer(self, layer: int, runs: list[_Run], number: int) -> bytearray:
        first, last = min(run.source for run in runs), max(run.source + run.files for run in runs)
        models = memoryview(self._models(layer, first, last))
        out = bytearray().join(
            [models[_STRIDE * (run.source - first) : _STRIDE * (run.source - first + run.files)] for run in runs]
        )
        count = len(out) // _STRIDE
        with memoryview(out) as whole, whole.cast("I") as words:
            words[5 :: _STRIDE // 4] = memoryview(array("I", range(number, number + count)))
            if self._links:
                links = [link for run in runs for link in self._tree.nlink[run.row : run.row + run.files]]
                words[11 :: _STRIDE // 4] = memoryview(array("I", links))
        return out

    def _models(self, layer: int, first: int, last: int) -> bytearray:
        """Return what the inodes of a layer's rows would be, were all of them ordinary files with one name."""
        table, count = self._tables[layer], last - first
        model = bytearray(_STRIDE)
        INODE.pack_into(model, 0, CHUNKED << 1 | EXTENDED, 0, stat.S_IFREG, 0, 0, CHUNK_FORMAT, 0, 0, 0, 0, 0, 1)
        CHUNK_INDEX.pack_into(model, INODE_BYTES, 0, self._device.get(layer, 0), 0)
        out = bytearray(model * count)
        sizes = table.size[first:last]
        # All offsets at once as one number: each is a multiple of a block, so none moves bits into its neighbour.
        offsets = int.from_bytes(table.data_offset[first:last].tobytes(), "little") >> BLOCK_BITS
        blocks = memoryview(offsets.to_bytes(8 * count, "little")).cast("I")
        modes = table.mode[first:last].tobytes()
        with memoryview(out) as whole, whole.cast("I") as words, whole.cast("q") as longs:
            whole[4::_STRIDE] = memoryview(modes[::2])
            whole[5::_STRIDE] = memoryview(modes[1::2].translate(_REG_MODE))
            longs[1 :: _STRIDE // 8] = memoryview(sizes.tobytes()).cast("q")
            words[6 :: _STRIDE // 4] = table.uid[first:last]
            words[7 :: _STRIDE // 4] = table.gid[first:last]
            longs[4 :: _STRIDE // 8] = table.mtime[first:last]
            words[10 :: _STRIDE // 4] = table.mtime_fraction[first:last]
            words[17 :: _STRIDE // 4] = blocks[::2]
            for empty in compress(range(count), map(not_, sizes.tolist())):
                words[17 + empty * _STRIDE // 4] = NULL_BLOCK
        return out


class _Run(NamedTuple):
    """Files that lie side by side in the tree and in their layer's table."""

    row: int
    source: int
    files: int


def _runs(layers: list[int], sources: list[int], is_ordinary: bytearray, count: int) -> list[list[_Run]]:
    """Return the runs of ordinary files in each of `count` layers."""
    rows = range(len(sources))
    shifts = list(map(sub, sources, rows))
    # A run begins where another kind of row was, where the table goes on elsewhere, and where another layer's does.
    begins = bytearray([1])
    begins += bytes(map(ne, islice(is_ordinary, 1, None), is_ordinary))
    for column in (shifts, layers) if count > 1 else (shifts,):
        for row in compress(rows, map(ne, islice(column, 1, None), column)):
            begins[row + 1] = 1
    out: list[list[_Run]] = [[] for _ in range(count)]
    row = 0
    while row < len(sources):
        end = begins.find(1, row + 1)
        end = end if end >= 0 else len(sources)
        if is_ordinary[row]:
            out[layers[row]].append(_Run(row, sources[row], end - row))
        row = end
    return out


def check_devices(tables: Sequence[LayerTable]) -> list[int]:
    """Return the sizes of the devices in blocks. Raise TocInvalid when one is too large for EROFS."""
    sizes = [(tables[place].data_size + BLOCK - 1) // BLOCK for place in device_layers(tables)]
    if any(size >= MAX_BLOCKS for size in sizes):
        raise TocInvalid("a layer has more content than an EROFS image can name, 16 TiB")
    return sizes


def _chunks_at(head: int) -> int:
    return (head + CHUNK_INDEX.size - 1) & -CHUNK_INDEX.size


def _chunk_count(size: int) -> int:
    return max(1, (size + _ALIKE - 1) >> CHUNK_SHIFT)
