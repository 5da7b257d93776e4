"""Many small files, a frame each: read one after another they cost few requests, read here and there no byte more."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.chunks.crowds import STRETCH, Crowds
from lazyfs.chunks.schedule import Scheduler
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.foreign import estargz_layer, storage_layer
from tests.helpers.served import Node, node
from tests.helpers.tars import file, tar_of

COUNT = 400
FILES = {f"{number:04}".encode(): noise(f"crowd {number}", 700 + number) for number in range(COUNT)}
TAR = tar_of(*(file(name.decode(), data) for name, data in FILES.items()))
MAKERS = {
    "zstd:chunked": lambda: zstd_chunked_layer(TAR, frame_size=0),
    "estargz": lambda: estargz_layer(TAR),
    "containers/storage": lambda: storage_layer(TAR),
}
every_form = pytest.mark.parametrize("form", MAKERS)


async def read_all(one: Node, layer: LayerBlob, registry: FakeRegistry, names: list[bytes]) -> tuple[int, int]:
    """Read files one after another; return requests and bytes."""
    served = one.serve(layer, registry, check=False)
    registry.clear_log()
    with trio.fail_after(60):
        for name in names:
            assert await one.read(served, name) == FILES[name]
    return registry.count(), registry.bytes_sent(layer.digest)


@every_form
async def test_a_walk_over_small_files_takes_few_requests(form: str, scratch: Path, registry: FakeRegistry) -> None:
    layer = MAKERS[form]()
    async with node(scratch) as one:
        requests, size = await read_all(one, layer, registry, list(FILES))
    assert requests <= COUNT // 8
    assert size <= len(layer.blob)


@every_form
async def test_a_walk_in_another_order_is_not_worse(form: str, scratch: Path, registry: FakeRegistry) -> None:
    layer = MAKERS[form]()
    async with node(scratch) as one:
        requests, size = await read_all(one, layer, registry, list(FILES)[::-1])
    assert requests <= COUNT
    assert size <= len(layer.blob)


@every_form
async def test_two_files_cost_their_frames_only(form: str, scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        requests, size = await read_all(one, MAKERS[form](), registry, [b"0010", b"0300"])
    assert requests == 2
    assert size < 6000


def test_what_a_round_trip_is_worth() -> None:
    scheduler = Scheduler(4, clock=lambda: 0.0)
    assert scheduler.bytes_in_a_round_trip("host") == 16 << 10
    scheduler.observe("host", 0.020, 1 << 20, 0.1)
    assert scheduler.bytes_in_a_round_trip("host") == pytest.approx((1 << 20) / 5, rel=0.01)


def test_the_third_miss_makes_a_crowd_and_the_first_beside_it() -> None:
    crowds = Crowds()
    assert [crowds.note(1, offset) for offset in (0, 100, 200, 300)] == [False, False, True, True]
    assert crowds.note(1, STRETCH)
    assert not crowds.note(1, 5 * STRETCH)
    assert not crowds.note(2, STRETCH), "another layer's"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40))))
def test_memory_is_bounded_and_nothing_far_away_is_a_crowd(misses: list[tuple[int, int]]) -> None:
    crowds = Crowds()
    seen: set[tuple[int, int]] = set()
    for layer, offset in misses:
        stretch = offset // STRETCH
        alone = all((layer, at) not in seen for at in range(stretch - 1, stretch + 2))
        assert not (crowds.note(layer, offset) and alone)
        seen.add((layer, stretch))
