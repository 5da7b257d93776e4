"""A store that is full, damaged or cut short: the reader gets the right bytes all the same."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from tests.faults.cases import NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, tmpfs, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(6_000_000, 3)
LAYER_FILES = ("data", "chunks", "toc", "table", "source")


def image_of(registry: FakeRegistry) -> AddedImage:
    return add(registry, "image", zstd_chunked_layer(tar_of(file("data", DATA), file("small", b"small"))))


def forget_pages(node: Node, path: Path) -> None:
    code = "os.posix_fadvise(os.open(a[0], os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)"
    node.python(code, path)


def layer_file(node: Node, image: AddedImage, name: str) -> Path:
    return node.root / "layers" / "sha256" / image.layers[0][7:] / name


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte[0] ^ 0xFF]))


@shows(
    Case(
        "disk-full-tmpfs",
        Area.DISK,
        "the disk holds half of the image",
        RIGHT,
        "`status`: passed by, or evicted",
        "`store_write_failures_total`, or `store_evicted_bytes_total`",
    ),
)
@both_drivers
def test_disk_full_in_mid_read(node: Node, registry: FakeRegistry) -> None:
    node.settings["MEMORY_SIZE"] = "1MB"
    with tmpfs(node.root, 3 << 20):
        tree = node.mount(image_of(registry))
        assert node.read(tree / "data") == DATA
        forget_pages(node, tree / "data")
        assert node.read(tree / "data") == DATA
        store = node.status()["cache"]["store"]
        assert store["write_failures"] > 0 or store["passed_by"] or store["evicted"] > 0
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends by itself")


@shows(
    Case(
        "disk-full-at-start", Area.DISK, "the disk is full before the daemon starts", NOTHING_SHOWN, "exit 9: no space"
    ),
)
def test_disk_full_from_the_start(node: Node, registry: FakeRegistry) -> None:
    with tmpfs(node.root, 1 << 20):
        with contextlib.suppress(OSError), (node.root / "filler").open("wb", buffering=0) as handle:
            while handle.write(bytes(4096)):
                pass
        sentence = node.refused(9, "mount", image_of(registry).reference, node.new_dir())
        assert "space" in sentence or "full" in sentence
        until(lambda: not node.processes(), "no daemon stays")


@shows(
    Case(
        "disk-full-to-the-block",
        Area.DISK,
        "no free block is left",
        "right bytes of what is here",
        "`cache ls`, `rm` and `prune` work",
    ),
)
@pytest.mark.parametrize("words", [("prune", "--all"), ("rm", "IMAGE")])
def test_disk_without_a_free_block_starts_what_is_here_and_can_be_cleared(
    node: Node, registry: FakeRegistry, words: tuple[str, ...]
) -> None:
    image = image_of(registry)
    with tmpfs(node.root, 12 << 20):
        assert node.lazyfs("fetch", image.reference).returncode == 0
        until(lambda: not node.processes(), "the daemon ends")
        with contextlib.suppress(OSError), (node.root / "filler").open("wb", buffering=0) as handle:
            while handle.write(bytes(4096)):
                pass
        assert os.statvfs(node.root).f_bavail == 0
        listed = node.lazyfs("cache", "ls")
        assert listed.returncode == 0 and "complete" in listed.stdout, listed.stderr
        tree = node.mount(image)
        assert node.read(tree / "data") == DATA
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends by itself")
        done = node.lazyfs("cache", *(image.reference if word == "IMAGE" else word for word in words))
        assert done.returncode == 0 and "1 layer removed" in done.stdout and "1 image forgotten" in done.stdout, done
        assert os.statvfs(node.root).f_bavail * 4096 > len(DATA)
        tree = node.mount(image)
        assert node.read(tree / "small") == b"small"
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends by itself")


@shows(
    Case(
        "disk-flipped",
        Area.DISK,
        "bits of chunks are flipped",
        RIGHT,
        "`status`: damaged chunks found and fetched again",
        "`store_damaged_chunks_total`",
    ),
)
@both_drivers
def test_damaged_chunks_are_fetched_again(node: Node, registry: FakeRegistry) -> None:
    node.settings["MEMORY_SIZE"] = "0"
    image = image_of(registry)
    tree = node.mount(image)
    assert node.read(tree / "data") == DATA
    data = layer_file(node, image, "data")
    until(lambda: data.stat().st_size >= len(DATA), "the last bytes, which were read at once, are stored too")
    for offset in (0, 1_500_000, 5_999_000):
        flip(data, offset)
    forget_pages(node, tree / "data")
    assert node.read(tree / "data") == DATA
    assert node.status()["cache"]["store"]["damaged"] == 3


@shows(
    Case(
        "disk-truncated",
        Area.DISK,
        "the file of chunks is cut short",
        RIGHT,
        "`status`: damaged chunks found and fetched again",
        "`store_damaged_chunks_total`",
    ),
)
@both_drivers
def test_truncated_data_is_fetched_again(node: Node, registry: FakeRegistry) -> None:
    node.settings["MEMORY_SIZE"] = "0"
    image = image_of(registry)
    tree = node.mount(image)
    assert node.read(tree / "data") == DATA
    os.truncate(layer_file(node, image, "data"), 1000)
    forget_pages(node, tree / "data")
    assert node.read(tree / "data") == DATA


@shows(
    Case(
        "disk-damaged-flipped",
        Area.DISK,
        "between two mounts, of five images each another file is flipped",
        RIGHT,
        "nothing: it is made or fetched again",
        param="flipped",
    ),
    Case(
        "disk-damaged-truncated",
        Area.DISK,
        "between two mounts, of five images each another file is truncated",
        RIGHT,
        "nothing: it is made or fetched again",
        param="truncated",
    ),
    Case(
        "disk-damaged-emptied",
        Area.DISK,
        "between two mounts, of five images each another file is emptied",
        RIGHT,
        "nothing: it is made or fetched again",
        param="emptied",
    ),
    Case(
        "disk-damaged-removed",
        Area.DISK,
        "between two mounts, of five images each another file is removed",
        RIGHT,
        "nothing: it is made or fetched again",
        param="removed",
    ),
)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "removed"])
def test_layer_file_damaged_between_mounts(node: Node, registry: FakeRegistry, damage: str) -> None:
    """Of five images side by side, of each another file."""
    contents = {name: pattern(3_000_000, seed) for seed, name in enumerate(LAYER_FILES, 10)}
    images = {
        name: add(registry, name, zstd_chunked_layer(tar_of(file("data", data), file("small", name.encode()))))
        for name, data in contents.items()
    }
    trees = {name: node.mount(image) for name, image in images.items()}
    for name, tree in trees.items():
        assert node.read(tree / "data") == contents[name]
        node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends by itself")
    for name, image in images.items():
        path = layer_file(node, image, name)
        size = path.stat().st_size
        if damage == "flipped":
            flip(path, size // 2)
        elif damage == "removed":
            path.unlink()
        else:
            os.truncate(path, 0 if damage == "emptied" else size // 2)
    for name, image in images.items():
        tree = node.mount(image)
        assert node.read(tree / "data") == contents[name]
        assert node.read(tree / "small") == name.encode()


@shows(
    Case(
        "disk-catalog-damaged",
        Area.DISK,
        "the catalog is damaged",
        "right bytes, or nothing is shown",
        "exit 9, names the file, or nothing",
        param="catalog.db",
    ),
    Case("disk-tree-damaged", Area.DISK, "a merged tree is damaged", RIGHT, "nothing: it is made again", param="trees"),
)
@pytest.mark.parametrize("what", ["catalog.db", "trees"])
def test_node_wide_file_damaged_between_mounts(node: Node, registry: FakeRegistry, what: str) -> None:
    image = image_of(registry)
    node.umount(node.mount(image))
    until(lambda: not node.processes(), "the daemon ends by itself")
    path = node.root / what
    if path.is_dir():
        path = next(path.iterdir())
    for offset in range(0, path.stat().st_size, 512):
        flip(path, offset)
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    if done.returncode == 0:
        assert node.read(directory / "data") == DATA
    else:
        assert done.returncode == 9 and done.stderr.startswith("lazyfs: ") and "catalog.db" in done.stderr, done.stderr


@shows(
    Case(
        "disk-layers-removed", Area.DISK, "`rm -rf` of the store's layers while an image is mounted", RIGHT, "nothing"
    ),
)
@both_drivers
def test_store_removed_under_the_daemon(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    assert node.read(tree / "small") == b"small"
    shutil.rmtree(node.root / "layers")
    assert node.read(tree / "data") == DATA


@shows(
    Case(
        "disk-plain-damaged",
        Area.DISK,
        "a chunk of a layer without a TOC is damaged",
        RIGHT,
        "nothing: the layer is fetched again",
        "`store_damaged_chunks_total`",
    ),
)
@both_drivers
def test_plain_layer_damaged(node: Node, registry: FakeRegistry) -> None:
    node.settings["MEMORY_SIZE"] = "0"
    image = add(registry, "plain", tar_of(file("data", DATA)))
    tree = node.mount(image)
    assert node.read(tree / "data") == DATA
    flip(layer_file(node, image, "data"), 2_000_000)
    forget_pages(node, tree / "data")
    assert node.read(tree / "data") == DATA
    assert node.status()["cache"]["store"]["damaged"] >= 1
