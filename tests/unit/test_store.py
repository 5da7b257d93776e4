"""The store gives the right bytes or none, whatever happened to its files, and keeps them over a restart."""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.holes import punch_hole
from lazyfs.chunks.shape import SEGMENT
from lazyfs.chunks.source import LayerSource
from lazyfs.chunks.store import LayerStore, Store
from lazyfs.errors import StoreBroken
from lazyfs.oci import OCI_LAYER_ZSTD, Descriptor
from lazyfs.units import MiB
from perf.resident import resident_pages
from tests.helpers.chunk_tables import ChunkTable, noise, table_of

Opener = Callable[..., Store]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    """Open the store at tmp_path as often as wanted, each time as after a restart."""
    with ExitStack() as stack:

        def make(bound: int = 64 * MiB) -> Store:
            stack.close()
            catalog = Catalog(tmp_path / "catalog.db")
            store = Store(tmp_path, bound, catalog)
            stack.callback(catalog.close)
            stack.callback(store.close)
            return store

        yield make


def directory(root: Path, table: ChunkTable) -> Path:
    return root / "layers" / "sha256" / table.digest[7:]


def fill(layer: LayerStore, table: ChunkTable) -> None:
    assert layer.write_run(0, table.content) == table.chunk_count


def test_written_chunks_come_back_and_others_do_not(opener: Opener) -> None:
    table = table_of([100, 50], [4096], [1], [MiB, MiB, 7])
    layer = opener().open_layer(table.digest, table)
    assert layer.write(1, table.content[1])
    assert layer.write_run(3, table.content[3:5]) == 2
    assert [layer.read(chunk) for chunk in (1, 3, 4)] == [table.content[chunk] for chunk in (1, 3, 4)]
    assert [layer.has(chunk) for chunk in range(table.chunk_count)] == [False, True, False, True, True, False, False]
    assert layer.missing(0, table.chunk_count) == [0, 2, 5, 6]
    assert layer.read(0) is None
    assert not layer.complete
    assert layer.present_bytes == 50 + 1 + MiB
    assert layer.disk_usage >= MiB


def test_small_chunks_in_the_page_cache_are_read_at_once(opener: Opener, tmp_path: Path) -> None:
    table = table_of([100, 50], [MiB], [4096])
    table.add_file([bytes(4096)], hole=True)
    layer = opener().open_layer(table.digest, table)
    assert layer.read_now(0) is None  # not here
    fill(layer, table)
    assert layer.read(0) == table.content[0]  # which notes the use of the segment
    assert [layer.read_now(chunk) for chunk in (0, 1, 3)] == [table.content[chunk] for chunk in (0, 1, 3)]
    assert layer.read_now(2) is None  # a thread's work
    assert layer.read_now(4) is None  # a hole: nothing to read
    assert not layer.has_read_pages
    data = directory(tmp_path, table) / "data"
    with open(data, "r+b") as file:
        file.write(b"\0")
    assert layer.read_now(0) is None  # not right, and left to `read` to say so
    assert layer.damaged == 0
    assert layer.read(0) is None
    assert layer.damaged == 1
    layer.close()
    assert layer.read_now(1) is None


def test_who_reads_at_once_writes_nothing(tmp_path: Path) -> None:
    """The use of a segment is noted by a thread, every five seconds."""
    clock = [1000.0]
    table = table_of([100])
    catalog = Catalog(tmp_path / "catalog.db")
    store = Store(tmp_path, 64 * MiB, catalog, now=lambda: clock[0])
    layer = store.open_layer(table.digest, table)
    fill(layer, table)
    used = directory(tmp_path, table) / "used"
    before = used.read_bytes()
    clock[0] += 4
    assert layer.read_now(0) == table.content[0]
    assert used.read_bytes() == before
    clock[0] += 4
    assert layer.read_now(0) is None
    assert layer.read(0) == table.content[0]
    assert used.read_bytes() != before
    assert layer.read_now(0) == table.content[0]
    layer.close()
    store.close()
    catalog.close()


def test_what_small_reads_have_had_leaves_the_page_cache(opener: Opener, tmp_path: Path) -> None:
    table = table_of(*[[64 << 10]] * 80)
    layer = opener().open_layer(table.digest, table)
    fill(layer, table)
    data = directory(tmp_path, table) / "data"
    with open(data, "r+b") as file:
        os.fsync(file.fileno())
        file.read()  # all of it is in memory, and clean
        chunks = 0
        while not layer.has_read_pages:
            assert layer.read_now(chunks) == table.content[chunks]
            chunks += 1
        assert 60 <= chunks <= 70
        assert all(resident_pages(data))
        layer.drop_read_pages()
    assert not layer.has_read_pages
    pages = resident_pages(data)
    read = chunks * 16
    assert sum(pages[:read]) <= read // 10  # a page that somebody just holds stays
    assert all(pages[read:])


