"""The background fill: good layers pass, every lie is found, and each byte crosses the network once."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from lazyfs.chunks import fill as fill_module
from lazyfs.chunks.fill import Filler
from lazyfs.chunks.layer import ServedLayer
from tests.helpers.blobs import LayerBlob, Toc, flipped, toc_entry, without_sparse, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault, Request, Rule
from tests.helpers.odd import odd_tar
from tests.helpers.served import Node, forget_chunks, node
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of

KIB = 1 << 10
BIG = noise("fill", 6 << 20)
TREE = tar_of(
    dir_("etc"),
    file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"),
    file("big", BIG),
    file("bin/su", b"su", mode=0o755),
    symlink("bin/sh", "dash"),
    hardlink("bin/again", "bin/su"),
    file("last", noise("last", 3000)),
)


@pytest.fixture
def blob() -> LayerBlob:
    return zstd_chunked_layer(TREE, chunk_size=64 * KIB, frame_size=64 * KIB)


async def run_fill(one: Node, layer: ServedLayer) -> str:
    with trio.fail_after(30):
        return await one.filler.fill(layer)


async def test_good_layer_passes_and_is_complete(scratch: Path, registry: FakeRegistry, blob: LayerBlob) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        one.scheduler.link(layer.host).believe(1e9)  # bytes a second: what it measures depends on the machine's load
        assert await run_fill(one, layer) == ""
        assert layer.verified
        assert layer.check is None
        assert layer.store.complete
        assert registry.bytes_sent("/blobs/") == len(blob.blob)
        assert registry.count() <= 10  # of 97 frames: on a link like that, segments are as large as they get
        registry.clear_log()
        assert await one.read(layer, b"big") == BIG
        assert registry.count() == 0


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (1000, 0), (100, 5000)])
async def test_odd_layer_passes(scratch: Path, registry: FakeRegistry, shape: tuple[int, int]) -> None:
    blob = zstd_chunked_layer(without_sparse(odd_tar()), chunk_size=shape[0], frame_size=shape[1])
    # A busy machine must not make it ask again: neither for want of an answer nor because a request took too long.
    async with node(scratch, read_timeout=60.0) as one:
        layer = one.serve(blob, registry, answer_timeout=30.0)
        assert await run_fill(one, layer) == ""
        assert registry.bytes_sent("/blobs/") == len(blob.blob), one.errors


async def test_layer_without_content_passes(scratch: Path, registry: FakeRegistry) -> None:
    blob = zstd_chunked_layer(tar_of(dir_("a"), symlink("b", "a"), file("empty")))
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert await run_fill(one, layer) == ""
        assert layer.verified


LIES: dict[str, Callable[[Toc], Any]] = {
    "mode": lambda toc: toc_entry(toc, "bin/su").update(mode=0o4755),
    "owner": lambda toc: toc_entry(toc, "etc/passwd").update(uid=1000),
    "link": lambda toc: toc_entry(toc, "bin/sh").update(linkName="/tmp/evil"),
    "missing": lambda toc: toc["entries"].remove(toc_entry(toc, "bin/again")),
    "added": lambda toc: toc["entries"].append(
        {"name": "bin/new", "type": "symlink", "linkName": "x", "mode": 0o777, "uid": 0, "gid": 0}
    ),
    "xattr": lambda toc: toc_entry(toc, "bin/su").update(xattrs={"user.x": "eQ=="}),
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_lying_toc_is_found(scratch: Path, registry: FakeRegistry, lie: str) -> None:
    blob = zstd_chunked_layer(TREE, chunk_size=64 * KIB, frame_size=64 * KIB, edit_toc=LIES[lie])
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert "TOC" in await run_fill(one, layer)
        assert not layer.verified


async def test_other_diff_id_is_found(scratch: Path, registry: FakeRegistry, blob: LayerBlob) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry, diff_id="sha256:" + "7" * 64)
        assert "diff ID" in await run_fill(one, layer)
        assert not layer.verified


@pytest.mark.parametrize("where", ["payload", "toc"])
async def test_flipped_byte_is_found(scratch: Path, registry: FakeRegistry, blob: LayerBlob, where: str) -> None:
    bad = flipped(blob, blob.frames[3][0] + 1000 if where == "payload" else blob.payload_end + 20)
    async with node(scratch, read_timeout=3) as one:
        layer = one.serve(blob, registry)
        registry.blobs[blob.digest] = bad.blob
        assert await run_fill(one, layer) != ""
        assert not layer.verified


async def test_byte_flipped_on_the_way_condemns_nothing(scratch: Path, registry: FakeRegistry, blob: LayerBlob) -> None:
    """Wrong bytes where no chunk digest sees them: the tail. The check begins again, once."""
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        registry.faults.append(_flip_tail_once(blob))
        assert await run_fill(one, layer) == ""
        assert layer.verified


def _flip_tail_once(blob: LayerBlob) -> Callable[[Request], Rule | None]:
    rules: list[Rule] = []

    def choose(request: Request) -> Rule | None:
        if f"bytes={blob.payload_end}-" in request.range and not rules:
            rules.append(Rule(Fault.FLIP))
            return rules[0]
        return None

    return choose


async def test_reading_during_the_fill_costs_no_byte_twice(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    registry.rate = 8_000_000
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        verdicts: list[str] = []

        async def fill() -> None:
            verdicts.append(await run_fill(one, layer))

        offsets = list(range(0, len(BIG), 300_000))
        random.Random(3).shuffle(offsets)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            for offset in offsets:
                assert await one.read(layer, b"big", offset, 4096) == BIG[offset : offset + 4096]
        assert verdicts == [""]
        assert registry.bytes_sent("/blobs/") == len(blob.blob)


async def test_what_was_read_before_the_fill_is_not_fetched_again(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert await one.read(layer, b"last") == noise("last", 3000)
        assert await one.read(layer, b"big") == BIG
        assert await run_fill(one, layer) == ""
        assert registry.bytes_sent("/blobs/") == len(blob.blob)


async def test_what_the_check_is_busy_with_is_not_fetched_again(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spool has given it away, and the check has not passed it, when background looks for what to bring next."""
    real = fill_module.feed_frames

    def slow(*arguments: Any) -> bytes:
        time.sleep(0.02)
        return real(*arguments)

    monkeypatch.setattr(fill_module, "feed_frames", slow)
    monkeypatch.setattr(Filler, "_until_welcome", lambda *_: trio.sleep(0.005))
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert await one.read(layer, b"big") == BIG
        assert await run_fill(one, layer) == ""
        assert registry.bytes_sent("/blobs/") == len(blob.blob)


