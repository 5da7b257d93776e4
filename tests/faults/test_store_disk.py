"""The cache disk fills up, turns read-only, loses bytes or is tampered with: reads go on, nothing wrong comes out."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.health import RETRY_AFTER
from lazyfs.chunks.store import Store
from lazyfs.errors import StoreBroken, StoreFull, StoreLocked
from lazyfs.units import MiB
from tests.faults.cases import NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.chunk_tables import ChunkTable, table_of

_MS_RDONLY, _MS_REMOUNT = 1, 32


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _mount(target: Path, flags: int, data: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", ctypes.c_ulong(flags), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    target = tmp_path / "disk"
    target.mkdir()
    _mount(target, 0, b"size=2m,mode=0700")
    yield target
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(target), 2)  # MNT_DETACH


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db")
    yield opened
    opened.close()


def directory(root: Path, table: ChunkTable) -> Path:
    return root / "layers" / "sha256" / table.digest[7:]


def test_full_disk_is_passed_by_and_tried_again(
    small_disk: Path, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    store = Store(small_disk, 1 << 30, catalog, monotonic=clock)
    table = table_of(*[[256 * 1024]] * 12)
    layer = store.open_layer(table.digest, table)
    with caplog.at_level(logging.WARNING):
        kept = [layer.write(chunk, table.content[chunk]) for chunk in range(12)]
    assert 5 <= kept.count(True) <= 7 and kept == sorted(kept, reverse=True)
    assert caplog.text.count("is passed by") == 1
    assert store.status().passing_by == "No space left on device"
    assert store.status().write_failures == 1
    assert store.status().passed_by == kept.count(False) - 1
    for chunk, there in enumerate(kept):
        assert layer.read(chunk) == (table.content[chunk] if there else None)
    layer.forget()
    assert not layer.write(0, table.content[0])
    clock.now += RETRY_AFTER
    assert layer.write(0, table.content[0]) and layer.write(1, table.content[1])
    assert store.status().passing_by == "" and caplog.text.count("takes writes again") == 1
    assert layer.damaged == 0
    store.close()


def test_run_that_does_not_fit_keeps_what_went_before(small_disk: Path, catalog: Catalog) -> None:
    store = Store(small_disk, 1 << 30, catalog)
    table = table_of([MiB], [1000] * 3, [MiB] * 12)
    layer = store.open_layer(table.digest, table)
    assert layer.write_run(0, table.content[:4]) == 4
    assert layer.write_run(4, table.content[4:]) == 0
    assert [layer.read(chunk) for chunk in range(4)] == table.content[:4]
    assert all(layer.read(chunk) is None for chunk in range(4, table.chunk_count))
    store.close()


def test_full_disk_from_the_start_still_opens_layers(small_disk: Path, catalog: Catalog) -> None:
    clock = Clock()
    store = Store(small_disk, 1 << 30, catalog, monotonic=clock)
    table = table_of([4096] * 3)
    store.path(table.digest)
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(bytes(4096))
            except OSError:
                break
    layer = store.open_layer(table.digest, table)
    assert not layer.write(0, table.content[0])
    assert layer.read(0) is None
    with pytest.raises(StoreFull):
        store.write_toc(table.digest, bytes(100_000))
    (small_disk / "ballast").unlink()
    clock.now += RETRY_AFTER
    assert layer.write(0, table.content[0])
    assert layer.read(0) == table.content[0]
    store.close()


def test_disk_that_turns_read_only_is_read_from(small_disk: Path, catalog: Catalog) -> None:
    store = Store(small_disk, 1 << 30, catalog)
    table = table_of([100_000], [100_000])
    layer = store.open_layer(table.digest, table)
    assert layer.write(0, table.content[0])
    store.close()
    _mount(small_disk, _MS_REMOUNT | _MS_RDONLY, b"size=2m,mode=0700")
    clock = Clock()
    again = Store(small_disk, 1 << 30, catalog, monotonic=clock)
    layer = again.open_layer(table.digest, table)
    assert layer.read(0) == table.content[0]
    assert not layer.write(1, table.content[1])
    assert layer.read(1) is None
    assert again.status().passing_by == "Read-only file system"
    _mount(small_disk, _MS_REMOUNT, b"size=2m,mode=0700")
    clock.now += 2 * RETRY_AFTER
    assert layer.write(1, table.content[1])
    assert layer.read(1) == table.content[1]
    again.close()


def test_truncated_files_are_misses_also_while_open(tmp_path: Path, catalog: Catalog) -> None:
    table = table_of([MiB], [MiB])
    for name in ("data", "chunks", "used"):
        store = Store(tmp_path, 1 << 30, catalog)
        layer = store.open_layer(table.digest, table)
        assert layer.write_run(0, table.content) == 2
        os.truncate(directory(tmp_path, table) / name, MiB + 5 if name == "data" else 65)
        assert layer.read(0) == table.content[0]
        assert layer.read(1) == (None if name == "data" else table.content[1])
        store.close()
        again = Store(tmp_path, 1 << 30, catalog)
        layer = again.open_layer(table.digest, table)
        assert layer.read(0) in (None, table.content[0])
        assert layer.write_run(0, table.content) == 2
        assert [layer.read(0), layer.read(1)] == table.content
        again.close()


@shows(
    Case(
        "disk-planted",
        Area.DISK,
        "somebody plants links or FIFOs in place of the store's files",
        RIGHT,
        "nothing: what the link leads to is not touched",
    ),
)
@pytest.mark.parametrize("name", ["data", "chunks", "used"])
@pytest.mark.parametrize("plant", ["symlink", "dangling", "hardlink", "fifo"])
def test_planted_file_is_removed_and_its_target_untouched(
    tmp_path: Path, catalog: Catalog, name: str, plant: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    table = table_of([5000])
    store = Store(tmp_path / "store", 1 << 30, catalog)
    file = store.path(table.digest) / name
    if plant == "symlink":
        file.symlink_to(precious)
    elif plant == "dangling":
        file.symlink_to(tmp_path / "made")
    elif plant == "hardlink":
        file.hardlink_to(precious)
    else:
        os.mkfifo(file)
    layer = store.open_layer(table.digest, table)
    assert layer.write(0, table.content[0])
    assert layer.read(0) == table.content[0]
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "made").exists()
    assert file.is_file() and not file.is_symlink()
    store.close()


def test_directory_planted_as_data_is_passed_by(tmp_path: Path, catalog: Catalog) -> None:
    table = table_of([5000])
    store = Store(tmp_path / "store", 1 << 30, catalog)
    (store.path(table.digest) / "data").mkdir()
    layer = store.open_layer(table.digest, table)
    assert not layer.write(0, table.content[0])
    assert layer.read(0) is None
    store.close()


def test_link_in_place_of_a_layer_directory_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    table = table_of([5000])
    store = Store(tmp_path / "store", 1 << 30, catalog)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    directory(tmp_path / "store", table).symlink_to(elsewhere)
    with pytest.raises(StoreBroken):
        store.open_layer(table.digest, table)
    with pytest.raises(StoreBroken):
        store.write_toc(table.digest, b"x")
    assert list(elsewhere.iterdir()) == []
    store.close()


@shows(
    Case("disk-open-store", Area.DISK, "others may write to the store", NOTHING_SHOWN, "exit 9: “written by others”"),
)
def test_store_that_others_can_write_to_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    root = tmp_path / "open"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(StoreBroken, match="written by others"):
        Store(root, 1 << 30, catalog)


_HOLDER = """
import sys
from pathlib import Path
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.store import Store
root = Path(sys.argv[1])
store = Store(root, 1 << 30, Catalog(root / "catalog.db"))
store.lock(sys.argv[2] == "exclusive")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("theirs", "ours", "allowed"),
    [("exclusive", True, False), ("exclusive", False, False), ("shared", True, False), ("shared", False, True)],
)
def test_lock_of_another_process(tmp_path: Path, catalog: Catalog, theirs: str, ours: bool, allowed: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path), theirs], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        store = Store(tmp_path, 1 << 30, catalog)
        if allowed:
            store.lock(ours)
        else:
            with pytest.raises(StoreLocked, match="another daemon"):
                store.lock(ours)
        holder.kill()
        holder.wait(10)
    store.lock(ours)  # the lock of a killed process is free
    store.close()