def test_complete_layer_survives_a_restart(opener: Opener) -> None:
    table = table_of([100, 50], [], [MiB] * 9 + [3])
    layer = opener().open_layer(table.digest, table)
    fill(layer, table)
    assert layer.complete
    again = opener().open_layer(table.digest, table)
    assert again.complete and again.missing(0, table.chunk_count) == []
    assert [again.read(chunk) for chunk in range(table.chunk_count)] == table.content
    assert again.damaged == 0


def test_neighbours_are_joined_and_gaps_are_zeros(opener: Opener, tmp_path: Path) -> None:
    table = table_of([100], [200], [300])
    fill(opener().open_layer(table.digest, table), table)
    data = (directory(tmp_path, table) / "data").read_bytes()
    expected = table.content[0].ljust(4096, b"\0") + table.content[1].ljust(4096, b"\0") + table.content[2]
    assert data == expected


def test_runs_longer_than_one_write_are_cut(opener: Opener) -> None:
    table = table_of(*[[10]] * 1300, [MiB] * 20)
    layer = opener().open_layer(table.digest, table)
    fill(layer, table)
    assert [layer.read(chunk) for chunk in range(table.chunk_count)] == table.content


def test_holes_need_no_disk_and_are_checked_too(opener: Opener) -> None:
    table = table_of([5000])
    table.add_file([bytes(MiB)], hole=True)
    table.add_file([b"\1" * 10], hole=True)  # a table that lies
    table.add_file([noise("tail", 10)])
    layer = opener().open_layer(table.digest, table)
    assert layer.missing(0, 4) == [0, 3]
    assert layer.read(1) == bytes(MiB)
    assert layer.read(2) is None
    assert layer.write_run(0, table.content) == 4
    assert layer.complete
    assert layer.disk_usage <= 16384
    layer.forget()
    assert not layer.complete


def test_wrong_size_is_the_callers_mistake(opener: Opener) -> None:
    table = table_of([10])
    with pytest.raises(ValueError, match="has 10 bytes, not 9"):
        opener().open_layer(table.digest, table).write(0, table.content[0][:9])


def test_wrong_bytes_written_are_never_given_out(opener: Opener) -> None:
    table = table_of([1000])
    layer = opener().open_layer(table.digest, table)
    assert layer.write(0, bytes(1000))
    assert layer.read(0) is None
    assert (layer.has(0), layer.damaged) == (False, 1)
    assert layer.write(0, table.content[0])
    assert layer.read(0) == table.content[0]


def test_copy_from_another_layer(opener: Opener) -> None:
    old, new = table_of([500], [MiB], seed=1), table_of([9], [500], seed=2)
    new.content[1] = old.content[0]
    store = opener()
    source, target = store.open_layer(old.digest, old), store.open_layer(new.digest, new)
    assert target.copy_from(source, 0, 1) is None
    fill(source, old)
    assert target.copy_from(source, 1, 1) is None
    assert target.copy_from(source, 0, 1) == old.content[0]
    assert target.read(1) == old.content[0]


def test_layers_are_shared_and_closed_with_the_last_user(opener: Opener) -> None:
    table = table_of([10])
    store = opener()
    first, second = store.open_layer(table.digest, table), store.open_layer(table.digest, table)
    assert first is second is store.layer(table.digest)
    first.close()
    assert store.layer(table.digest) is second and store.is_mounted(table.digest)
    assert second.write(0, table.content[0])
    second.close()
    assert store.layer(table.digest) is None and not store.is_mounted(table.digest)
    assert second.read(0) is None
    assert second.write(0, table.content[0]) in (True, False)
    assert store.open_layer(table.digest, table).read(0) == table.content[0]


def test_another_shape_begins_anew(opener: Opener, tmp_path: Path) -> None:
    table, other = table_of([MiB, 10]), table_of([10], [20], [30])
    other.digest = table.digest
    fill(opener().open_layer(table.digest, table), table)
    layer = opener().open_layer(other.digest, other)
    assert layer.missing(0, 3) == [0, 1, 2]
    assert (directory(tmp_path, table) / "data").stat().st_size == 0


def test_modes_are_private(opener: Opener, tmp_path: Path) -> None:
    table = table_of([10])
    store = opener()
    fill(store.open_layer(table.digest, table), table)
    store.write_toc(table.digest, b"{}")
    store.lock(True)
    for path in (tmp_path / "layers").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600


