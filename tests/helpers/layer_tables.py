"""Layer tables and trees from entries, without TOC or blob, and all that can be seen of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.listing import Listing
from lazyfs.format.table import FORM_ZSTD_CHUNKED, LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.tree import Tree, build_tree
from tests.helpers.unpack import Seen

FACTS = LayerFacts(FORM_ZSTD_CHUNKED, 1 << 30, (1 << 30) - 100)


def table_at(path: Path, entries: Iterable[Entry], chunks: dict[bytes, list[Chunk]] | None = None) -> LayerTable:
    """Build a table and open it; `chunks` by path."""
    build_table(path, FACTS, Listing.of((entry, (chunks or {}).get(entry.path, [])) for entry in entries))
    return LayerTable(path)


def tree_at(directory: Path, layers: Sequence[Iterable[Entry]]) -> tuple[Tree, list[LayerTable]]:
    """Build the tables of a chain, base first, and their tree."""
    tables = [table_at(directory / f"table-{number}", layer) for number, layer in enumerate(layers)]
    build_tree(directory / "tree", tables)
    return Tree(directory / "tree"), tables


def seen_in_tree(tree: Tree, tables: Sequence[LayerTable]) -> dict[bytes, Seen]:
    """Lay a tree out as names, by walking it as the kernel would."""
    groups: dict[int, list[bytes]] = {}
    rows: dict[bytes, int] = {}
    todo = [(0, b"")]
    while todo:
        row, path = todo.pop()
        rows[path] = row
        groups.setdefault(tree.inode[row], []).append(path)
        for child in tree.children(row):
            name = tree.name(child)
            assert tree.child(row, name) == child
            assert tree.parent[child] == row
            todo.append((child, path + b"/" + name if path else name))
    assert len(rows) == tree.rows
    out = {}
    for path, row in rows.items():
        table, source = tables[tree.layer[row]], tree.source[row]
        kind = Kind(table.kind[source])
        assert kind == tree.kind[row] and kind not in (Kind.WHITEOUT, Kind.HARDLINK)
        names = tuple(sorted(groups[tree.inode[row]]))
        if kind is Kind.DIR:
            assert tree.nlink[row] == 2 + sum(tree.kind[child] == Kind.DIR for child in tree.children(row))
        else:
            assert tree.nlink[row] == len(names)
            assert tree.own[row] == (table.nlink[source] != len(names))
        mode = 0 if kind is Kind.SYMLINK else table.mode[source]
        link = table.link(source) if kind is Kind.SYMLINK else b""
        out[path] = Seen(kind, mode, table.uid[source], link, names)
    return out