def test_processes_that_share_a_store_see_each_others_chunks(tmp_path: Path, catalog: Catalog) -> None:
    """Two stores in one process are what two solo daemons are: nothing but the files is common."""
    table = table_of([5000], [6000])
    one, two = Store(tmp_path, 1 << 30, catalog), Store(tmp_path, 1 << 30, catalog)
    for store in (one, two):
        store.lock(False)
    first, second = one.open_layer(table.digest, table), two.open_layer(table.digest, table)
    assert first.write(0, table.content[0])
    assert second.read(0) == table.content[0]
    assert second.missing(0, 2) == [1]
    first.forget()
    assert second.read(0) is None
    assert second.damaged == 0, "another process's eviction was taken for damage"
    first.close()
    assert not one.remove_layer(table.digest), "a layer that another process has open was removed"
    second.close()
    assert one.remove_layer(table.digest)
    one.close()
    two.close()


def test_catalog_on_a_full_disk_says_so_and_can_still_be_read(small_disk: Path) -> None:
    opened = Catalog(small_disk / "catalog.db")
    number = opened.number("layer:a")
    digest = opened.put_document(b"a document")
    with pytest.raises(StoreFull, match="full"):
        for index in range(400):
            opened.put_document(bytes([index % 256]) * (20_000 + index))
    assert opened.number("layer:a") == number
    assert opened.document(digest) == b"a document"
    opened.close()
