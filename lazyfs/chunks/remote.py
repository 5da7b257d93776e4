"""Missing chunks from the registry: frames in flight, neighbours merged, windows that double while reads are in order.

A reader wakes when ITS frame is there, not when the request is over. Whoever wants a frame that is on its way waits for
it, whatever it was fetched for.
"""

from __future__ import annotations

import logging
import random
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

import trio

from lazyfs.chunks.crowds import STRETCH, Crowds
from lazyfs.chunks.frames import Fetched, Sample, fetch_frames, fetch_piece, needed
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Priority, Scheduler, Ticket
from lazyfs.chunks.slow import MOVES, SlowRanges
from lazyfs.chunks.strides import Strides
from lazyfs.errors import DaemonFault, LazyfsError, ReadDeadline, RegistryError, RegistryTimeout
from lazyfs.format.table import NO_FRAME, Place
from lazyfs.registry.repository import Repository
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

WINDOW = 4 * MiB  # compressed bytes of the largest read-ahead; two are under way where the link holds no more
_IN_ORDER = 2  # round trips of bytes under way for a sequential reader: the link never waits for what he takes next
_MOST_AHEAD = 32 * MiB  # compressed bytes of them at most: 2.5 round trips of 1 Gbit/s and 100 ms
_FIRST_WINDOW = 512 * KiB  # compressed bytes of the first read-ahead after two reads in order
MAX_FRAMES = 512  # of one request: tiny frames must not hold up the loop, nor pile up as flights
_SKIP = 32  # frames that a read-ahead steps over because they are here already
_STREAMS = 64  # sequential readers remembered, node-wide
_MARKS = 4 * _STREAMS  # windows whose middle somebody may come to
_PIECE = 128 * KiB  # compressed bytes of a piece of a frame at least: 20 ms at 50 Mbit/s
_BACKOFF = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries, with jitter
_DAMAGED_TRIES = 2  # wrong bytes are fetched again once, and once from each other source; then they are real
_LONGEST_TRY = 300.0  # seconds of one request; frames that came before its end stay
_FOREVER = 10 * 365 * 86400.0  # seconds, where read_timeout is 0


class _Fetch:
    """One request for neighbouring frames, tried until all have landed: how urgent, and since when."""

    __slots__ = ("began", "flights", "hurry", "landed", "moves", "over", "priority", "repository", "ticket")

    def __init__(self, layer: ServedLayer, first: int, stop: int, priority: Priority, ticket: Ticket) -> None:
        self.priority = priority
        self.ticket = ticket  # of the try that waits or runs
        self.repository: Repository = layer.repository
        self.began = 0.0  # when the last try left (time.monotonic)
        self.hurry = trio.Event()  # somebody more urgent has turned up: no time for a pause
        self.over = trio.Event()
        self.moves = 0  # times that it was slow and asked for anew
        self.landed: list[int] = []  # frames that arrived last: the store is still writing them
        # By frame; those that are in the store drop out, for they hold decoded bytes.
        self.flights = {frame: _Flight(self) for frame in range(first, stop)}

    def missing(self) -> tuple[int, int] | None:
        """The first frame that has not landed, and the one behind the last."""
        left = [frame for frame, flight in self.flights.items() if not flight.done.is_set()]
        return (left[0], left[-1] + 1) if left else None

    def promote(self, priority: Priority) -> None:
        if priority < self.priority:
            self.priority = priority
            self.ticket.promote(priority)
            self.hurry.set()


class _Flight:
    """One frame on its way. It stays findable until its chunks are in the store, so that nobody fetches it twice."""

    __slots__ = ("chunks", "done", "error", "fetch", "tries")

    def __init__(self, fetch: _Fetch) -> None:
        self.fetch = fetch
        self.done = trio.Event()
        self.chunks: dict[int, bytes] = {}
        self.error: LazyfsError | None = None
        self.tries = 0  # that brought wrong bytes


