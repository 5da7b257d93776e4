"""Mounted trees as FUSE sees them: node ids that last, names, lists that can be resumed, attributes."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazyfs.format.entry import Entry, Kind
from lazyfs.format.table import LayerTable
from lazyfs.mount.forest import ROOT_ID, SHIFT, Forest, NoSuchName, Owner, Planted
from lazyfs.tree import Tree, build_tree
from tests.helpers.entries import entry
from tests.helpers.layer_tables import table_at

MTIME = 1_700_000_000_000_000_001
BASE = [
    Entry(b"", Kind.DIR, 0o751, 1, 2, MTIME),
    Entry(b"d", Kind.DIR, 0o2755, 3, 4, MTIME, xattrs=((b"user.d", b"v"),)),
    Entry(b"d/file", Kind.REG, 0o4711, 5, 6, MTIME),
    Entry(b"d/link", Kind.SYMLINK, 0o777, 0, 0, MTIME, link=b"file"),
    Entry(b"d/null", Kind.CHAR, 0o666, 0, 0, MTIME, rdev=(1, 300)),
    Entry(b"pair", Kind.REG, 0o600, 0, 0, MTIME),
    Entry(b"pair2", Kind.HARDLINK, 0, 0, 0, 0, link=b"pair"),
    Entry(b"pipe", Kind.FIFO, 0o600, 0, 0, MTIME),
]


class Grove:
    """Builds layers and trees, and closes them."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._open: list[LayerTable | Tree] = []

    def layer(self, number: int, entries: list[Entry]) -> Any:
        table = table_at(self._place / f"layer-{number}", entries)
        self._open.append(table)
        return SimpleNamespace(number=number, table=table)

    def plant(self, number: int, name: bytes, *layers: Any) -> Planted:
        path = self._place / f"tree-{number}"
        build_tree(path, [layer.table for layer in layers])
        tree = Tree(path)
        self._open.append(tree)
        return Planted(number, name, tree, layers)

    def close(self) -> None:
        for one in self._open:
            one.close()


@pytest.fixture
def grove(tmp_path: Path) -> Iterator[Grove]:
    one = Grove(tmp_path)
    yield one
    one.close()


def resolve(forest: Forest, path: str) -> int:
    node = ROOT_ID
    for part in path.encode().split(b"/") if path else ():
        node = forest.lookup(node, part)
    return node


def code(call: Any, *words: Any) -> int:
    """The errno that a call is answered with."""
    with pytest.raises(NoSuchName) as caught:
        result = call(*words)
        list(result if isinstance(result, Iterator) else ())
    return caught.value.errno


def test_names_and_attributes(grove: Grove) -> None:
    forest = Forest()
    forest.plant(grove.plant(9, b"one", grove.layer(2, BASE)))
    top = forest.attributes(resolve(forest, "one"))
    assert (top.mode, top.uid, top.gid, top.nlink) == (stat.S_IFDIR | 0o751, 1, 2, 3)
    found = forest.attributes(resolve(forest, "one/d/file"))
    assert found.node == resolve(forest, "one/d/file")
    assert (found.mode, found.uid, found.gid, found.nlink) == (stat.S_IFREG | 0o4711, 5, 6, 1)
    assert (found.mtime_ns, found.size, found.rdev) == (MTIME, 0, 0)
    link = resolve(forest, "one/d/link")
    assert forest.link(link) == b"file"
    assert forest.attributes(link).size == 4
    device = forest.attributes(resolve(forest, "one/d/null"))
    assert stat.S_ISCHR(device.mode)
    assert (device.rdev >> 8 & 0xFFF, device.rdev & 0xFF | (device.rdev >> 12 & ~0xFF)) == (1, 300)
    assert stat.S_ISFIFO(forest.attributes(resolve(forest, "one/pipe")).mode)
    assert forest.xattrs(resolve(forest, "one/d")) == {b"user.d": b"v"}
    assert forest.xattrs(link) == {}


