"""Missing chunks from a registry: what is asked for, in which requests, and who waits for whom."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lazyfs.chunks import flights
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.link import Link
from lazyfs.chunks.windows import WINDOW
from lazyfs.errors import BlobMissing, DaemonFault, DigestMismatch, LayerQuarantined, ReadDeadline, RegistryError
from lazyfs.limits import MAX_FRAMES
from lazyfs.registry.repository import ByteStream
from tests.helpers.blobs import LayerBlob, flipped_chunk, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault, Request
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of

KIB = 1 << 10
CHUNK = 64 * KIB
BIG = noise("big", 8 << 20)
SMALL = {f"s{i:02}".encode(): noise(("small", i), 500 + i) for i in range(20)}


def make_blob() -> LayerBlob:
    """One file of 128 frames that do not compress, then small files that share a frame."""
    tar = tar_of(file("big", BIG), *(file(name, data) for name, data in SMALL.items()))
    return zstd_chunked_layer(tar, chunk_size=CHUNK, frame_size=CHUNK)


BLOB = make_blob()


def ranges(requests: list[Request]) -> list[tuple[int, int]]:
    """The (start, size) of each request, all of them single ranges."""
    out = []
    for request in requests:
        start, _, end = request.range.removeprefix("bytes=").partition("-")
        out.append((int(start), int(end) - int(start) + 1))
    return out


def big_chunks(layer: ServedLayer) -> range:
    row = layer.table.find(b"big")
    assert row is not None
    return layer.table.file_chunks(row)


async def take(one: Node, layer: ServedLayer, chunk: int, priority: Priority = Priority.DEMAND) -> bytes:
    return await one.remote.get(layer, chunk, priority, big_chunks(layer)[-1])


async def landed(one: Node) -> None:
    with trio.fail_after(10):
        while one.remote.in_flight():
            await trio.sleep(0.001)


class Gated:
    """A repository whose fetches wait for a gate each, and that can be made to fail."""

    name = "image"
    host = "gated"

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.asked: list[tuple[int, int]] = []
        self.open = threading.Event()
        self.errors: list[BaseException] = []

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        self.asked.append((blob_offset, size))
        assert self.open.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        return _Bytes(self.blob[blob_offset : blob_offset + size])


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int) -> bytes:
        out, self._data = self._data[:size], self._data[size:]
        return out

    def close(self) -> None:
        pass

    def reject(self, reason: str) -> None:
        pass

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *args: object) -> None:
        pass


async def test_one_chunk_is_one_range_of_its_frame(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        chunk = big_chunks(layer)[5]
        assert await take(one, layer, chunk) == BIG[5 * CHUNK : 6 * CHUNK]
        await landed(one)
        frame = layer.table.chunk_frame[chunk]
        assert ranges(registry.matching("GET", "/blobs/")) == [BLOB.frames[frame]]
        assert layer.store.has(chunk)
        assert layer.bytes_by_priority == [BLOB.frames[frame][1], 0, 0]


async def test_sequential_reads_grow_their_ranges_up_to_the_files_end(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        for chunk in big_chunks(layer):
            await one.reader.chunk(layer, chunk, Priority.DEMAND, big_chunks(layer)[-1])
        await landed(one)
        asked = sorted(ranges(registry.matching("GET", "/blobs/")))
        assert len(asked) <= 8
        sizes = [size for _, size in asked]
        assert sizes[:-1] == sorted(sizes[:-1])
        assert max(sizes) <= WINDOW
        last = layer.table.chunk_frame[big_chunks(layer)[-1]]
        assert sum(sizes) == sum(BLOB.frames[last])  # each byte once, none behind the file


async def test_scattered_reads_fetch_no_more_than_their_frames(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        wanted = [big_chunks(layer)[i] for i in (90, 3, 60, 31, 7, 120)]
        for chunk in wanted:
            await take(one, layer, chunk)
        assert sum(size for _, size in ranges(registry.matching("GET", "/blobs/"))) == sum(
            BLOB.frames[layer.table.chunk_frame[chunk]][1] for chunk in wanted
        )


async def test_everybody_who_wants_a_frame_waits_for_the_same_request(scratch: Path) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        chunk = big_chunks(layer)[0]
        results: list[bytes] = []

        async def ask() -> None:
            results.append(await take(one, layer, chunk))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            source.open.set()
        assert results == [BIG[:CHUNK]] * 10
        assert len(source.asked) == 1


async def test_files_of_one_frame_are_fetched_once(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the frame has arrived and the store is still writing it."""
    async with node(scratch, memory=0) as one:
        layer = one.serve(BLOB, registry)
        gate, writing = threading.Event(), threading.Event()
        real = layer.store.write_run

        def slow(first: int, pieces: list[bytes], *how: Any) -> int:
            writing.set()
            assert gate.wait(10)
            return real(first, pieces, *how)

        monkeypatch.setattr(layer.store, "write_run", slow)
        for name, data in SMALL.items():
            assert await one.read(layer, name) == data
        assert await trio.to_thread.run_sync(writing.wait, 10)
        gate.set()
        await landed(one)
        assert registry.count("GET", "/blobs/") <= 2  # the small files may straddle two frames


