"""What a trace says a start wants first is fetched before the layers' tables are here, once, and lands as if read."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.chunks.census import Census
from lazyfs.chunks.frames import needed
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.pace import Pace
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.config import Settings
from lazyfs.format.table import LayerTable
from lazyfs.format.trace import Span, Trace, stripped
from lazyfs.limits import MAX_EARLY_BYTES, MAX_SPAN, MAX_SPANS
from lazyfs.mount.advance import Advance, spans_of
from lazyfs.mount.starts import Start, Starts
from lazyfs.mount.tracing import Recorder
from lazyfs.registry.health import Health
from tests.helpers.blobs import flipped, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.served import Node, build_layer_table, node
from tests.helpers.tars import file, tar_of

CHUNK = 64 << 10
FILES = {b"f%02d" % number: noise(f"a{number}", 3 * CHUNK) for number in range(40)}
BLOB = zstd_chunked_layer(
    tar_of(*(file(name.decode(), data) for name, data in FILES.items())), chunk_size=CHUNK, frame_size=CHUNK
)
MANIFEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
WANTED = [b"f05", b"f06", b"f30", b"f11"]
DEADLINE = 10  # seconds


async def recorded(one: Node, layer: ServedLayer, *names: bytes) -> Trace:
    """Return the trace of a start that reads these files."""
    recorder = Recorder()
    recorder.attach([layer])
    for name in names:
        assert await one.read(layer, name) == FILES[name]
    recorder.detach()
    return stripped(recorder.trace(MANIFEST, [layer.digest], 0.0))


def starts_of(one: Node, root: Path, trace: Trace | None) -> Starts:
    nothing = cast(Census, SimpleNamespace(store=SimpleNamespace(table_path=lambda digest: root / "none")))
    config = Settings(root, root / "run", learn=False)
    files = TraceFiles(root)
    return Starts(config, files, nothing, one.remote, one.scheduler, one.nursery, lambda *_: trace, one.errors.append)


def told_bytes(trace: Trace) -> int:
    """Return the compressed bytes that a trace tells of."""
    return sum(span.size for span in trace.spans)


def limit(layer: ServedLayer, seconds: float) -> None:
    """Have the layer's host say that it wants to be left alone."""
    health = getattr(layer.repository, "health", None)
    assert isinstance(health, Health)
    health.note_limit(layer.host, None, seconds)
    assert layer.limited_for()


def advance_of(one: Node, layer: ServedLayer, trace: Trace, asked: Callable[[int], None]) -> Advance:
    return Advance(one.scheduler, layer.repository, layer.host, trace, [layer.digest], asked)


async def until_asked(start: Start) -> None:
    with trio.fail_after(DEADLINE):
        while not start.asked.size:
            await trio.sleep(0.005)


@pytest.fixture
async def told(scratch: Path, registry: FakeRegistry) -> Trace:
    async with node(scratch / "before") as one:
        return await recorded(one, one.serve(BLOB, registry, check=False), *WANTED)


@dataclass(frozen=True, slots=True)
class Cold:
    """A node that has nothing of a layer and knows the trace `told`; the registry's log is empty."""

    one: Node
    layer: ServedLayer
    starts: Starts

    def begin(self, *, early: bool = False, trusted: bool = True) -> Start:
        digests = [self.layer.digest]
        return self.starts.begin(self.layer.repository, MANIFEST, digests, whole=True, early=early, trusted=trusted)

    def mounted(self, *starts: Start, trusted: bool = True) -> None:
        for start in starts:
            self.starts.mounted(start, [self.layer], trusted=trusted)

    async def reads(self, *names: bytes) -> None:
        """Read files in full, and find in them what they have."""
        with trio.fail_after(DEADLINE):
            for name in names:
                assert await self.one.read(self.layer, name) == FILES[name]

    async def until_landed(self, *starts: Start) -> None:
        """Wait until nothing is on its way any more."""
        with trio.fail_after(DEADLINE):
            for start in starts:
                await start.over.wait()
            while self.one.remote.in_flight():
                await trio.sleep(0.005)


@pytest.fixture
async def cold(told: Trace, scratch: Path, registry: FakeRegistry) -> AsyncIterator[Cold]:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        registry.clear_log()
        yield Cold(one, layer, starts_of(one, scratch, told))


async def test_spans_are_where_the_reads_lie(told: Trace, scratch: Path, registry: FakeRegistry) -> None:
    assert told_bytes(told) >= 12 * CHUNK
    async with node(scratch) as one:
        table = one.serve(BLOB, registry, check=False).table
        for name in WANTED:
            row = table.find(name)
            assert row is not None
            for chunk in table.file_chunks(row):
                frame = table.chunk_frame[chunk]
                begin, end = table.frame_blob_offset[frame], table.frame_blob_offset[frame] + needed(table, frame)
                assert any(span.blob_offset <= begin and end <= span.blob_offset + span.size for span in told.spans)


