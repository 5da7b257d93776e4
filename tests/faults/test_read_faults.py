"""Registries that misbehave under a reader: the right bytes or an error in bounded time, and nobody else notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from lazyfs.errors import BlobMissing, LazyfsError, RegistryError, TrustError, Unauthorized
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of

BIG = noise("faulty", 2 << 20)
OTHER = noise("other", 200_000)
TIMEOUT = 2.0  # read_timeout of these tests, seconds
SLACK = 2.0  # seconds that a loaded machine may add


def blob_of(name: str, data: bytes) -> LayerBlob:
    return zstd_chunked_layer(tar_of(file(name, data)), chunk_size=64 << 10, frame_size=0)


BLOB, OTHER_BLOB = blob_of("big", BIG), blob_of("other", OTHER)
Break = Callable[[FakeRegistry, int | None], object]


def status(code: int, retry_after: str = "") -> Break:
    return lambda registry, times: registry.fault(
        Fault.STATUS, path="/blobs/", status=code, retry_after=retry_after, times=times
    )


def fault(kind: Fault, *, rate: int = 1000) -> Break:
    return lambda registry, times: registry.fault(kind, path="/blobs/", times=times, rate=rate)


FAULTS: dict[str, Break] = {
    "refused": fault(Fault.REFUSE),
    "429": status(429),
    "429 with Retry-After": status(429, "1"),
    "500": status(500),
    "503 with Retry-After": status(503, "1"),
    "truncated": fault(Fault.TRUNCATE),
    "reset": fault(Fault.RESET),
    "wrong bytes": fault(Fault.FLIP),
    "200 instead of 206": fault(Fault.IGNORE_RANGE),
    "another range": fault(Fault.WRONG_RANGE),
    "a shorter range": fault(Fault.SHORT_RANGE),
    "stalled body": fault(Fault.STALL),
    "black hole": fault(Fault.BLACK_HOLE),
    "drip": fault(Fault.DRIP),
    "dripping header": fault(Fault.DRIP_HEADERS, rate=5),
}


async def settled(one: Node, *registries: FakeRegistry) -> None:
    """Nothing is under way any more and no connection's slot is lost."""
    for registry in registries:
        registry.clear_faults()
    with trio.fail_after(20):
        while one.remote.in_flight() or any(h.running or h.waiting for h in one.scheduler.statistics().values()):
            await trio.sleep(0.01)


@pytest.mark.parametrize("what", list(FAULTS))
async def test_fault_once_is_mended(scratch: Path, registry: FakeRegistry, what: str) -> None:
    async with node(scratch, read_timeout=15) as one:
        layer = one.serve(BLOB, registry, answer_timeout=0.5)
        if what == "drip":
            registry.fault(Fault.DRIP, path="/blobs/", times=1, rate=100_000)
        else:
            FAULTS[what](registry, 1)
        assert await one.read(layer, b"big", 70_000, 100_000) == BIG[70_000:170_000]
        await settled(one, registry)
        assert await one.read(layer, b"big") == BIG


@pytest.mark.parametrize("what", list(FAULTS))
async def test_fault_always_ends_in_an_error_in_time(scratch: Path, registry: FakeRegistry, what: str) -> None:
    with FakeRegistry() as healthy:
        async with node(scratch, read_timeout=TIMEOUT) as one:
            layer = one.serve(BLOB, registry, answer_timeout=0.5)
            good = one.serve(OTHER_BLOB, healthy)
            FAULTS[what](registry, None)
            outcome: list[LazyfsError] = []
            slowest = 0.0

            async def reads() -> None:
                began = trio.current_time()
                try:
                    await one.read(layer, b"big", 0, 300_000)
                except LazyfsError as error:
                    outcome.append(error)
                assert trio.current_time() - began < TIMEOUT + SLACK

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(reads)
                for at in range(0, len(OTHER), 10_000):  # another registry's readers don't notice
                    began = trio.current_time()
                    assert await one.read(good, b"other", at, 10_000) == OTHER[at : at + 10_000]
                    slowest = max(slowest, trio.current_time() - began)
            assert len(outcome) == 3
            assert slowest < 1
            assert outcome[0].temporary or isinstance(outcome[0], TrustError)
            await settled(one, registry)
            assert await one.read(layer, b"big") == BIG  # the registry is well again, and so are its readers