async def test_reads_of_several_chunks_are_one_request(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        for start in (0, 40, 80):
            registry.clear_log()
            assert (
                await one.read(layer, b"big", start * CHUNK + 5, 20 * CHUNK) == BIG[start * CHUNK + 5 :][: 20 * CHUNK]
            )
            assert registry.count("GET", "/blobs/") == 1


async def test_cancelled_reader_leaves_the_flight_to_the_others(scratch: Path) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        results: list[bytes] = []
        scopes = [trio.CancelScope() for _ in range(4)]

        async def ask(scope: trio.CancelScope) -> None:
            with scope:
                results.append(await one.read(layer, b"big", 0, 100))

        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(ask, scope)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for scope in scopes[:3]:
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked(0.01)
            source.open.set()
        assert results == [BIG[:100]]
        assert len(source.asked) == 1
        await landed(one)


async def test_all_readers_cancelled_leaves_nothing_in_flight(scratch: Path) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        with trio.move_on_after(0.05):
            await one.read(layer, b"big")
        assert one.remote.in_flight() > 0
        source.open.set()
        await landed(one)
        assert await one.read(layer, b"big") == BIG


async def test_read_time_is_bounded_whatever_the_source_does(scratch: Path) -> None:
    async with node(scratch, read_timeout=0.2) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        began = trio.current_time()
        with pytest.raises(ReadDeadline):
            await take(one, layer, 0)
        assert trio.current_time() - began < 2
        source.open.set()


async def test_reader_that_joins_an_old_flight_has_its_own_time(scratch: Path) -> None:
    """The flight ends with its first reader's time, the second reader then asks for itself."""
    async with node(scratch, read_timeout=0.6) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        source.errors = [_temporary()] * 3
        source.open.set()
        outcome: dict[str, bytes | RegistryError] = {}

        async def ask(name: str) -> None:
            try:
                outcome[name] = await one.read(layer, b"big", 0, 10)
            except RegistryError as error:
                outcome[name] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "first")
            await trio.sleep(0.3)
            nursery.start_soon(ask, "second")
        assert isinstance(outcome["first"], (RegistryError, bytes))
        assert outcome["second"] == BIG[:10]


def _temporary() -> RegistryError:
    error = RegistryError("gated", "for a moment")
    error.temporary = True
    return error


async def test_demand_that_joins_ends_the_pause_of_a_background_flight(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flights, "_BACKOFF", (0.01, 0.01, 0.01, 40))  # seconds
    async with node(scratch, read_timeout=120) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        errors = [_temporary() for _ in range(4)]
        source.errors = list(errors)
        source.open.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.remote.bring, layer, 0, 10, Priority.BACKGROUND)
            with trio.fail_after(20):
                while layer.trouble is not errors[-1]:  # it rests for forty seconds then
                    await trio.sleep(0.01)
            with trio.fail_after(20):
                await take(one, layer, 3)


async def test_demand_promotes_what_background_has_queued(scratch: Path) -> None:
    async with node(scratch, connections=2) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            for first in (0, 20, 40):  # one runs, two wait
                nursery.start_soon(one.remote.bring, layer, first, first + 10, Priority.BACKGROUND)
                await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(take, one, layer, 45)
            with trio.fail_after(5):
                while len(source.asked) < 2:
                    await trio.sleep(0.001)
            assert source.asked[1][0] == BLOB.frames[40][0]
            source.open.set()


