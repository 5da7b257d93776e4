"""A recorded start: what was demanded first, in order, how long readers waited, and what was fetched meanwhile."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import trio

from lazyfs.chunks import trace_files
from lazyfs.chunks.frames import needed
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.format.trace import Read, Trace, decode, encode, fitting
from lazyfs.mount.tracing import Recorder
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import node
from tests.helpers.tars import dir_, file, hardlink, tar_of

KIB = 1 << 10
CHUNK = 64 * KIB
BIG = noise("traced", 300 * KIB)
SMALL = noise("traced small", 900)
BLOB = zstd_chunked_layer(
    tar_of(dir_("usr"), file("usr/small", SMALL), file("usr/big", BIG), hardlink("link", "usr/small")),
    chunk_size=CHUNK,
    frame_size=CHUNK,
)
MANIFEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


def listen(layer: ServedLayer) -> Recorder:
    recorder = Recorder()
    recorder.attach([layer])
    return recorder


async def test_first_demands_in_order_with_paths_and_what_was_waited_for(scratch: Path, registry: FakeRegistry) -> None:
    registry.latency = 0.05
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        recorder = listen(layer)
        await one.read(layer, b"usr/big", 2 * CHUNK, 2 * CHUNK)
        await one.read(layer, b"link")
        await one.read(layer, b"usr/big", 2 * CHUNK, 10)  # again: not noted
        layer.store.forget()
        recorder.detach()
        await one.read(layer, b"usr/big", 0, 10)  # nobody listens any more
        trace = recorder.trace(MANIFEST, [OTHER, layer.digest], 1.5, ("cmd",))
    assert (trace.manifest, trace.layers, trace.ready) == (MANIFEST, (OTHER, layer.digest), 1.5)
    assert [(read.path, read.layer, read.offset, read.size) for read in trace.reads] == [
        (b"usr/big", 1, 2 * CHUNK, CHUNK),
        (b"usr/big", 1, 3 * CHUNK, CHUNK),
        (b"usr/small", 1, 0, len(SMALL)),
    ]
    assert all(0.05 <= read.waited < 10 for read in trace.reads)
    assert [read.at for read in trace.reads] == sorted(read.at for read in trace.reads)
    assert trace.requests and all(
        request.layer == 1
        and request.priority == Priority.DEMAND
        and request.size > 0
        and 0 <= request.began <= request.began + 0.05 <= request.first <= request.ended
        for request in trace.requests
    )
    assert decode(encode(trace)).reads[0].path == b"usr/big"


async def test_what_is_here_is_noted_and_not_waited_for(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, memory=0) as one:
        layer = one.serve(BLOB, registry)
        await one.read(layer, b"usr/big")
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
        recorder = listen(layer)
        await one.reader.read_data(layer, 0, layer.table.data_size)
        trace = recorder.trace(MANIFEST, [layer.digest], 0)
    assert {read.path for read in trace.reads} == {b"usr/big", b"usr/small"}
    assert [read.waited for read in trace.reads if read.path == b"usr/big"] == [0.0] * 5


async def test_a_small_file_that_is_at_hand_is_noted_too(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch, memory=0) as one:
        layer = one.serve(BLOB, registry)
        assert not await one.filler.fill(layer)
        await one.reader.read_data(layer, 0, layer.table.data_size)
        recorder = listen(layer)
        row = layer.table.find(b"usr/small")
        assert row is not None
        found = one.reader.begin_data(layer, layer.table.data_offset[row], 4096)
        assert isinstance(found, bytearray)  # it was answered at once
        trace = recorder.trace(MANIFEST, [layer.digest], 0)
    assert [(read.path, read.waited) for read in trace.reads] == [(b"usr/small", 0.0)]


async def test_prefetch_is_no_demand_and_is_told_as_a_request(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        recorder = listen(layer)
        await one.remote.bring(layer, 0, layer.table.frame_count, Priority.PREFETCH)
        await one.reader.chunk(layer, 0, Priority.PREFETCH, 0)
        trace = recorder.trace(MANIFEST, [layer.digest], 0)
    assert not trace.reads
    assert [request.priority for request in trace.requests] == [Priority.PREFETCH]


async def test_a_request_is_told_with_all_of_its_bytes(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        table = layer.table
        recorder = listen(layer)
        for frame in range(table.frame_count):  # the first is one small file: it comes in one piece with its header
            await one.remote.bring(layer, frame, frame + 1, Priority.PREFETCH)
        wanted = [(table.frame_blob_offset[frame], needed(table, frame)) for frame in range(table.frame_count)]
        trace = recorder.trace(MANIFEST, [layer.digest], 0)
    told = sorted((request.blob_offset, request.size) for request in trace.requests)
    assert told == wanted and min(size for _, size in told) < 64 * KIB


async def test_two_recorders_of_one_layer_hear_the_same(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        first, second = listen(layer), listen(layer)
        await one.read(layer, b"usr/small")
        first.detach()
        await one.read(layer, b"usr/big", 0, 1)
        second.detach()
        assert not layer.witnesses
    assert (len(first), len(second)) == (1, 2)


def trace_of(manifest: str, reads: int = 1) -> Trace:
    return Trace(manifest, (OTHER,), tuple(Read(b"f%d" % number, 0, 0, 1) for number in range(reads)))


def test_a_trace_that_is_too_large_loses_its_last_reads() -> None:
    paths = [os.urandom(100).hex().encode() for _ in range(12_000)]
    large = Trace(MANIFEST, (OTHER,), tuple(Read(path, 0, 0, 1) for path in paths))
    small = fitting(large)
    assert 0 < len(small.reads) < len(large.reads)
    assert small.reads == large.reads[: len(small.reads)]
    encode(small)


def test_learned_traces_are_kept_by_manifest_and_dropped(scratch: Path) -> None:
    files = TraceFiles(scratch)
    assert files.load(MANIFEST) is None
    files.save(trace_of(MANIFEST))
    assert files.load(MANIFEST) == trace_of(MANIFEST)
    assert (scratch / "traces").stat().st_mode & 0o777 == 0o700
    assert (scratch / "traces" / ("a" * 64)).stat().st_mode & 0o777 == 0o600
    files.drop(MANIFEST)
    assert files.load(MANIFEST) is None
    files.drop(MANIFEST)


def test_a_disk_that_is_read_only_keeps_what_was_learned(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TraceFiles(scratch)
    files.save(trace_of(MANIFEST))

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert files.load(MANIFEST) == trace_of(MANIFEST)


@pytest.mark.parametrize("content", [b"", b"garbage", encode(trace_of(OTHER)), bytes((1 << 20) + 1)])
def test_a_damaged_or_foreign_file_is_removed_and_ignored(scratch: Path, content: bytes) -> None:
    path = scratch / "traces" / ("a" * 64)
    path.parent.mkdir(0o700)
    path.write_bytes(content)
    assert TraceFiles(scratch).load(MANIFEST) is None
    assert not path.exists()


def test_no_link_is_followed(scratch: Path) -> None:
    elsewhere = scratch / "elsewhere"
    elsewhere.write_bytes(encode(trace_of(MANIFEST)))
    (scratch / "traces").mkdir(0o700)
    path = scratch / "traces" / ("a" * 64)
    path.symlink_to(elsewhere)
    assert TraceFiles(scratch).load(MANIFEST) is None
    path.symlink_to(elsewhere) if not path.is_symlink() else None
    TraceFiles(scratch).save(trace_of(MANIFEST, 2))
    assert not path.is_symlink()
    assert decode(elsewhere.read_bytes()) == trace_of(MANIFEST)


def test_the_files_used_longest_ago_go(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_files, "MAX_TRACE_FILES", 3)
    monkeypatch.setattr(trace_files, "MAX_RECORDS", 2)
    files = TraceFiles(scratch)
    manifests = ["sha256:" + f"{number}" * 64 for number in range(5)]
    for age, manifest in enumerate(manifests[:3]):
        files.save(trace_of(manifest))
        moment = time.time() - 100 + age
        os.utime(scratch / "traces" / manifest[7:], (moment, moment))
    assert files.load(manifests[0]) is not None  # used again
    files.save(trace_of(manifests[3]))
    assert [files.load(manifest) is not None for manifest in manifests[:4]] == [True, False, True, True]
    paths = [files.record(trace_of(manifests[0])) for _ in range(4)]
    left = [path for path in paths if path.exists()]
    assert len(left) == 2 and decode(left[0].read_bytes()) == trace_of(manifests[0])
    assert left[0].stat().st_mode & 0o777 == 0o600
