"""Ranges of a trace over tiny frames: counted in frames too, for each costs the loop as much as a large one."""

from __future__ import annotations

from pathlib import Path

from lazyfs.format.trace import Read, Trace
from lazyfs.limits import MAX_FRAMES
from lazyfs.mount.plan import Plan, Range
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import node
from tests.helpers.tars import file, tar_of

CHUNK = 16
COUNT = 3 * MAX_FRAMES
TINY = zstd_chunked_layer(tar_of(file("tiny", noise("tiny", COUNT * CHUNK))), chunk_size=CHUNK, frame_size=0)


async def test_no_range_and_no_gap_has_more_frames_than_one_request(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(TINY, registry)
        row = layer.table.find(b"tiny")
        assert row is not None
        zero = layer.table.chunk_frame[layer.table.file_chunks(row)[0]]

        def ranges(*wanted: tuple[int, int]) -> list[tuple[int, int]]:
            """What is asked for, where a trace tells of these [first, stop) chunks and a gap costs next to nothing."""
            reads = [Read(b"tiny", 0, first * CHUNK, (stop - first) * CHUNK) for first, stop in wanted]
            plan = Plan(Trace("sha256:" + "a" * 64, (layer.digest,), tuple(reads)), [layer])
            found: list[Range] = plan.next(1 << 30, 1 << 30, 1)
            assert plan.over
            return [(one.first - zero, one.stop - zero) for one in found]

        assert ranges((0, 1), (MAX_FRAMES // 2, MAX_FRAMES // 2 + 1)) == [(0, MAX_FRAMES // 2 + 1)]
        assert ranges((0, 1), (MAX_FRAMES + 2, MAX_FRAMES + 3)) == [(0, 1), (MAX_FRAMES + 2, MAX_FRAMES + 3)]
        assert ranges((0, COUNT)) == [(at, at + MAX_FRAMES) for at in range(0, COUNT, MAX_FRAMES)]
