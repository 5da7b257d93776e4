"""Plain layers on their way into the store: progress, a disk that is too full, a mirror that lies, leftovers."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyfs import reference
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.plain import PlainLayer
from lazyfs.chunks.store import Store
from lazyfs.digest import of
from lazyfs.errors import DigestMismatch, StoreFull
from lazyfs.format.table import LayerTable
from lazyfs.mount.unpacking import UNPACKED, Unpacking
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers import tars
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.registry_faults import Fault


@contextmanager
def store_at(root: Path) -> Iterator[Store]:
    root.mkdir(mode=0o700, exist_ok=True)
    catalog = Catalog(root / "catalog.db")
    store = Store(root, 1 << 30, catalog)
    try:
        yield store
    finally:
        store.close()
        catalog.close()


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "lazyfs-test", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)  # the store closes its directories late


@pytest.fixture
def repository(registry: FakeRegistry) -> Iterator[Repository]:
    opened = open_repository(reference.parse(f"{registry.host}/app:1"), OpenOptions())
    yield opened
    opened.close()


def layer_of(registry: FakeRegistry, unpacking: Unpacking, size: int) -> PlainLayer:
    """Publish a layer of one file that doesn't compress."""
    tar = tars.tar_of(tars.file("f", os.urandom(size)))
    blob = gzip.compress(tar, 1)
    registry.add_blob(blob)
    data = unpacking.place(of(blob))
    return PlainLayer(of(blob), len(blob), of(tar), data, data.with_name("table"))


def adopt(store: Store, layer: PlainLayer) -> None:
    """Take a layer over as a mount does, and let it go again."""
    table = LayerTable(layer.table)
    opened = store.open_layer(layer.blob_digest, table)
    opened.adopt(layer.data.name)
    assert opened.complete
    opened.close()
    table.close()


def test_a_full_disk_is_emptied_of_what_was_used_before(
    registry: FakeRegistry, repository: Repository, scratch: Path
) -> None:
    with small_disk(scratch / "small", "40m") as disk, store_at(disk / "root") as store:
        unpacking = Unpacking(store, 8)
        for _ in range(3):
            layer = layer_of(registry, unpacking, 24 << 20)
            unpacking.unpack(repository, layer)
            adopt(store, layer)


def test_a_layer_larger_than_the_disk_is_told(registry: FakeRegistry, repository: Repository, scratch: Path) -> None:
    with small_disk(scratch / "small", "16m") as disk, store_at(disk / "root") as store:
        unpacking = Unpacking(store, 8)
        layer = layer_of(registry, unpacking, 24 << 20)
        sentence = r"takes more than 1\d.* unpacked, and the store's disk has .* free.*--root"
        with pytest.raises(StoreFull, match=sentence):
            unpacking.unpack(repository, layer)
        assert not layer.data.exists() and not layer.table.exists()


def test_wrong_bytes_leave_nothing(registry: FakeRegistry, repository: Repository, tmp_path: Path) -> None:
    with store_at(tmp_path / "root") as store:
        unpacking = Unpacking(store, 8)
        layer = layer_of(registry, unpacking, 300_000)
        registry.fault(Fault.FLIP, path="/blobs/")
        with pytest.raises(DigestMismatch):
            unpacking.unpack(repository, layer)
        assert os.listdir(layer.data.parent) == []


def test_who_waits_no_more_ends_the_work(registry: FakeRegistry, repository: Repository, tmp_path: Path) -> None:
    def gone() -> None:
        raise InterruptedError

    with store_at(tmp_path / "root") as store:
        unpacking = Unpacking(store, 8)
        layer = layer_of(registry, unpacking, 300_000)
        with pytest.raises(InterruptedError):
            unpacking.unpack(repository, layer, alive=gone)
        assert not layer.data.exists() and not layer.table.exists()


def test_the_user_hears_how_far_it_is(registry: FakeRegistry, repository: Repository, tmp_path: Path) -> None:
    registry.rate = 1_000_000
    said: list[str] = []
    with store_at(tmp_path / "root") as store:
        unpacking = Unpacking(store, 3)  # one connection: the test's seconds are known
        layer = layer_of(registry, unpacking, 3_000_000)
        unpacking.unpack(repository, layer, said.append)
    assert 1 <= len(said) <= 5
    assert all(line.startswith(f"layer {layer.blob_digest[7:19]}: ") and line.endswith("/s") for line in said)


def test_what_a_killed_daemon_left_goes(tmp_path: Path) -> None:
    with store_at(tmp_path / "root") as store:
        unpacking = Unpacking(store, 8)
        digest = of(b"layer")
        left = store.path(digest) / f"{UNPACKED}.{_gone()}"
        alive = store.path(digest) / f"{UNPACKED}.{os.getppid()}"
        for file in (left, alive):
            file.write_bytes(b"x")
        assert unpacking.place(digest).name == f"{UNPACKED}.{os.getpid()}"
        assert not left.exists() and alive.exists()


def _gone() -> int:
    """Return the number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid
