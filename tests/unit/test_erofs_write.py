"""EROFS images, read back by a reader of our own: every tree comes back as it is, and no other file passes for one."""

from __future__ import annotations

import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lazyfs.child import run_job
from lazyfs.errors import StoreBroken, TableInvalid, TarInvalid, TocInvalid
from lazyfs.format import erofs_inodes
from lazyfs.format.entry import Chunk, Entry, Kind
from lazyfs.format.erofs_dirs import Directories, TreeColumns
from lazyfs.format.erofs_layout import BLOCK, DIRENT, crc32c
from lazyfs.format.erofs_write import check, device_layers, write_erofs
from lazyfs.format.table import LayerTable
from lazyfs.tree import Tree, build_tree, tree_key
from tests.helpers.entries import BASE_LAYERS, UPPER_LAYERS, entry, numbered
from tests.helpers.erofs_reader import Image, Inode
from tests.helpers.layer_tables import table_at, tree_at
from tests.helpers.tars import ACL_ONE_USER, acl

KEY = tree_key(["a table"])
TYPES = {
    Kind.DIR: stat.S_IFDIR, Kind.REG: stat.S_IFREG, Kind.SYMLINK: stat.S_IFLNK, Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO,
}  # fmt: skip
TIB = 1 << 40


def content(*sized: Entry) -> dict[bytes, list[Chunk]]:
    """Chunks of at most 1 GiB for files, one behind the other."""
    out, at = {}, 0
    for one in sized:
        pieces = range(0, one.size, 1 << 30)
        out[one.path] = [Chunk(s, min(1 << 30, one.size - s), at + n, 0, bytes(32)) for n, s in enumerate(pieces)]
        at += len(pieces)
    return out


def written(directory: Path, layers: Sequence[Iterable[Entry]]) -> bytes:
    """The image of a chain without content."""
    tree, tables = tree_at(directory, layers)
    return image(directory, tree, tables)


def image(directory: Path, tree: Tree, tables: list[LayerTable]) -> bytes:
    write_erofs(directory / "image", tree, tables, KEY)
    check(directory / "image", KEY)
    return (directory / "image").read_bytes()


def expected(tree: Tree, tables: Sequence[LayerTable]) -> dict[bytes, tuple[object, ...]]:
    """What the columns say of each name, the inode's first row in front."""
    paths = {0: b""}
    out: dict[bytes, tuple[object, ...]] = {}
    for row in range(tree.rows):
        if row:
            above = paths[tree.parent[row]]
            paths[row] = above + b"/" + tree.name(row) if above else tree.name(row)
        table, source = tables[tree.layer[row]], tree.source[row]
        kind = Kind(table.kind[source])
        size = table.size[source] if kind in (Kind.REG, Kind.SYMLINK) else 0
        link = table.link(source) if kind is Kind.SYMLINK else b""
        rdev = table.rdev(source) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0)
        mode = 0o777 if kind is Kind.SYMLINK else table.mode[source]  # Linux gives symlinks no other
        place = (
            (device_layers(tables).index(tree.layer[row]), table.data_offset[source])
            if kind is Kind.REG and size
            else ()
        )
        out[paths[row]] = (
            tree.inode[row], TYPES[kind] | mode, table.uid[source], table.gid[source], size, table.mtime_ns(source),
            tree.nlink[row], rdev, link, table.xattrs(source), place,
        )  # fmt: skip
    return out


def told(names: dict[bytes, Inode]) -> dict[bytes, tuple[object, ...]]:
    """The same of an image; inodes are numbered by nid."""
    return {
        path: (
            one.nid, one.mode, one.uid, one.gid, 0 if stat.S_ISDIR(one.mode) else one.size, one.mtime_ns, one.nlink,
            one.rdev, one.link, one.xattrs, one.extents[0][:2] if one.extents else (),
        )
        for path, one in names.items()
    }  # fmt: skip


def same(raw: bytes, tree: Tree, tables: Sequence[LayerTable]) -> dict[bytes, Inode]:
    """Assert that an image shows a tree, the numbers of inodes apart; equal numbers are equal inodes."""
    names = Image(raw).names()
    found, wanted = told(names), expected(tree, tables)
    assert {path: item[1:] for path, item in found.items()} == {path: item[1:] for path, item in wanted.items()}
    pairs = {(found[path][0], wanted[path][0]) for path in found}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    return names