async def test_bring_asks_for_what_is_not_under_way(scratch: Path) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, one, layer, 5)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(one.remote.bring, layer, 0, 10, Priority.PREFETCH)
            await trio.testing.wait_all_tasks_blocked(0.01)
            source.open.set()
        frames = BLOB.frames
        spans = [(0, 5), (5, 6), (6, 10)]
        assert sorted(source.asked) == [(frames[a][0], sum(frames[b - 1]) - frames[a][0]) for a, b in spans]
        assert layer.store.missing(0, 10) == []


async def test_wrong_bytes_once_are_fetched_again(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        registry.fault(Fault.FLIP, path="/blobs/", times=1)
        assert await one.read(layer, b"big", 0, 10 * CHUNK) == BIG[: 10 * CHUNK]
        assert [type(error) for error in one.errors] != []


async def test_wrong_bytes_fail_their_own_frame_only(scratch: Path, registry: FakeRegistry) -> None:
    bad = flipped_chunk(BLOB, b"big", 4)
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        registry.blobs[BLOB.digest] = bad.blob
        outcome: dict[int, bytes | Exception] = {}

        async def ask(chunk: int) -> None:
            try:
                outcome[chunk] = await take(one, layer, chunk)
            except Exception as error:
                outcome[chunk] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_bring_quietly, one, layer, 0, 10)
            await trio.testing.wait_all_tasks_blocked(0)
            for chunk in range(10):
                nursery.start_soon(ask, chunk)
        good = {chunk: BIG[chunk * CHUNK : (chunk + 1) * CHUNK] for chunk in range(10) if chunk != 4}
        assert {chunk: data for chunk, data in outcome.items() if chunk != 4} == good
        assert not isinstance(outcome[4], bytes)
        assert not layer.store.has(4)
        with trio.fail_after(10):  # what was read ahead may still be on its way
            while one.remote.in_flight():
                await trio.sleep(0.01)


async def _bring_quietly(one: Node, layer: ServedLayer, first: int, stop: int) -> None:
    with pytest.raises(Exception, match=r"digest|zstd"):
        await one.remote.bring(layer, first, stop, Priority.PREFETCH)


