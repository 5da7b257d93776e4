"""Whoever reads in order finds chunks verified: only right ones, only what is in the store, and within the memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.layer_store import LayerStore
from lazyfs.errors import LayerQuarantined
from lazyfs.limits import READERS
from lazyfs.units import KiB, MiB
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of

CHUNK = 64 * KiB
CHUNKS = 40
CONTENT = noise("ahead", CHUNKS * CHUNK - 100)  # so that the next file begins behind a gap
BLOB = zstd_chunked_layer(tar_of(file("big", CONTENT), file("next", noise("next", 100_000))), chunk_size=CHUNK)


async def stored(one: Node, registry: FakeRegistry, memory: int = 16 * MiB) -> ServedLayer:
    """Serve a layer that is in the store whole, with nothing of it in memory."""
    layer = one.serve(BLOB, registry)
    one.memory.resize(0)
    await one.read(layer, b"big")
    await one.read(layer, b"next")
    with trio.fail_after(10):
        while one.remote.in_flight() or not layer.store.complete:
            await trio.sleep(0.001)
    one.memory.resize(memory)
    registry.clear_log()
    one.reader.counters.from_store = one.reader.counters.from_memory = 0
    return layer


async def read(one: Node, layer: ServedLayer, first: int, last: int, step: int = 1) -> None:
    """Read chunks `first` to `last` of the big file in data space, one after another."""
    row = layer.table.find(b"big")
    assert row is not None
    start = layer.table.data_offset[row]
    for chunk in range(first, last + 1, step):
        found = await one.reader.read_data(layer, start + chunk * CHUNK, CHUNK)
        assert bytes(found) == CONTENT[chunk * CHUNK : (chunk + 1) * CHUNK].ljust(CHUNK, b"\0"), chunk


def held(one: Node, layer: ServedLayer) -> list[int]:
    """Return the chunks in memory."""
    return [chunk for chunk in range(layer.table.chunk_count) if (layer.serial, chunk) in one.memory]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


def damage(one: Node, layer: ServedLayer, chunk: int) -> None:
    """Turn a bit of a chunk over in the store's file."""
    with (one.store.path(layer.digest) / "data").open("r+b") as data:
        at = layer.table.chunk_data_offset[chunk] + 5
        byte = os.pread(data.fileno(), 1, at)
        os.pwrite(data.fileno(), bytes([byte[0] ^ 1]), at)


async def test_what_is_wanted_next_is_there_before(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, memory=8 * MiB) as one:
        layer = await stored(one, registry, memory=8 * MiB)
        await read(one, layer, 0, 2)
        window = 1 * MiB // CHUNK  # an eighth of the memory
        await until(lambda: held(one, layer) == list(range(3 + window)))
        before = one.reader.counters.from_store
        await read(one, layer, 3, CHUNKS - 1)
        assert held(one, layer) == list(range(CHUNKS))  # and nothing of the next file
        assert before == 3 * CHUNK
        assert one.reader.counters.from_store == len(CONTENT)  # each chunk counts once, when it is read
        assert registry.count() == 0


async def test_whole_files_are_read_ahead_too(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry)
        for chunk in range(3):
            at = chunk * CHUNK
            assert await one.read(layer, b"big", at, CHUNK) == CONTENT[at : at + CHUNK]
        await until(lambda: len(held(one, layer)) > 3)
        assert await one.read(layer, b"big") == CONTENT


async def test_requests_over_the_edges_of_chunks(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry)
        for at in range(0, len(CONTENT), 100_000):
            assert await one.read(layer, b"big", at, 100_000) == CONTENT[at : at + 100_000]
        assert one.reader.counters.from_store == len(CONTENT)


@pytest.mark.parametrize("order", [range(0, CHUNKS, 2), range(CHUNKS - 1, -1, -1), [5, 6] * 10], ids=str)
async def test_who_jumps_about_gets_what_was_asked_for(scratch: Path, registry: FakeRegistry, order: range) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry)
        for chunk in order:
            await read(one, layer, chunk, chunk)
        assert held(one, layer) == sorted(set(order))


async def test_a_damaged_chunk_ahead_is_fetched_again(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry)
        damage(one, layer, 6)
        await read(one, layer, 0, 2)
        await until(lambda: 7 in held(one, layer))
        assert 6 not in held(one, layer)
        assert layer.store.damaged == 0  # nobody has asked for it
        await read(one, layer, 3, CHUNKS - 1)
        assert layer.store.damaged == 1
        assert registry.count() > 0


async def test_what_is_not_in_the_store_is_no_guess_to_fetch(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry)
        await read(one, layer, 0, 1)
        layer.store.forget()
        one.memory.forget_layer(layer.serial)
        await read(one, layer, 2, 2)
        await until(lambda: one.remote.in_flight() == 0)
        await read(one, layer, 3, CHUNKS - 1)


