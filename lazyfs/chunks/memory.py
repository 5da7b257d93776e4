"""Decoded, verified chunks held in memory, so that a page-in beside the last one neither reads nor hashes again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from lru import LRU

# What an entry costs beside its bytes: the LRU's node, the key tuple with two ints, the dict's slot, the bytes header.
OVERHEAD = 256  # bytes, rounded up

Key = tuple[int, int]  # layer serial, chunk number


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """What `status` shows. Sizes in bytes, overhead included; the rest are counts since the start."""

    bound: int
    size: int
    entries: int
    hits: int
    misses: int
    evicted: int
    refused: int  # chunks too large to be kept


class MemoryCache:
    """An LRU of (layer, chunk) → bytes, bounded in bytes, OVERHEAD an entry included. Thread-safe, never blocks long.

    A chunk that with its overhead takes more than a quarter of the bound is not kept: it would push out everything that
    the other readers are about to want again.
    """

    def __init__(self, bound: int) -> None:
        self._bound = max(0, bound)
        # lru-dict counts entries; the number that fits is reached by empty chunks only, so bytes always decide.
        self._entries: LRU[Key, bytes] = LRU(self._bound // OVERHEAD + 1)
        self._lock = threading.Lock()
        self._size = self._hits = self._misses = self._evicted = self._refused = 0

    @property
    def bound(self) -> int:
        """Bytes that it may hold."""
        return self._bound

    def __contains__(self, key: Key) -> bool:
        """Tell whether a chunk is held. Not counted, and no use of it."""
        with self._lock:
            return key in self._entries

    def get(self, key: Key) -> bytes | None:
        """Return the chunk's bytes, which become the most recently used, or None."""
        with self._lock:
            data = self._entries.get(key)
            if data is None:
                self._misses += 1
            else:
                self._hits += 1
            return data

    def put(self, key: Key, data: bytes) -> bool:
        """Keep verified bytes, in place of what the key had. False: too large to be kept."""
        cost = len(data) + OVERHEAD
        with self._lock:
            self._remove(key)
            if cost > self._bound // 4:
                self._refused += 1
                return False
            self._shrink(self._bound - cost)
            self._entries[key] = data
            self._size += cost
            return True

    def forget_layer(self, layer: int) -> None:
        """Drop all chunks of one layer serial (it was quarantined)."""
        with self._lock:
            for key in [key for key in self._keys() if key[0] == layer]:
                self._remove(key)

    def resize(self, bound: int) -> None:
        """Set the bound in bytes; a smaller one takes effect at once."""
        with self._lock:
            self._bound = max(0, bound)
            self._shrink(self._bound)
            self._entries.set_size(self._bound // OVERHEAD + 1)

    def statistics(self) -> MemoryStatistics:
        """Return the numbers of this moment."""
        with self._lock:
            return MemoryStatistics(
                self._bound, self._size, len(self._entries), self._hits, self._misses, self._evicted, self._refused
            )

    def _keys(self) -> Iterable[Key]:
        return self._entries.keys()

    def _remove(self, key: Key) -> None:
        data = self._entries.pop(key, None)
        if data is not None:
            self._size -= len(data) + OVERHEAD

    def _shrink(self, target: int) -> None:
        while self._size > target:
            # not popitem: it leaks a reference to the value (lru-dict 1.4.1), and so every byte that passes through
            oldest = self._entries.peek_last_item()
            if oldest is None:
                return
            key, data = oldest
            del self._entries[key]
            self._size -= len(data) + OVERHEAD
            self._evicted += 1