async def test_garbage_costs_two_requests_not_one_a_frame(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        registry.blobs[BLOB.digest] = bytes(len(BLOB.blob))
        with pytest.raises(Exception, match="zstd"):
            await one.remote.bring(layer, 0, 50, Priority.BACKGROUND)
        await landed(one)
        assert registry.count("GET", "/blobs/") == 2


async def test_permanent_errors_are_not_tried_again(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        del registry.blobs[BLOB.digest]
        with pytest.raises(BlobMissing):
            await take(one, layer, 0)
        assert registry.count("GET", "/blobs/") == 1
        assert one.remote.in_flight() == 0


async def test_reader_with_another_registry_is_not_failed_by_the_first(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        source.errors = [BlobMissing("gated", "gone")]
        registry.add_blob(BLOB.blob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_missing, one, layer)
            await trio.testing.wait_all_tasks_blocked(0.01)
            layer.repository = one.repository(registry.host)

            async def joins() -> None:
                assert await take(one, layer, 0) == BIG[:CHUNK]

            nursery.start_soon(joins)
            await trio.testing.wait_all_tasks_blocked(0.01)
            source.open.set()


async def _expect_missing(one: Node, layer: ServedLayer) -> None:
    with pytest.raises(BlobMissing):
        await one.remote.bring(layer, 0, 1, Priority.BACKGROUND)


async def test_bug_in_a_fetch_fails_the_read_and_nothing_else(scratch: Path) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        source.errors = [ValueError("a bug")]
        source.open.set()
        with pytest.raises(DaemonFault):
            await take(one, layer, 0)
        assert await take(one, layer, 0) == BIG[:CHUNK]


async def test_quarantined_layer_is_not_asked_for(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        layer.quarantine = "false"
        with pytest.raises(LayerQuarantined):
            await take(one, layer, 0)
        assert registry.count("GET", "/blobs/") == 0


async def test_tiny_frames_are_bounded_a_request(scratch: Path, registry: FakeRegistry) -> None:
    data = noise("tiny", 3 * MAX_FRAMES * 16)
    blob = zstd_chunked_layer(tar_of(file("tiny", data)), chunk_size=16, frame_size=0)
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        await one.remote.bring(layer, 0, layer.table.frame_count, Priority.BACKGROUND)
        assert await one.read(layer, b"tiny") == data
        await landed(one)
        assert registry.count("GET", "/blobs/") == 3


async def test_what_is_brought_is_on_its_way_one_request_at_a_time(scratch: Path) -> None:
    """Each frame on its way costs the loop something, whatever its size."""
    blob = zstd_chunked_layer(tar_of(file("tiny", noise("tiny", 3 * MAX_FRAMES * 16))), chunk_size=16, frame_size=0)
    async with node(scratch) as one:
        source = Gated(blob.blob)
        layer = one.serve(blob, source)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.remote.bring, layer, 0, 3 * MAX_FRAMES, Priority.PREFETCH)
            with trio.fail_after(10):
                while not source.asked:  # its thread may take long to begin
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert one.remote.in_flight() == MAX_FRAMES
            assert len(source.asked) == 1
            source.open.set()
        assert len(source.asked) == 3
        assert layer.store.missing(0, 3 * MAX_FRAMES) == []


async def test_damaged_frame_is_an_error_of_trust(scratch: Path, registry: FakeRegistry) -> None:
    """A frame that decodes to other bytes than the TOC promises, under a TOC that is what its digest says."""
    liar = zstd_chunked_layer(
        tar_of(file("f", b"A" * 1000)), frames_from=tar_of(file("f", b"A" * 999 + b"B")), frame_size=0
    )
    async with node(scratch) as one:
        layer = one.serve(liar, registry)
        with pytest.raises(DigestMismatch):
            await one.read(layer, b"f")
        assert registry.count("GET", "/blobs/") == 2


@pytest.mark.parametrize(("held", "least", "most"), [(64 * KIB, 1, 1), (2 << 20, 2, 6)])
async def test_a_reader_in_order_has_as_much_under_way_as_the_link_holds(
    scratch: Path, held: int, least: int, most: int
) -> None:
    """Over a link that holds little the next window; over a long one several ranges at once, each byte in one."""
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        chunks = big_chunks(layer)
        source.open.set()
        for chunk in chunks[:2]:
            await take(one, layer, chunk)
        await landed(one)
        source.open.clear()
        one.scheduler._host(layer.host).link = Link()
        one.scheduler.observe(layer.host, 0.1, 10 * held, 1.0)
        asked = len(source.asked)
        for chunk in chunks[2:9]:  # all of the first window, which is here
            one.remote.note_read(layer, chunk)
        await trio.testing.wait_all_tasks_blocked(0.05)
        ahead = source.asked[asked:]
        assert least <= len(ahead) <= most
        if least > 1:
            assert sum(size for _, size in ahead) >= 3 * held // 2
        assert len({start for start, _ in ahead}) == len(ahead)
        source.open.set()
        await landed(one)


async def test_pieces_at_equal_distances_are_asked_for_before_they_are_read(scratch: Path) -> None:
    async with node(scratch) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        frames = [int(layer.table.chunk_frame[chunk]) for chunk in big_chunks(layer)[::16]]  # every MiB
        begins = [BLOB.frames[frame][0] for frame in frames]

        async def piece(number: int) -> None:
            data = await one.read(layer, b"big", number << 20, 4 * KIB)
            assert data == BIG[number << 20 :][: 4 * KIB]

        source.open.set()
        for number in range(2):
            await piece(number)
        await landed(one)
        assert sorted(start for start, _ in source.asked) == begins[:2]  # two are no pattern
        source.open.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(piece, 2)
            with trio.fail_after(10):
                while len(source.asked) < 5:
                    await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert sorted(source.asked) == [BLOB.frames[frame] for frame in frames[:5]]  # the third, and two more
            nursery.start_soon(piece, 3)  # joins what is on its way
            with trio.fail_after(10):
                while len(source.asked) == 5:
                    await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert [start for start, _ in source.asked].count(begins[3]) == 1
            assert {start for start, _ in source.asked[5:]} <= set(begins[5:])
            source.open.set()
        await landed(one)
        asked = len(source.asked)
        await piece(4)  # is here
        await landed(one)
        assert not {start for start, _ in source.asked[asked:]} & set(begins[:5])
