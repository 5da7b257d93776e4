"""Reading a file of a layer: memory, then the store, then another layer of this node, then the registry.

Each step is asked only for what the one before did not have, and each chunk by one reader at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from lazyfs.chunks.data_reads import refusal
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.memory import MemoryCache
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.chunks.verify_ahead import VerifyAhead, is_small_end
from lazyfs.errors import BlobMissing, LazyfsError, StoreFull
from lazyfs.format.table import NO_FRAME, Place
from lazyfs.limits import READ_TASKS

_REFILL_TRIES = 2  # fetches of one, for one read
_REFILLS = 2  # plain layers fetched again at a time
Data = bytes | bytearray | memoryview
Rest = Coroutine[Any, Any, Data]  # what a read still has to wait for
_DISK_THREADS = 8  # reads and hashes of the store side by side; the disk and two cores want no more


@dataclass(slots=True)
class ReadCounters:
    """Uncompressed bytes by where they came from, since the start."""

    from_memory: int = 0
    from_store: int = 0
    from_other_layer: int = 0
    from_registry: int = 0
    limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_DISK_THREADS))

    def answered(self) -> int:
        """Return what readers were given so far."""
        return self.from_memory + self.from_store + self.from_other_layer + self.from_registry


class Reader:
    """Reads of all layers. Belongs to one trio loop.

    `donors(digest)` names other layers' chunks with the same bytes as (their layer, chunk) pairs; blocking. What looks
    ahead of readers runs in `nursery`.
    """

    def __init__(
        self,
        memory: MemoryCache,
        remote: Remote,
        donors: Callable[[ServedLayer, bytes], bytes | None],
        nursery: trio.Nursery,
    ) -> None:
        self._memory = memory
        self._remote = remote
        self._donors = donors
        self._single: SingleFlight[tuple[int, int], bytes] = SingleFlight()
        self._ahead = VerifyAhead(memory, nursery, self._single.__contains__)
        self._nursery = nursery
        self._dropping = False
        self.counters = ReadCounters()
        # Apart from the disk's threads: a registry that stalls must not hold up reads of what is here.
        self._refills = trio.CapacityLimiter(_REFILLS)

    async def read(self, layer: ServedLayer, row: int, offset: int, size: int) -> Data:
        """Return bytes [offset, offset + size) of regular file `row`, cut at its end. All of them verified.

        A checkpoint unless all is in memory. Raise a LazyfsError: never a short read inside the file.
        """
        return await _whole(self.begin(layer, row, offset, size))

    def begin(self, layer: ServedLayer, row: int, offset: int, size: int) -> Data | Rest:
        """Do what `read` does as far as nothing has to be waited for: return the bytes, or what will have them.

        What is returned in their place must be awaited. Never blocks.
        """
        layer.ensure_readable()
        places = list(layer.table.places(row, offset, size))
        if not places:
            return b""
        self._ahead.note(layer, places[0].chunk, places[-1].chunk)
        if layer.witnesses:
            _tell(layer, places)
        chunks = layer.table.file_chunks(row)
        last = chunks[-1]
        self._remote.note_piece(layer, places[0], places[-1], last, chunks[0])
        here = self._those_here(layer, places)
        if len(here) < len(places):
            return self._rest(layer, places, here, last, _join)
        return _join(here)

    async def read_data(self, layer: ServedLayer, data_offset: int, size: int) -> Data:
        """Return exactly `size` bytes of a layer's data space, verified; zeros between files and behind the last.

        Chunks that are here are taken from here, whatever else the range has. A checkpoint unless all is in memory.
        Raise a LazyfsError: one chunk that can't be had fails the whole range.
        """
        return await _whole(self.begin_data(layer, data_offset, size))

    def begin_data(self, layer: ServedLayer, data_offset: int, size: int) -> Data | Rest:
        """Do what `read_data` does as far as nothing has to be waited for, as `begin` does."""
        layer.ensure_readable()
        if layer.data_reads.ending and layer.users < 2:
            raise refusal()
        if (small := self._small_file(layer, data_offset, size)) is not None:
            return small
        found = list(layer.table.data_places(data_offset, size))
        if not found:
            return bytes(size)
        last = found[-1][1].chunk
        self._ahead.note(layer, found[0][1].chunk, last)
        places = [place for _, place in found]
        if layer.witnesses:
            _tell(layer, places)
        if not all(layer.store.has(place.chunk) for place in places):
            last = layer.table.run_end(last)  # wanted by fetches alone, and it takes longer than all else here
        self._remote.note_piece(layer, places[0], places[-1], last)

        def spread(parts: list[memoryview]) -> Data:
            if len(parts) == 1 and len(parts[0]) == size:
                return parts[0]
            out = bytearray(size)  # not before: a thousand reads may wait for a registry
            for (at, place), part in zip(found, parts, strict=True):
                out[at : at + place.size] = part
            return out

        here = self._those_here(layer, places)
        if len(here) < len(places):
            return layer.data_reads.run(self._rest(layer, places, here, last, spread), lambda: layer.users > 1)
        return spread(here)

    def _small_file(self, layer: ServedLayer, data_offset: int, size: int) -> Data | None:
        """Return the range of one small file that the store has at hand; None: it is none, `begin_data` knows.

        Most reads of who walks a tree are such. Memory doesn't keep it: the kernel has all of it from now on.
        """
        chunk = layer.table.lone_chunk(data_offset, size)
        if chunk is None or not is_small_end(layer, chunk):
            return None
        key = layer.serial, chunk
        if key in self._memory or key in self._ahead or self._remote.is_foreseen(layer, data_offset):
            return None
        data = layer.store.read_now(chunk, size)
        if data is not None:
            self._note_read_now(layer, chunk)
            for witness in layer.witnesses:
                witness.demanded(layer.number, chunk)
        return data

    def _those_here(self, layer: ServedLayer, places: list[Place]) -> list[memoryview]:
        """Return the parts that can be had without waiting, up to the first that can't."""
        here = []
        for place in places:
            data = self._here(layer, place.chunk)
            if data is None:
                break
            here.append(_cut(data, place))
        return here

    async def _rest(
        self,
        layer: ServedLayer,
        places: list[Place],
        here: list[memoryview],
        last: int,
        finish: Callable[[list[memoryview]], Data],
    ) -> Data:
        if len(places) == 1:
            return finish([_cut(await self._absent(layer, places[0].chunk, Priority.DEMAND, last), places[0])])
        parts = list(here)
        for first in range(len(here), len(places), READ_TASKS):
            parts += await self._side_by_side(layer, places[first : first + READ_TASKS], last)
        return finish(parts)

    async def _side_by_side(self, layer: ServedLayer, places: list[Place], last: int) -> list[memoryview]:
        if all((layer.serial, place.chunk) in self._ahead for place in places):
            return [await self._part(layer, place, last) for place in places]  # in this order they become ready
        read = places[0].chunk, places[-1].chunk
        found: dict[Place, memoryview] = {}
        failed: list[LazyfsError] = []

        async def one(place: Place) -> None:
            try:
                part = await self._part(layer, place, last, read)
            except LazyfsError as error:
                # Not raised here: a reader that is cancelled at the same moment would get a group of both.
                failed.append(error)
                nursery.cancel_scope.cancel()
            else:
                found[place] = part

        async with trio.open_nursery() as nursery:
            for place in places:
                nursery.start_soon(one, place)
        if failed:
            raise failed[0]
        return [found[place] for place in places]

    async def _part(
        self, layer: ServedLayer, place: Place, last: int, read: tuple[int, int] | None = None
    ) -> memoryview:
        return _cut(await self.chunk(layer, place.chunk, Priority.DEMAND, last, read), place)

    async def chunk(
        self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None = None
    ) -> bytes:
        """Return one verified chunk. `last_chunk`: the last of the file that is read, where read-ahead ends.

        `read`: first and last chunk of the read that this one is part of, see `Remote.get`.
        """
        data = self._here(layer, chunk)
        return await self._absent(layer, chunk, priority, last_chunk, read) if data is None else data

    def _here(self, layer: ServedLayer, chunk: int) -> bytes | None:
        """Return a chunk that is in memory, or in the store and at hand. Doesn't block."""
        key = layer.serial, chunk
        data = self._memory.get(key)
        if data is not None:
            if self._ahead.take(key):
                self.counters.from_store += len(data)
            else:
                self.counters.from_memory += len(data)
            self._remote.note_read(layer, chunk)
            return data
        if key in self._ahead:
            return None
        found = layer.store.read_now(chunk)
        if found is None:
            return None
        self._note_read_now(layer, chunk)
        data = bytes(found)
        if not layer.dropped:
            self._memory.put(key, data)
        return data

    def _note_read_now(self, layer: ServedLayer, chunk: int) -> None:
        layer.ensure_readable()
        self.counters.from_store += layer.table.chunk_size[chunk]
        self._remote.note_read(layer, chunk)
        if layer.store.has_read_pages and not self._dropping:
            self._dropping = True
            self._nursery.start_soon(self._drop_pages, layer)

    async def _absent(
        self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None = None
    ) -> bytes:
        """Return a chunk that `_here` did not have."""
        key = layer.serial, chunk
        if await self._ahead.wait(key):
            data = self._here(layer, chunk)
            if data is not None:
                return data
        began = trio.current_time()
        absent = bool(layer.witnesses) and priority is Priority.DEMAND and not layer.store.has(chunk)
        while True:
            joined = key in self._single
            try:
                data = await self._single.run(key, partial(self._find, layer, chunk, priority, last_chunk, read))
                if absent:
                    for witness in layer.witnesses:
                        witness.waited(layer.number, chunk, trio.current_time() - began)
                return data
            except LazyfsError as error:
                # Whoever came first has run out of its time; ours is longer by what we came later.
                if not joined or not error.temporary or self._remote.is_over(began):
                    raise

    async def _find(
        self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None
    ) -> bytes:
        data: bytes | None = None
        if layer.store.has(chunk):
            data = await trio.to_thread.run_sync(layer.store.read, chunk, limiter=self.counters.limiter)
            if data is not None:
                self.counters.from_store += len(data)
                self._remote.note_read(layer, chunk)
        if data is None and layer.is_plain:
            data = await self._refill(layer, chunk)
        if data is None and layer.table.chunk_frame[chunk] != NO_FRAME:
            data = await self._from_afar(layer, chunk, priority, last_chunk, read)
        if data is None:
            raise BlobMissing(layer.host, f"a hole of layer {layer.digest} is not what its TOC says")
        layer.ensure_readable()  # the whole check may have ended meanwhile
        if not layer.dropped:
            self._memory.put((layer.serial, chunk), data)
        return data

    async def _from_afar(
        self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None
    ) -> bytes:
        digest = layer.table.chunk_digest(chunk)
        data: bytes | None = None
        if not self._remote.is_coming(layer, chunk):
            data = await trio.to_thread.run_sync(self._donors, layer, digest, limiter=self.counters.limiter)
        if data is not None and len(data) == layer.table.chunk_size[chunk]:
            self.counters.from_other_layer += len(data)
            await trio.to_thread.run_sync(layer.store.write, chunk, data, limiter=self.counters.limiter)
            return data
        while layer.store.has(chunk):  # it came and was written while we looked elsewhere
            data = await trio.to_thread.run_sync(layer.store.read, chunk, limiter=self.counters.limiter)
            if data is not None:
                self.counters.from_store += len(data)
                return data
        data = await self._remote.get(layer, chunk, priority, last_chunk, read)
        self.counters.from_registry += len(data)
        return data

    async def _refill(self, layer: ServedLayer, chunk: int) -> bytes | None:
        """Unpack a plain layer anew because a chunk of it was evicted or damaged: there is no smaller unit to fetch."""
        if layer.refill is None:
            return None
        for _ in range(_REFILL_TRIES):  # a store that is much too small may have evicted it again
            await self.refill(layer)
            data = await trio.to_thread.run_sync(layer.store.read, chunk, limiter=self.counters.limiter)
            if data is not None:
                return data
        raise StoreFull(
            f"layer {layer.digest} was fetched again and is gone before it could be read",
            hint="the store is too small for it: raise store_size",
        )

    async def _drop_pages(self, layer: ServedLayer) -> None:
        try:
            await trio.to_thread.run_sync(layer.store.drop_read_pages, limiter=self.counters.limiter)
        finally:
            self._dropping = False

    def forget(self, layer: ServedLayer) -> None:
        """Drop what memory has of a layer."""
        self._memory.forget_layer(layer.serial)

    def drop(self, layer: ServedLayer) -> None:
        """Forget a layer that nobody holds any more, and all that is on its way for it."""
        self.forget(layer)
        self._remote.drop(layer)

    async def refill(self, layer: ServedLayer) -> None:
        """Unpack a plain layer anew, once for all who want that now. A checkpoint. Raise what the unpacking raises."""
        if layer.refill is not None:
            # By number: a blob is unpacked in one place, also for a layer that was dropped meanwhile.
            await self._single.run((layer.number, -1), partial(self._run_refill, layer.refill))

    async def _run_refill(self, refill: Callable[[], object]) -> bytes:
        await trio.to_thread.run_sync(refill, limiter=self._refills)
        return b"done"


def _tell(layer: ServedLayer, places: Iterable[Place]) -> None:
    """Tell whoever records the layer what a reader wants, in its order: the tasks for it begin in any."""
    for place in places:
        for witness in layer.witnesses:
            witness.demanded(layer.number, place.chunk)


def _cut(chunk: bytes, place: Place) -> memoryview:
    return memoryview(chunk)[place.offset : place.offset + place.size]


def _join(parts: list[memoryview]) -> Data:
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _whole(begun: Data | Rest) -> Data:
    return begun if isinstance(begun, (bytes, bytearray, memoryview)) else await begun