NAMES = st.one_of(
    st.sampled_from((b"a", b"b", b"-", b"+x", b"...", b"..a", b".-", b".a", b"!" * 255, b"z" * 255, b"\xff", b" ")),
    st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name),
).filter(lambda name: name not in (b".", b"..") and not name.startswith(b".wh."))
XATTRS = st.dictionaries(
    st.sampled_from((b"user.a", b"user.b", b"user." + b"n" * 250, b"security.capability", b"user.c")),
    st.one_of(st.sampled_from((b"", b"same")), st.binary(max_size=300)),
    max_size=5,
).map(lambda pairs: tuple(sorted(pairs.items())))

IDS = st.integers(0, 0xFFFFFFFE)


@st.composite
def trees(draw: st.DrawFn) -> list[Entry]:
    """One layer: directories within each other, and everything in them."""
    dirs, taken = [b""], {b""}
    out: list[Entry] = []
    for _ in range(draw(st.integers(0, 25))):
        above, name = draw(st.sampled_from(dirs)), draw(NAMES)
        path = above + b"/" + name if above else name
        if path in taken or len(path) > 3000:
            continue
        taken.add(path)
        kind = draw(st.sampled_from([kind for kind in Kind if kind is not Kind.WHITEOUT]))
        one = Entry(
            path, kind, draw(st.integers(0, 0o7777)), draw(IDS), draw(IDS), draw(st.integers(-(2**62), 2**62)),
            xattrs=draw(XATTRS),
        )  # fmt: skip
        if kind is Kind.DIR:
            dirs.append(path)
        elif kind is Kind.SYMLINK:
            one.link = b"t" * draw(st.one_of(st.integers(1, 100), st.integers(3900, 4095)))
        elif kind in (Kind.CHAR, Kind.BLOCK):
            one.rdev = draw(st.integers(0, 0xFFF)), draw(st.integers(0, 0xFFFFF))
        elif kind is Kind.REG:
            one.size = draw(st.sampled_from((0, 1, 4096, 4097, 123_456_789)))
        elif kind is Kind.HARDLINK:
            known = [other.path for other in out if other.kind not in (Kind.DIR, Kind.HARDLINK)]
            if not known:
                continue
            one.link, one.xattrs = draw(st.sampled_from(known)), ()
        out.append(one)
    return out


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_any_layer_comes_back(layer: list[Entry]) -> None:
    with TemporaryDirectory() as name:
        table = table_at(Path(name) / "table-0", layer, content(*(one for one in layer if one.size)))
        run_tree(Path(name), [table])


def run_tree(directory: Path, tables: list[LayerTable]) -> dict[bytes, Inode]:
    build_tree(directory / "tree", tables)
    tree = Tree(directory / "tree")
    raw = image(directory, tree, tables)
    names = same(raw, tree, tables)
    assert image(directory, tree, tables) == raw
    tree.close()
    for table in tables:
        table.close()
    return names


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.builds(lambda base, upper: [base, *upper], BASE_LAYERS, st.lists(UPPER_LAYERS, min_size=1, max_size=3)))
def test_any_chain_comes_back(layers: list[list[Entry]]) -> None:
    with TemporaryDirectory() as name:
        try:
            tree, tables = tree_at(Path(name), numbered(layers))
        except (TarInvalid, TocInvalid):
            assume(False)
        same(image(Path(name), tree, tables), tree, tables)
        tree.close()
        for table in tables:
            table.close()


def test_a_chain_names_the_devices_of_its_layers(tmp_path: Path) -> None:
    base, top = replace(entry(b"base"), size=5000), replace(entry(b"top"), size=9000)
    tables = [
        table_at(tmp_path / "0", [base], content(base)),
        table_at(tmp_path / "1", [entry(b"empty")]),
        table_at(tmp_path / "2", [top], content(top)),
    ]
    assert device_layers(tables) == [0, 2]
    names = run_tree(tmp_path, tables)
    assert names[b"base"].extents == ((0, 0, 5000),)
    assert names[b"top"].extents == ((1, 0, 9000),)
    assert names[b"empty"].extents == ()
    assert Image((tmp_path / "image").read_bytes()).devices == [2, 3]


@pytest.mark.parametrize("first", [b"a", b"-"])
def test_names_of_255_bytes(tmp_path: Path, first: bytes) -> None:
    layer = [entry(b"d/" + first + b"%03d" % number + b"n" * 251) for number in range(700)]
    assert Image(written(tmp_path, [layer])).names().keys() == {b"", b"d", *(one.path for one in layer)}


