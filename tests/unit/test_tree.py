"""The tree of a chain: held against a real unpack of its layers, and what its inodes promise."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from lazyfs import tree as trees
from lazyfs.errors import StoreBroken, TableInvalid, TarInvalid, TocInvalid
from lazyfs.format.entry import OPAQUE_MARKER, Entry, Kind
from lazyfs.format.table import LayerTable
from lazyfs.tree import Tree, build_tree, tree_key
from tests.helpers.entries import BASE_LAYERS, UPPER_LAYERS, entry, numbered
from tests.helpers.layer_tables import seen_in_tree, table_at, tree_at
from tests.helpers.unpack import Ambiguous, Refused, Seen, Unpacker, seen_on_disk

CHAINS = st.builds(lambda base, upper: [base, *upper], BASE_LAYERS, st.lists(UPPER_LAYERS, max_size=3))


def merged(directory: Path, *layers: list[Entry]) -> dict[bytes, Seen]:
    """Names in the tree of a chain; owners count entries from 1."""
    tree, tables = tree_at(directory, numbered([list(layer) for layer in layers]))
    with_tree = seen_in_tree(tree, tables)
    close(tree, tables)
    return with_tree


def close(tree: Tree, tables: list[LayerTable]) -> None:
    tree.close()
    for table in tables:
        table.close()


def d(path: bytes, mode: int = 0o755) -> Entry:
    return entry(path, Kind.DIR, mode=mode)


def symlink(path: bytes, target: bytes) -> Entry:
    return entry(path, Kind.SYMLINK, target)


def hardlink(path: bytes, target: bytes) -> Entry:
    return entry(path, Kind.HARDLINK, target)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(CHAINS)
def test_the_tree_is_what_a_real_unpack_leaves(layers: list[list[Entry]]) -> None:
    layers = numbered(layers)
    with TemporaryDirectory() as name:
        root = os.path.join(os.fsencode(name), b"root")
        os.mkdir(root)
        os.chmod(root, 0o755)
        unpacker = Unpacker(root)
        try:
            for layer in layers:
                unpacker.layer(layer)
        except (Refused, Ambiguous) as error:
            event(type(error).__name__)
            try:
                close(*tree_at(Path(name), layers))
            except (TarInvalid, TocInvalid):
                event("refused by both")
            return
        assume(len(layers) > 1)
        tree, tables = tree_at(Path(name), layers)
        found = seen_in_tree(tree, tables)
        close(tree, tables)
        assert found == seen_on_disk(root)


# -- whiteouts, whatever their place in the layer


@pytest.mark.parametrize("first", [True, False], ids=["whiteout first", "whiteout last"])
def test_a_whiteout_beside_a_new_directory_empties_the_old_one(tmp_path: Path, first: bool) -> None:
    layer = [d(b"d", 0o700), entry(b"d/new")]
    marker = entry(b".wh.d")
    found = merged(tmp_path, [d(b"d"), entry(b"d/old")], [marker, *layer] if first else [*layer, marker])
    assert found.keys() == {b"", b"d", b"d/new"}
    assert found[b"d"].mode == 0o700


@pytest.mark.parametrize("first", [True, False], ids=["whiteout first", "whiteout last"])
def test_nothing_of_a_removed_directory_shows_through(tmp_path: Path, first: bool) -> None:
    """The layer has `d` only as somebody's parent: attributes of the removed one are gone with it."""
    layer = [entry(b"d/new")]
    marker = entry(b".wh.d")
    found = merged(tmp_path, [d(b"d", 0o700), entry(b"d/old")], [marker, *layer] if first else [*layer, marker])
    assert found.keys() == {b"", b"d", b"d/new"}
    assert (found[b"d"].mode, found[b"d"].owner) == (0o755, 0)


def test_a_removed_symlink_is_not_followed(tmp_path: Path) -> None:
    found = merged(tmp_path, [d(b"real"), entry(b"real/x"), symlink(b"l", b"real")], [entry(b".wh.l"), entry(b"l/y")])
    assert found.keys() == {b"", b"real", b"real/x", b"l", b"l/y"}
    assert found[b"l"].kind is Kind.DIR


def test_a_whiteout_beside_a_file_is_only_the_file(tmp_path: Path) -> None:
    found = merged(tmp_path, [d(b"f"), entry(b"f/x")], [entry(b"f"), entry(b".wh.f")])
    assert found.keys() == {b"", b"f"}
    assert found[b"f"].owner == 3


