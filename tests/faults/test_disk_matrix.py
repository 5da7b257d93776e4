"""The store's disk fails under a daemon that goes on: its readers get the right bytes all the same.

The kernel's errors are put between the daemon and its files by `tests.helpers.sabotage`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lazyfs.container import mounts
from lazyfs.control_client import connect
from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers import sabotage
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.fault_bench import SIZE, Bench, Victim
from tests.helpers.pattern import pattern
from tests.helpers.takeover import held
from tests.helpers.tars import file, tar_of


@pytest.fixture(scope="module")
def bench(module_scratch: Path) -> Iterator[Bench]:
    prefix = sabotage.prefix(module_scratch / "sabotage", module_scratch / "store")
    with Bench(module_scratch, prefix, DRIVER="fuse", MEMORY_SIZE="0", READ_TIMEOUT="15") as one:
        yield one


def stored(bench: Bench) -> Victim:
    """Return an image whose data is in the store and in nobody's page cache."""
    victim = bench.victim("stored")
    bench.show(victim)
    bench.until_right([victim])
    data = layer_directory(bench.node, victim.image) / "data"
    until(lambda: data.stat().st_blocks * 512 >= SIZE, "all chunks are in the store")
    bench.forget_pages(victim)
    return victim


def layer_directory(node: Node, image: AddedImage) -> Path:
    return node.root / "layers" / "sha256" / image.layers[0][7:]


def read_right(bench: Bench, victim: Victim) -> None:
    for each in bench.read_all([victim], 30)[victim.name]:
        assert (each.data, each.words) == (victim.content, "")


DAMAGED = "`store_damaged_chunks_total`"
REFETCHED = "`status`: damaged chunks found and fetched again"


@shows(Case("disk-eio-read", Area.DISK, "EIO for each read of chunks in the store", RIGHT, REFETCHED, DAMAGED))
def test_reads_of_the_store_fail(bench: Bench) -> None:
    victim = stored(bench)
    before = bench.metrics()["lazyfsd_store_damaged_chunks_total", ""]
    with sabotage.on(bench.node.place / "sabotage", "read-fails", "EIO"):
        read_right(bench, victim)
    assert bench.metrics()["lazyfsd_store_damaged_chunks_total", ""] > before
    assert "damaged chunks found and fetched again" in bench.node.lazyfs("status").stdout


@shows(Case("disk-holes", Area.DISK, "holes where chunks were, with the file's size kept", RIGHT, REFETCHED, DAMAGED))
def test_holes_in_place_of_chunks(bench: Bench) -> None:
    victim = stored(bench)
    before = bench.metrics()["lazyfsd_store_damaged_chunks_total", ""]
    data = layer_directory(bench.node, victim.image) / "data"
    size = data.stat().st_size
    os.truncate(data, 4096)
    os.truncate(data, size)
    read_right(bench, victim)
    assert bench.metrics()["lazyfsd_store_damaged_chunks_total", ""] > before


@shows(
    Case(
        "disk-slow",
        Area.DISK,
        "each read and write of chunks in the store takes half a second",
        RIGHT,
        "nothing: it is slow",
    )
)
def test_a_slow_disk(bench: Bench) -> None:
    victim = stored(bench)
    with sabotage.on(bench.node.place / "sabotage", "slow", "0.5"):
        read_right(bench, victim)
        assert bench.node.lazyfs("status", timeout=10).returncode == 0


@shows(
    *(
        Case(
            f"disk-{name}",
            Area.DISK,
            fault,
            RIGHT,
            "`status`: PASSED BY; log: “the cache is passed by, reads are served from memory: …”",
            "`store_passed_by`, `store_write_failures_total`",
            word,
        )
        for name, fault, word in (
            ("eio-write", "EIO for each write of chunks to the store", "EIO"),
            ("read-only", "each write of chunks to the store ends as on a read-only file system (EROFS)", "EROFS"),
            ("full", "the disk is full for each write of chunks, in mid-read", "ENOSPC"),
            ("quota", "the quota is used up for each write of chunks, in mid-read", "EDQUOT"),
        )
    )
)
@pytest.mark.parametrize("word", ["EIO", "EROFS", "ENOSPC", "EDQUOT"])
def test_writes_to_the_store_fail(bench: Bench, word: str) -> None:
    victim = bench.victim(word)
    bench.show(victim)
    with sabotage.on(bench.node.place / "sabotage", "write-fails", word):
        read_right(bench, victim)
        numbers = bench.metrics()
        assert numbers["lazyfsd_store_passed_by", ""] == 1
        assert numbers["lazyfsd_store_write_failures_total", ""] >= 1
        assert "PASSED BY: its disk is full or fails, reads go on without it" in bench.node.lazyfs("status").stdout
        bench.forget_pages(victim)
        read_right(bench, victim)  # from the registry again


