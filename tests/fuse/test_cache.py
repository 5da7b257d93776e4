"""`lazyfs cache`: lists, removals, pruning and checks, with a daemon and without, under those who read meanwhile."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

BASE = pattern(900_000, 1)
OWN = {name: pattern(700_000, number) for number, name in enumerate(("one", "two"), 2)}


def image_of(registry: FakeRegistry, name: str) -> AddedImage:
    """Store an image of a shared lazy layer and a plain one of its own."""
    own = gzip.compress(tar_of(file("own", OWN[name])), mtime=0)
    return add(registry, name, zstd_chunked_layer(tar_of(file("base", BASE))), own)


@pytest.fixture
def images(node: Node, registry: FakeRegistry) -> tuple[AddedImage, AddedImage]:
    """Fetch two images that share a layer; the daemon that did is gone."""
    found = image_of(registry, "one"), image_of(registry, "two")
    done = node.lazyfs("fetch", *(image.reference for image in found))
    assert done.returncode == 0, done.stderr
    until(lambda: not node.processes(), "the daemon ends")
    return found


def cache(node: Node, *words: str, code: int = 0) -> dict[str, Any]:
    done = node.lazyfs("cache", *words, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def directory(node: Node, digest: str) -> Path:
    return node.root / "layers" / "sha256" / digest.removeprefix("sha256:")


def test_without_a_store(node: Node) -> None:
    assert cache(node, "ls")["images"] == []
    cache(node, "prune", "--all")
    assert cache(node, "verify")["clean"]
    assert not node.root.exists()
    assert "cache wants a command" in node.refused(2, "cache")


def test_ls_is_the_same_with_a_daemon_and_without(node: Node, images: tuple[AddedImage, AddedImage]) -> None:
    before = cache(node, "ls")
    assert [image["complete"] for image in before["images"]] == [True, True]
    assert {layer["digest"]: layer["complete"] for layer in before["layers"]} == dict.fromkeys(
        {*images[0].layers, *images[1].layers}, True
    )
    tree = node.mount(images[0])
    now = cache(node, "ls")
    (mounted,) = [image for image in now["images"] if image["mounts"]]
    assert (mounted["digest"], mounted["mounts"]) == (images[0].digest, [str(tree)])
    assert {layer["digest"] for layer in now["layers"] if layer["used"]} == set(images[0].layers)
    for first, second in zip(before["layers"], now["layers"], strict=True):
        assert first["present"] == first["full"] and second["complete"]
    text = node.lazyfs("cache", "ls", "--layers").stdout
    assert f"mounted on {tree}" in text and "2 images, 3 layers" in text and "in 2 images" in text


def test_rm_takes_what_no_other_image_needs(
    node: Node, registry: FakeRegistry, images: tuple[AddedImage, AddedImage]
) -> None:
    done = cache(node, "rm", images[0].reference)
    assert done["layers"] == [images[0].layers[1]] and list(done["kept"]) == [images[0].layers[0]]
    assert not directory(node, images[0].layers[1]).exists()
    assert [image["digest"] for image in cache(node, "ls")["images"]] == [images[1].digest]
    assert "belongs to" in node.refused(2, "cache", "rm", images[1].layers[0][:19])
    assert "is not in the store" in node.refused(3, "cache", "rm", images[0].reference)
    assert "has the digest" in node.refused(3, "cache", "rm", "sha256:" + "0" * 64)
    registry.stop_listening()
    tree = node.mount(images[1])
    assert node.read(tree / "base") == BASE and node.read(tree / "own") == OWN["two"]
    node.umount(tree)
    registry.listen_again()
    tree = node.mount(images[0])  # unpacked again
    assert node.read(tree / "own") == OWN["one"]
    assert cache(node, "verify")["clean"]


@both_drivers
def test_rm_of_what_is_mounted(node: Node, registry: FakeRegistry, images: tuple[AddedImage, AddedImage]) -> None:
    tree = node.mount(images[0])
    assert f"is mounted on {tree}" in node.refused(2, "cache", "rm", images[0].reference)
    done = cache(node, "rm", "--force", images[0].reference)
    assert done["dropped"] == [images[0].layers[1]] and done["layers"] == []
    registry.clear_log()
    assert node.read(tree / "own") == OWN["one"]
    assert registry.bytes_sent(images[0].layers[1]) > 600_000
    assert node.read(tree / "base") == BASE


def test_prune_spares_pins_and_mounts(node: Node, images: tuple[AddedImage, AddedImage]) -> None:
    assert node.lazyfs("fetch", "--pin", images[0].reference).returncode == 0
    tree = node.mount(images[1])
    done = cache(node, "prune", "--all")
    assert done["layers"] == []
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends")
    assert cache(node, "prune")["layers"] == []
    assert cache(node, "prune", "--older", "1h")["layers"] == []
    done = cache(node, "prune", "--to", "2MB")
    assert done["layers"] == [images[1].layers[1]] and done["size"] <= 2_000_000 and done["trees"] == 2
    assert {image["digest"]: image["complete"] for image in cache(node, "ls")["images"]} == {
        images[0].digest: True, images[1].digest: False,
    }  # fmt: skip
    assert "pinned or in use" in node.lazyfs("cache", "prune", "--to", "10k").stderr
    assert cache(node, "unpin", images[0].digest[:20])["images"] == [images[0].digest]
    done = cache(node, "prune", "--all")
    assert sorted(done["images"]) == sorted(image.digest for image in images)
    assert cache(node, "ls")["layers"] == []
    assert list((node.root / "layers" / "sha256").iterdir()) == []


READER = """
import hashlib, time
seen, end = set(), time.monotonic() + 3
while time.monotonic() < end:
    for path in a[:2]:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        data = b"".join(iter(lambda: os.read(fd, 65536), b""))
        os.close(fd)
        seen.add((path, hashlib.sha256(data).hexdigest()))