async def test_it_comes_before_the_layers_are_known_and_once(told: Trace, cold: Cold, registry: FakeRegistry) -> None:
    start = cold.begin(early=True)
    size = told_bytes(told)
    with trio.fail_after(DEADLINE):
        while registry.bytes_sent("/blobs/") < size:  # nobody has told of a layer so far
            await trio.sleep(0.005)
    cold.mounted(start)
    await cold.reads(*WANTED)
    await cold.until_landed(start)
    assert registry.bytes_sent("/blobs/") == start.asked.size == size
    layer = cold.layer
    assert layer.store.has(layer.table.file_chunks(layer.table.find(b"f30") or 0)[0])
    with trio.fail_after(DEADLINE):
        assert await cold.one.filler.fill(layer) == ""  # what landed is not fetched again for the check, but for gaps
    assert registry.bytes_sent("/blobs/") <= len(BLOB.blob) + CHUNK


async def test_a_reader_joins_what_is_under_way(told: Trace, cold: Cold, registry: FakeRegistry) -> None:
    registry.rate = 1_000_000
    start = cold.begin(early=True)
    await until_asked(start)
    cold.mounted(start)
    await trio.testing.wait_all_tasks_blocked()
    await cold.reads(WANTED[0])
    await cold.until_landed(start)
    assert registry.bytes_sent("/blobs/") <= told_bytes(told)


async def test_a_second_start_beside_the_first_asks_for_nothing(
    told: Trace, cold: Cold, registry: FakeRegistry
) -> None:
    """The pull of an image, and its container: both know the trace before the layers are there."""
    registry.rate = 2_000_000
    pull = cold.begin(early=True)
    await until_asked(pull)
    mount = cold.begin()
    cold.starts.clear(mount)
    await trio.testing.wait_all_tasks_blocked()
    cold.mounted(pull, mount)
    await cold.until_landed(pull, mount)
    assert registry.bytes_sent("/blobs/") == told_bytes(told)


async def test_nothing_is_in_the_way_of_what_a_mount_waits_for(cold: Cold, registry: FakeRegistry) -> None:
    start = cold.begin()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert registry.bytes_sent("/blobs/") == start.asked.size == 0
    cold.starts.clear(start)  # its TOCs have come
    await until_asked(start)


async def test_nothing_comes_early_where_layers_are_checked_whole_first(cold: Cold, registry: FakeRegistry) -> None:
    start = cold.begin(trusted=False)
    cold.starts.clear(start)
    await trio.testing.wait_all_tasks_blocked(0.05)
    cold.mounted(start, trusted=False)
    await cold.until_landed(start)
    assert registry.bytes_sent("/blobs/") == 0


async def test_a_host_that_wants_to_be_left_alone_is(told: Trace, cold: Cold, registry: FakeRegistry) -> None:
    limit(cold.layer, 0.3)
    left_to_wait: list[float] = []  # whenever something was asked for
    with trio.fail_after(DEADLINE):
        await advance_of(cold.one, cold.layer, told, lambda _: left_to_wait.append(cold.layer.limited_for())).run()
    assert left_to_wait == [0.0] * len(told.spans)
    assert registry.bytes_sent("/blobs/") == told_bytes(told)


