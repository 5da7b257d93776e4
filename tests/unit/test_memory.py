"""Chunks in memory: never more bytes than the bound, the least recently used ones go."""

from __future__ import annotations

import sys
import threading

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.chunks.memory import OVERHEAD, MemoryCache

BOUND = 64 * 1024


def test_returns_what_was_put_and_counts() -> None:
    cache = MemoryCache(BOUND)
    assert cache.get((1, 0)) is None
    assert cache.put((1, 0), b"abc")
    assert cache.get((1, 0)) == b"abc"
    found = cache.statistics()
    assert (found.hits, found.misses, found.entries, found.size) == (1, 1, 1, 3 + OVERHEAD)


def test_least_recently_used_goes_first() -> None:
    cache = MemoryCache(4 * (1000 + OVERHEAD))
    for chunk in range(4):
        assert cache.put((1, chunk), bytes(1000))
    assert cache.get((1, 0)) is not None
    assert cache.put((1, 4), bytes(1000))
    assert [chunk for chunk in range(5) if cache.get((1, chunk)) is not None] == [0, 2, 3, 4]


def test_chunk_larger_than_a_quarter_is_not_kept_and_replaces_nothing_stale() -> None:
    cache = MemoryCache(BOUND)
    assert cache.put((1, 0), bytes(BOUND // 4 - OVERHEAD))
    assert not cache.put((1, 0), bytes(BOUND // 4 - OVERHEAD + 1))
    assert cache.get((1, 0)) is None
    assert cache.statistics().refused == 1
    assert cache.statistics().size == 0


def test_replacing_an_entry_does_not_count_it_twice() -> None:
    cache = MemoryCache(BOUND)
    for size in (10, 2000, 5):
        cache.put((1, 1), bytes(size))
    assert cache.statistics().size == 5 + OVERHEAD


def test_resize_takes_effect_at_once() -> None:
    cache = MemoryCache(BOUND)
    for chunk in range(20):
        cache.put((1, chunk), bytes(2000))
    cache.resize(5000)
    assert cache.statistics().size <= 5000
    cache.resize(0)
    assert cache.statistics().entries == 0
    assert not cache.put((1, 0), b"")


def test_forget_layer_leaves_the_others() -> None:
    cache = MemoryCache(BOUND)
    cache.put((1, 0), b"a")
    cache.put((2, 0), b"b")
    cache.forget_layer(1)
    assert cache.get((1, 0)) is None
    assert cache.get((2, 0)) == b"b"


_CALLS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "resize"]), st.integers(0, 12), st.integers(0, 6000)), max_size=60
)


@given(_CALLS)
def test_any_calls_stay_within_the_bound_and_give_the_last_bytes(calls: list[tuple[str, int, int]]) -> None:
    cache, bound = MemoryCache(20_000), 20_000
    last: dict[int, bytes] = {}
    for step, (call, chunk, size) in enumerate(calls):
        if call == "put":
            last[chunk] = bytes([step % 256]) * size
            cache.put((0, chunk), last[chunk])
        elif call == "get":
            assert cache.get((0, chunk)) in (None, last.get(chunk))
        else:
            bound = size * 5
            cache.resize(bound)
        found = cache.statistics()
        assert found.size <= bound
        kept = [data for key, data in last.items() if cache.get((0, key)) is not None]
        assert found.size == sum(map(len, kept)) + OVERHEAD * len(kept)


def test_threads_leave_the_account_right() -> None:
    cache = MemoryCache(BOUND)

    def work(layer: int) -> None:
        for step in range(500):
            cache.put((layer, step % 30), bytes([layer]) * (step * 7 % 3000))
            found = cache.get((layer, step % 17))
            assert found is None or set(found) <= {layer}

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = cache.statistics()
    assert found.size <= BOUND
    cache.resize(0)
    assert cache.statistics().size == 0


def test_what_is_pushed_out_is_freed() -> None:
    cache = MemoryCache(BOUND)
    first = bytes(bytearray(1000))
    references = sys.getrefcount(first)
    cache.put((0, 0), first)
    for chunk in range(1, 2 * BOUND // 1000):
        cache.put((0, chunk), bytes(1000))
    assert cache.get((0, 0)) is None
    assert sys.getrefcount(first) == references
