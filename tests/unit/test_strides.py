"""Reads at equal distances are foreseen, others are not, and what is foreseen stays in bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.chunks.strides import Strides
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import node
from tests.helpers.tars import file, tar_of

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 64 * KIB
DATA = noise("strides", 16 * MIB)


def foreseen(begins: list[int], size: int = CHUNK, limit: int = 1 << 40) -> list[tuple[int, int]]:
    strides = Strides()
    return [piece for begin in begins for piece in strides.note(1, begin, begin + size, limit)]


@pytest.mark.parametrize("stride", [MIB, -MIB, 260 * KIB])
def test_the_third_read_at_an_equal_distance_names_the_next_ones(stride: int) -> None:
    begins = [40 * MIB + number * stride for number in range(12)]
    named = foreseen(begins)
    assert named[:2] == [(begins[number], begins[number] + CHUNK) for number in (3, 4)]
    assert len(set(named)) == len(named)
    assert {begin for begin, _ in named} >= set(begins[3:])
    assert len(named) <= 9 + 8


def test_reads_in_order_or_without_one_are_not_foreseen() -> None:
    assert foreseen([number * CHUNK for number in range(30)]) == []
    assert foreseen([100 * KIB << number for number in range(30)]) == []
    assert foreseen([number * 200 * MIB for number in range(10)]) == [], "that far apart is chance"
    assert foreseen([0, 2 * MIB, 4 * MIB, MIB, 3 * MIB], size=MIB) == [], "in order, as the kernel asks for it"


def test_nothing_is_foreseen_behind_the_end_of_a_file() -> None:
    assert foreseen([0, MIB, 2 * MIB, 3 * MIB], limit=4 * MIB) == [(3 * MIB, 3 * MIB + CHUNK)]


def test_files_at_equal_distances_are_no_pattern() -> None:
    strides = Strides()
    for begin in (0, MIB, 2 * MIB):
        assert strides.note(1, begin, begin + CHUNK, begin + MIB, begin) == []


def test_a_piece_that_is_not_taken_ends_it() -> None:
    strides = Strides()
    for number in range(4):
        strides.note(1, number * MIB, number * MIB + CHUNK, 1 << 40)
    assert strides.note(1, 777 * KIB, 777 * KIB + CHUNK, 1 << 40) == []
    assert not strides.expects(1, 5 * MIB)


def test_two_readers_of_a_layer_do_not_hide_each_other() -> None:
    begins = [begin for number in range(6) for begin in (number * MIB, 500 * MIB + number * 3 * MIB)]
    named = {begin for begin, _ in foreseen(begins)}
    assert 5 * MIB in named and 500 * MIB + 15 * MIB in named


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 1 << 24)), max_size=80), st.integers(0, 1 << 30))
def test_whatever_is_read_little_is_foreseen(reads: list[tuple[int, int]], limit: int) -> None:
    strides = Strides()
    for begin, size in reads:
        named = strides.note(1, begin, begin + size, limit)
        assert len(named) <= 8
        assert sum(end - first for first, end in named) <= max(8 * MIB, size)
        assert all(first >= 0 and end <= limit for first, end in named)


async def test_pieces_of_a_file_are_here_before_they_are_wanted(scratch: Path, registry: FakeRegistry) -> None:
    """And a reader that stops has cost a few pieces more than he took."""
    blob = zstd_chunked_layer(tar_of(file("big", DATA), file("z", b"z")), chunk_size=CHUNK, frame_size=CHUNK)
    for by_data in (False, True):
        async with node(scratch / str(by_data)) as one:
            layer = one.serve(blob, registry, check=False)
            row = layer.table.find(b"big")
            assert row is not None
            base = layer.table.data_offset[row] if by_data else 0
            registry.clear_log()
            for number in range(10):
                at = number * MIB
                if by_data:
                    data = await one.reader.read_data(layer, base + at, 4096)
                else:
                    data = await one.reader.read(layer, row, at, 4096)
                assert bytes(data) == DATA[at : at + 4096]
                if number == 5:
                    for later in (6, 7):
                        chunk = layer.table.file_chunks(row)[later * MIB // CHUNK]
                        assert layer.store.has(chunk) or one.remote.is_coming(layer, chunk)
            while one.remote.in_flight():
                await trio.sleep(0.001)
            assert registry.count("GET", "/blobs/") <= 16