@contextlib.contextmanager
def disk_that_fails(directory: Path, image: Path) -> Iterator[Callable[[], None]]:
    """Mount an ext4 of its own; what is yielded has the kernel turn it read-only, with files open for writing in it.

    mount(8) refuses that as long as a daemon has such files, so a tmpfs can't stand for it.
    """
    directory.mkdir()
    with image.open("wb") as disk:
        disk.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, directory], check=True)
    try:
        found = mounts.top_at(os.fsencode(directory))
        assert found is not None
        directory.chmod(0o700)
        shutil.rmtree(directory / "lost+found")
        trigger = Path("/sys/fs/ext4", Path(os.fsdecode(found.source)).name, "trigger_fs_error")

        def fail() -> None:
            trigger.write_text("of a test")

        yield fail
    finally:
        mounts.umount(os.fsencode(directory), lazy=True)  # and with it goes the loop device


def says_why(said: str) -> bool:
    """Tell whether a command says in one sentence what the disk does: in the kernel's words, or in SQLite's."""
    first, *others = said.strip().splitlines()
    one = first.startswith("lazyfs: ") and all(line.startswith("lazyfs: hint: ") for line in others)
    return one and ("Read-only file system" in first or "disk I/O error" in first)


@shows(
    Case(
        "disk-remounted",
        Area.DISK,
        "the kernel turns the store's file system read-only, as ext4 does after an error",
        RIGHT,
        "`status`: PASSED BY; `cache ls` goes on; other mounts too, or exit 9, one sentence with the disk's error",
        "`store_passed_by`, `store_write_failures_total`",
    )
)
def test_the_file_system_of_the_store_turns_read_only(node: Node, registry: FakeRegistry) -> None:
    contents = [pattern(3_000_000, 80 + number) for number in range(3)]
    begun, known, other = (
        # One file of each is read later: all of the other may come with its beginning.
        add(registry, f"image{number}", zstd_chunked_layer(tar_of(file("data", data), file("later", data[::-1]))))
        for number, data in enumerate(contents)
    )
    with disk_that_fails(node.root, node.place / "disk") as fail:
        tree = node.mount(begun)
        assert node.tool("head", "-c", "200000", tree / "data").stdout == contents[0][:200_000]
        node.umount(node.mount(known))
        until(lambda: len(node.status()["mounts"]) == 1, "that one is gone")
        fail()
        with pytest.raises(OSError, match="Read-only"):
            (node.root / "file").touch()
        assert node.read(tree / "data") == contents[0] and node.read(tree / "later") == contents[0][::-1]
        again = node.new_dir()
        done = node.lazyfs("mount", known.reference, again)  # whether that has anything to write down varies
        if done.returncode == 0:
            assert node.read(again / "data") == contents[1]
            node.umount(again)
        else:
            assert done.returncode == 9 and says_why(done.stderr), done
        assert says_why(node.refused(9, "mount", other.reference, node.new_dir()))
        listed = node.lazyfs("cache", "ls")
        assert listed.returncode == 0 and begun.reference in listed.stdout, listed
        assert "PASSED BY" in node.lazyfs("status").stdout
        assert node.read(tree / "data") == contents[0]
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends by itself")
        # The next one can't write down what it shows.
        assert says_why(node.refused(9, "mount", begun.reference, tree))