class _Run:
    """A reader in order: where its next read-ahead begins (a frame), where the last one ends, and its bytes."""

    __slots__ = ("first", "limit", "window")

    def __init__(self, first: int, limit: int, window: int) -> None:
        self.first = first
        self.limit = limit
        self.window = window


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
        self._crowds = Crowds()
        self._strides = Strides()
        self._slow = SlowRanges(scheduler, nursery)
        # (layer, frame that continues the stream) -> compressed bytes of the next window
        self._streams: OrderedDict[tuple[int, int], int] = OrderedDict()
        # (layer, frame whose reading triggers more windows) -> whose they are
        self._marks: OrderedDict[tuple[int, int], _Run] = OrderedDict()

    async def get(
        self, layer: ServedLayer, chunk: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None = None
    ) -> bytes:
        """Return a chunk's verified bytes from its registry. `last_chunk`: the last one of the file being read.

        `read`: the first and last chunk of the same read, all fetched with one request where none is here. A
        checkpoint. Raise ReadDeadline after read_timeout, else what the fetch raised.
        """
        table = layer.table
        frame = table.chunk_frame[chunk]
        give_up = trio.current_time() + self._timeout
        limit = _frame_at(layer, last_chunk) + 1
        span = (frame, frame) if read is None else (_frame_at(layer, read[0]), _frame_at(layer, read[1]))
        if priority is Priority.DEMAND:
            self._scheduler.note_demand(layer.host)
        while True:
            flight = self._flights.get((layer.number, frame))
            joined = flight is not None
            if flight is None:
                flight = self._depart(layer, frame, priority, limit, span)
            else:
                flight.fetch.promote(priority)
                self._pass(layer, frame)
            if priority is Priority.DEMAND:
                self._read_on(layer, frame)
            with trio.move_on_at(give_up):
                await flight.done.wait()
            if not flight.done.is_set():
                raise ReadDeadline(self._timeout, f"layer {layer.digest} from {layer.host}")
            if flight.error is None:
                return flight.chunks[chunk]
            # Who joined a flight of somebody else's has a time of its own, and perhaps another registry.
            other = flight.error.temporary or flight.fetch.repository is not layer.repository
            if not joined or not other or trio.current_time() >= give_up:
                raise flight.error
            layer.ensure_readable()

    def note_read(self, layer: ServedLayer, chunk: int) -> None:
        """Tell that a reader took a chunk that was here already: a stream of reads may want its next window."""
        if self._streams:
            frame = layer.table.chunk_frame[chunk]
            self._pass(layer, frame)
            self._read_on(layer, frame)

    def note_piece(self, layer: ServedLayer, first: Place, last: Place, last_chunk: int, first_chunk: int = 0) -> None:
        """Tell of a read from `first` to `last` before its chunks are wanted: it may be one of a pattern.

        `first_chunk`, `last_chunk`: those of the file, as far as known. What the pattern wants next is asked for, if
        connections are free.
        """
        starts = layer.table.chunk_data_offset
        begin = starts[first.chunk] + first.offset
        if layer.store.has(first.chunk) and not self._strides.expects(layer.number, begin):
            return
        end = starts[last.chunk] + last.offset + last.size
        limit = starts[last_chunk] + layer.table.chunk_size[last_chunk]
        room = self._scheduler.room(layer.host)
        for at, stop in self._strides.note(layer.number, begin, end, limit, starts[first_chunk]):
            chunks = [place.chunk for _, place in layer.table.data_places(at, stop - at)]
            if not chunks or layer.is_plain:
                continue
            frame, through = _frame_at(layer, chunks[0]), _frame_at(layer, chunks[-1])
            while frame <= through and room > 0:
                end_frame = frame
                while end_frame <= min(through, frame + MAX_FRAMES - 1) and self._wanted(layer, end_frame):
                    end_frame += 1
                if end_frame > frame:
                    self._launch(layer, frame, end_frame, Priority.DEMAND)
                    room -= 1
                frame = max(frame + 1, end_frame)

    async def bring(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> None:
        """Fetch frames [first, stop) as one request, except those under way; wait until all are in the store.

        As far as the disk keeps them. A checkpoint.

        Raise what the first failed fetch raised.
        """
        waiting: deque[_Flight] = deque()
        at = first
        while at < stop:
            flight = self._flights.get((layer.number, at))
            if flight is not None:
                flight.fetch.promote(priority)
                waiting.append(flight)
                at += 1
                continue
            end = at + 1
            while end < min(stop, at + MAX_FRAMES) and (layer.number, end) not in self._flights:
                end += 1
            waiting.extend(self._launch(layer, at, end, priority).flights.values())
            at = end
        while waiting:
            flight = waiting.popleft()
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error
            if not waiting or waiting[0].fetch is not flight.fetch:
                await flight.fetch.over.wait()

    def is_coming(self, layer: ServedLayer, chunk: int) -> bool:
        """Tell whether a chunk is on its way, or has arrived and is being written to the store."""
        return (layer.number, layer.table.chunk_frame[chunk]) in self._flights

    def is_over(self, began: float) -> bool:
        """Tell whether a reader that began to wait at `began` (trio clock) has waited for as long as readers may."""
        return trio.current_time() >= began + self._timeout

    def in_flight(self) -> int:
        """Return the number of frames on their way."""
        return len(self._flights)

    # -- windows

    def _depart(self, layer: ServedLayer, frame: int, priority: Priority, limit: int, span: tuple[int, int]) -> _Flight:
        first = frame
        while first > span[0] and self._wanted(layer, first - 1):
            first -= 1
        window = self._streams.pop((layer.number, first), 0)
        stop = self._reach(layer, first, window, limit, max(frame, span[1]))
        if priority is Priority.DEMAND:
            stop = self._take_along(layer, frame, stop)
        fetch = self._launch(layer, first, stop, priority)
        self._remember(layer, first, stop, _Run(stop, limit, window))
        return fetch.flights[frame]

    def _wanted(self, layer: ServedLayer, frame: int) -> bool:
        return (layer.number, frame) not in self._flights and layer.frame_missing(frame)

    def _reach(self, layer: ServedLayer, first: int, window: int, limit: int, through: int) -> int:
        """Return where a request that begins at `first` ends: behind `through` or at `window` bytes, whichever is more.

        Before that at a frame that is here, or at `limit`.
        """
        table = layer.table
        end = table.frame_blob_offset[first] + window
        limit = min(limit, table.frame_count, first + MAX_FRAMES)
        stop = first + 1
        while stop < limit and (stop <= through or table.frame_blob_end[stop] <= end) and self._wanted(layer, stop):
            stop += 1
        return stop

    def _take_along(self, layer: ServedLayer, frame: int, stop: int) -> int:
        """Return where a request for `frame` and what lies before `stop` ends, small neighbours included."""
        table = layer.table
        start = table.frame_blob_offset[frame]
        if not self._crowds.note(layer.number, start):
            return stop
        end = start + min(STRETCH, self._scheduler.bytes_in_a_round_trip(layer.host))
        limit = min(table.frame_count, frame + MAX_FRAMES)
        while stop < limit and table.frame_blob_end[stop] <= end and self._wanted(layer, stop):
            stop += 1
        return stop

    def _remember(self, layer: ServedLayer, first: int, stop: int, run: _Run) -> None:
        """Note that `run` goes on behind [first, stop), which was asked for just now, with twice its window."""
        began = run.window > 0
        run.first = stop
        run.window = min(max(2 * run.window, _FIRST_WINDOW), WINDOW)
        self._streams[layer.number, stop] = run.window
        if began and first < run.limit:
            # Half-way through this window the next one departs, so that a sequential reader never waits for it.
            self._marks[layer.number, (first + stop) // 2] = run
        while len(self._marks) > _MARKS:
            self._marks.popitem(last=False)
        while len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)

    def _pass(self, layer: ServedLayer, frame: int) -> None:
        """Let a sequential reader keep its window over a frame that somebody else has fetched."""
        window = self._streams.pop((layer.number, frame), 0)
        if window:
            self._streams[layer.number, frame + 1] = window

    def _read_on(self, layer: ServedLayer, frame: int) -> None:
        """Where a sequential reader has come to the middle of a window, ask for the next one.

        For as many as keep a long link busy, if connections are free that no other reader could want.
        """
        run = self._marks.pop((layer.number, frame), None)
        if run is None:
            return
        starts = layer.table.frame_blob_offset
        reach = min(_MOST_AHEAD, _IN_ORDER * self._scheduler.bytes_in_a_round_trip(layer.host))
        reach = starts[frame] + max(run.window, reach)
        most = room = max(1, self._scheduler.room(layer.host))
        while room and self._next_wanted(layer, run) and starts[run.first] < reach:
            self._streams.pop((layer.number, run.first), None)
            first, stop = run.first, self._reach(layer, run.first, run.window, run.limit, run.first)
            self._launch(layer, first, stop, Priority.DEMAND)
            self._remember(layer, first, stop, run)
            room -= 1
        if room == most and run.first < run.limit and (frame + run.first) // 2 > frame:
            # Enough is under way: look again further on, if no window's middle comes first.
            self._marks.setdefault((layer.number, (frame + run.first) // 2), run)

    def _next_wanted(self, layer: ServedLayer, run: _Run) -> bool:
        """Step over frames that are here already. Tell whether the next one is missing, and within the bounds."""
        limit = min(run.limit, layer.table.frame_count)
        for _ in range(_SKIP):
            if run.first >= limit or self._wanted(layer, run.first):
                break
            self._pass(layer, run.first)
            run.first += 1
        return run.first < limit and self._wanted(layer, run.first)

    # -- flights

    def _launch(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> _Fetch:
        fetch = _Fetch(layer, first, stop, priority, self._scheduler.ticket(layer.host, priority))
        for frame, flight in fetch.flights.items():
            self._flights[layer.number, frame] = flight
        self._nursery.start_soon(self._fly, layer, fetch)
        return fetch

    async def _fly(self, layer: ServedLayer, fetch: _Fetch) -> None:
        error: LazyfsError = ReadDeadline(self._timeout)
        try:
            error = await self._try(layer, fetch) or error
        except Exception as bug:  # a bug here must fail these reads, not the daemon and every other image with it
            log.exception("fetch of layer %s broke", layer.digest)
            error = DaemonFault(f"the fetch of layer {layer.digest} broke: {type(bug).__name__}")
            self._on_error(error)
        finally:
            for frame, flight in list(fetch.flights.items()):
                if not flight.done.is_set():
                    flight.error = error
                self._forget(layer, fetch, frame)
                flight.done.set()
            fetch.over.set()

    async def _try(self, layer: ServedLayer, fetch: _Fetch) -> LazyfsError | None:
        """Fetch until all flights have landed. Return why some did not: an error that another try won't mend."""
        end = time.monotonic() + self._timeout
        tries = 0
        while (left := fetch.missing()) is not None:
            if tries:
                # A ticket serves one run.
                fetch.ticket = self._scheduler.ticket(layer.host, fetch.priority)
            repository, moves = layer.repository, fetch.moves
            try:
                layer.ensure_readable()
                size = layer.table.frame_blob_end[left[1] - 1] - layer.table.frame_blob_offset[left[0]]
                head = b""
                if left[1] == left[0] + 1 and not fetch.flights[left[0]].tries:
                    head = await self._head(layer, fetch, left[0])
                job = self._job(layer, fetch, left, end, head)
                fetched = await self._run(layer, fetch, job, size - len(head))
            except LazyfsError as error:
                self._on_error(error)
                layer.trouble = error
                turned = isinstance(error, RegistryError) and layer.turn(repository)
                lasting = not error.temporary and not (turned and tries < len(layer.others))
                asked = float(getattr(error, "retry_after", 0.0))
                pause = 0.0 if fetch.moves > moves else _BACKOFF[min(tries, len(_BACKOFF) - 1)]
                wait = (asked or pause) * random.uniform(1.0, 1.2)
                if lasting or time.monotonic() + wait >= end:
                    return error
                log.info("fetch failed, again in %.1f s: layer=%s error=%s", wait, layer.digest, error)
                fetch.hurry = trio.Event()
                with trio.move_on_after(wait):
                    await (trio.sleep_forever() if asked else fetch.hurry.wait())
            else:
                sample = fetched.sample
                self._scheduler.observe(layer.host, sample.first_byte, sample.size, sample.seconds)
                if layer.witnesses:
                    _tell(layer, fetch, layer.table.frame_blob_offset[left[0]] + len(head), sample)
                self._blame(layer, fetch, fetched, repository)
            tries += 1
        return None

    async def _run(self, layer: ServedLayer, fetch: _Fetch, job: Callable[[], Fetched], size: int) -> Fetched:
        """Run a try. Raise RegistryTimeout, with one move more, where the host gives others far more: see `slow`."""
        host = layer.host
        if fetch.moves >= MOVES:
            return await self._scheduler.run(fetch.ticket, job, size)
        with self._slow.watch(host, fetch.ticket, lambda: fetch.priority is Priority.DEMAND):
            return await self._scheduler.run(fetch.ticket, job, size)
        fetch.moves += 1
        raise RegistryTimeout(
            host, f"{host} sends a range of layer {layer.digest} much slower than it can: asking anew"
        )

    async def _head(self, layer: ServedLayer, fetch: _Fetch, frame: int) -> bytes:
        """Fetch the beginning of a frame in pieces where all of it is more than background may have under way.

        Once a reader wants the frame, the rest is asked for at once. Raise RegistryError.
        """
        start, size = layer.table.frame_blob_offset[frame], needed(layer.table, frame)
        parts: list[bytes] = []
        at = 0
        while fetch.priority is Priority.BACKGROUND:
            most = max(_PIECE, self._scheduler.segment(layer.host))
            if size - at <= most:
                break
            piece = -(-(size - at) // -(-(size - at) // most))  # equal ones, rather than a small one at the end
            fetch.began = time.monotonic()
            ticket, deadline = fetch.ticket, fetch.began + _LONGEST_TRY
            job = partial(fetch_piece, layer, start + at, piece, deadline, ticket.flow)
            data, sample = await self._scheduler.run(ticket, job, piece)
            self._scheduler.observe(layer.host, sample.first_byte, sample.size, sample.seconds)
            if layer.witnesses:
                _tell(layer, fetch, start + at, sample)
            fetch.ticket = self._scheduler.ticket(layer.host, fetch.priority)
            parts.append(data)
            at += piece
        return b"".join(parts)

    def _job(
        self, layer: ServedLayer, fetch: _Fetch, left: tuple[int, int], end: float, head: bytes
    ) -> Callable[[], Fetched]:
        token = trio.lowlevel.current_trio_token()
        ticket = fetch.ticket

        def deliver(arrived: dict[int, dict[int, bytes]]) -> None:
            size = sum(needed(layer.table, frame) for frame in arrived)
            token.run_sync_soon(self._arrive, layer, fetch, arrived, size, ticket)

        def job() -> Fetched:
            # One try must leave time for another: a server that drips is not known by a pause between two bytes. What
            # nobody waits for may have waited long for its turn: its time runs from now.
            fetch.began = time.monotonic()
            deadline = fetch.began + min(self._timeout / 2, _LONGEST_TRY)
            if ticket.priority is Priority.DEMAND:
                deadline = min(deadline, end)
            return fetch_frames(layer, *left, deadline, deliver, ticket.flow, head)

        return job

    def _blame(self, layer: ServedLayer, fetch: _Fetch, fetched: Fetched, repository: Repository) -> None:
        """Give up frames that came with wrong bytes too often; the others in the same request go on."""
        for frame, error in fetched.damaged.items():
            flight = fetch.flights.get(frame)
            if flight is None or flight.done.is_set():
                continue  # it was here before, and came along because it lies between others
            self._on_error(error)
            flight.tries += 1
            layer.turn(repository)
            if flight.tries >= max(_DAMAGED_TRIES, layer.sources + 1) + len(layer.others):
                layer.pardon()
                flight.error = error
                self._forget(layer, fetch, frame)
                flight.done.set()

    def _arrive(
        self, layer: ServedLayer, fetch: _Fetch, arrived: dict[int, dict[int, bytes]], size: int, ticket: Ticket
    ) -> None:
        """Let frames of `size` compressed bytes land. The loop calls it, perhaps late, and would die of an error."""
        layer.bytes_by_priority[ticket.priority] += size
        self._scheduler.look(ticket)
        layer.trouble = None
        for frame in fetch.landed:
            self._forget(layer, fetch, frame)  # they are in the store by now, see fetch_frames
        fetch.landed = list(arrived)
        for frame, chunks in arrived.items():
            flight = fetch.flights.get(frame)
            if flight is not None and not flight.done.is_set():
                flight.chunks = chunks
                flight.done.set()

    def _forget(self, layer: ServedLayer, fetch: _Fetch, frame: int) -> None:
        flight = fetch.flights.pop(frame, None)
        if flight is not None and self._flights.get((layer.number, frame)) is flight:
            del self._flights[layer.number, frame]


def _tell(layer: ServedLayer, fetch: _Fetch, blob_offset: int, sample: Sample) -> None:
    """Tell whoever records the layer of a request that began there: all of its bytes, until the last one."""
    flow, first = fetch.ticket.flow, fetch.began + sample.first_byte
    ended = max(first, flow.since + sample.seconds)
    for witness in layer.witnesses:
        witness.requested(
            layer.number,
            blob_offset,
            flow.came,
            fetch.ticket.priority,
            fetch.began,
            first,
            ended,
        )


def _frame_at(layer: ServedLayer, chunk: int) -> int:
    """Return the frame of a chunk; for a hole the last frame before it."""
    table = layer.table
    frame = int(table.chunk_frame[chunk])
    return frame if frame != NO_FRAME else max(0, bisect_right(table.frame_first_chunk, chunk) - 1)
