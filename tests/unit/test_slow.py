"""A range that crawls while its host is well is asked for anew; a link that is slow as a whole is left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.chunks import slow
from lazyfs.chunks.frames import PIECE
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.slow import Moment, part_of_others
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of
from tests.unit.test_remote import BIG, BLOB, CHUNK, ranges


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge within a fraction of a second."""
    monkeypatch.setattr(slow, "_LOOK", 0.05)
    monkeypatch.setattr(slow, "_SPAN", 0.2)
    monkeypatch.setattr(slow, "_WORTH", 0.2)


async def known(one: Node, registry: FakeRegistry) -> ServedLayer:
    """Serve the layer from a host whose rate is known."""
    layer = one.serve(BLOB, registry)
    await one.remote.bring(layer, 0, 30, Priority.PREFETCH)
    assert one.scheduler.link(layer.host).rate > 0
    registry.clear_log()
    return layer


async def read(one: Node, layer: ServedLayer, first: int, stop: int) -> None:
    assert await one.read(layer, b"big", first * CHUNK, (stop - first) * CHUNK) == BIG[first * CHUNK : stop * CHUNK]


async def test_a_range_that_crawls_is_asked_for_anew(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=60) as one:
        layer = await known(one, registry)
        registry.fault(Fault.DRIP, path="/blobs/", times=1, rate=100_000)
        with trio.fail_after(20):
            await read(one, layer, 40, 80)
        asked = ranges(registry.matching("GET", "/blobs/"))
        assert len(asked) == 2
        assert sum(asked[1]) == sum(asked[0]), "the rest of the same range"
        assert any("slower" in error.message for error in one.errors)


async def test_one_that_nobody_waits_for_is_left_alone(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=60) as one:
        layer = await known(one, registry)
        registry.fault(Fault.DRIP, path="/blobs/", times=1, rate=2_000_000)
        await one.remote.bring(layer, 40, 70, Priority.BACKGROUND)
        assert registry.count("GET", "/blobs/") == 1


async def test_a_host_whose_every_connection_crawls_is_asked_a_bounded_number_of_times(
    scratch: Path, registry: FakeRegistry
) -> None:
    """A link that drops to a tenth in the midst of a start: the reads go on, and no storm of requests comes of it."""
    async with node(scratch, read_timeout=60) as one:
        layer = await known(one, registry)
        registry.rate = 400_000  # of each body
        with trio.fail_after(30):
            for first in (41, 55):
                await read(one, layer, first, first + 5)
            async with trio.open_nursery() as nursery:
                for first in (79, 86, 105, 119):  # at no equal distances
                    nursery.start_soon(read, one, layer, first, first + 5)
        assert registry.count("GET", "/blobs/") <= 6 + 1
        assert registry.bytes_sent("/blobs/") <= 30 * CHUNK + 10 * CHUNK


async def test_the_other_source_is_turned_to(scratch: Path, registry: FakeRegistry) -> None:
    with FakeRegistry() as other:
        other.add_blob(BLOB.blob)
        async with node(scratch, read_timeout=60) as one:
            layer = await known(one, registry)
            layer.others.append(one.repository(other.host))
            registry.fault(Fault.DRIP, path="/blobs/", rate=100_000)
            with trio.fail_after(20):
                await read(one, layer, 40, 80)
            assert registry.count("GET", "/blobs/") == 1
            assert other.count("GET", "/blobs/") == 1


async def test_background_counts_what_it_fetches_as_it_comes(scratch: Path, registry: FakeRegistry) -> None:
    """Else a whole request of it comes in one moment, and a reader's range looks slow beside that."""
    big = noise("one frame", 1 << 20)
    async with node(scratch) as one:
        layer = one.serve(
            zstd_chunked_layer(tar_of(file("big", big)), chunk_size=1 << 20, frame_size=1 << 20), registry
        )
        assert layer.check is not None
        layer.check.spool.works = False  # so that it brings extent by extent
        registry.rate = 2_000_000
        seen = set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.filler.fill, layer)
            with trio.fail_after(20):
                while not layer.verified:
                    under_way = one.scheduler.progress(layer.host)[0] - sum(layer.bytes_by_priority)
                    seen.add(under_way)
                    await trio.sleep(0.005)
        assert any(0 < under_way < 1 << 20 for under_way in seen)


@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.integers(2, 16), st.floats(0.2, 100))
def test_equal_shares_are_never_slow(came: int, before: int, running: int, seconds: float) -> None:
    first = Moment(10.0, before, before * running, running)
    then = Moment(10.0 + seconds, before + came, (before + came) * running, running)
    mine, others = part_of_others(first, then)
    assert mine >= others
    assert mine <= (came + PIECE) / seconds * 1.001