print(json.dumps(sorted(seen)))
"""


@both_drivers
def test_every_byte_is_right_while_the_store_is_emptied(
    node: Node, registry: FakeRegistry, images: tuple[AddedImage, AddedImage]
) -> None:
    import hashlib

    tree = node.mount(images[0])
    prelude = "import os, sys, json\na = sys.argv[1:]\n"
    words = [sys.executable, "-I", "-S", "-c", prelude + READER, str(tree / "base"), str(tree / "own")]
    reader = node.spawn(words)
    rounds = 0
    while reader.poll() is None:
        cache(node, "rm", "--force", *images[0].layers)
        cache(node, "prune", "--all")
        cache(node, "verify")
        rounds += 1
    done = node.finish(reader, 30)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(
        [str(tree / name), hashlib.sha256(data).hexdigest()] for name, data in (("base", BASE), ("own", OWN["one"]))
    )
    assert rounds >= 1


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        (byte,) = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("mounted", [False, True])
def test_verify_finds_a_flipped_bit_and_the_next_fetch_mends_it(
    node: Node, images: tuple[AddedImage, AddedImage], mounted: bool
) -> None:
    assert cache(node, "verify")["clean"]
    tree = node.mount(images[0]) if mounted else None
    lazy, plain = images[0].layers
    flip(directory(node, lazy) / "data", 400_000)
    flip(directory(node, plain) / "data", 5)
    assert cache(node, "verify", images[1].layers[1])["clean"]
    found = cache(node, "verify", code=6)
    assert found["damaged"] == {lazy: 1, plain: 1}
    assert [image["complete"] for image in cache(node, "ls")["images"]] == [False, False]
    assert cache(node, "verify")["clean"]  # what was damaged is gone
    assert node.lazyfs("fetch", *(image.reference for image in images)).returncode == 0
    assert [image["complete"] for image in cache(node, "ls")["images"]] == [True, True]
    if tree is not None:
        assert node.read(tree / "base") == BASE and node.read(tree / "own") == OWN["one"]


def test_verify_finds_damaged_tables_and_leaves_the_clock_alone(
    node: Node, images: tuple[AddedImage, AddedImage]
) -> None:
    before = cache(node, "ls")["layers"]
    time.sleep(1.1)  # the clock has seconds
    table = directory(node, images[1].layers[1]) / "table"
    flip(table, table.stat().st_size // 2)
    found = cache(node, "verify", code=6)
    assert found["tables"] == [images[1].layers[1]] and found["layers"] == 2
    now = {layer["digest"]: layer["last_use"] for layer in cache(node, "ls")["layers"]}
    assert now == {layer["digest"]: layer["last_use"] for layer in before}
    tree = node.mount(images[1])
    assert node.read(tree / "own") == OWN["two"]


def test_what_nobody_knows_of_is_found(node: Node, images: tuple[AddedImage, AddedImage]) -> None:
    stranger = directory(node, "sha256:" + "e" * 64)
    shutil.copytree(directory(node, images[0].layers[1]), stranger)
    half = directory(node, images[0].layers[0]) / "data.new"
    half.write_bytes(bytes(100_000))
    for path in (stranger, *stranger.iterdir(), half):
        os.chmod(path, 0o700 if path.is_dir() else 0o600)
    listed = cache(node, "ls")
    assert not half.exists()  # left by a crash
    assert [layer["digest"][-3:] for layer in listed["layers"]].count("eee") == 1
    assert "in no image" in node.lazyfs("cache", "ls", "--layers").stdout
    done = cache(node, "prune")
    assert done["layers"] == ["sha256:" + "e" * 64] and done["freed"] > 600_000
    assert [image["complete"] for image in cache(node, "ls")["images"]] == [True, True]


def test_commands_side_by_side_without_a_daemon(node: Node, images: tuple[AddedImage, AddedImage]) -> None:
    """Each holds the store for a moment; none of them fails for that, nor does a mount that starts meanwhile."""
    directory_ = node.new_dir()
    started = [node.spawn(node.words("cache", *words)) for words in (("ls",), ("verify",), ("prune",), ("ls",))]
    started.append(node.spawn(node.words("mount", images[0].reference, directory_)))
    done = [node.finish(process, 60) for process in started]
    assert [each.returncode for each in done] == [0] * 5, [each.stderr for each in done]
    assert node.read(directory_ / "own") == OWN["one"]
