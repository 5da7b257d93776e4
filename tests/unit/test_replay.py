"""What a trace tells of is fetched ahead: in its order, in few ranges, once, and whatever a hostile one says."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.chunks.census import Census
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.config import Settings
from lazyfs.format.trace import Read, Trace
from lazyfs.mount.plan import Plan
from lazyfs.mount.replay import Replay
from lazyfs.mount.starts import Starts
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.served import Node, node
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 32 * KIB
MANIFEST = "sha256:" + "a" * 64
NAMES = [b"d/f%03d" % number for number in range(100)]


def blob(seed: str) -> LayerBlob:
    """A hundred files of one frame each, one of forty frames, and small ones that share frames."""
    parts = [file(name, noise((seed, number), CHUNK)) for number, name in enumerate(NAMES)]
    small = [file(b"s%02d" % number, noise((seed, "s", number), 100)) for number in range(20)]
    big = file("big", noise((seed, "big"), 40 * CHUNK))
    tar = tar_of(dir_("d"), *parts, big, *small, hardlink("link", "d/f000"), symlink("sym", "d/f001"))
    return zstd_chunked_layer(tar, chunk_size=CHUNK, frame_size=CHUNK)


ONE, TWO = blob("one"), blob("two")


def trace(layer: ServedLayer | LayerBlob, *reads: Read) -> Trace:
    return Trace(MANIFEST, (layer.digest,), reads)


def reads(*names: bytes, layer: int = 0) -> list[Read]:
    return [Read(name, layer, 0, CHUNK) for name in names]


async def play(one: Node, told: Trace, *layers: ServedLayer, room: int = 1 << 40) -> int:
    """Replay a trace to its end. Return the bytes that it asked for."""
    asked: list[int] = []
    with trio.fail_after(20):
        await Replay(one.remote, one.scheduler, told, layers, room, asked.append).run()
    return sum(asked)


def present(layer: ServedLayer) -> set[bytes]:
    """Return the files of which everything is here."""
    out = set()
    for name in [*NAMES, b"big"]:
        row = layer.table.find(name)
        assert row is not None
        if not layer.store.missing(*_bounds(layer.table.file_chunks(row))):
            out.add(name)
    return out


def _bounds(chunks: range) -> tuple[int, int]:
    return chunks.start, chunks.stop


async def test_all_that_it_tells_of_comes_in_few_ranges_and_nothing_else(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        wanted = NAMES[20:60]
        shuffled = random.Random(1).sample(wanted, len(wanted))
        asked = await play(one, trace(layer, *reads(*shuffled)), layer)
        assert present(layer) == set(wanted)
        assert registry.count("GET", "/blobs/") <= 12  # not forty
        assert asked == sum(layer.bytes_by_priority) == layer.bytes_by_priority[Priority.PREFETCH]
        assert one.remote.in_flight() == 0
        before = registry.count()
        assert await play(one, trace(layer, *reads(*shuffled)), layer) == 0
        assert registry.count() == before


async def test_the_trace_decides_the_order_of_windows(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        order = [NAMES[90], NAMES[10], NAMES[50], NAMES[11]]
        plan = Plan(trace(layer, *reads(*order)), [layer])
        first = plan.next(2 * CHUNK, 0, 1)
        second = plan.next(2 * CHUNK, 0, 1)

        def frames(*names: bytes) -> list[int]:
            """The frames of files, as they lie in the blob."""
            rows = [layer.table.find(name) for name in names]
            return sorted(layer.table.chunk_frame[layer.table.first_chunk[row]] for row in rows if row is not None)

        assert [each.first for each in first] == frames(NAMES[90], NAMES[10])
        assert [each.first for each in second] == frames(NAMES[50], NAMES[11])


async def test_small_gaps_are_fetched_where_that_saves_requests(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        every_other = trace(layer, *reads(*NAMES[::2]))
        assert len(Plan(every_other, [layer]).next(100 * MIB, 0, 4)) == 50
        merged = Plan(every_other, [layer]).next(100 * MIB, 2 * CHUNK, 4)
        assert len(merged) == 4
        table = layer.table
        await one.read(layer, NAMES[1])  # what is here is not fetched again for the sake of a gap
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
        again = Plan(every_other, [layer]).next(100 * MIB, 2 * CHUNK, 1)
        here = table.chunk_frame[table.first_chunk[table.find(NAMES[1]) or 0]]
        assert not any(each.first <= here < each.stop for each in again)
        assert sum(each.stop - each.first for each in again) < 100


async def test_no_gap_is_large_whatever_the_link_is_said_to_hold(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        one.scheduler.observe(layer.host, 0.1, 0, 0.0)
        one.scheduler.link(layer.host).believe(300e6)  # 30 MB in a round trip
        # More ranges than places, more than 1 MiB apart each.
        told = trace(layer, *reads(NAMES[0], NAMES[40], NAMES[80]), Read(b"big", 0, 39 * CHUNK, CHUNK))
        asked = await play(one, told, layer)
        assert present(layer) == {NAMES[0], NAMES[40], NAMES[80]}
        assert asked <= 5 * CHUNK


async def test_background_goes_on_while_a_replay_waits_for_its_turn(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        registry.fault(Fault.STATUS, path="/blobs/", status=429, retry_after="2", times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play, one, trace(layer, *reads(*NAMES[:4])), layer)
            with trio.fail_after(10):
                while not layer.limited_for():
                    await trio.sleep(0.001)
            assert one.scheduler.statistics()[layer.host].running and one.scheduler.is_quiet(layer.host)
            nursery.cancel_scope.cancel()


async def test_links_and_parts_of_files(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        told = trace(
            layer, Read(b"link", 0, 0, 1), Read(b"sym", 0, 0, CHUNK), Read(b"big", 0, 3 * CHUNK + 5, 2 * CHUNK)
        )
        await play(one, told, layer)
        row = layer.table.find(b"big")
        assert row is not None and present(layer) == {NAMES[0]}
        chunks = layer.table.file_chunks(row)
        assert [chunk - chunks.start for chunk in chunks if layer.store.has(chunk)] == [3, 4, 5]


async def test_what_is_under_way_is_not_asked_for_again(scratch: Path, registry: FakeRegistry) -> None:
    registry.latency = 0.1
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.read, layer, b"big")
            await trio.sleep(0.02)
            nursery.start_soon(play, one, trace(layer, Read(b"big", 0, 0, MIB), *reads(NAMES[0])), layer)
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
        assert registry.bytes_sent("/blobs/") <= 41 * (CHUNK + 100)


async def test_reads_of_several_layers_and_of_layers_that_are_not_there(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        first, second = one.serve(ONE, registry), one.serve(TWO, registry)
        foreign = "sha256:" + "f" * 64
        told = Trace(
            MANIFEST,
            (foreign, second.digest, first.digest),
            (*reads(NAMES[5], layer=0), *reads(NAMES[6], layer=1), *reads(NAMES[7], layer=2)),
        )
        await play(one, told, first, second)
        assert (present(first), present(second)) == ({NAMES[7]}, {NAMES[6]})


async def test_a_registry_that_fails_is_left_to_the_readers(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, read_timeout=1.0) as one:
        layer = one.serve(ONE, registry)
        registry.fault(Fault.STATUS, path="/blobs/")
        await play(one, trace(layer, *reads(*NAMES)), layer)
        assert not present(layer)
        registry.clear_faults()
        assert await one.read(layer, NAMES[3]) == noise(("one", 3), CHUNK)


async def test_a_store_that_is_too_small_gets_no_more_than_it_has_room_for(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        await play(one, trace(layer, *reads(*NAMES)), layer, room=10 * CHUNK)
        assert len(present(layer)) <= 64  # what one window had under way
    async with node(scratch / "full") as one:
        layer = one.serve(ONE, registry)
        monkeypatch.setattr(type(layer.store), "write_run", lambda *_: None)  # as a disk without a free block
        asked = await play(one, trace(layer, *reads(*NAMES), Read(b"big", 0, 0, 40 * CHUNK)), layer)
        assert asked <= 3 * MIB < len(ONE.blob)


async def test_cancelled_in_the_middle_it_leaves_readers_alone(scratch: Path, registry: FakeRegistry) -> None:
    registry.latency = 0.05
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        with trio.move_on_after(0.03):
            await play(one, trace(layer, *reads(*NAMES)), layer)
        assert await one.read(layer, NAMES[0]) == noise(("one", 0), CHUNK)
        assert one.scheduler.is_quiet(layer.host) or one.scheduler.has_readers(layer.host)


NUMBERS = st.one_of(st.integers(0, 50 * CHUNK), st.sampled_from([0, 1, 1 << 40, (1 << 62) - 1]))


async def test_many_mounts_of_one_image_ask_its_registry_once(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(ONE, registry)
        asked: list[object] = []

        def find(*question: object) -> Trace:
            asked.append(question[1:2] + question[3:])
            time.sleep(0.05)
            return trace(layer, *reads(NAMES[4]))

        nothing = cast(Census, SimpleNamespace(store=SimpleNamespace(table_path=lambda digest: scratch / "none")))
        config = Settings(scratch, scratch / "run", learn=False)
        starts = Starts(
            config, TraceFiles(scratch), nothing, one.remote, one.scheduler, one.nursery, find, one.errors.append
        )
        begun = [starts.begin(layer.repository, MANIFEST, [layer.digest], whole=True) for _ in range(5)]
        for start in begun:
            starts.mounted(start, [layer])
        with trio.fail_after(10):
            while NAMES[4] not in present(layer) or any(start.source == "none" for start in begun):
                await trio.sleep(0.01)
        assert asked == [(MANIFEST, (layer.digest,))]
        for start in begun:
            starts.end(start)
            await starts.until_over(start)
        assert sum(start.asked.size for start in begun) == layer.bytes_by_priority[Priority.PREFETCH]


@pytest.fixture(scope="module")
def plan_layers(module_scratch: Path) -> Iterator[tuple[ServedLayer, ServedLayer]]:
    """Two layers of which a part is here."""
    with FakeRegistry() as registry:
        nobody = cast(trio.Nursery, None)  # nothing is fetched or read
        one = Node(module_scratch, nobody, read_timeout=1.0, memory=0, connections=4)
        layers = one.serve(ONE, registry, check=False), one.serve(TWO, registry, check=False)
        for layer, seed in zip(layers, ("one", "two"), strict=True):
            layer.store.write(3, noise((seed, 3), CHUNK))
        yield layers
        one.close()


HOSTILE = st.lists(
    st.builds(
        Read,
        st.one_of(
            st.sampled_from([*NAMES[:5], b"big", b"link", b"sym", b"d", b"", b"none/at/all"]), st.binary(max_size=9)
        ),
        st.integers(0, 2),
        NUMBERS,
        NUMBERS,
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=HOSTILE, size=st.integers(1, 2 * MIB), gap=st.integers(0, MIB), side=st.integers(1, 8))
def test_no_trace_asks_for_a_frame_twice_or_for_one_that_is_not_there(
    plan_layers: tuple[ServedLayer, ServedLayer], told: list[Read], size: int, gap: int, side: int
) -> None:
    first, second = plan_layers
    plan = Plan(Trace(MANIFEST, (first.digest, "sha256:" + "f" * 64, second.digest), tuple(told)), plan_layers)
    seen: set[tuple[int, int]] = set()
    rounds = 0
    while not plan.over:
        rounds += 1
        assert rounds < 10_000
        for each in plan.next(size, gap, side):
            assert 0 <= each.first < each.stop <= each.layer.table.frame_count
            frames = {(each.layer.number, frame) for frame in range(each.first, each.stop)}
            assert not frames & seen
            seen |= frames
