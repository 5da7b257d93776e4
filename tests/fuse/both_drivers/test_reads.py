"""Reading through the mount: each way that a process can read gives the image's bytes, warm ones from the kernel."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of, whiteout

BIG = pattern(5_300_001)
CHUNK = 1 << 20


@pytest.fixture(scope="module")
def tree(node: Node, registry: FakeRegistry) -> Path:
    """Return where an image shows that has a file of BIG."""
    return node.mount(big_image(registry))


def big_image(registry: FakeRegistry, name: str = "big") -> str:
    layer = zstd_chunked_layer(tar_of(file("big", BIG), file("small", b"small\n"), file("empty")))
    return add(registry, name, layer).reference


def test_whole_files(node: Node, tree: Path) -> None:
    assert node.read(tree / "big") == BIG
    assert node.read(tree / "small") == b"small\n"
    assert node.read(tree / "empty") == b""


def test_ranges_and_beyond_the_end(node: Node, tree: Path) -> None:
    places = [
        (0, 1),
        (4095, 2),
        (CHUNK - 1, 2),
        (CHUNK + 5, 2 * CHUNK),
        (len(BIG) - 1, 100),
        (len(BIG), 10),
        (1 << 40, 5),
    ]
    code = """
fd = os.open(a[0], os.O_RDONLY)
print(json.dumps([os.pread(fd, size, offset).hex() for offset, size in json.loads(a[1])]))
"""
    found = node.python(code, tree / "big", str([list(place) for place in places]))
    assert [bytes.fromhex(part) for part in found] == [BIG[offset : offset + size] for offset, size in places]


def test_mapped(node: Node, tree: Path) -> None:
    code = """
