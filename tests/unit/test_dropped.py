"""A layer that nobody holds any more: whoever shows its blob next gets nothing of what was on its way for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.errors import DigestMismatch, FrameInvalid, LazyfsError
from lazyfs.format.trace import Read, Trace
from lazyfs.mount.replay import Replay
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import Node, node
from tests.helpers.tars import dir_, file, tar_of
from tests.unit.test_remote import Gated

CHUNK = 32 << 10
NAMES = [b"d/f%03d" % number for number in range(100)]
DATA = {name: noise(("dropped", name), CHUNK) for name in NAMES}
BLOB = zstd_chunked_layer(
    tar_of(dir_("d"), *(file(name, data) for name, data in DATA.items())), chunk_size=CHUNK, frame_size=CHUNK
)


def with_another_toc() -> LayerBlob:
    """The same blob, of which another image says that its files are in another order: the digests are exchanged."""
    toc = json.loads(BLOB.toc)
    files = [entry for entry in toc["entries"] if entry.get("type") == "reg"]
    digests = [entry["digest"] for entry in reversed(files)]
    for entry, digest in zip(files, digests, strict=True):
        entry["digest"] = entry["chunkDigest"] = digest
    return dataclasses.replace(BLOB, toc=json.dumps(toc).encode())


def let_go(one: Node, layer: ServedLayer) -> None:
    """What `Layers.drop` does."""
    layer.dropped = True
    layer.users = 0
    one.reader.drop(layer)
    layer.store.close()
    one.layers.remove(layer)


async def replay(one: Node, layer: ServedLayer) -> None:
    told = Trace("sha256:" + "a" * 64, (layer.digest,), tuple(Read(name, 0, 0, CHUNK) for name in NAMES))
    await Replay(one.remote, one.scheduler, told, [layer], 1 << 40, lambda size: None).run()


@pytest.mark.parametrize("stays", [False, True])
async def test_bytes_that_another_toc_promised_reach_nobody(scratch: Path, registry: FakeRegistry, stays: bool) -> None:
    """`stays`: a reader of the first image still waits."""
    registry.latency = 0.2
    async with node(scratch) as one, trio.open_nursery() as nursery:
        first = one.serve(BLOB, registry, check=False)

        async def read() -> None:
            with pytest.raises(LazyfsError, match="not in use") if stays else trio.move_on_after(0.1):
                await one.read(first, NAMES[3])

        nursery.start_soon(read)
        await trio.sleep(0.15)
        let_go(one, first)
        second = one.serve(with_another_toc(), registry, check=False)
        assert second.number == first.number and second.serial != first.serial
        with pytest.raises((DigestMismatch, FrameInvalid)):
            await one.read(second, NAMES[3])


async def test_a_start_behind_another_fetches_all_that_it_is_told(scratch: Path, registry: FakeRegistry) -> None:
    registry.latency = 0.2
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry, check=False)
        with trio.move_on_after(0.1):
            await replay(one, layer)
        assert one.remote.in_flight()
        let_go(one, layer)
        layer = one.serve(BLOB, registry, check=False)
        with trio.fail_after(20):
            await replay(one, layer)
        assert not layer.store.missing(0, len(NAMES))


@pytest.mark.parametrize("check", [False, True])
async def test_a_fill_behind_another_start_ends_with_all_of_it(
    scratch: Path, registry: FakeRegistry, check: bool
) -> None:
    registry.latency = 0.2
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry, check=False)
        with trio.move_on_after(0.1):
            await one.filler.fill(layer)
        assert one.remote.in_flight()
        let_go(one, layer)
        layer = one.serve(BLOB, registry, check=check)
        with trio.fail_after(20):
            assert await one.filler.fill(layer) == ""
        assert layer.store.complete and layer.verified is check


async def test_what_was_on_its_way_ends_at_once_and_lands_nowhere(scratch: Path) -> None:
    """Its place at the host is free for others, and bytes that come all the same are nobody's."""
    async with node(scratch, connections=3) as one:
        source = Gated(BLOB.blob)
        layer = one.serve(BLOB, source)  # type: ignore[arg-type]
        assert layer.check is not None
        failed: list[LazyfsError] = []

        async def bring(first: int) -> None:
            try:
                await one.remote.bring(layer, first, first + 20, Priority.BACKGROUND)
            except LazyfsError as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            for first in (0, 20, 40):  # one runs, two wait for their turn
                nursery.start_soon(bring, first)
            await trio.testing.wait_all_tasks_blocked(0.01)
            layer.dropped = True
            one.reader.drop(layer)
        assert [str(error) for error in failed] == [f"layer {layer.digest} is not in use any more"] * 3
        assert one.remote.in_flight() == 0
        assert one.scheduler.statistics()["gated"].running == 0
        source.open.set()
        await trio.sleep(0.1)
        assert len(source.asked) == 1
        assert len(layer.store.missing(0, len(NAMES))) == len(NAMES)
        assert not any(layer.check.spool.has(extent) for extent in range(layer.extents))
        with pytest.raises(LazyfsError, match="not in use"):
            await one.read(layer, NAMES[50])
