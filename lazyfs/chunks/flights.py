"""Frames on their way from the registry: neighbours in one request, which is tried until all of them have landed.

A reader wakes when ITS frame is there, not when the request is over. Whoever wants a frame that is on its way waits for
it, whatever it was fetched for.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from lazyfs.chunks.flight import Fetch, Flight
from lazyfs.chunks.frames import Fetched, Sample, fetch_frames, fetch_piece, needed
from lazyfs.chunks.host import Priority, Ticket
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.slow import MOVES, SlowRanges
from lazyfs.errors import DaemonFault, LazyfsError, ReadDeadline, RegistryError, RegistryTimeout
from lazyfs.limits import LONGEST_TRY
from lazyfs.registry.repository import Repository
from lazyfs.units import KiB

log = logging.getLogger(__name__)

T = TypeVar("T")

_PIECE = 128 * KiB  # compressed bytes of a piece of a frame at least: 20 ms at 50 Mbit/s
_BACKOFF = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries, with jitter
_DAMAGED_TRIES = 2  # wrong bytes are fetched again once, and once from each other source; then they are real
_LANDING = 2  # threads that take apart what came before its layer's table: the machine's cores, about
_LATE = 1.0  # seconds beyond twice the time that a piece takes, after which a reader waits for it no longer


@dataclass(frozen=True, slots=True)
class Given:
    """Bytes that somebody has asked for. `wait` for them; None: they don't come. `ticket`: of that request, which may
    still wait for its turn when a reader turns up."""

    wait: Callable[[], Awaitable[bytes | None]]
    ticket: Ticket


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
        self._flights: dict[tuple[int, int], Flight] = {}  # by the layer's serial and frame
        self._landing = trio.CapacityLimiter(_LANDING)

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, layer: ServedLayer, frame: int) -> Flight | None:
        """Return the flight of a frame that is on its way, or has arrived and is being written to the store."""
        return self._flights.get((layer.serial, frame))

    def is_wanted(self, layer: ServedLayer, frame: int) -> bool:
        """Tell whether a frame is neither in the store nor on its way."""
        return (layer.serial, frame) not in self._flights and layer.frame_missing(frame)

    def launch(self, layer: ServedLayer, first: int, stop: int, priority: Priority, *, is_guess: bool = False) -> Fetch:
        """Ask for frames [first, stop) with one request. None of them may be on its way. Never blocks.

        `is_guess`: nobody has asked for most of them yet, and they may push nothing out of the store.
        """
        return self._begin(layer, first, stop, priority, is_guess, None)

    def land(self, layer: ServedLayer, first: int, stop: int, priority: Priority, given: Given) -> None:
        """Let frames [first, stop) land whose compressed bytes somebody has asked for already. Never blocks.

        None of them may be on its way. Where the bytes don't come, or are wrong, the frames are asked for like others.
        """
        self._begin(layer, first, stop, priority, False, given)

    def _begin(
        self,
        layer: ServedLayer,
        first: int,
        stop: int,
        priority: Priority,
        is_guess: bool,
        given: Given | None,
    ) -> Fetch:
        fetch = Fetch(layer, first, stop, priority, self._scheduler.ticket(layer.host, priority), is_guess)
        for frame, flight in fetch.flights.items():
            self._flights[layer.serial, frame] = flight
        self._nursery.start_soon(self._fly, layer, fetch, given)
        return fetch

    def drop(self, layer: ServedLayer) -> None:
        """End all flights of a layer that nobody holds any more: nothing of them lands. Never blocks."""
        for fetch in {flight.fetch for (serial, _), flight in self._flights.items() if serial == layer.serial}:
            fetch.ticket.flow.dropped = True  # its thread ends with the next bytes, if any come
            fetch.scope.cancel()

    async def _fly(self, layer: ServedLayer, fetch: Fetch, given: Given | None) -> None:
        error: LazyfsError = ReadDeadline(self._timeout)
        try:
            with fetch.scope:
                if given is not None:
                    await self._land(layer, fetch, given)
                error = await self._try(layer, fetch) or error
            if layer.dropped:
                error = LazyfsError(f"layer {layer.digest} is not in use any more")
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

    async def _land(self, layer: ServedLayer, fetch: Fetch, given: Given) -> None:
        """Take what is given apart. What is wrong with it, or late for a reader, is left to a request."""
        left = fetch.missing()
        if left is None:
            return
        size = layer.table.frame_blob_end[left[1] - 1] - layer.table.frame_blob_offset[left[0]]
        data: bytes | None = None
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(self._hasten, fetch, given.ticket, scope, self._patience(layer, size))
                data = await given.wait()
            nursery.cancel_scope.cancel()
        if data is None or layer.dropped:
            return
        try:
            layer.ensure_readable()
            job = self._job(layer, fetch, left, time.monotonic() + self._timeout, data)
            fetched = await trio.to_thread.run_sync(job, limiter=self._landing, abandon_on_cancel=True)
        except LazyfsError as error:
            log.info("what came early does not land: layer=%s error=%s", layer.digest, error)
            return
        for wrong in fetched.damaged.values():
            self._on_error(wrong)

    @staticmethod
    async def _hasten(fetch: Fetch, ticket: Ticket, scope: trio.CancelScope, patience: float) -> None:
        """End a wait `patience` seconds after somebody has come to want the frames now; `ticket` waits no longer."""
        await fetch.hurry.wait()
        ticket.promote(fetch.priority)
        scope.deadline = trio.current_time() + patience

    def _patience(self, layer: ServedLayer, size: int) -> float:
        """Return the seconds that a reader waits for bytes that are under way for somebody else."""
        link = self._scheduler.link(layer.host)
        late = _LATE + 2 * (link.round_trip + size / link.rate) if link.rate else self._timeout
        return min(self._timeout / 2, late)

    async def _try(self, layer: ServedLayer, fetch: Fetch) -> LazyfsError | None:
        """Fetch until all flights have landed. Return why some did not: an error that another try won't mend."""
        end = time.monotonic() + self._timeout
        tries = 0
        while (left := fetch.missing()) is not None and not layer.dropped:
            if tries:
                # A ticket serves one run.
                fetch.ticket = self._scheduler.ticket(layer.host, fetch.priority)
            repository, moves = layer.repository, fetch.moves
            try:
                layer.ensure_readable()
                size = layer.table.frame_blob_end[left[1] - 1] - layer.table.frame_blob_offset[left[0]]
                head = b""
                if left[1] == left[0] + 1 and fetch.in_pieces and not fetch.flights[left[0]].tries:
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
                if head and fetched.damaged:
                    # Its pieces may be of several sources: fetched whole from one, the next wrong bytes are that one's.
                    fetch.in_pieces = False
                    fetch.head.clear()
                    for wrong in fetched.damaged.values():
                        self._on_error(wrong)
                else:
                    self._blame(layer, fetch, fetched, repository)
            tries += 1
        return None

    async def _run(self, layer: ServedLayer, fetch: Fetch, job: Callable[[], T], size: int) -> T:
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

        Once a reader wants the frame, the rest is asked for at once. What is here already is kept for the next try.
        Raise RegistryError.
        """
        start, size = layer.table.frame_blob_offset[frame], needed(layer.table, frame)
        at = sum(map(len, fetch.head))
        while fetch.priority is Priority.BACKGROUND:
            most = max(_PIECE, self._scheduler.segment(layer.host))
            if size - at <= most:
                break
            piece = -(-(size - at) // -(-(size - at) // most))  # equal ones, rather than a small one at the end
            data = await self._piece(layer, fetch, start + at, piece)
            fetch.ticket = self._scheduler.ticket(layer.host, fetch.priority)
            if data is not None:
                fetch.head.append(data)
                at += piece
        return b"".join(fetch.head)

    async def _piece(self, layer: ServedLayer, fetch: Fetch, blob_offset: int, size: int) -> bytes | None:
        """Fetch a piece. None: somebody has come to want the frame, and the piece was late. Raise RegistryError."""
        ticket = fetch.ticket
        fetch.patience = self._patience(layer, size)

        def job() -> tuple[bytes, Sample]:
            fetch.began = time.monotonic()
            return fetch_piece(layer, blob_offset, size, fetch.began + LONGEST_TRY, ticket.flow)

        data: bytes | None = None
        try:
            with trio.CancelScope() as fetch.piece:
                data, sample = await self._run(layer, fetch, job, size)
                self._scheduler.observe(layer.host, sample.first_byte, sample.size, sample.seconds)
                if layer.witnesses:
                    _tell(layer, fetch, blob_offset, sample)
        finally:
            fetch.piece = None
        if data is None:
            ticket.flow.dropped = True  # its thread ends with the next bytes, if any come
        return data

    def _job(
        self, layer: ServedLayer, fetch: Fetch, left: tuple[int, int], end: float, head: bytes
    ) -> Callable[[], Fetched]:
        token = trio.lowlevel.current_trio_token()
        ticket = fetch.ticket

        def deliver(arrived: dict[int, dict[int, bytes]]) -> None:
            size = sum(needed(layer.table, frame) for frame in arrived)
            token.run_sync_soon(self._arrive, layer, fetch, arrived, size, ticket)

        def is_spare() -> bool:
            spare = (fetch.is_guess or fetch.priority is not Priority.DEMAND) and not layer.collected
            fetch.spared = fetch.spared or spare
            return spare

        def job() -> Fetched:
            # One try must leave time for another: a server that drips is not known by a pause between two bytes. What
            # nobody waits for may have waited long for its turn: its time runs from now.
            fetch.began = time.monotonic()
            deadline = fetch.began + min(self._timeout / 2, LONGEST_TRY)
            if ticket.priority is Priority.DEMAND:
                deadline = min(deadline, end)
            return fetch_frames(layer, *left, deadline, deliver, ticket.flow, head, is_spare)

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
        if flight is not None and self._flights.get((layer.serial, frame)) is flight:
            del self._flights[layer.serial, frame]


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