def test_names_that_are_not_there(grove: Grove) -> None:
    forest = Forest()
    forest.plant(grove.plant(9, b"one", grove.layer(2, BASE)))
    one, file = resolve(forest, "one"), resolve(forest, "one/d/file")
    assert code(forest.lookup, ROOT_ID, b"two") == errno.ENOENT
    assert code(forest.lookup, one, b"absent") == errno.ENOENT
    assert code(forest.lookup, file, b"x") == errno.ENOTDIR
    assert code(forest.list_from, file, 0) == errno.ENOTDIR
    assert code(forest.link, file) == errno.EINVAL
    assert code(forest.link, one) == errno.EINVAL


def test_hard_links_are_one_node(grove: Grove) -> None:
    forest = Forest()
    forest.plant(grove.plant(9, b"one", grove.layer(2, BASE)))
    assert resolve(forest, "one/pair") == resolve(forest, "one/pair2")
    assert forest.attributes(resolve(forest, "one/pair")).nlink == 2


def test_files_are_shared_between_images_and_directories_are_not(grove: Grove) -> None:
    base = grove.layer(2, BASE)
    forest = Forest()
    forest.plant(grove.plant(9, b"one", base))
    forest.plant(grove.plant(10, b"two", base, grove.layer(3, [entry(b".wh.pair"), entry(b"new")])))
    assert resolve(forest, "one/d/file") == resolve(forest, "two/d/file") == 2 << SHIFT | base.table.find(b"d/file")
    assert resolve(forest, "one/d") != resolve(forest, "two/d")
    assert forest.layer(2) is base
    # `two` hides a name of the pair: there it is another inode, with another link count.
    assert resolve(forest, "one/pair2") != resolve(forest, "two/pair2")
    assert forest.attributes(resolve(forest, "two/pair2")).nlink == 1
    assert forest.attributes(resolve(forest, "one/pair2")).nlink == 2
    # Its content is the same layer's.
    layer, row = forest.source(resolve(forest, "two/pair2"))
    assert (layer, row) == (base, base.table.find(b"pair"))
    assert forest.lookup(resolve(forest, "two"), b"new") >> SHIFT == 3


def test_any_id_resolves_without_a_lookup_before_it(grove: Grove) -> None:
    """A new daemon has heard of no lookup; the kernel goes on with the ids it has."""
    layer = grove.layer(2, BASE)
    first, second = Forest(), Forest()
    for forest in (first, second):
        forest.plant(grove.plant(9, b"one", layer))
    for path in ("one", "one/d", "one/d/file", "one/pair2"):
        node = resolve(first, path)
        assert second.attributes(node) == first.attributes(node)


def test_ids_that_nobody_has_are_stale(grove: Grove) -> None:
    forest = Forest()
    layer = grove.layer(2, [*BASE, entry(b".wh.gone")])
    planted = grove.plant(9, b"one", layer)
    forest.plant(planted)
    link, whiteout = layer.table.find(b"pair2"), layer.table.find(b"gone")
    unknown = [0, 2, 5 << SHIFT, 9 << SHIFT | planted.tree.rows, 2 << SHIFT | layer.table.rows, (1 << 63) + 1]
    unknown += [2 << SHIFT | link, 2 << SHIFT | whiteout]
    for node in unknown:
        for call in (forest.attributes, forest.source, forest.link, forest.xattrs, forest.parent_of):
            assert code(call, node) == errno.ESTALE
        assert code(forest.lookup, node, b"x") == errno.ESTALE
        assert code(forest.list_from, node, 0) == errno.ESTALE


def test_parents(grove: Grove) -> None:
    forest = Forest()
    forest.plant(grove.plant(9, b"one", grove.layer(2, [entry(b"a/b/c")])))
    assert forest.parent_of(resolve(forest, "one/a/b")) == resolve(forest, "one/a")
    assert forest.parent_of(resolve(forest, "one/a")) == resolve(forest, "one")
    assert forest.parent_of(resolve(forest, "one")) == ROOT_ID
    assert forest.parent_of(ROOT_ID) == ROOT_ID
    assert code(forest.parent_of, resolve(forest, "one/a/b/c")) == errno.ENOTDIR


