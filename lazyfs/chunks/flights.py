"""Frames on their way from the registry: neighbours in one request, which is tried until all of them have landed.

A reader wakes when ITS frame is there, not when the request is over. Whoever wants a frame that is on its way waits for
it, whatever it was fetched for.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from functools import partial

import trio

from lazyfs.chunks.frames import Fetched, Sample, fetch_frames, fetch_piece, needed
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Priority, Scheduler, Ticket
from lazyfs.chunks.slow import MOVES, SlowRanges
from lazyfs.errors import DaemonFault, LazyfsError, ReadDeadline, RegistryError, RegistryTimeout
from lazyfs.registry.repository import Repository
from lazyfs.units import KiB

log = logging.getLogger(__name__)

MAX_FRAMES = 512  # of one request: tiny frames must not hold up the loop, nor pile up as flights
_PIECE = 128 * KiB  # compressed bytes of a piece of a frame at least: 20 ms at 50 Mbit/s
_BACKOFF = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries, with jitter
_DAMAGED_TRIES = 2  # wrong bytes are fetched again once, and once from each other source; then they are real
_LONGEST_TRY = 300.0  # seconds of one request; frames that came before its end stay


class Fetch:
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
        self.flights = {frame: Flight(self) for frame in range(first, stop)}

    def missing(self) -> tuple[int, int] | None:
        """The first frame that has not landed, and the one behind the last."""
        left = [frame for frame, flight in self.flights.items() if not flight.done.is_set()]
        return (left[0], left[-1] + 1) if left else None

    def promote(self, priority: Priority) -> None:
        if priority < self.priority:
            self.priority = priority
            self.ticket.promote(priority)
            self.hurry.set()


class Flight:
    """One frame on its way. It stays findable until its chunks are in the store, so that nobody fetches it twice."""

    __slots__ = ("chunks", "done", "error", "fetch", "tries")

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.done = trio.Event()
        self.chunks: dict[int, bytes] = {}
        self.error: LazyfsError | None = None
        self.tries = 0  # that brought wrong bytes


class Flights:
    """All frames on their way. Belongs to one trio loop.

    `timeout`: seconds for which somebody waits for one; `on_error` hears of every failed try.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        nursery: trio.Nursery,
        timeout: float,
        on_error: Callable[[LazyfsError], None],
    ) -> None:
        self._scheduler = scheduler
        self._nursery = nursery
        self._timeout = timeout
        self._on_error = on_error
        self._slow = SlowRanges(scheduler, nursery)
        self._flights: dict[tuple[int, int], Flight] = {}  # by layer and frame

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, layer: ServedLayer, frame: int) -> Flight | None:
        """Return the flight of a frame that is on its way, or has arrived and is being written to the store."""
        return self._flights.get((layer.number, frame))

    def is_wanted(self, layer: ServedLayer, frame: int) -> bool:
        """Tell whether a frame is neither in the store nor on its way."""
        return (layer.number, frame) not in self._flights and layer.frame_missing(frame)

    def launch(self, layer: ServedLayer, first: int, stop: int, priority: Priority) -> Fetch:
        """Ask for frames [first, stop) with one request. None of them may be on its way. Never blocks."""
        fetch = Fetch(layer, first, stop, priority, self._scheduler.ticket(layer.host, priority))
        for frame, flight in fetch.flights.items():
            self._flights[layer.number, frame] = flight
        self._nursery.start_soon(self._fly, layer, fetch)
        return fetch

    async def _fly(self, layer: ServedLayer, fetch: Fetch) -> None:
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

    async def _try(self, layer: ServedLayer, fetch: Fetch) -> LazyfsError | None:
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

    async def _run(self, layer: ServedLayer, fetch: Fetch, job: Callable[[], Fetched], size: int) -> Fetched:
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

    async def _head(self, layer: ServedLayer, fetch: Fetch, frame: int) -> bytes:
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
        self, layer: ServedLayer, fetch: Fetch, left: tuple[int, int], end: float, head: bytes
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

    def _blame(self, layer: ServedLayer, fetch: Fetch, fetched: Fetched, repository: Repository) -> None:
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
        self, layer: ServedLayer, fetch: Fetch, arrived: dict[int, dict[int, bytes]], size: int, ticket: Ticket
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

    def _forget(self, layer: ServedLayer, fetch: Fetch, frame: int) -> None:
        flight = fetch.flights.pop(frame, None)
        if flight is not None and self._flights.get((layer.number, frame)) is flight:
            del self._flights[layer.number, frame]


def _tell(layer: ServedLayer, fetch: Fetch, blob_offset: int, sample: Sample) -> None:
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