@shows(
    Case(
        "disk-table-cut",
        Area.DISK,
        "a layer's table is cut short while lazyfsd has it mapped (SIGBUS), with a holder",
        RIGHT,
        "nothing: another lazyfsd takes over, and makes the table again",
    )
)
def test_a_table_that_is_cut_short_while_it_is_mapped(node: Node, registry: FakeRegistry) -> None:
    names = {f"d{number % 50}/f{number}": b"%d" % number for number in range(3000)}
    tar = tar_of(file("data", pattern(300_000, 60)), *(file(name, data) for name, data in names.items()))
    image = add(registry, "cut", zstd_chunked_layer(tar))
    with held(node) as daemon:
        tree = node.mount(image)
        beside = node.mount(add(registry, "beside", zstd_chunked_layer(tar_of(file("f", b"beside")))))
        before = daemon.pid()
        os.truncate(layer_directory(node, image) / "table", 4096)
        listed = node.tool("find", tree, "-type", "f", "-size", "+1")
        assert listed.returncode == 0 and listed.stdout.split() == [os.fsencode(tree / "data")], listed.stderr
        assert node.read(tree / "data") == pattern(300_000, 60)
        assert node.read(beside / "f") == b"beside"
        assert daemon.pid() != before
        node.umount(tree)
        node.umount(beside)


# -- a power cut: what was not synced is lost, of each file the newest or all of it

LOSSES = {
    "tails": "the last third of each file is zeros",
    "zeros": "each file is zeros, at its size",
    "cut": "each file ends in the middle",
    "empty": "each file is empty",
    "data": "only the bytes of chunks are lost: the flags say that they are there",
    "older": "the catalog is as it was before the image was fetched",
}


def lose(node: Node, image: AddedImage, loss: str, older: Path) -> None:
    trees = node.root / "trees"
    files = [path for path in layer_directory(node, image).iterdir() if path.is_file()]
    files += list(trees.iterdir()) if loss == "tails" else []  # all of them: the first one's turn
    if loss == "older":
        for path in node.root.glob("catalog.db*"):
            path.unlink()
        shutil.copy(older, node.root / "catalog.db")
        return
    for path in files:
        size = path.stat().st_size
        keep = {"tails": size * 2 // 3, "zeros": 0, "cut": size // 2, "empty": 0, "data": size}[loss]
        if loss == "data" and path.name == "data":
            keep = 0
        os.truncate(path, keep)
        if loss in ("tails", "zeros", "data"):
            os.truncate(path, size)


@shows(
    Case(
        "disk-lost-writes",
        Area.DISK,
        "power cut: " + "; ".join(f"or {what}" if number else what for number, what in enumerate(LOSSES.values())),
        RIGHT,
        "nothing: what is damaged is made or fetched again",
        DAMAGED,
    )
)
def test_writes_that_a_power_cut_took(scratch: Path, registry: FakeRegistry) -> None:
    with Node(scratch, DRIVER="fuse") as node:
        first = add(registry, "first", zstd_chunked_layer(tar_of(file("f", b"f"))))
        tree = node.mount(first)
        older = scratch / "older.db"
        with closing(sqlite3.connect(node.root / "catalog.db")) as now, closing(sqlite3.connect(older)) as copy:
            now.backup(copy)
        images, contents = {}, {}
        for seed, loss in enumerate(LOSSES):
            contents[loss] = pattern(300_000, 50 + seed)
            images[loss] = add(registry, loss, zstd_chunked_layer(tar_of(file("data", contents[loss])), frame_size=0))
        with connect(node.run_dir / "lazyfsd.sock") as daemon:
            for image in images.values():
                daemon.call("fetch_image", **asked(image), pull=None, pin=False, timeout=30)
                daemon.call("mount_image", **asked(image), lease=True, driver="fuse", timeout=30)  # its tree is made
            node.kill_all()
        node.lazyfs("umount", tree)  # its record
        for loss, image in images.items():
            lose(node, image, loss, older)
        again = node.mount(first, at=tree)
        with connect(node.run_dir / "lazyfsd.sock") as daemon:
            for loss, image in images.items():
                shown = daemon.call("mount_image", **asked(image), lease=True, driver="fuse", timeout=30)
                assert node.read(Path(shown["path"]) / "data") == contents[loss], loss
        assert node.read(again / "f") == b"f"
        assert node.status()["cache"]["store"]["damaged"] > 0


def asked(image: AddedImage) -> dict[str, Any]:
    """Return what calls about an image have in common."""
    return {"image": image.reference, "platform": None, "plain_http": None, "access": None}
