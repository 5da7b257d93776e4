"""Missing chunks from the registry, for whoever wants them: on a flight that is under way, or on a new one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import trio

from lazyfs.chunks.flight import Flight
from lazyfs.chunks.flights import Flights, Given
from lazyfs.chunks.frames import needed
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.windows import Windows
from lazyfs.errors import LazyfsError, ReadDeadline
from lazyfs.format.table import Place
from lazyfs.limits import MAX_FRAMES

_FOREVER = 10 * 365 * 86400.0  # seconds, where read_timeout is 0


class Remote:
    """Fetch frames for readers, prefetch and background. Belongs to one trio loop.

    `on_error` hears of every failed try (for the counters that `status` shows).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        nursery: trio.Nursery,
        read_timeout: float,
        on_error: Callable[[LazyfsError], None],
    ) -> None:
        self._scheduler = scheduler
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(2)
        self._timeout = read_timeout or _FOREVER
        self._flights = Flights(scheduler, nursery, self._timeout, on_error)
        self._windows = Windows(self._flights, scheduler)

    async def get(
        self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None = None
    ) -> bytes:
        """Return a chunk's verified bytes from its registry. `last_chunk`: the last one of the file being read.

        `read`: the first and last chunk of the same read, all fetched with one request where none is here. A
        checkpoint. Raise ReadDeadline after read_timeout, else what the fetch raised.
        """
        frame = layer.table.chunk_frame[chunk]
        give_up = trio.current_time() + self._timeout
        if priority is Priority.DEMAND:
            self._scheduler.note_demand(layer.host)
        while True:
            flight = self._flights.find(layer, frame)
            joined = flight is not None
            if flight is None:
                flight = self._windows.depart(layer, frame, priority, last_chunk, read)
            else:
                flight.fetch.promote(priority)
                self._windows.pass_over(layer, frame)
            if priority is Priority.DEMAND:
                self._windows.read_on(layer, frame)
            with trio.move_on_at(give_up):
                await flight.done.wait()
            if not flight.done.is_set():
                raise ReadDeadline(self._timeout, f"layer {layer.digest} from {layer.host}")
            if flight.error is None:
                data = flight.chunks[chunk]
                if flight.fetch.spared and priority is Priority.DEMAND:
                    self._nursery.start_soon(self._keep, layer, chunk, data)
                return data
            # Who joined a flight of somebody else's has a time of its own, and perhaps another registry.
            other = flight.error.temporary or flight.fetch.repository is not layer.repository
            if not joined or not other or trio.current_time() >= give_up:
                raise flight.error
            layer.ensure_readable()

    async def _keep(self, layer: ServedLayer, chunk: int, data: bytes) -> None:
        """Keep what somebody has read now and nobody had asked for when it came."""
        await trio.to_thread.run_sync(layer.store.write, chunk, data, limiter=self._limiter)

    def note_read(self, layer: ServedLayer, chunk: int) -> None:
        """Tell that a reader took a chunk that was here already: a stream of reads may want its next window."""
        self._windows.note_read(layer, chunk)

    def note_piece(self, layer: ServedLayer, first: Place, last: Place, last_chunk: int, first_chunk: int = 0) -> None:
        """Tell of a read from `first` to `last` before its chunks are wanted: it may be one of a pattern.

        `first_chunk`, `last_chunk`: those of the file, as far as known.
        """
        self._windows.note_piece(layer, first, last, last_chunk, first_chunk)

    def is_foreseen(self, layer: ServedLayer, data_offset: int) -> bool:
        """Tell whether a pattern has foreseen a read that begins here: then `note_piece` is to hear of it."""
        return self._windows.is_foreseen(layer, data_offset)

    async def bring(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> None:
        """Fetch frames [first, stop), except those under way; wait until all are in the store.

        As far as the disk keeps them. As one request, or of more than MAX_FRAMES one after another. A checkpoint.

        Raise what the first failed fetch raised.
        """
        for begin in range(first, stop, MAX_FRAMES):
            await self._bring(layer, begin, min(stop, begin + MAX_FRAMES), priority)

    async def _bring(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> None:
        waiting: deque[Flight] = deque()
        at = first
        while at < stop:
            flight = self._flights.find(layer, at)
            if flight is not None:
                flight.fetch.promote(priority)
                waiting.append(flight)
                at += 1
                continue
            end = at + 1
            while end < stop and self._flights.find(layer, end) is None:
                end += 1
            waiting.extend(self._flights.launch(layer, at, end, priority).flights.values())
            at = end
        while waiting:
            flight = waiting.popleft()
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error
            if not waiting or waiting[0].fetch is not flight.fetch:
                await flight.fetch.over.wait()

    def land(self, layer: ServedLayer, first: int, stop: int, priority: Priority, given: Given) -> None:
        """Let frames [first, stop) land whose bytes are here or under way, except those that are here or on flights.

        `given`: the compressed bytes from the first frame's to the last one's. Never blocks.
        """
        table = layer.table
        base = table.frame_blob_offset[first]

        async def part(begin: int, end: int) -> bytes | None:
            data = await given.wait()
            return None if data is None else data[begin - base : end - base]

        while first < stop:
            end = first
            while end < min(stop, first + MAX_FRAMES) and self._flights.is_wanted(layer, end):
                end += 1
            if end > first:
                last = int(table.frame_blob_offset[end - 1]) + needed(table, end - 1)
                wait = partial(part, int(table.frame_blob_offset[first]), last)
                self._flights.land(layer, first, end, priority, Given(wait, given.ticket))
            first = max(end, first + 1)

    def drop(self, layer: ServedLayer) -> None:
        """End what is on its way for a layer that nobody holds any more."""
        self._flights.drop(layer)

    def is_coming(self, layer: ServedLayer, chunk: int) -> bool:
        """Tell whether a chunk is on its way, or has arrived and is being written to the store."""
        return self._flights.find(layer, layer.table.chunk_frame[chunk]) is not None

    def is_over(self, began: float) -> bool:
        """Tell whether a reader that began to wait at `began` (trio clock) has waited for as long as readers may."""
        return trio.current_time() >= began + self._timeout

    def in_flight(self) -> int:
        """Return the number of frames on their way."""
        return len(self._flights)