@pytest.mark.parametrize(
    ("code", "error"), [(401, Unauthorized), (403, Unauthorized), (404, BlobMissing), (416, RegistryError)]
)
async def test_refusal_in_the_middle_of_a_file_is_told_at_once(
    scratch: Path, registry: FakeRegistry, code: int, error: type[LazyfsError]
) -> None:
    async with node(scratch, read_timeout=30) as one:
        layer = one.serve(BLOB, registry)
        assert await one.read(layer, b"big", 0, 65_536) == BIG[:65_536]
        await settled(one)
        registry.fault(Fault.STATUS, path="/blobs/", status=code)
        began = trio.current_time()
        with pytest.raises(error):
            await one.read(layer, b"big", 1_000_000, 65_536)
        assert trio.current_time() - began < 3
        assert await one.read(layer, b"big", 0, 65_536) == BIG[:65_536]  # what is here needs no registry
        await settled(one, registry)
        assert await one.read(layer, b"big") == BIG


async def test_registry_that_is_down_is_found_again(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=20) as one:
        layer = one.serve(BLOB, registry)
        assert await one.read(layer, b"big", 0, 10) == BIG[:10]
        await settled(one)
        registry.stop_listening()
        back = threading.Timer(0.5, registry.listen_again)
        back.start()
        try:
            assert await one.read(layer, b"big") == BIG
        finally:
            back.join()


async def test_reader_gives_up_on_a_registry_that_stays_down(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=1) as one:
        layer = one.serve(BLOB, registry)
        registry.stop_listening()
        began = trio.current_time()
        with pytest.raises(LazyfsError):
            await one.read(layer, b"big")
        assert trio.current_time() - began < 1 + SLACK
        await settled(one)


async def test_black_hole_of_one_layer_leaves_connections_for_its_neighbours(
    scratch: Path, registry: FakeRegistry
) -> None:
    async with node(scratch, read_timeout=10) as one:
        stuck = one.serve(BLOB, registry, answer_timeout=5)
        good = one.serve(OTHER_BLOB, registry)
        registry.fault(Fault.BLACK_HOLE, path=BLOB.digest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.filler.fill, stuck)
            for number in range(3):
                nursery.start_soon(_ignore_errors, one, stuck, number)
            await trio.sleep(0.1)
            with trio.fail_after(3):
                assert await one.read(good, b"other") == OTHER
            nursery.cancel_scope.cancel()
        registry.release()
        await settled(one, registry)


async def _ignore_errors(one: Node, layer: object, number: int) -> None:
    try:
        await one.read(layer, b"big", number * 400_000, 100)  # type: ignore[arg-type]
    except LazyfsError:
        pass


async def test_many_readers_of_a_dead_registry_ask_it_rarely(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=TIMEOUT) as one:
        layer = one.serve(BLOB, registry)
        registry.fault(Fault.STATUS, path="/blobs/", status=503)
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(_ignore_errors, one, layer, number % 4)
        assert registry.count("GET", "/blobs/") <= 120  # not 60 readers times their tries
        await settled(one, registry)


async def test_threads_do_not_pile_up(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=0.3) as one:
        layer = one.serve(BLOB, registry, answer_timeout=5)
        registry.fault(Fault.BLACK_HOLE, path="/blobs/")
        before = threading.active_count()
        for number in range(10):
            with pytest.raises(LazyfsError):
                await one.read(layer, b"big", number * 100_000, 10)
        serving = len([thread for thread in threading.enumerate() if "process_request" in thread.name])
        assert threading.active_count() - before - serving <= 16
        await settled(one, registry)
        began = time.monotonic()
        assert await one.read(layer, b"big") == BIG
        assert time.monotonic() - began < 5