def test_source_and_toc_round_trip_and_damage_is_absence(opener: Opener, tmp_path: Path) -> None:
    table = table_of([10])
    store = opener()
    assert store.source(table.digest) is None and store.read_toc(table.digest) is None
    descriptor = Descriptor(OCI_LAYER_ZSTD, table.digest, 77, {"a": "b"})
    source = LayerSource(descriptor, "zstd-chunked", "h/r", "sha256:" + "0" * 64, True, 12, "")
    store.set_source(table.digest, source)
    store.write_toc(table.digest, b"toc")
    assert store.source(table.digest) == source and store.read_toc(table.digest) == b"toc"
    file = directory(tmp_path, table) / "source"
    raw = file.read_bytes()
    for damage in (b"", raw[:40], raw.replace(b'"version": 1', b'"version": 0'), b"[1]", b"\xff\xfe" * 40):
        file.write_bytes(damage)
        assert store.source(table.digest) is None
    file.write_bytes(raw.replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(StoreBroken, match="newer lazyfs"):
        store.source(table.digest)


def test_newer_chunks_file_is_refused_and_left_alone(opener: Opener, tmp_path: Path) -> None:
    table = table_of([10])
    fill(opener().open_layer(table.digest, table), table)
    store = opener()
    file = directory(tmp_path, table) / "chunks"
    newer = file.read_bytes()[:8] + b"\3\0\0\0" + file.read_bytes()[12:]
    file.write_bytes(newer)
    with pytest.raises(StoreBroken, match="newer lazyfs"):
        store.open_layer(table.digest, table)
    assert file.read_bytes() == newer


def test_reads_and_writes_from_many_threads(opener: Opener) -> None:
    table = table_of(*[[300_000, 5, 9000]] * 30)
    store = opener(bound=5 * MiB)
    layer = store.open_layer(table.digest, table)
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            chunk = chance.randrange(table.chunk_count)
            found = layer.read(chunk)
            if found is None:
                layer.write(chunk, table.content[chunk])
            elif found != table.content[chunk]:
                wrong.append(chunk)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.evictor.close()
    assert wrong == []
    assert layer.damaged == 0, "an eviction beside a reader was taken for damage"
    assert store.evictor.scan() <= 5 * MiB + SEGMENT


class World:
    """A store under attack, and what may be expected of it."""

    BOUND = 6 * MiB
    TABLES = (table_of([MiB] * 5, [10], [MiB, 1000], seed=1), table_of([3000], [2 * MiB] * 3, [5, 5], seed=2))

    def __init__(self, root: Path) -> None:
        self.root = root
        self.catalog = Catalog(root / "catalog.db")
        self.open()

    def open(self) -> None:
        self.store = Store(self.root, self.BOUND, self.catalog)
        self.layers = [self.store.open_layer(table.digest, table) for table in self.TABLES]

    def close(self) -> None:
        self.store.close()

    def do(self, call: str, which: int, chunk: int, more: int) -> None:
        table, layer = self.TABLES[which], self.layers[which]
        chunk %= table.chunk_count
        where = directory(self.root, table)
        if call == "write":
            layer.write_run(chunk, table.content[chunk : chunk + 1 + more % 3])
        elif call == "read":
            assert layer.read(chunk) in (None, table.content[chunk])
        elif call == "evict":
            self.store.evictor.run()
        elif call == "reopen":
            self.close()
            self.open()
        elif call in ("chunks", "used"):
            size = (where / call).stat().st_size
            garbage = noise(more, size)
            (where / call).write_bytes(garbage if more % 2 else (where / call).read_bytes()[:64] + garbage[64:])
        else:
            self.hurt_data(call, where / "data", table.chunk_data_offset[chunk], table.chunk_size[chunk], more)

    def hurt_data(self, call: str, data: Path, offset: int, size: int, more: int) -> None:
        with data.open("r+b") as handle:
            if call == "flip":
                at = offset + more % size
                byte = os.pread(handle.fileno(), 1, at)
                os.pwrite(handle.fileno(), bytes([byte[0] ^ (1 << more % 8)]) if byte else b"x", at)
            elif call == "punch":
                punch_hole(handle.fileno(), offset, 1 + more % size)
            else:
                handle.truncate(offset + more % size)

    def check(self) -> None:
        for table, layer in zip(self.TABLES, self.layers, strict=True):
            for chunk in range(table.chunk_count):
                assert layer.read(chunk) in (None, table.content[chunk])
        self.store.evictor.close()
        assert self.store.evictor.scan() <= self.BOUND + SEGMENT


_CALLS = st.lists(
    st.tuples(
        st.sampled_from(["write"] * 5 + ["read", "evict", "reopen", "chunks", "used", "flip", "punch", "truncate"]),
        st.integers(0, 1),
        st.integers(0, 20),
        st.integers(0, 1 << 20),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_CALLS)
def test_never_wrong_bytes_whatever_happens(calls: list[tuple[str, int, int, int]]) -> None:
    with TemporaryDirectory() as root:
        world = World(Path(root))
        try:
            for call in calls:
                world.do(*call)
            world.check()
        finally:
            world.close()
            world.catalog.close()
