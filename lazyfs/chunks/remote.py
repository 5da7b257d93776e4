"""Missing chunks from the registry: frames in flight, neighbours merged, windows that double while reads are in order.

A reader wakes when ITS frame is there, not when the request is over. Whoever wants a frame that is on its way waits for
it, whatever it was fetched for.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import trio

from lazyfs.chunks.frames import Sample, fetch_frames
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Priority, Scheduler, Ticket
from lazyfs.errors import DaemonFault, DigestMismatch, FrameInvalid, LazyfsError, ReadDeadline
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

WINDOW = 4 * MiB  # compressed bytes of the largest read-ahead; two are under way at most while reads are sequential
_FIRST_WINDOW = 512 * KiB  # compressed bytes of the first read-ahead after two reads in order
_STREAMS = 64  # sequential readers remembered, node-wide
_BACKOFF = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries, with jitter
_DAMAGED_TRIES = 2  # wrong bytes are fetched again once: a bad mirror or a flipped bit on the way; then they are real
_FOREVER = 10 * 365 * 86400.0  # seconds, where read_timeout is 0


class _Flight:
    """One frame on its way. `chunks` holds the result while somebody may still look at it."""

    __slots__ = ("chunks", "done", "error", "ticket")

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.done = trio.Event()
        self.chunks: dict[int, bytes] = {}
        self.error: LazyfsError | None = None


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
        self._timeout = read_timeout or _FOREVER
        self._on_error = on_error
        self._flights: dict[tuple[int, int], _Flight] = {}
        # (layer, frame that continues the stream) -> compressed bytes of the next window
        self._streams: OrderedDict[tuple[int, int], int] = OrderedDict()
        # (layer, frame whose reading triggers the next window) -> (first frame of it, stop at, window)
        self._marks: OrderedDict[tuple[int, int], tuple[int, int, int]] = OrderedDict()

    async def get(self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int) -> bytes:
        """Return a chunk's verified bytes from its registry. `last_chunk`: the last one of the file being read.

        A checkpoint. Raise ReadDeadline after read_timeout, else what the fetch raised.
        """
        frame = layer.table.chunk_frame[chunk]
        if priority is Priority.DEMAND:
            self._scheduler.note_demand(layer.host)
        flight = self._flights.get((layer.number, frame))
        if flight is None:
            flight = self._depart(layer, frame, priority, layer.table.chunk_frame[last_chunk] + 1)
        else:
            flight.ticket.promote(priority)
        if priority is Priority.DEMAND:
            self._read_on(layer, frame)
        with trio.move_on_after(self._timeout):
            await flight.done.wait()
        if not flight.done.is_set():
            raise ReadDeadline(self._timeout, f"layer {layer.digest} from {layer.host}")
        if flight.error is not None:
            raise flight.error
        return flight.chunks[chunk]

    def note_read(self, layer: ServedLayer, chunk: int) -> None:
        """Tell that a reader took a chunk that was here already: a stream of reads may want its next window."""
        if self._marks:
            self._read_on(layer, layer.table.chunk_frame[chunk])

    async def bring(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> None:
        """Fetch frames [first, stop) as one request, except those under way, and wait for all of them. A checkpoint.

        Raise what the first failed fetch raised.
        """
        waiting = []
        at = first
        while at < stop:
            flight = self._flights.get((layer.number, at))
            if flight is not None:
                waiting.append(flight)
                at += 1
                continue
            end = at + 1
            while end < stop and (layer.number, end) not in self._flights:
                end += 1
            waiting += self._launch(layer, at, end, priority)
            at = end
        for flight in waiting:
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error

    def in_flight(self) -> int:
        """Return the number of frames on their way."""
        return len(self._flights)

    # -- windows

    def _depart(self, layer: ServedLayer, frame: int, priority: Priority, limit: int) -> _Flight:
        window = self._streams.pop((layer.number, frame), 0)
        stop = self._reach(layer, frame, window, limit)
        flights = self._launch(layer, frame, stop, priority)
        self._remember(layer, frame, stop, limit, window)
        return flights[0]

    def _reach(self, layer: ServedLayer, frame: int, window: int, limit: int) -> int:
        """Return where a request that begins at `frame` ends: at `window` bytes, a frame that is here, or `limit`."""
        table = layer.table
        end = table.frame_blob_offset[frame] + window
        stop = frame + 1
        limit = min(limit, table.frame_count)
        while (
            stop < limit
            and table.frame_blob_end[stop] <= end
            and (layer.number, stop) not in self._flights
            and layer.frame_missing(stop)
        ):
            stop += 1
        return stop

    def _remember(self, layer: ServedLayer, first: int, stop: int, limit: int, window: int) -> None:
        grown = min(max(2 * window, _FIRST_WINDOW), WINDOW)
        self._streams[layer.number, stop] = grown
        if stop < limit:
            if window:
                # Half-way through this window the next one departs, so that a sequential reader never waits for it.
                self._marks[layer.number, (first + stop) // 2] = (stop, limit, grown)
            while len(self._marks) > _STREAMS:
                self._marks.popitem(last=False)
        while len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)

    def _read_on(self, layer: ServedLayer, frame: int) -> None:
        mark = self._marks.pop((layer.number, frame), None)
        if mark is None:
            return
        first, limit, window = mark
        if (layer.number, first) in self._flights or not layer.frame_missing(first):
            return
        self._streams.pop((layer.number, first), None)
        stop = self._reach(layer, first, window, limit)
        self._launch(layer, first, stop, Priority.DEMAND)
        self._remember(layer, first, stop, limit, window)

    # -- flights

    def _launch(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> list[_Flight]:
        ticket = self._scheduler.ticket(layer.host, priority)
        flights = [_Flight(ticket) for _ in range(first, stop)]
        for frame, flight in enumerate(flights, first):
            self._flights[layer.number, frame] = flight
        self._nursery.start_soon(self._fly, layer, first, flights)
        return flights

    async def _fly(self, layer: ServedLayer, first: int, flights: list[_Flight]) -> None:
        error: LazyfsError = ReadDeadline(self._timeout)
        try:
            error = await self._try(layer, first, flights) or error
        except Exception as bug:  # a bug here must fail these reads, not the daemon and every other image with it
            log.exception("fetch of layer %s broke", layer.digest)
            error = DaemonFault(f"the fetch of layer {layer.digest} broke: {type(bug).__name__}")
            self._on_error(error)
        finally:
            for frame, flight in enumerate(flights, first):
                if not flight.done.is_set():
                    flight.error = error
                    self._land(layer, frame, flight)

    async def _try(self, layer: ServedLayer, first: int, flights: list[_Flight]) -> LazyfsError | None:
        """Fetch until all flights have landed. Return why some did not: an error that another try won't mend."""
        deadline = time.monotonic() + self._timeout
        token = trio.lowlevel.current_trio_token()
        damaged = tries = 0

        def deliver(frame: int, chunks: dict[int, bytes]) -> None:
            token.run_sync_soon(self._arrive, layer, frame, flights[frame - first], chunks, flights[0].ticket.priority)

        def note(sample: Sample) -> None:
            token.run_sync_soon(self._scheduler.observe, layer.host, sample.first_byte, sample.size, sample.seconds)

        while True:
            start = next((i for i, flight in enumerate(flights) if not flight.done.is_set()), None)
            if start is None:
                return None
            ticket = flights[start].ticket
            if ticket.entered:  # a ticket serves one run
                ticket = self._scheduler.ticket(layer.host, ticket.priority)
                for flight in flights[start:]:
                    flight.ticket = ticket
            job = partial(fetch_frames, layer, first + start, first + len(flights), deadline, deliver, note)
            try:
                layer.ensure_readable()
                await self._scheduler.run(ticket, job)
                await trio.lowlevel.checkpoint()  # deliveries are queued behind us; let them land
                continue
            except LazyfsError as error:
                self._on_error(error)
                damaged += isinstance(error, (DigestMismatch, FrameInvalid))
                give_up = damaged >= _DAMAGED_TRIES if damaged else not error.temporary
                wait = getattr(error, "retry_after", 0.0) or _BACKOFF[min(tries, len(_BACKOFF) - 1)]
                wait *= random.uniform(0.8, 1.2)
                tries += 1
                if give_up or time.monotonic() + wait >= deadline:
                    return error
                log.info("fetch failed, again in %.1f s: layer=%s error=%s", wait, layer.digest, error)
            await trio.sleep(wait)

    def _arrive(
        self, layer: ServedLayer, frame: int, flight: _Flight, chunks: dict[int, bytes], priority: Priority
    ) -> None:
        table = layer.table
        layer.bytes_by_priority[priority] += table.frame_blob_end[frame] - table.frame_blob_offset[frame]
        if not flight.done.is_set():
            flight.chunks = chunks
            self._land(layer, frame, flight)

    def _land(self, layer: ServedLayer, frame: int, flight: _Flight) -> None:
        if self._flights.get((layer.number, frame)) is flight:
            del self._flights[layer.number, frame]
        flight.done.set()
