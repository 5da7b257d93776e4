"""perf.stalls' and perf.crowd's arithmetic: what is demanded and promised, who used the processors, what limits."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lazyfs.format.trace import Read, Trace
from perf import processors
from perf.crowd import Crowd, limited_by
from perf.limit import Link
from perf.processors import Look, Process
from perf.stalls import Demanded, Recorded, demanded, summarise
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import node
from tests.helpers.tars import file, tar_of

KIB = 1 << 10
MANIFEST, LAYER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FAR = Link("far", 0.1, 50.0)


def trace_of(*reads: Read, ready: float = 1.0) -> Trace:
    return Trace(MANIFEST, (LAYER,), reads, (), ready)


async def test_a_chunk_is_demanded_with_its_share_of_a_frame(scratch: Path, registry: FakeRegistry) -> None:
    files = {f"f{number}": noise(f"stalls {number}", 20 * KIB) for number in range(4)}
    blob = zstd_chunked_layer(tar_of(*(file(name, data) for name, data in files.items())), frame_size=1 << 20)
    reads = Read(b"f1", 0, 0, 20 * KIB), Read(b"f2", 0, 0, 20 * KIB), Read(b"gone", 0, 0, 5)
    async with node(scratch) as one:
        table = one.serve(blob, registry).table
        assert table.frame_count == 1
        found = demanded(trace_of(*reads), [table])
        frame = int(table.frame_blob_end[0] - table.frame_blob_offset[0])
        del table
    assert (found.size, found.frames) == (40 * KIB + 5, frame)
    assert found.compressed == pytest.approx(frame / 2, abs=1)
    assert demanded(trace_of(*reads), [None]) == Demanded(40 * KIB + 5, 0, 0)


def test_a_stall_is_the_time_in_which_anybody_waits_beside_transfer_and_two_round_trips() -> None:
    reads = (
        Read(b"a", 0, 0, 1, at=0.1, waited=0.2),
        Read(b"b", 0, 0, 1, at=0.2, waited=0.2),  # side by side with the first
        Read(b"c", 0, 0, 1, at=0.5),
        Read(b"d", 0, 0, 1, at=0.9, waited=0.1),
    )
    one = Recorded(trace_of(*reads), Demanded(10_000_000, 1_250_000, 2_500_000))
    assert one.stall == pytest.approx(0.4)
    assert one.promise(FAR) == pytest.approx(1_250_000 * 8 / 50e6 + 2 * 0.1)
    assert one.promise(FAR, whole=True) == pytest.approx(2_500_000 * 8 / 50e6 + 2 * 0.1)
    told = summarise([one, one], one, FAR)
    assert told["by_promise"] == 1.0 and told["waited_for"] == 3


def test_what_limits_a_crowd_is_told_with_figures() -> None:
    crowd = Crowd(0.5, (1.0, 2.0), 1_000_000, 1_000_000, 3, {}, busy=3.8, stolen=0.0, idle=0.05)
    assert limited_by(crowd, FAR) == "the processors: 3.8 processor seconds in 2.0 s, 5% idle"
    assert limited_by(replace(crowd, idle=0.6, moved=12_000_000), FAR) == "the link: 12000000 bytes in 2.0 s"
    assert limited_by(replace(crowd, idle=0.6), FAR).startswith("neither alone")


def test_processor_seconds_are_told_by_process_and_for_the_machine() -> None:
    tick = os.sysconf("SC_CLK_TCK")
    before = Look({1: Process(0, 10, 0), 2: Process(1, 0, 5)}, (100, 0, 0, 100, 0, 0, 0, 0))
    processes = {1: Process(0, 10 + tick, 0), 2: Process(1, tick, 5 + tick), 3: Process(2, tick, 0)}
    after = Look(processes, (100 + 3 * tick, 0, 0, 100 + tick, 0, 0, 0, tick))
    assert processors.used_seconds(before, after, [1]) == 1.0
    assert processors.used_seconds(before, after, [2, 3, 4]) == 3.0
    assert processors.below(after, [1]) == {2, 3} and processors.below(after, [3]) == set()
    assert processors.busy_seconds(before, after) == 3.0 and processors.stolen_seconds(before, after) == 1.0
    assert processors.idle_share(before, after) == 0.2


def test_the_machine_is_looked_at() -> None:
    before = processors.look()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    after = processors.look()
    assert processors.used_seconds(before, after, [os.getpid()]) >= 0.02
    assert processors.busy_seconds(before, after) > 0 and os.getpid() in after.processes