@pytest.mark.parametrize("how", ["full", "damaged"])
async def test_spool_disk_that_fails_condemns_nothing(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert layer.check is not None
        file = layer.check.spool._file
        assert file is not None
        real = os.pwrite

        def bad(fd: int, data: bytes, offset: int) -> int:
            if fd != file.number:
                return real(fd, data, offset)
            if how == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, bytes(len(data)), offset)

        monkeypatch.setattr(os, "pwrite", bad)
        assert await run_fill(one, layer) == ""
        assert layer.verified
        assert registry.bytes_sent("/blobs/") <= 2 * len(blob.blob)


async def test_extent_too_large_for_memory_is_checked_in_pieces(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content that no name leads to lies behind a frame: a reader does not fetch it, the check does."""
    dead = noise("dead", 40 << 20)
    tar = tar_of(file("a", b"first"), file("x", dead), dir_("x"), file("z", b"last"))
    blob = zstd_chunked_layer(tar, chunk_size=1 << 20, frame_size=0)
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert await one.read(layer, b"a") == b"first"
        assert registry.bytes_sent("/blobs/") < 20 << 20
        registry.fault(Fault.TRUNCATE, path="/blobs/", times=1, after=2)  # and it goes on where it stopped
        monkeypatch.setattr(fill_module, "_PAUSE", 0.01)
        assert await run_fill(one, layer) == ""


async def test_errors_of_the_registry_are_waited_out(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_module, "_PAUSE", 0.01)
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        registry.fault(Fault.STATUS, status=404, path="/blobs/", times=3)
        registry.fault(Fault.STATUS, status=503, path="/blobs/", times=3)
        assert await run_fill(one, layer) == ""


async def test_verified_layer_is_not_condemned_by_a_registry_that_sends_garbage(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        assert await run_fill(one, layer) == ""
        forget_chunks(layer)
        registry.blobs[blob.digest] = bytes(len(blob.blob))
        with trio.move_on_after(1) as scope:
            await one.filler.fill(layer)
        assert scope.cancelled_caught
        registry.blobs[blob.digest] = blob.blob
        assert await run_fill(one, layer) == ""
        assert layer.store.complete


async def test_cancelled_fill_leaves_no_file_and_no_flight(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    registry.rate = 2_000_000
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        before = sorted(os.listdir(one.store.path(blob.digest)))
        with trio.move_on_after(0.5) as scope:
            await one.filler.fill(layer)
        assert scope.cancelled_caught
        assert layer.check is not None
        layer.check.spool.close()
        assert set(os.listdir(one.store.path(blob.digest))) - set(before) <= {"data", "chunks", "used"}
        registry.rate = 0
        registry.release()
        with trio.fail_after(20):
            while one.remote.in_flight():
                await trio.sleep(0.01)


async def test_prefetch_brings_what_lies_before_the_landmark(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        layer.table.landmark = blob.frames[40][0]
        await one.filler.prefetch(layer)
        with trio.fail_after(10):
            while one.remote.in_flight():
                await trio.sleep(0.001)
        assert registry.count("GET", "/blobs/") <= 2
        missing = [frame for frame in range(layer.table.frame_count) if layer.frame_missing(frame)]
        assert missing[0] == next(
            frame for frame in range(1000) if layer.table.frame_blob_offset[frame] >= layer.table.landmark
        )


async def test_background_asks_for_little_while_somebody_reads(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazyfs.chunks.host.QUIET", 60.0)  # the reader is one of just now, however slow this machine
    monkeypatch.setattr("lazyfs.chunks.fill._START", 0.0)  # the check goes on meanwhile
    registry.latency = 0.02  # of a near one nothing is in a reader's way
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        filler = Filler(one.scheduler, one.remote, int)
        one.scheduler.note_demand(layer.host)
        with trio.fail_after(30):
            assert await filler.fill(layer) == ""
        sizes = []
        for request in registry.matching("GET", "/blobs/"):
            start, _, end = request.range.removeprefix("bytes=").partition("-")
            sizes.append(int(end) - int(start) + 1)
        assert max(sizes) <= 300_000


async def test_the_check_gives_way_to_readers_of_a_start_and_fetching_goes_on(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazyfs.chunks.host.QUIET", 60.0)
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        check = layer.check
        assert check is not None
        one.scheduler.note_demand(layer.host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_fill, one, layer)
            with trio.fail_after(20):
                while not layer.store.complete:
                    await trio.sleep(0.02)
            assert check.next == 0 and not layer.verified  # all is here, and nothing of it was looked at
            with one.filler.awaited(layer), trio.fail_after(10):  # somebody waits for the verdict itself
                while not layer.verified:
                    await trio.sleep(0.02)
        assert registry.bytes_sent("/blobs/") == len(blob.blob)


@asynccontextmanager
async def reading(one: Node, layer: ServedLayer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Have somebody read what is here, again and again; nobody waits for the network."""
    monkeypatch.setattr("lazyfs.chunks.host.QUIET", 0.0)
    monkeypatch.setattr("lazyfs.chunks.fill._STILL", 2.0)  # on a busy machine a reader may come late
    row = next(row for row in range(layer.table.rows) if layer.table.size[row])

    async def read() -> None:
        while True:
            assert await one.reader.read(layer, row, 0, 1)
            await trio.sleep(0.01)

    await one.reader.read(layer, row, 0, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        yield
        nursery.cancel_scope.cancel()


async def test_the_check_gives_way_to_readers_of_what_is_here(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(scratch) as one, trio.open_nursery() as nursery:
        layer = one.serve(blob, registry)
        check = layer.check
        assert check is not None
        async with reading(one, layer, monkeypatch):
            nursery.start_soon(run_fill, one, layer)
            with trio.fail_after(20):
                while not layer.store.complete:
                    await trio.sleep(0.02)
            looked_at = check.next
            await trio.sleep(0.3)
            assert check.next == looked_at < layer.extents and not layer.verified  # all is here, and it waits


async def test_a_full_spool_does_not_end_fetching_while_somebody_reads(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazyfs.chunks.fill._AHEAD", 1000)  # bytes
    async with node(scratch) as one, trio.open_nursery() as nursery:
        layer = one.serve(blob, registry)
        async with reading(one, layer, monkeypatch):
            nursery.start_soon(run_fill, one, layer)
            with trio.fail_after(20):
                while not layer.store.complete:
                    await trio.sleep(0.02)


async def test_the_check_gives_way_for_the_time_of_a_start_only(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazyfs.chunks.host.QUIET", 60.0)
    monkeypatch.setattr("lazyfs.chunks.fill._START", 0.5)
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        one.scheduler.note_demand(layer.host)
        assert await run_fill(one, layer) == ""
        assert layer.verified


async def test_background_leaves_a_host_alone_that_limits_it(
    scratch: Path, registry: FakeRegistry, blob: LayerBlob
) -> None:
    async with node(scratch) as one:
        layer = one.serve(blob, registry, answer_timeout=1.0)
        rule = registry.fault(Fault.STATUS, path="/blobs/", status=429, retry_after="2", times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_fill, one, layer)
            with trio.fail_after(10):
                while not layer.limited_for():
                    await trio.sleep(0.01)
            asked = registry.count(path="/blobs/")
            await trio.sleep(layer.limited_for() / 2)
            # What was on its way already, or waited for its turn only, may arrive, and nothing else.
            assert registry.count(path="/blobs/") <= asked + 3
        assert layer.verified
        assert rule.hits == 1


async def test_a_frame_larger_than_what_may_be_under_way_comes_in_pieces(scratch: Path, registry: FakeRegistry) -> None:
    """Of a link that holds little, and each byte once; a reader who wants the frame meanwhile gets its rest at once."""
    blob = zstd_chunked_layer(tar_of(file("big", BIG)), chunk_size=2 << 20, frame_size=2 << 20)
    async with node(scratch) as one:
        layer = one.serve(blob, registry)
        registry.rate, registry.latency = 4_000_000, 0.01
        one.scheduler.observe(layer.host, 0.02, 400_000, 0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_fill, one, layer)
            assert await one.read(layer, b"big", 3 << 20, 100) == BIG[3 << 20 :][:100]
            registry.rate = 0
        assert layer.verified
        assert registry.bytes_sent("/blobs/") == len(blob.blob)
        sizes = [request.sent for request in registry.matching("GET", "/blobs/")]
        assert len([size for size in sizes if size < 700_000]) >= 4