import hashlib
with open(a[0], "rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as view:
    last = view[len(view) - 3:].hex()
    print(json.dumps([last, hashlib.sha256(view).hexdigest()]))
"""
    assert node.python(code, tree / "big") == [BIG[-3:].hex(), hashlib.sha256(BIG).hexdigest()]


def test_direct(node: Node, tree: Path, driver: str) -> None:
    done = node.tool("dd", f"if={tree / 'big'}", "iflag=direct", "bs=65536", "status=none")
    if driver == "erofs":  # the kernel has none for mounts whose devices are files: refused before a byte is read
        assert b"Invalid argument" in done.stderr and done.stdout == b""
    else:
        assert done.stdout == BIG, done.stderr


def test_many_readers_at_once_fetch_each_byte_once(node: Node, registry: FakeRegistry) -> None:
    data = pattern(5_300_001, 2)
    tree = node.mount(add(registry, "crowd", zstd_chunked_layer(tar_of(file("big", data)))))
    before = registry.bytes_sent("/blobs/")
    readers = [node.spawn(["sha256sum", str(tree / "big")]) for _ in range(12)]
    found = {node.finish(reader, 30).stdout.split()[0].decode() for reader in readers}
    assert found == {hashlib.sha256(data).hexdigest()}
    assert registry.bytes_sent("/blobs/") - before <= len(data) * 1.02


def test_warm_reads_and_stats_stay_in_the_kernel(node: Node, registry: FakeRegistry, driver: str) -> None:
    layer = zstd_chunked_layer(tar_of(*(file(f"d{i % 5}/f{i}", pattern(9000, i)) for i in range(60))))
    tree = node.mount(add(registry, "warm", layer))
    walk = """
for path, _, names in os.walk(a[0]):
    for name in names:
        os.lstat(os.path.join(path, name))
        with open(os.path.join(path, name), "rb") as handle:
            handle.read()
    try:
        os.lstat(os.path.join(path, "no-such-name"))
    except FileNotFoundError:
        pass
"""
    earlier = node.fuse_calls()
    node.python(walk, tree)
    before = node.fuse_calls()
    node.python(walk, tree)
    after = node.fuse_calls()
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    if driver == "erofs":
        assert before["read"] > earlier.get("read", 0)
        assert grown == {}
    else:
        assert before["read"] - earlier.get("read", 0) >= 60
        assert not {"lookup", "getattr", "read", "readlink", "getxattr"} & set(grown), grown


def test_two_images_share_a_layer(node: Node, registry: FakeRegistry, driver: str) -> None:
    shared = zstd_chunked_layer(tar_of(file("common", pattern(300_000, 7))))
    one = node.mount(add(registry, "one", shared, zstd_chunked_layer(tar_of(file("a", b"a")))))
    two = node.mount(add(registry, "two", shared, zstd_chunked_layer(tar_of(file("b", b"b")))))
    assert node.read(one / "common") == pattern(300_000, 7)
    sent, reads = registry.bytes_sent(shared.digest), node.fuse_calls()["read"]
    assert node.read(two / "common") == pattern(300_000, 7)
    assert registry.bytes_sent(shared.digest) == sent
    if driver == "fuse":  # with erofs each image has inodes and pages of its own
        assert node.fuse_calls()["read"] == reads  # one inode, one page cache
        code = "print(json.dumps([os.stat(path).st_ino for path in a]))"
        first, second = node.python(code, one / "common", two / "common")
        assert first == second
    assert node.read(one / "a") + node.read(two / "b") == b"ab"


def test_layer_kept_while_another_image_uses_it(node: Node, registry: FakeRegistry) -> None:
    shared = zstd_chunked_layer(tar_of(file("common", pattern(300_000, 7)), file("later", pattern(99_000, 8))))
    one = node.mount(add(registry, "goes", shared, zstd_chunked_layer(tar_of(file("a", b"a")))))
    two = node.mount(add(registry, "stays", shared, zstd_chunked_layer(tar_of(file("b", b"b")))))
    node.umount(one)
    assert node.read(two / "common") == pattern(300_000, 7)
    assert node.read(two / "later") == pattern(99_000, 8)


def test_mixed_layers_and_the_note_for_a_plain_one(node: Node, registry: FakeRegistry) -> None:
    lazy = zstd_chunked_layer(tar_of(file("low", b"low"), file("gone", b"gone"), file("changed", b"old")))
    plain = gzip.compress(tar_of(file("changed", b"new"), whiteout("gone"), file("big", BIG)), mtime=0)
    image = add(registry, "mixed", lazy, plain)
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "can't be lazy" in line]
    assert len(notes) == 1 and "fetched in full and checked" in notes[0]
    assert "1 of 2 layers lazy" in done.stdout
    listing = node.python("print(json.dumps(sorted(os.listdir(a[0]))))", directory)
    assert listing == ["big", "changed", "low"]
    assert node.read(directory / "changed") == b"new"
    assert node.read(directory / "low") == b"low"
    assert node.read(directory / "big") == BIG


def test_a_plain_layer_is_shared_and_evicted_like_any(scratch: Path, registry: FakeRegistry) -> None:
    """Two images cost one download; evicted for another image, it is fetched once more."""
    content, large = pattern(3_000_000, 4), pattern(6_000_000, 9)
    layer = gzip.compress(tar_of(file("content", content)), mtime=0)
    one, two = add(registry, "one", layer), add(registry, "two", layer)
    other = add(registry, "other", zstd_chunked_layer(tar_of(file("large", large))))
    with Node(scratch, STORE_SIZE="8MB", MEMORY_SIZE="0", READ_TIMEOUT="30") as node:
        trees = [node.mount(one), node.mount(two)]
        assert node.read(trees[1] / "content") == content
        assert registry.count("GET", one.layers[0]) == 1
        for tree in trees:
            node.umount(tree)
        assert node.read(node.mount(other) / "large") == large
        assert node.read(node.mount(one) / "content") == content
        assert registry.count("GET", one.layers[0]) == 2


def test_eviction_under_reads(scratch: Path, registry: FakeRegistry, driver: str) -> None:
    with Node(scratch, DRIVER=driver, STORE_SIZE="4MB", MEMORY_SIZE="1MB") as node:
        check_eviction(node, registry)


def check_eviction(node: Node, registry: FakeRegistry) -> None:
    contents = {f"f{i}": pattern(700_000, i) for i in range(16)}
    layer = zstd_chunked_layer(tar_of(*(file(name, data) for name, data in contents.items())))
    tree = node.mount(add(registry, "evicted", layer))
    code = """
import hashlib
print(json.dumps({n: hashlib.sha256(open(os.path.join(a[0], n), "rb").read()).hexdigest() for n in os.listdir(a[0])}))
"""
    drop = """
for name in os.listdir(a[0]):
    os.posix_fadvise(os.open(os.path.join(a[0], name), os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
"""
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    for _ in range(3):
        assert node.python(code, tree, timeout=60) == wanted
        node.python(drop, tree)  # so that the kernel has to ask again
    store = node.status()["cache"]["store"]
    assert store["evicted"] > 0
    assert store["size"] <= 4_000_000
