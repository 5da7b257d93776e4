"""Who reads one file after another has the next ones on their way; nobody else has more than his own file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from lazyfs.chunks.evict import Budget
from lazyfs.chunks.layer import ServedLayer
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of

MIB = 1 << 20
FILES = {f"{number:02}": noise(f"w{number}", 3 * MIB) for number in range(14)}  # larger than what comes for a crowd
STEP = 1 << 17  # bytes of a read


def serve(one: Node, registry: FakeRegistry, files: dict[str, bytes]) -> ServedLayer:
    tar = tar_of(*(file(name, data) for name, data in files.items()))
    layer = one.serve(zstd_chunked_layer(tar, chunk_size=MIB, frame_size=MIB), registry)
    registry.clear_log()
    return layer


async def walk(one: Node, layer: ServedLayer, files: dict[str, bytes]) -> list[str]:
    """Read files from end to end, one after another. Return which were here or on their way before they were read."""
    came = []
    with trio.fail_after(30):
        for name, data in files.items():
            row = layer.table.find(name.encode())
            assert row is not None
            first = layer.table.file_chunks(layer.table.inode(row))[0]
            if layer.store.has(first) or one.remote.is_coming(layer, first):
                came.append(name)
            for offset in range(0, len(data), STEP):
                assert await one.read(layer, name.encode(), offset, STEP) == data[offset : offset + STEP]
    return came


async def test_the_next_files_are_on_their_way(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = serve(one, registry, FILES)
        assert await walk(one, layer, FILES) == list(FILES)[3:]


async def test_a_large_file_ends_where_it_ends(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        large = noise("large", 24 * MIB)
        layer = serve(one, registry, {"large": large, **FILES})
        await walk(one, layer, {"large": large})
        assert await walk(one, layer, {"00": FILES["00"]}) == []


@pytest.mark.parametrize("full", ["store", "disk"])
async def test_what_would_be_thrown_away_is_not_fetched(
    scratch: Path, registry: FakeRegistry, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(scratch) as one:
        layer = serve(one, registry, FILES)
        if full == "disk":
            one.store.health.failed(OSError(errno.ENOSPC, "No space left on device"))
        else:
            monkeypatch.setattr(Budget, "takes_spare", False)
        assert await walk(one, layer, FILES) == []


def test_a_full_budget_takes_what_is_spare_while_an_eviction_may_help() -> None:
    now = 0.0
    budget = Budget(1000, monotonic=lambda: now)
    budget.set_used(800, 0)
    budget.set_spare_hopeless()
    assert budget.takes_spare  # it has room
    budget.set_used(950, 0)
    assert not budget.takes_spare
    now = 60.0
    assert budget.takes_spare
    assert not Budget(0).takes_spare