async def test_a_quarantined_layer_leaves_nothing(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry)
        await read(one, layer, 0, 1)
        looked, check = [], LayerStore._checked

        def seen(self: LayerStore, data: bytes, chunk: int) -> bytes | None:
            looked.append(chunk)
            if chunk == 6:
                trio.from_thread.run_sync(quarantine)
            return check(self, data, chunk)

        def quarantine() -> None:
            layer.quarantine = "its TOC lies"
            one.memory.forget_layer(layer.serial)

        monkeypatch.setattr(LayerStore, "_checked", seen)
        with suppress(LayerQuarantined):  # it may come before that
            await read(one, layer, 2, 2)
        await until(lambda: 12 in looked)
        with pytest.raises(LayerQuarantined):
            await read(one, layer, 12, 12)
        await until(lambda: not any((layer.serial, chunk) in one.reader._ahead for chunk in range(CHUNKS)))
        assert held(one, layer) == []


async def test_a_crowd_of_readers_verifies_each_chunk_once(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many as are looked ahead of, and a memory that holds little: nothing is pushed out before it is read."""
    readers = 2 * READERS
    each = CHUNKS // readers
    memory = 24 * CHUNK
    async with node(scratch, memory=memory) as one:
        layer = await stored(one, registry, memory)
        hashed, check = [], LayerStore._is_right

        def counted(self: LayerStore, data: bytes | memoryview, chunk: int) -> bool:
            hashed.append(chunk)
            return check(self, data, chunk)

        monkeypatch.setattr(LayerStore, "_is_right", counted)
        for step in range(each):
            for reader in range(readers):
                await read(one, layer, reader * each + step, reader * each + step)
                assert one.memory.statistics().size <= memory
        assert len(hashed) <= CHUNKS + READERS * 3  # at their ends they look into the next reader's part
        assert set(hashed) == set(range(CHUNKS))


async def test_a_small_memory_is_left_to_what_was_asked_for(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = await stored(one, registry, memory=5 * CHUNK)  # an eighth is less than a chunk
        for chunk in range(CHUNKS):
            await read(one, layer, chunk, chunk)
            assert max(held(one, layer), default=-1) <= chunk
        assert one.reader.counters.from_store == len(CONTENT)


async def test_what_comes_after_its_layer_was_dropped_is_nobodys(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another table's by then: of the same blob, by what another image says of it."""
    gate = threading.Event()
    real = LayerStore.read_in_order

    def slow(self: LayerStore, chunks: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
        for item in real(self, chunks):
            gate.wait(10)
            yield item

    async with node(scratch) as one:
        layer = await stored(one, registry)
        monkeypatch.setattr(LayerStore, "read_in_order", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, one, layer, 0, 4)
            await until(lambda: (layer.serial, 3) in one.reader._ahead)
            nursery.cancel_scope.cancel()
        layer.dropped = True
        one.memory.forget_layer(layer.serial)
        gate.set()
        await until(lambda: not one.reader._ahead._promised)
        assert held(one, layer) == []


async def test_a_reader_who_rested_waits_for_his_turn_alone(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others who read on all the time keep no thread to themselves."""
    names = [f"file-{number}" for number in range(READERS + 1)]
    blob = zstd_chunked_layer(tar_of(*(file(name, noise(name, CHUNKS * CHUNK)) for name in names)), chunk_size=CHUNK)
    async with node(scratch, memory=64 * MiB) as one:
        layer = one.serve(blob, registry)
        one.memory.resize(0)
        for name in names:
            await one.read(layer, name.encode())
        await until(lambda: not one.remote.in_flight() and layer.store.complete)
        one.memory.resize(2 * MiB)
        window = 2 * MiB // (2 * READERS) // CHUNK
        looked_at = 0
        real = LayerStore.read_in_order

        def slowly(self: LayerStore, chunks: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
            nonlocal looked_at
            for item in real(self, chunks):
                looked_at += 1
                time.sleep(0.005)  # longer than a reader takes to ask for more
                yield item

        monkeypatch.setattr(LayerStore, "read_in_order", slowly)

        async def read_on(name: str, first: int, stop: int) -> int:
            """Return how many chunks were looked at, for anybody, during the longest of these reads."""
            longest = 0
            for chunk in range(first, stop):
                before = looked_at
                await one.read(layer, name.encode(), chunk * CHUNK, CHUNK)
                longest = max(longest, looked_at - before)
            return longest

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await read_on(names[0], 0, 6)
                await trio.sleep(1.2)  # after a second he makes room for others
                for name in names[1:]:
                    nursery.start_soon(read_on, name, 0, CHUNKS)
                await until(lambda: looked_at > 4 * READERS)
                longest = await read_on(names[0], 6, CHUNKS)
        assert longest <= 2 * (READERS + 1) * (window + 1), "a thread goes back when what it was given is done"
