"""Eviction: within the bound, least recently used first, pinned layers stay, mounted ones keep their directory."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lazyfs.chunks.catalog import Catalog, Pin
from lazyfs.chunks.layer_store import LayerStore
from lazyfs.chunks.shape import SEGMENT, shape_of
from lazyfs.chunks.store import Store
from lazyfs.errors import StoreBroken
from lazyfs.units import MiB
from tests.helpers.chunk_tables import ChunkTable, table_of

BOUND = 20 * MiB


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db")
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path, catalog: Catalog, clock: Clock) -> Iterator[Store]:
    opened = Store(tmp_path, BOUND, catalog, now=clock)
    opened.budget.wake = lambda: None  # passes are made by the tests, so that each sees just one
    yield opened
    opened.close()


def filled(store: Store, table: ChunkTable) -> LayerStore:
    """Fill a layer as if the bound were larger, so that one pass has all of it to think about."""
    layer = store.open_layer(table.digest, table)
    bound, store.budget.bound = store.budget.bound, 1 << 40
    assert layer.write_run(0, table.content) == table.chunk_count
    store.budget.bound = bound
    return layer


def _ignore(job: Callable[[], int]) -> None:
    job()


def test_segments_cover_every_chunk_once() -> None:
    table = table_of([100, 200], [MiB] * 9, [5 * MiB, 5 * MiB], [1])
    shape = shape_of(table)
    chunks = [chunk for segment in range(len(shape.first_chunk)) for chunk in range(*shape.chunks(segment))]
    assert chunks == list(range(table.chunk_count))
    ends = [shape.extent(segment) for segment in range(len(shape.first_chunk))]
    assert ends[0][0] == 0 and ends[-1][1] == table.data_size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert len(shape_of(table_of()).first_chunk) == 0


def test_nothing_goes_within_the_bound(store: Store) -> None:
    layer = filled(store, table_of([MiB] * 15))
    assert store.evictor.run() == 0
    assert layer.complete


def test_least_recently_used_segments_go_until_the_low_water_mark(store: Store, clock: Clock) -> None:
    table = table_of([MiB] * 24)
    layer = filled(store, table)
    clock.now += 10
    used = [0, 1, 2, 3, 20, 21, 22, 23]
    assert all(layer.read(chunk) for chunk in used)
    freed = store.evictor.run()
    assert freed >= 24 * MiB - BOUND
    assert store.budget.used <= BOUND * 0.9
    assert store.budget.used >= BOUND * 0.9 - 2 * SEGMENT
    assert all(layer.read(chunk) == table.content[chunk] for chunk in used)
    assert layer.missing(0, 24) == list(range(4, 12))
    assert layer.damaged == 0


def test_evicted_chunks_are_misses_and_can_be_written_again(store: Store) -> None:
    table = table_of([MiB] * 22)
    layer = filled(store, table)
    store.evictor.run()
    gone = layer.missing(0, 22)
    assert gone and all(layer.read(chunk) is None for chunk in gone)
    assert layer.write(gone[0], table.content[gone[0]])
    assert layer.read(gone[0]) == table.content[gone[0]]
    assert layer.damaged == 0


def test_pinned_layers_stay(store: Store, catalog: Catalog, clock: Clock) -> None:
    old, new = table_of([MiB] * 12, seed="old"), table_of([MiB] * 12, seed="new")
    pinned = filled(store, old)
    catalog.pin(Pin("docker://h/r:1", "linux/amd64", "image"), [old.digest])
    clock.now += 10
    other = filled(store, new)
    store.evictor.run()
    assert pinned.complete and not other.complete


def test_unmounted_layers_go_first_at_equal_age_and_lose_their_directory(
    store: Store, catalog: Catalog, tmp_path: Path
) -> None:
    mounted, left = table_of([MiB] * 12, seed=1), table_of([MiB] * 12, seed=2)
    stays = filled(store, mounted)
    leaves = filled(store, left)
    number = catalog.number(f"layer:{left.digest}")
    catalog.add_layer(left.digest, 1, 1)
    catalog.index_layer(number, left)
    leaves.close()
    store.budget.bound = 12 * MiB
    store.evictor.run()
    assert stays.present_bytes >= 8 * MiB
    assert store.digests() == [mounted.digest]
    assert not (tmp_path / "layers" / "sha256" / left.digest[7:]).exists()
    assert catalog.places(left.chunk_digest(0)) == []
    assert catalog.layer(left.digest) is None
    assert catalog.number(f"layer:{left.digest}") == number


def test_mounted_layer_evicted_to_nothing_keeps_its_directory(store: Store) -> None:
    table = table_of([MiB] * 8)
    layer = filled(store, table)
    store.write_toc(table.digest, b"toc")
    store.budget.bound = 1
    store.evictor.run()
    assert layer.present_bytes == 0 and layer.disk_usage == 0
    assert store.digests() == [table.digest] and store.read_toc(table.digest) == b"toc"


def test_layers_nobody_has_opened_are_evicted_by_their_clock(
    tmp_path: Path, store: Store, catalog: Catalog, clock: Clock
) -> None:
    tables = [table_of([MiB] * 8, seed=seed) for seed in range(3)]
    for table in tables:
        filled(store, table).close()
        clock.now += 100
    store.close()
    again = Store(tmp_path, BOUND, catalog, now=clock)
    again.evictor.run()
    try:
        layers = [again.open_layer(table.digest, table) for table in tables]
        assert [layer.present_bytes // MiB for layer in layers] == [0, 8, 8]
        assert [layers[2].read(chunk) for chunk in range(8)] == tables[2].content
    finally:
        again.close()


def test_clock_in_the_future_is_taken_for_long_ago(
    tmp_path: Path, store: Store, catalog: Catalog, clock: Clock
) -> None:
    table = table_of([MiB])
    clock.now += 10**8
    filled(store, table).close()
    store.close()
    clock.now -= 10**8
    again = Store(tmp_path, BOUND, catalog, now=clock)
    with again.borrow(table.digest) as files:
        assert files is not None and files.last_use() == 0
    again.close()


def test_data_without_a_usable_chunks_file_is_removed_when_room_is_wanted(store: Store, tmp_path: Path) -> None:
    table = table_of([MiB] * 8)
    filled(store, table).close()
    path = tmp_path / "layers" / "sha256" / table.digest[7:]
    (path / "chunks").write_bytes(b"garbage")
    store.budget.bound = MiB
    store.evictor.run()
    assert not path.exists()


def test_directory_being_filled_is_left_alone_for_an_hour(store: Store, clock: Clock) -> None:
    digest = "sha256:" + "c" * 64
    path = store.path(digest)
    (path / "table").write_bytes(bytes(MiB))
    clock.now = path.stat().st_mtime + 10
    store.budget.bound = 1
    store.evictor.run()
    assert (path / "table").exists()
    clock.now += 3700
    store.evictor.run()
    assert not path.exists()


def test_rest_of_a_removal_is_swept_with_the_exclusive_lock(store: Store, tmp_path: Path) -> None:
    rest = tmp_path / "layers" / "sha256" / ".gone-abc-1"
    rest.mkdir()
    (rest / "data").write_bytes(b"x")
    store.lock(True)
    assert not rest.exists()


def test_what_is_written_while_the_store_is_counted_is_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of([MiB] * 4)
    layer = filled(store, table)
    count = store.directory_usage

    def counted(digest: str) -> int:
        found = count(digest)
        store.budget.note_written(MiB)  # by another thread, behind the count
        return found

    monkeypatch.setattr(store, "directory_usage", counted)
    store.evictor.scan()
    assert store.budget.used >= layer.disk_usage + MiB


def test_writes_over_the_bound_start_an_eviction_of_their_own(tmp_path: Path, catalog: Catalog) -> None:
    store = Store(tmp_path, BOUND, catalog)
    try:
        table = table_of([MiB] * 60)
        layer = store.open_layer(table.digest, table)
        for chunk in range(60):
            layer.write(chunk, table.content[chunk])
            assert layer.disk_usage <= BOUND + SEGMENT
        store.evictor.close()
        assert store.evictor.evicted > 0
        assert layer.read(59) == table.content[59] or store.status().passed_by > 0
    finally:
        store.close()


def test_when_nothing_can_go_writes_are_passed_by_at_once(
    tmp_path: Path, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = Clock()
    store = Store(tmp_path, 4 * MiB, catalog, monotonic=ticks)
    try:
        table = table_of([MiB] * 12)
        catalog.pin(Pin("docker://h/r:1", "linux/amd64", "image"), [table.digest])
        layer = store.open_layer(table.digest, table)
        with caplog.at_level(logging.WARNING):
            assert layer.write_run(0, table.content[:7]) == 7
            store.evictor.run()
            assert not layer.write_run(7, table.content[7:])
        assert store.status().passed_by == 1
        assert "the bound is" in caplog.text
        assert [layer.read(chunk) for chunk in range(7)] == table.content[:7]
    finally:
        store.close()


def test_what_nobody_asked_for_pushes_out_what_nobody_uses_and_nothing_else(store: Store, clock: Clock) -> None:
    store.budget.wake = partial(_ignore, store.evictor.run)
    left, read, coming = table_of([MiB] * 6, seed=1), table_of([MiB] * 6, seed=2), table_of([MiB] * 24, seed=3)
    demanded = filled(store, read)
    clock.now += 1000
    filled(store, left).close()  # used last, and nobody has it open
    clock.now += 1000
    layer = store.open_layer(coming.digest, coming)
    kept = [layer.write_run(chunk, [coming.content[chunk]], spare=True) for chunk in range(24)]
    assert demanded.complete and left.digest not in store.digests()
    assert 10 <= sum(kept) == layer.present_bytes // MiB < 24
    assert store.budget.used <= BOUND * 0.9
    assert layer.write(23, coming.content[23]), "a reader's are kept"
    assert demanded.complete


def test_what_nobody_asked_for_goes_before_what_was_read_earlier(store: Store, clock: Clock) -> None:
    table = table_of([MiB] * 16)
    layer = store.open_layer(table.digest, table)
    assert layer.write_run(8, table.content[8:]) == 8
    clock.now += 10
    assert layer.write_run(0, table.content[:8], spare=True) == 8
    store.budget.bound = 12 * MiB
    assert store.evictor.run() > 0
    assert layer.missing(8, 16) == []


def test_unknown_pins_mean_that_nothing_is_evicted(store: Store, catalog: Catalog) -> None:
    layer = filled(store, table_of([MiB] * 22))
    catalog.close()
    assert store.evictor.run() == 0
    assert layer.complete
    with pytest.raises(StoreBroken):
        catalog.pinned()


def test_file_system_without_holes_gives_back_the_whole_layer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("lazyfs.chunks.layer_files.punch_hole", refuse)
    layer = filled(store, table_of([MiB] * 22))
    assert store.evictor.run() >= 22 * MiB
    assert layer.disk_usage == 0 and layer.missing(0, 22) == list(range(22))