@pytest.mark.parametrize("first", [True, False], ids=["marker first", "marker last"])
def test_an_opaque_directory_keeps_what_its_own_layer_has(tmp_path: Path, first: bool) -> None:
    layer = [entry(b"d/new"), entry(b"d/sub/new")]
    marker = entry(b"d/" + OPAQUE_MARKER)
    base = [d(b"d", 0o700), entry(b"d/old"), d(b"d/sub", 0o700), entry(b"d/sub/old")]
    found = merged(tmp_path, base, [marker, *layer] if first else [*layer, marker])
    assert found.keys() == {b"", b"d", b"d/new", b"d/sub", b"d/sub/new"}
    assert found[b"d"].mode == 0o700, "an opaque marker removes names, not the directory"
    assert found[b"d/sub"].mode == 0o755


def test_an_opaque_root_hides_all_layers_below(tmp_path: Path) -> None:
    assert merged(tmp_path, [entry(b"a")], [entry(b"b")], [entry(OPAQUE_MARKER), entry(b"c")]).keys() == {b"", b"c"}


def test_whiteouts_of_nothing_are_nothing(tmp_path: Path) -> None:
    layers = [[entry(b".wh.x")], [entry(b".wh.x"), entry(b"d/.wh.y"), entry(b".wh..wh.plnk")]]
    assert merged(tmp_path, *layers).keys() == {b"", b"d"}


# -- symlinks of lower layers as parents


def test_symlinks_of_lower_layers_are_followed(tmp_path: Path) -> None:
    base = [d(b"usr/lib", 0o711), symlink(b"lib", b"usr/lib"), symlink(b"usr/again", b"../lib"), symlink(b"all", b"/")]
    found = merged(tmp_path, base, [entry(b"lib/x"), entry(b"usr/again/y"), entry(b"all/lib/z")])
    assert {b"usr/lib/x", b"usr/lib/y", b"usr/lib/z"} < found.keys()
    assert found[b"lib"].kind is Kind.SYMLINK
    assert found[b"usr/lib"].mode == 0o711


def test_a_dangling_symlink_of_a_lower_layer_is_followed_as_by_mkdir(tmp_path: Path) -> None:
    found = merged(tmp_path, [symlink(b"run", b"no/../var/run")], [entry(b"run/pid")])
    assert found.keys() == {b"", b"run", b"var", b"var/run", b"var/run/pid"}
    assert (found[b"run"].kind, found[b"var/run"].mode, found[b"var/run"].owner) == (Kind.SYMLINK, 0o755, 0)


def test_symlinks_stay_inside_the_root(tmp_path: Path) -> None:
    found = merged(tmp_path, [symlink(b"a/out", b"../../../../etc")], [entry(b"a/out/passwd")])
    assert found.keys() == {b"", b"a", b"a/out", b"etc", b"etc/passwd"}


def test_a_directory_that_an_entry_names_replaces_a_symlink(tmp_path: Path) -> None:
    found = merged(tmp_path, [d(b"real"), symlink(b"l", b"real")], [d(b"l"), entry(b"l/x")])
    assert found.keys() == {b"", b"real", b"l", b"l/x"}


def test_a_directory_replaces_a_file_of_a_lower_layer(tmp_path: Path) -> None:
    """overlayfs takes such layers, and so do we."""
    assert merged(tmp_path, [entry(b"f")], [entry(b"f/x")]).keys() == {b"", b"f", b"f/x"}
    assert merged(tmp_path, [symlink(b"l", b"f"), entry(b"f")], [entry(b"l/x")]).keys() == {b"", b"l", b"f", b"l/x"}


def test_a_cycle_of_symlinks_below_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TocInvalid, match="cycle of symbolic links"):
        merged(tmp_path, [symlink(b"a", b"b"), symlink(b"b", b"a")], [entry(b"a/x")])


def test_a_symlink_to_a_name_that_can_not_be_is_refused(tmp_path: Path) -> None:
    assert b"n" * 255 + b"/x" in merged(tmp_path, [symlink(b"l", b"n" * 255)], [entry(b"l/x")])
    with pytest.raises(TocInvalid, match="a name longer than a file system takes"):
        merged(tmp_path, [symlink(b"l", b"n" * 256)], [entry(b"l/x")])


def test_symlinks_can_not_make_merging_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "MAX_FOLLOWED", 100_000)
    base = [d(b"d"), *(symlink(b"l%d" % i, b"d/../" * 800 + b"d") for i in range(100))]
    with pytest.raises(TocInvalid, match="too often through symbolic links"):
        merged(tmp_path, base, [entry(b"l%d/x" % i) for i in range(100)])


# -- inodes


def test_a_file_whose_names_are_partly_hidden_has_an_inode_of_its_own(tmp_path: Path) -> None:
    base = [entry(b"a"), hardlink(b"b", b"a"), hardlink(b"c", b"a"), entry(b"x"), hardlink(b"y", b"x")]
    tree, tables = tree_at(tmp_path, [base, [entry(b".wh.a")]])
    b, c, x = (tree.find(name) for name in (b"b", b"c", b"x"))
    assert b is not None and c is not None and x is not None
    assert tree.find(b"a") is None
    assert (tree.nlink[b], tree.nlink[c], tree.own[b], tree.own[c]) == (2, 2, 1, 1)
    assert tree.inode[b] == tree.inode[c] == b
    assert tree.source[b] == tables[0].find(b"a")
    assert (tree.nlink[x], tree.own[x]) == (2, 0)
    close(tree, tables)


def test_the_same_layer_twice_in_a_chain(tmp_path: Path) -> None:
    table = table_at(tmp_path / "table", [d(b"d"), entry(b"d/a"), hardlink(b"d/b", b"d/a")])
    build_tree(tmp_path / "tree", [table, table])
    tree = Tree(tmp_path / "tree")
    assert seen_in_tree(tree, [table, table]).keys() == {b"", b"d", b"d/a", b"d/b"}
    close(tree, [table])


def test_sixty_five_thousand_hard_links(tmp_path: Path) -> None:
    count = 65_600  # more than fit into 16 bits, and more than ext4 takes
    layer = [entry(b"f"), *(hardlink(b"d/%05d" % i, b"f") for i in range(count - 1))]
    tree, tables = tree_at(tmp_path, [layer, [entry(b"d/.wh.00000")]])
    row = tree.find(b"f")
    assert row is not None
    assert tables[0].nlink[tables[0].find(b"f") or 0] == count
    assert (tree.nlink[row], tree.own[row]) == (count - 1, 1)
    assert len({tree.inode[child] for child in tree.children(tree.find(b"d") or 0)}) == 1
    close(tree, tables)


def test_a_large_directory_builds_in_seconds(tmp_path: Path) -> None:
    layer = [entry(b"d/%06d" % (i * 7919 % 200_000)) for i in range(200_000)]
    before = time.process_time()
    tree, tables = tree_at(tmp_path, [layer])
    assert time.process_time() - before < 30
    row = tree.find(b"d")
    assert row is not None
    assert [tree.name(child) for child in tree.children(row)] == [b"%06d" % i for i in range(200_000)]
    assert tree.find(b"d/123456") == tree.children(row)[123_456]
    assert tree.find(b"d/1234567") is None
    close(tree, tables)


# -- the file


def test_row_numbers_depend_on_the_names_only(tmp_path: Path) -> None:
    """Node ids stay valid over a restart, and are the same on every node."""
    entries = numbered([[d(b"b"), entry(b"b/x"), entry(b"a"), entry(b"c/d/e")]])[0]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    close(*tree_at(one, [entries]))
    close(*tree_at(two, [sorted(entries, key=lambda entry: (entry.kind is not Kind.DIR, entry.path))]))
    assert (one / "tree").read_bytes() == (two / "tree").read_bytes()


def test_damage_and_other_versions_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close(*tree_at(tmp_path, [[entry(b"a")]]))
    path = tmp_path / "tree"
    whole = path.read_bytes()
    with pytest.raises(TableInvalid):
        Tree(tmp_path / "absent")
    for cut in (0, 63, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(TableInvalid):
            Tree(path)
    path.write_bytes(whole)
    Tree(path).close()
    with pytest.raises(TableInvalid):
        LayerTable(path)
    monkeypatch.setattr(trees, "VERSION", trees.VERSION + 1)
    with pytest.raises(TableInvalid):
        Tree(path)


def test_a_tree_that_can_not_be_written(tmp_path: Path) -> None:
    table = table_at(tmp_path / "table", [entry(b"a")])
    with pytest.raises(StoreBroken):
        build_tree(tmp_path / "absent" / "tree", [table])
    table.close()


def test_the_key_tells_chains_apart() -> None:
    keys = {tree_key(["a", "b"]), tree_key(["b", "a"]), tree_key(["a"]), tree_key(["a\nb"]), tree_key([])}
    assert len(keys) == 4, "keys of layers hold no line breaks"
    assert all(len(key) == 64 for key in keys)
