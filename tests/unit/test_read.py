"""Every read of every file is the right bytes, whatever is evicted, damaged or asked for at the same time."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs import digest
from lazyfs.chunks import frames
from lazyfs.chunks.layer import ServedLayer
from lazyfs.errors import LayerQuarantined
from lazyfs.units import PAGE
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import Node, forget_chunks, node
from tests.helpers.tars import file, hardlink, tar_of

SIZES = [0, 1, 10, 4095, 4096, 4097, 9000, 20_000, 65_536, 100_001, 3, 2, 1]
CONTENT = {f"f{i:02}".encode(): noise(("read", i), size) for i, size in enumerate(SIZES)}


def layers() -> list[LayerBlob]:
    tar = tar_of(*(file(name, data) for name, data in CONTENT.items()), hardlink("link", "f07"))
    shapes = [(4096, 0), (4096, 16_384), (1 << 20, 1 << 20), (100, 3000)]
    return [zstd_chunked_layer(tar, chunk_size=chunk, frame_size=frame) for chunk, frame in shapes]


LAYERS = layers()


@pytest.mark.parametrize("blob", LAYERS, ids=["frame a chunk", "chunks share frames", "large", "small chunks"])
async def test_whole_files_and_each_byte_crosses_the_network_once(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        for name, data in CONTENT.items():
            assert await one.read(layer, name) == data
        assert await one.read(layer, b"link") == CONTENT[b"f07"]
        assert registry.bytes_sent("/blobs/") <= blob.payload_end
        assert one.remote.in_flight() == 0 or registry.bytes_sent("/blobs/") > 0


async def test_second_read_asks_nobody(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, memory=0) as one:
        layer = one.serve(LAYERS[1], registry)
        for name in CONTENT:
            await one.read(layer, name)
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
        registry.clear_log()
        for name, data in CONTENT.items():
            assert await one.read(layer, name) == data
        assert registry.count() == 0
        assert one.reader.counters.from_store >= sum(SIZES)


async def test_memory_serves_what_was_just_read(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(LAYERS[2], registry)
        await one.read(layer, b"f09")
        before = one.reader.counters.from_memory
        assert await one.read(layer, b"f09", 50_000, 100) == CONTENT[b"f09"][50_000:50_100]
        assert one.reader.counters.from_memory > before


async def test_chunks_of_another_layer_are_copied(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(LAYERS[0], registry)
        by_digest = {
            layer.table.chunk_digest(chunk): CONTENT[b"f07"][offset : offset + 4096]
            for chunk, offset in zip(_chunks(layer, b"f07"), range(0, 20_000, 4096), strict=True)
        }
        one.copies = lambda layer, digest: by_digest.get(digest)
        assert await one.read(layer, b"f07") == CONTENT[b"f07"]
        assert registry.count() == 0
        assert one.reader.counters.from_other_layer == 20_000
        assert all(layer.store.has(chunk) for chunk in _chunks(layer, b"f07"))


@pytest.mark.parametrize("what", ["decoding", "hashing"])
async def test_frames_are_taken_apart_on_several_threads_at_once(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Both requests are in the midst of it at the same time: neither waits for the other, nor for the loop."""
    meeting = threading.Barrier(2)
    met: set[int] = set()

    def meet() -> None:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            meeting.wait(10)

    def raw_of(data: bytes) -> bytes:
        meet()
        return digest.raw_of(data)

    class Meeting:
        def decode_prefix(self, data: bytes | memoryview, size: int, /) -> bytes:
            meet()
            return frames.decoder().decode_prefix(data, size)

    if what == "decoding":
        monkeypatch.setattr(frames, "decoder_for", lambda form: Meeting())
    else:
        monkeypatch.setattr(frames, "digests", SimpleNamespace(raw_of=raw_of, of=digest.of, text=digest.text))
    results: dict[bytes, bytes] = {}
    async with node(scratch) as one:
        layer = one.serve(LAYERS[0], registry)

        async def read(name: bytes) -> None:
            results[name] = await one.read(layer, name, 0, 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, b"f08")
            nursery.start_soon(read, b"f09")
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
    assert results == {name: CONTENT[name][:100] for name in (b"f08", b"f09")}
    assert len(met) == 2 and threading.get_ident() not in met


