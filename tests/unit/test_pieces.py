"""Large frames that come in pieces: one that crawls holds up no reader, and a wrong one is charged to nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.chunks import flights, slow
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.mirrors import Mirrors
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of
from tests.unit.test_remote import BIG, Gated, ranges

FRAME = 2 << 20
BLOB = zstd_chunked_layer(tar_of(file("big", BIG)), chunk_size=FRAME, frame_size=FRAME)


def frame_of(layer: ServedLayer, offset: int) -> int:
    row = layer.table.find(b"big")
    assert row is not None
    return int(layer.table.chunk_frame[layer.table.file_chunks(row)[offset // FRAME]])


def extent(layer: ServedLayer, offset: int) -> tuple[int, int]:
    """The (blob offset, size) of the frame that holds a byte of the file."""
    return layer.extent(frame_of(layer, offset) + 1)


async def bring(one: Node, layer: ServedLayer, offset: int) -> None:
    frame = frame_of(layer, offset)
    await one.remote.bring(layer, frame, frame + 1, Priority.BACKGROUND)


@pytest.mark.parametrize("how", ["late", "slow"])
async def test_a_piece_that_crawls_holds_up_no_reader(
    scratch: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What came before it is kept, and the rest asked for with one request."""
    monkeypatch.setattr(flights, "_LATE", 0.2 if how == "late" else 1000.0)
    for name in ("_LOOK", "_SPAN", "_WORTH"):
        monkeypatch.setattr(slow, name, 0.1 if how == "slow" else 1000.0)
    async with node(scratch, read_timeout=300) as one, trio.open_nursery() as nursery:
        layer = one.serve(BLOB, registry, check=False)
        one.scheduler.observe(layer.host, 0.02, 400_000, 0.1)
        registry.fault(Fault.DRIP, path="/blobs/", after=1, times=1, rate=2_000)
        nursery.start_soon(bring, one, layer, 3 << 20)
        with trio.fail_after(10):
            while len(registry.matching("GET", "/blobs/")) < 2:
                await trio.sleep(0.01)
        with trio.fail_after(20):
            assert await one.read(layer, b"big", 3 << 20, 100) == BIG[3 << 20 :][:100]
        first, crawling, rest = ranges(registry.matching("GET", "/blobs/"))
        start, size = extent(layer, 3 << 20)
        assert first[0] == start and crawling[0] == sum(first)
        assert rest == (sum(first), start + size - sum(first))


async def test_a_piece_that_waits_for_its_turn_is_not_waited_for(scratch: Path) -> None:
    async with node(scratch, connections=3) as one, trio.open_nursery() as nursery:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source, check=False)  # type: ignore[arg-type]
        for offset in (0, 3 << 20):  # one runs, one waits
            nursery.start_soon(bring, one, layer, offset)
            await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(one.read, layer, b"big", 3 << 20, 100)
        with trio.fail_after(10):
            while len(source.asked) < 2:
                await trio.sleep(0.001)
        assert source.asked[0][1] < FRAME // 2
        assert source.asked[1] == extent(layer, 3 << 20)
        source.open.set()


async def test_a_liars_piece_is_not_charged_to_who_sent_the_rest(scratch: Path) -> None:
    """Where the frame is wrong it is fetched whole, once, and then it is known who lies."""
    with Mirrors(scratch, 1) as hosts:
        digest = hosts.add_blob(BLOB.blob)
        hosts.mirrors[0].fault(Fault.FLIP, path="/blobs/", times=1)
        hosts.mirrors[0].fault(Fault.REFUSE, path="/blobs/")
        repository = hosts.open()
        async with node(scratch / "node") as one:
            layer = one.serve(BLOB, repository, check=False)
            with trio.fail_after(20):
                await bring(one, layer, 3 << 20)
                assert await one.read(layer, b"big", 3 << 20, 100) == BIG[3 << 20 :][:100]
            whole = extent(layer, 3 << 20)
            assert len(one.errors) == 1
        assert not repository.health.has_lied(hosts.origin.host, digest)
        assert repository.health.snapshot()[hosts.origin.host]["errors"] == 0
        asked = ranges(hosts.origin.matching("GET", "/blobs/"))
        assert asked[-1] == whole and asked.count(whole) == 1