async def test_nobody_waits_for_a_host_that_wants_to_be_left_alone(
    told: Trace, cold: Cold, registry: FakeRegistry
) -> None:
    limit(cold.layer, 60.0)
    asked: list[int] = []
    advance = advance_of(cold.one, cold.layer, told, asked.append)
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(advance.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert advance.land(cold.one.remote, [cold.layer]) == []  # the layers are here, and that ends it
    assert not asked and not registry.count(path="/blobs/")
    assert not any(host.running or host.waiting for host in cold.one.scheduler.statistics().values())


async def test_a_reader_does_not_wait_for_what_crawls(told: Trace, cold: Cold, registry: FakeRegistry) -> None:
    registry.fault(Fault.DRIP, path="/blobs/", times=len(told.spans))
    start = cold.begin(early=True)
    await until_asked(start)
    cold.mounted(start)
    await trio.testing.wait_all_tasks_blocked()
    assert cold.one.remote.in_flight()
    await cold.reads(WANTED[0])
    assert not start.over.is_set()  # what crawls does so still


async def test_no_reader_waits_for_the_rate_of_prefetch(told: Trace, scratch: Path, registry: FakeRegistry) -> None:
    """He would wait for half an hour here: nothing is known of the link so far."""
    async with node(scratch, read_timeout=3600.0) as one:
        layer = one.serve(BLOB, registry)
        registry.clear_log()
        pace = one.scheduler._paces[Priority.PREFETCH] = Pace(1, trio.current_time)
        pace._note(10**6)
        cold = Cold(one, layer, starts_of(one, scratch, told))
        start = cold.begin(early=True)
        await until_asked(start)
        cold.mounted(start)
        await trio.testing.wait_all_tasks_blocked()
        assert one.remote.in_flight() and not registry.bytes_sent("/blobs/")
        await cold.reads(WANTED[0])
        cold.starts.end(start)
        assert registry.bytes_sent("/blobs/") < told_bytes(told)  # what nobody reads still waits for its turn


async def test_the_link_is_known_from_what_came_early(told: Trace, cold: Cold, registry: FakeRegistry) -> None:
    link = cold.one.scheduler.link(cold.layer.host)
    assert not link.round_trip
    with trio.fail_after(DEADLINE):
        await advance_of(cold.one, cold.layer, told, lambda _: None).run()
    assert link.round_trip > 0


@pytest.mark.parametrize("how", ["flip", "refuse", "other_blob"])
async def test_what_comes_wrong_is_fetched_again(told: Trace, cold: Cold, registry: FakeRegistry, how: str) -> None:
    if how == "refuse":
        registry.fault(Fault.STATUS, path="/blobs/", status=404, times=len(told.spans))
    elif how == "flip":
        registry.fault(Fault.FLIP, path="/blobs/", times=len(told.spans))
    else:
        registry.blobs[BLOB.digest] = flipped(BLOB, BLOB.frames[15][0] + 100).blob
    start = cold.begin(early=True)
    await until_asked(start)
    registry.clear_faults()  # on a busy machine fewer requests were made than there are spans
    cold.mounted(start)
    if how == "other_blob":
        registry.blobs[BLOB.digest] = BLOB.blob
    await cold.reads(*WANTED)


@pytest.mark.parametrize("way", ["ended", "whole"])
async def test_a_start_that_ends_leaves_nothing(cold: Cold, registry: FakeRegistry, way: str) -> None:
    registry.rate = 100_000
    start = cold.begin(early=True)
    await until_asked(start)
    cold.mounted(start, trusted=way == "ended")
    if way == "ended":
        cold.starts.end(start)
    registry.rate = 0
    with trio.fail_after(DEADLINE):
        await start.over.wait()
    await cold.reads(WANTED[0])
    await cold.until_landed(start)


HOSTILE = st.lists(
    st.builds(
        Span,
        st.integers(0, 1),
        st.one_of(st.integers(0, len(BLOB.blob)), st.just(1 << 61)),
        st.one_of(st.integers(0, 3 * CHUNK), st.just(MAX_SPAN + 1), st.just(1 << 61)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans=HOSTILE)
async def test_no_trace_makes_a_wrong_byte_or_much_traffic(
    scratch: Path, registry: FakeRegistry, spans: list[Span]
) -> None:
    async with node(scratch / str(len(os.listdir(scratch))), connections=4) as one:
        layer = one.serve(BLOB, registry, check=False)
        layer.store.forget()
        registry.clear_log()
        asked: list[int] = []
        trace = Trace(MANIFEST, (layer.digest, OTHER), (), spans=tuple(spans))
        advance = advance_of(one, layer, trace, asked.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(advance.run)
            await trio.sleep(0.01)
            advance.land(one.remote, [layer])
        assert sum(asked) <= MAX_EARLY_BYTES and max(asked, default=0) <= MAX_SPAN
        with trio.fail_after(DEADLINE):
            for name in WANTED[:2]:
                assert await one.read(layer, name) == FILES[name]


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, 119), unique=True, max_size=120))
def test_what_is_told_covers_what_was_read_and_has_a_bound(table: LayerTable, order: list[int]) -> None:
    order = [frame for frame in order if frame < table.frame_count]
    spans = spans_of((0, table, frame) for frame in order)
    assert len(spans) <= MAX_SPANS and all(0 < span.size <= MAX_SPAN for span in spans)
    for frame in order:
        begin, end = table.frame_blob_offset[frame], table.frame_blob_offset[frame] + needed(table, frame)
        assert any(span.blob_offset <= begin and end <= span.blob_offset + span.size for span in spans)
    assert sum(span.size for span in spans) <= len(BLOB.blob)


@pytest.fixture(scope="module")
def table(module_scratch: Path) -> Iterator[LayerTable]:
    found = build_layer_table(module_scratch / "table", BLOB)
    yield found
    found.close()