def test_directories_are_sorted_and_resumable_at_any_cookie(grove: Grove) -> None:
    names = [b"%04d" % (i * 37 % 1000) for i in range(1000)]
    forest = Forest()
    forest.plant(grove.plant(9, b"one", grove.layer(2, [entry(b"d/" + name) for name in names])))
    node = resolve(forest, "one/d")
    listed = list(forest.list_from(node, 0))
    assert [name for name, _, _ in listed] == sorted(names)
    assert all(forest.lookup(node, name) == child for name, child, _ in listed)
    for position in (0, 1, 499, 998, 999):
        cookie = listed[position][2]
        assert list(forest.list_from(node, cookie)) == listed[position + 1 :]
    assert list(forest.list_from(node, 10**9)) == []


def test_the_list_of_trees_can_change_while_it_is_read(grove: Grove) -> None:
    forest = Forest()
    layer = grove.layer(2, BASE)
    trees = {number: grove.plant(number, b"tree-%d" % (100 - number), layer) for number in (10, 11, 12, 13)}
    for number in (10, 11, 12):
        forest.plant(trees[number])
    listing = forest.list_from(ROOT_ID, 0)
    seen = [next(listing) for _ in range(2)]
    forest.uproot(trees[10])
    forest.plant(trees[13])
    seen += forest.list_from(ROOT_ID, seen[-1][2])
    assert [node >> SHIFT for _, node, _ in seen] == [10, 11, 12, 13]
    assert forest.attributes(ROOT_ID).nlink == 5
    assert forest.is_list(ROOT_ID) and not forest.is_list(seen[0][1])
    assert forest.xattrs(ROOT_ID) == {}


def test_uprooting_gives_back_what_no_other_tree_holds(grove: Grove) -> None:
    forest = Forest()
    base, top = grove.layer(2, BASE), grove.layer(3, [entry(b"x")])
    one, two = grove.plant(9, b"one", base), grove.plant(10, b"two", base, top, top)
    forest.plant(one)
    forest.plant(two)
    assert forest.find_tree(b"two") is two
    x = resolve(forest, "two/x")
    assert forest.uproot(two) == [top]
    assert code(forest.attributes, x) == errno.ESTALE
    assert forest.find_tree(b"two") is None
    assert forest.trees() == [one] and forest.layers() == [base]
    assert forest.attributes(resolve(forest, "one/d/file")).uid == 5
    assert forest.uproot(one) == [base]
    assert list(forest.list_from(ROOT_ID, 0)) == []


def test_a_tree_alone_is_the_root_itself(grove: Grove) -> None:
    forest = Forest(solo=True)
    assert forest.is_list(ROOT_ID), "before the image is there the root is an empty list"
    assert list(forest.list_from(ROOT_ID, 0)) == []
    planted = grove.plant(9, b"one", grove.layer(2, BASE))
    forest.plant(planted)
    assert not forest.is_list(ROOT_ID)
    root = forest.attributes(ROOT_ID)
    assert (root.node, root.mode, root.uid) == (ROOT_ID, stat.S_IFDIR | 0o751, 1)
    names = [name for name, _, _ in forest.list_from(ROOT_ID, 0)]
    assert names == [b"d", b"pair", b"pair2", b"pipe"]
    assert forest.parent_of(resolve(forest, "d")) == ROOT_ID
    assert forest.parent_of(ROOT_ID) == ROOT_ID
    assert code(forest.lookup, ROOT_ID, b"one") == errno.ENOENT
    forest.uproot(planted)
    assert forest.is_list(ROOT_ID)


def test_everything_can_belong_to_one_owner(grove: Grove) -> None:
    forest = Forest(solo=True, squash=Owner(1000, 1001))
    forest.plant(grove.plant(9, b"one", grove.layer(2, BASE)))
    for path in ("", "d", "d/file", "pair2"):
        found = forest.attributes(resolve(forest, path))
        assert (found.uid, found.gid) == (1000, 1001)
    assert forest.attributes(resolve(forest, "d/file")).mode == stat.S_IFREG | 0o4711