def _chunks(layer: ServedLayer, name: bytes) -> range:
    row = layer.table.find(name)
    assert row is not None
    return layer.table.file_chunks(row)


async def test_quarantine_ends_reads_of_what_is_here_already(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(LAYERS[1], registry)
        await one.read(layer, b"f07")
        layer.quarantine = "its TOC lies"
        with pytest.raises(LayerQuarantined, match="its TOC lies"):
            await one.read(layer, b"f07")


async def test_reader_cancelled_in_the_middle_gets_no_error(scratch: Path, registry: FakeRegistry) -> None:
    registry.latency = 0.2
    async with node(scratch) as one:
        layer = one.serve(LAYERS[0], registry)
        with trio.move_on_after(0.02) as scope:
            await one.read(layer, b"f09")
        assert scope.cancelled_caught
        registry.latency = 0
        assert await one.read(layer, b"f09") == CONTENT[b"f09"]


READS = st.lists(
    st.tuples(
        st.sampled_from(sorted(CONTENT)), st.integers(0, 110_000), st.sampled_from([1, 100, 4096, 30_000, 1 << 20])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), blob=st.sampled_from(LAYERS), memory=st.sampled_from([0, 50_000, 16 << 20]))
def test_any_read_equals_the_slice(data: st.DataObject, blob: LayerBlob, memory: int, registry: FakeRegistry) -> None:
    """In random order, side by side, under evictions and with a store that changes bytes."""
    rounds = data.draw(st.lists(st.tuples(READS, st.sampled_from(["", "evict", "damage"])), min_size=1, max_size=4))

    async def scenario(root: Path) -> None:
        async with node(root, memory=memory) as one:
            layer = one.serve(blob, registry)

            async def check(name: bytes, offset: int, size: int) -> None:
                assert await one.read(layer, name, offset, size) == CONTENT[name][offset : offset + size]

            for reads, mischief in rounds:
                async with trio.open_nursery() as nursery:
                    for read in reads:
                        nursery.start_soon(check, *read)
                    if mischief == "evict":
                        await trio.sleep(0)
                        forget_chunks(layer)
                    elif mischief == "damage":
                        _damage(one, layer)
            with trio.fail_after(10):
                while one.remote.in_flight():
                    await trio.sleep(0.001)

    with tempfile.TemporaryDirectory() as scratch:
        trio.run(scenario, Path(scratch) / "node")


def _damage(one: Node, layer: ServedLayer) -> None:
    """Turn bits over in the store's file."""
    path = one.store.path(layer.digest) / "data"
    if path.exists() and path.stat().st_size:
        random.seed(1)
        with path.open("r+b") as handle:
            for _ in range(10):
                at = random.randrange(path.stat().st_size)
                byte = os.pread(handle.fileno(), 1, at)
                os.pwrite(handle.fileno(), bytes([byte[0] ^ 1]) if byte else b"", at)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=READS, blob=st.sampled_from(LAYERS))
def test_every_chunk_is_fetched_at_most_once(
    reads: list[tuple[bytes, int, int]], blob: LayerBlob, registry: FakeRegistry
) -> None:
    async def scenario(root: Path) -> None:
        registry.clear_log()
        async with node(root) as one:
            layer = one.serve(blob, registry)
            async with trio.open_nursery() as nursery:
                for name, offset, size in reads:
                    nursery.start_soon(one.read, layer, name, offset, size)
            for name, data in CONTENT.items():
                assert await one.read(layer, name) == data
            with trio.fail_after(10):
                while one.remote.in_flight():
                    await trio.sleep(0.001)
        seen: set[int] = set()
        for request in registry.matching("GET", "/blobs/"):
            start, _, end = request.range.removeprefix("bytes=").partition("-")
            bytes_of = set(range(int(start), int(end) + 1))
            assert not bytes_of & seen
            seen |= bytes_of

    with tempfile.TemporaryDirectory() as scratch:
        trio.run(scenario, Path(scratch) / "node")