@pytest.mark.parametrize("size", [*range(4090, 4102), 4031, 4032, 4033])
def test_directories_about_the_size_of_a_block(tmp_path: Path, size: int) -> None:
    last = size - 27 - 14 * (12 + 255)  # bytes that are left for two entries and their names
    layer = [entry(b"d/%02d" % number + b"n" * 253) for number in range(14)]
    layer += [entry(b"d/z" + b"l" * (last // 2 - 13)), entry(b"d/z" + b"m" * (last - last // 2 - 13))]
    tree, tables = tree_at(tmp_path, [layer])
    names = same(image(tmp_path, tree, tables), tree, tables)
    assert names[b"d"].size == (size if size <= 4096 else 4096 + last - last // 2)


def one_directory(names: Sequence[bytes]) -> TreeColumns:
    """A root with these files, sorted; whoever reads columns from a disk can't know that their names are sound."""
    rows = len(names) + 1
    ends = array("I", accumulate(map(len, names), initial=0))
    numbers = memoryview(array("I", bytes(4 * rows)))
    columns = dict.fromkeys(("parent", "layer", "source", "nlink", "inode"), numbers)
    columns["kind"] = memoryview(bytes([Kind.DIR] + [Kind.REG] * len(names)))
    columns["first_child"] = memoryview(array("I", [1] + [0] * len(names)))
    columns["child_count"] = memoryview(array("I", [len(names)] + [0] * len(names)))
    columns |= {"name_end": memoryview(array("I", [0, *ends])), "names": memoryview(b"".join(names))}
    return cast(TreeColumns, SimpleNamespace(rows=rows, **columns))


def listed(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the names of a directory's content with their nids, block by block."""
    for at in range(0, len(content), BLOCK):
        block = content[at : at + BLOCK]
        entries = [DIRENT.unpack_from(block, 12 * number) for number in range(DIRENT.unpack_from(block)[1] // 12)]
        stops = [start for _, start, _ in entries[1:]] + [len(block)]
        for (nid, start, _), stop in zip(entries, stops, strict=True):
            yield block[start:stop].rstrip(b"\0"), nid


LENGTHS = st.one_of(st.integers(6, 255), st.sampled_from((255, 254)), st.just(6))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=120),
    first=st.sampled_from((b"a", b"-")),
    long=st.one_of(st.none(), st.tuples(st.integers(0, 119), st.sampled_from((256, 4056, 4057, 4084, 4085, 70_000)))),
)
def test_any_names_are_cut_into_blocks_and_one_that_fits_no_block_is_refused(
    lengths: list[int], first: bytes, long: tuple[int, int] | None
) -> None:
    if long is not None:
        lengths[long[0] % len(lengths)] = long[1]
    names = [(first + b"%05d" % number).ljust(length, b"n") for number, length in enumerate(lengths)]
    if long is not None:
        with pytest.raises(TocInvalid, match="more than 255 bytes"):
            Directories(one_directory(names))
        return
    directories = Directories(one_directory(names))
    directories.number(array("I", range(100, 101 + len(names))))
    content = directories.content(0, 100, 99)
    assert len(content) == directories.sizes[0]
    nids = {b".": 100, b"..": 99} | {name: number for number, name in enumerate(names, 101)}
    assert list(listed(content)) == [(name, nids[name]) for name in sorted(nids)]


def test_a_file_of_terabytes_has_an_index_for_each_eight(tmp_path: Path) -> None:
    exact, more, behind = (
        replace(entry(b"exact"), size=8 * TIB - 4096),
        replace(entry(b"more"), size=5 * TIB, xattrs=((b"user.a", b"b"),)),
        replace(entry(b"behind"), size=1),
    )
    layer = [exact, more, behind]
    names = run_tree(tmp_path, [table_at(tmp_path / "0", layer, content(*layer))])
    assert names[b"exact"].extents == ((0, 0, 8 * TIB - 4096),)
    assert names[b"behind"].extents == ((0, 13 * TIB - 4096, 1),)
    large = replace(entry(b"large"), size=8 * TIB + 1)
    names = run_tree(tmp_path, [table_at(tmp_path / "0", [large], content(large))])
    assert names[b"large"].extents == ((0, 0, 8 * TIB), (0, 8 * TIB, 1))


@pytest.mark.parametrize("layer", [[Kind.SYMLINK] * 9, [Kind.REG] * 9], ids=["special", "ordinary"])
def test_more_inodes_than_have_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: list[Kind]
) -> None:
    entries = [entry(b"%d" % number, kind, b"to") for number, kind in enumerate(layer)]
    written(tmp_path, [entries])
    monkeypatch.setattr(erofs_inodes, "NULL_BLOCK", 20)
    with pytest.raises(TocInvalid, match="too many files"):
        written(tmp_path, [entries])


def test_a_layer_of_more_than_a_device_holds_is_refused(tmp_path: Path) -> None:
    layer = [replace(entry(b"a"), size=9 * TIB), replace(entry(b"b"), size=9 * TIB)]
    tables = [table_at(tmp_path / "0", layer, content(*layer))]
    with pytest.raises(TocInvalid, match="16 TiB"):
        run_tree(tmp_path, tables)


# -- extended attributes


def attributes(directory: Path, *pairs: tuple[bytes, bytes]) -> dict[bytes, bytes]:
    layer = [replace(entry(b"file"), xattrs=tuple(sorted(pairs)))]
    return Image(written(directory, [layer])).names()[b"file"].xattrs


def test_attributes_that_many_files_have_are_stored_once(tmp_path: Path) -> None:
    layer = [replace(entry(b"%04d" % number), xattrs=((b"user.same", b"s" * 2000),)) for number in range(1000)]
    raw = written(tmp_path, [layer])
    assert raw.count(b"s" * 2000) == 1
    assert all(one.xattrs == {b"user.same": b"s" * 2000} for path, one in Image(raw).names().items() if path)


def test_more_attributes_than_can_be_shared(tmp_path: Path) -> None:
    pairs = [(b"user.%03d" % number, b"v" * 250) for number in range(400)]
    assert attributes(tmp_path, *pairs) == dict(pairs)
    directory = [replace(entry(b"d", Kind.DIR), xattrs=tuple(pairs)), entry(b"d/in-it")]
    names = Image(written(tmp_path, [directory])).names()
    assert names[b"d"].xattrs == dict(pairs) and b"d/in-it" in names


def test_attributes_that_no_unpack_could_set_are_left_out(tmp_path: Path) -> None:
    good = acl(*ACL_ONE_USER)
    kept = [(b"user.x", b""), (b"security.capability", b"c"), (b"system.posix_acl_access", good)]
    odd = [(b"com.apple.x", b"x"), (b"user.", b"x"), (b"system.other", b"x"), (b"system.posix_acl_access.x", good)]
    assert attributes(tmp_path, *kept, *odd, (b"system.posix_acl_default", b"no list")) == dict(kept)
    assert attributes(tmp_path, (b"trusted.overlay.opaque", b"y"), (b"user.overlay.redirect", b"/")) == {}


@pytest.mark.parametrize("size", [65_535, 65_536])
def test_values_up_to_what_fits(tmp_path: Path, size: int) -> None:
    if size <= 0xFFFF:
        assert attributes(tmp_path, (b"user.large", b"v" * size)) == {b"user.large": b"v" * size}
    else:
        with pytest.raises(TocInvalid, match="65536 bytes"):
            attributes(tmp_path, (b"user.large", b"v" * size))


# -- the file


def test_checksum_and_uuid(tmp_path: Path) -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    raw = bytearray(written(tmp_path, [[entry(b"a")]]))
    first = Image(bytes(raw))
    raw[1028:1032] = bytes(4)
    assert crc32c(raw[1024:4096]) == first.checksum
    tree, tables = tree_at(tmp_path, [[entry(b"a")]])
    write_erofs(tmp_path / "other", tree, tables, "another key")
    assert Image((tmp_path / "other").read_bytes()).uuid != first.uuid


def test_any_damage_is_found(tmp_path: Path) -> None:
    raw = written(tmp_path, [[entry(b"a"), entry(b"d", Kind.DIR)]])
    path = tmp_path / "image"
    for position in (*range(0, 100), *range(100, len(raw), 61), len(raw) - 1):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(TableInvalid):
            check(path, KEY)
    for size in (0, 100, 1024, 4096, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(TableInvalid):
            check(path, KEY)
    path.write_bytes(raw + b"\0")
    with pytest.raises(TableInvalid):
        check(path, KEY)
    path.write_bytes(raw)
    check(path, KEY)
    with pytest.raises(TableInvalid):
        check(path, "another key")
    path.unlink()
    with pytest.raises(TableInvalid):
        check(path, KEY)
    path.symlink_to(tmp_path / "tree")
    with pytest.raises(TableInvalid):
        check(path, KEY)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    tree, tables = tree_at(tmp_path, [[entry(b"a")]])
    with pytest.raises(StoreBroken):
        write_erofs(tmp_path / "absent" / "image", tree, tables, KEY)


def test_the_child_writes_it(tmp_path: Path) -> None:
    raw = written(tmp_path, [[entry(b"a")], [entry(b"b")]])
    tables = [str(tmp_path / "table-0"), str(tmp_path / "table-1")]
    made = tmp_path / "made"
    run_job({"erofs": {"tree": str(tmp_path / "tree"), "tables": tables, "key": KEY, "out": str(made)}})
    assert made.read_bytes() == raw
    assert made.stat().st_mode & 0o777 == 0o600
