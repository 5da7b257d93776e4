"""Bytes that a start is known to want, fetched while its layers' TOCs are still on their way or become tables.

A trace tells where in the blobs they lie (its spans). On a node that never saw the image the link would rest for the
time that a table takes. Whose spans they are, and whether they are what they seem, is decided when the tables are here:
then they land as frames, each chunk held against its digest. Until then nobody is given a byte of them.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import trio

from lazyfs.chunks.flights import Given
from lazyfs.chunks.frames import Sample, fetch_bytes, needed
from lazyfs.chunks.host import Priority, Ticket
from lazyfs.chunks.layer import ServedLayer, limited_for
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Scheduler
from lazyfs.errors import LazyfsError
from lazyfs.format.table import LayerTable
from lazyfs.format.trace import Span, Trace
from lazyfs.limits import EARLY_TRY, MAX_EARLY_BYTES, MAX_SPAN, MAX_SPANS
from lazyfs.mount.plan import Range
from lazyfs.registry.repository import Repository
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

_WINDOW = 1 * MiB  # bytes of reads within which the order is that of the blobs
_GAP = 16 * KiB  # bytes between two frames of a span at most: another request costs more
_WELCOME = 5.0  # seconds between looks while a host wants to be left alone


@dataclass(eq=False, slots=True)
class _Coming:
    """A span that was asked for; its bytes once they are here, None where they don't come."""

    digest: str
    span: Span
    ticket: Ticket
    data: bytes | None = None
    over: trio.Event = field(default_factory=trio.Event)

    async def wait(self) -> bytes | None:
        await self.over.wait()
        return self.data


class Advance:
    """The spans of one start. Belongs to one trio loop; `asked` hears of the bytes of each request."""

    def __init__(
        self,
        scheduler: Scheduler,
        repository: Repository,
        host: str,
        trace: Trace,
        digests: Sequence[str],
        asked: Callable[[int], None],
    ) -> None:
        """`host`: as the scheduler knows it. `digests`: the image's layers; spans of others are passed over."""
        self._scheduler = scheduler
        self._repository = repository
        self._host = host
        self._spans = list(_usable(trace, digests))
        self._asked = asked
        self._coming: list[_Coming] = []
        self._landed = trio.Event()

    async def run(self) -> None:
        """Fetch spans until the layers are here. A checkpoint, until the last one has come; never raises."""
        try:
            async with trio.open_nursery() as nursery:
                places = trio.CapacityLimiter(self._scheduler.places(self._host))
                for digest, span in self._spans:
                    await places.acquire_on_behalf_of(span)
                    places.total_tokens = self._scheduler.places(self._host)
                    await self._until_welcome()
                    if self._landed.is_set():
                        break
                    coming = _Coming(digest, span, self._scheduler.ticket(self._host, Priority.PREFETCH))
                    self._coming.append(coming)
                    self._asked(span.size)
                    nursery.start_soon(self._fetch, coming, partial(places.release_on_behalf_of, span))
        finally:
            for each in self._coming:
                each.over.set()

    async def _until_welcome(self) -> None:
        """Wait while the host limits how often it may be asked, or until the layers are here: a mount needs what it
        still allows."""
        while (wait := limited_for(self._repository)) > 0 and not self._landed.is_set():
            with trio.move_on_after(min(wait, _WELCOME)):
                await self._landed.wait()

    async def _fetch(self, coming: _Coming, release: Callable[[], None]) -> None:
        ticket, span = coming.ticket, coming.span

        def job() -> tuple[bytes, Sample]:
            deadline = time.monotonic() + EARLY_TRY
            return fetch_bytes(self._repository, coming.digest, span.blob_offset, span.size, deadline, ticket.flow)

        try:
            coming.data, sample = await self._scheduler.run(ticket, job, span.size)
            self._scheduler.observe(self._host, sample.first_byte, sample.size, sample.seconds)
        except LazyfsError as error:
            log.info("what a trace asks for early is left to readers: layer=%s error=%s", coming.digest, error)
        finally:
            ticket.flow.dropped = True  # where it was cancelled, its thread ends with the next bytes
            coming.over.set()
            release()

    def land(self, remote: Remote, layers: Iterable[ServedLayer]) -> list[Range]:
        """Give what came, and what is under way, to the layers that it is of; ask for no more. Never blocks.

        Return the frames that are on their way now, or were here.
        """
        self._landed.set()
        out = []
        by_digest = {layer.digest: layer for layer in layers if not layer.is_plain}
        for coming in self._coming:
            layer = by_digest.get(coming.digest)
            if layer is None:
                continue
            span = coming.span
            first, stop = _frames(layer.table, span.blob_offset, span.blob_offset + span.size)
            if first < stop:
                skipped = int(layer.table.frame_blob_offset[first]) - span.blob_offset
                given = Given(partial(_behind, coming, skipped), coming.ticket)
                remote.land(layer, first, stop, Priority.PREFETCH, given)
                out.append(Range(layer, first, stop))
        self._coming = [coming for coming in self._coming if not coming.over.is_set()]
        return out


async def _behind(coming: _Coming, skipped: int) -> bytes | None:
    data = await coming.wait()
    return None if data is None else data[skipped:]


def _usable(trace: Trace, digests: Sequence[str]) -> Iterator[tuple[str, Span]]:
    """Yield the spans that may be asked for, with their blobs: a trace is a stranger's."""
    own, left = set(digests), MAX_EARLY_BYTES
    seen: set[Span] = set()
    for span in trace.spans:
        digest = trace.layers[span.layer]
        if digest in own and span not in seen and 0 < span.size <= min(left, MAX_SPAN):
            seen.add(span)
            left -= span.size
            yield digest, span


def _frames(table: LayerTable, begin: int, end: int) -> tuple[int, int]:
    """Return the frames [first, stop) whose chunks lie within bytes [begin, end) of a blob."""
    first = bisect_left(table.frame_blob_offset, begin)
    stop = bisect_left(table.frame_blob_offset, end)
    if stop > first and table.frame_blob_offset[stop - 1] + needed(table, stop - 1) > end:
        stop -= 1
    return first, stop


# -- as a recorder tells of them


def spans_of(frames: Iterable[tuple[int, LayerTable, int]]) -> tuple[Span, ...]:
    """Return where frames lie that were read first: (layer's place, its table, frame), in order, each once.

    Neighbours and small gaps in one span, within a window of the order. As many as may be asked for.
    """
    out: list[Span] = []
    window: list[tuple[int, int, int]] = []  # layer, blob offset, size
    size = total = 0
    for place, table, frame in frames:
        window.append((place, int(table.frame_blob_offset[frame]), needed(table, frame)))
        size += window[-1][2]
        if size >= _WINDOW:
            out += _joined(window)
            total += size
            window, size = [], 0
        if total >= MAX_EARLY_BYTES:
            break
    out += _joined(window)
    return tuple(out[:MAX_SPANS])


def _joined(window: list[tuple[int, int, int]]) -> Iterator[Span]:
    for place, group in groupby(sorted(window), key=lambda each: each[0]):
        begin = end = -1
        for _, at, size in group:
            if begin >= 0 and at - end <= _GAP and at + size - begin <= MAX_SPAN:
                end = max(end, at + size)
                continue
            if 0 < end - begin <= MAX_SPAN:
                yield Span(place, begin, end - begin)
            begin, end = at, at + size
        if 0 < end - begin <= MAX_SPAN:
            yield Span(place, begin, end - begin)