@pytest.mark.parametrize("blob", LAYERS, ids=["frame a chunk", "chunks share frames", "large", "small chunks"])
async def test_data_space_is_the_files_in_their_places_and_zeros(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        table = layer.table
        whole = bytearray(table.data_size + 3 * PAGE)  # it may be read beyond its end
        for name, data in CONTENT.items():
            at = table.data_offset[table.find(name)]
            whole[at : at + len(data)] = data
        order = random.Random(7)
        ranges = [(0, len(whole)), (table.data_size, PAGE), (0, 0)]
        ranges += [(order.randrange(0, table.data_size, PAGE), order.randrange(1, 9) * PAGE) for _ in range(40)]
        for at, size in ranges:
            wanted = bytes(whole[at : at + size]).ljust(size, b"\0")
            assert bytes(await one.reader.read_data(layer, at, size)) == wanted, (at, size)


@pytest.mark.parametrize("memory", [0, 16 << 20])
async def test_small_files_that_the_store_has_at_hand_need_no_wait(
    scratch: Path, registry: FakeRegistry, memory: int
) -> None:
    async with node(scratch, memory=memory) as one:
        layer = one.serve(LAYERS[2], registry)
        assert not await one.filler.fill(layer)
        await one.reader.read_data(layer, 0, layer.table.data_size)  # which notes the use
        one.memory.forget_layer(layer.serial)
        registry.clear_log()
        before = one.reader.counters.from_store
        small = {name: data for name, data in CONTENT.items() if 0 < len(data) <= 20_000 and len(data) % PAGE}
        for name, data in small.items():
            at, size = layer.table.data_offset[layer.table.find(name)], -len(data) // PAGE * -PAGE
            found = one.reader.begin_data(layer, at, size)
            assert isinstance(found, (bytes, bytearray, memoryview))
            assert bytes(found) == data.ljust(size, b"\0")
        assert one.reader.counters.from_store == before + sum(map(len, small.values()))
        _damage_file(one, layer, b"f02")
        at = layer.table.data_offset[layer.table.find(b"f02")]
        assert bytes(await one.reader.read_data(layer, at, PAGE)) == CONTENT[b"f02"].ljust(PAGE, b"\0")
        assert layer.store.damaged == 1
        layer.quarantine = "it was a lie"
        with pytest.raises(LayerQuarantined):
            one.reader.begin_data(layer, at, PAGE)


def _damage_file(one: Node, layer: ServedLayer, name: bytes) -> None:
    """Turn a bit of a file over in the store."""
    at = layer.table.data_offset[layer.table.find(name)]
    with (one.store.path(layer.digest) / "data").open("r+b") as handle:
        byte = os.pread(handle.fileno(), 1, at)
        os.pwrite(handle.fileno(), bytes([byte[0] ^ 1]), at)


async def test_data_space_brings_the_chunks_of_its_pages_alone(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(LAYERS[0], registry)
        row = layer.table.find(b"f09")
        for page in (3, 9):
            await one.reader.read_data(layer, layer.table.data_offset[row] + page * PAGE, PAGE)
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
        assert layer.store.present_bytes == 2 * PAGE


async def test_data_space_of_a_quarantined_layer_is_an_error(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(LAYERS[1], registry)
        assert await one.reader.read_data(layer, 0, PAGE)
        layer.quarantine = "it was a lie"
        with pytest.raises(LayerQuarantined):
            await one.reader.read_data(layer, 0, PAGE)
