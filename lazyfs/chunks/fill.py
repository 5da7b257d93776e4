"""Background: prefetch up to the landmark, then the whole layer in blob order, checked as it comes.

The TOC does not prove the diff ID, and containerd shares snapshots by it. So each lazy layer is read whole once, and
its blob digest, its diff ID and its tar headers are held against what was promised; see `WholeCheck`.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import trio

from lazyfs.chunks.feed import feed_frames
from lazyfs.chunks.frames import fetch_piece, needed, prove_frame
from lazyfs.chunks.host import SEGMENT, Priority
from lazyfs.chunks.layer import Check, ServedLayer
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Scheduler
from lazyfs.errors import (
    DiffIdMismatch,
    FrameInvalid,
    LazyfsError,
    RegistryError,
    TocMismatch,
    TrustError,
    first_of,
)
from lazyfs.limits import MAX_FRAMES
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

_LOOK = 256  # frames looked at in one go: the loop has readers to serve
_FED = 4 * MiB  # bytes that the check is fed in one go: what comes meanwhile waits
_PIECE = 64 * KiB  # bytes of an extent that does not go through the spool, in one request at least
_MORE = 1  # requests beyond the host's places: one waits, so that no place is empty between two
_PAUSE = 5.0  # seconds before a failed fill is tried again, growing to _LONG_PAUSE
_LONG_PAUSE = 60.0
_CHECK_THREADS = 2
_AHEAD = 256 * MiB  # bytes that may come before the check has seen what is in front of them
_START = 30.0  # seconds from a check's begin in which readers come before it
_GIVE_WAY = 0.1  # seconds between looks whether they still do
_STILL = 0.3  # seconds after which who has read nothing more is done


class Filler:
    """Fill layers one after another or side by side; one `fill` task a layer. Belongs to one trio loop.

    `answered` counts what readers were given so far, of whatever layer (bytes).
    """

    def __init__(self, scheduler: Scheduler, remote: Remote, answered: Callable[[], int]) -> None:
        self._scheduler = scheduler
        self._remote = remote
        self._answered = answered
        self._limiter = trio.CapacityLimiter(_CHECK_THREADS)

    def awaited(self, layer: ServedLayer) -> AbstractContextManager[None]:
        """Tell that somebody waits for a layer's fill until the context ends. Doesn't block."""
        return self._scheduler.awaited(layer.host)

    async def prefetch(self, layer: ServedLayer) -> None:
        """Bring the frames before the landmark, in few large requests. Errors are left to the readers."""
        stop = bisect_left(layer.table.frame_blob_offset, layer.table.landmark)
        try:
            await self._bring_missing(layer, stop, Priority.PREFETCH)
        except LazyfsError as error:
            log.warning("prefetch gave up: layer=%s error=%s", layer.digest, error)

    async def fill(self, layer: ServedLayer) -> str:
        """Fetch all that is missing and run the whole check where it is due. Try until it is done or found false.

        A checkpoint. Return "" when the layer is verified and its chunks are here (if the disk keeps them), else why
        it must not be read any more. Errors of the registry are waited out.
        """
        pause = _PAUSE
        layer.reopen()
        while True:
            repository = layer.repository
            try:
                if layer.check is not None:
                    await self._check(layer, layer.check)
                else:
                    await self._complete(layer)
                layer.trouble = None
                return ""
            except LazyfsError as error:
                if layer.quarantine:
                    return layer.quarantine
                # A layer that has passed is not made false by what its registry sends now.
                if layer.check is not None and isinstance(error, (TrustError, FrameInvalid)):
                    senders = [] if _is_proof(error) else layer.blame(error.message)
                    said = f"{error.message} (sent by {', '.join(senders)})" if senders else error.message
                    others = 0 if _is_proof(error) else len(layer.others)
                    if layer.check.restarts > others and (_is_proof(error) or layer.agreed()):
                        layer.pardon()
                        return said
                    log.warning("the whole check begins again: layer=%s error=%s", layer.digest, said)
                    restarts = layer.check.restarts
                    layer.check.restart()
                    layer.turn(repository)
                    if restarts < 2 * layer.sources + others:
                        continue
                    # Some source never got to send all of it alone: what it would say is worth waiting for.
                    pause = _LONG_PAUSE
                layer.trouble = error
                if isinstance(error, RegistryError):
                    layer.turn(repository)
                log.warning("fill paused for %.0f s: layer=%s error=%s", pause, layer.digest, error)
            await trio.sleep(pause)
            pause = min(2 * pause, _LONG_PAUSE)

    def _segments(self, layer: ServedLayer, first: int, stop: int, size: int) -> list[tuple[int, int]]:
        """Cut the missing frames of [first, stop) into runs of at most `size` compressed bytes (one frame at least)."""
        table = layer.table
        out: list[tuple[int, int]] = []
        at = first
        while at < stop:
            if not layer.frame_missing(at):
                at += 1
                continue
            end = at + 1
            limit = table.frame_blob_offset[at] + size
            while end < stop and table.frame_blob_end[end] <= limit and layer.frame_missing(end):
                end += 1
            out.append((at, end))
            at = end
        return out

    async def _complete(self, layer: ServedLayer) -> None:
        """Bring what is missing of a layer that has passed its check before."""
        if not layer.is_plain and not layer.store.complete:
            await self._bring_missing(layer, layer.table.frame_count, Priority.BACKGROUND)

    async def _bring_missing(self, layer: ServedLayer, stop: int, priority: Priority) -> None:
        """Bring the missing frames before `stop` in large requests, several under way, as long as the store keeps them.

        Raise what the first failed one raised; the others are waited for.
        """
        coming = _Coming(self._remote, layer, priority)
        at = 0
        try:
            async with trio.open_nursery() as nursery:
                while at < stop and coming.kept:
                    await self._until_welcome(layer)
                    await coming.fewer_than(self._most_coming(layer))
                    size = self._scheduler.segment(layer.host) if priority is Priority.BACKGROUND else SEGMENT
                    end = min(at + _LOOK, stop)
                    runs = self._segments(layer, at, end, size)
                    if runs:
                        end = runs[0][1]
                        coming.begin()
                        nursery.start_soon(coming.bring, *runs[0])
                    at = end
                    await trio.lowlevel.checkpoint()
        except* LazyfsError as group:
            raise first_of(group) from None

    def _most_coming(self, layer: ServedLayer) -> int:
        """Return how many requests for a layer should be under way or wait for their place."""
        quiet = self._scheduler.is_quiet(layer.host)
        return self._scheduler.places(layer.host) + _MORE if quiet else 1

    async def _until_welcome(self, layer: ServedLayer) -> None:
        """Wait while the layer's host limits how often it may be asked: readers need what it still allows."""
        while (wait := layer.limited_for()) > 0:
            await trio.sleep(min(wait, _LONG_PAUSE))  # another source may turn up meanwhile

    # -- the whole check

    async def _check(self, layer: ServedLayer, check: Check) -> None:
        ahead, running = check.next, 0  # the first extent that nobody was asked for; requests under way
        pause = _Pause(trio.current_time() + _START, self._answered)
        await trio.to_thread.run_sync(check.prepare, limiter=self._limiter)

        async def bring(first: int, stop: int) -> None:
            nonlocal running
            try:
                await self._bring_extents(layer, check, first, stop)
            finally:
                running -= 1

        try:
            async with trio.open_nursery() as nursery:
                while check.next < layer.extents:
                    ahead = max(ahead, check.next)
                    while check.spool.works and running < self._most_coming(layer) and not _is_far(layer, check, ahead):
                        stop = self._segment_end(layer, ahead)
                        if stop == ahead:
                            break
                        running += 1
                        nursery.start_soon(bring, ahead, stop)
                        ahead = stop
                    if check.spool.works and not _is_far(layer, check, ahead) and self._gives_way(layer, pause):
                        await trio.sleep(_GIVE_WAY)
                    elif not await self._feed(layer, check):
                        await self._one_extent(layer, check, check.next)
        except* LazyfsError as group:
            raise first_of(group) from None
        await trio.to_thread.run_sync(check.whole.finish, limiter=self._limiter)
        layer.check = None
        layer.verified = True
        check.spool.close()

    def _gives_way(self, layer: ServedLayer, pause: _Pause) -> bool:
        """Tell whether readers have the processors for now: what has come for the check waits in the spool."""
        if trio.current_time() >= pause.end or self._scheduler.is_awaited(layer.host):
            return False
        return pause.is_somebody_reading() or self._scheduler.has_readers(layer.host)

    def _segment_end(self, layer: ServedLayer, first: int) -> int:
        """Return where the next request of the check ends (extent numbers)."""
        size = self._scheduler.segment(layer.host)
        stop, total = first, 0
        while (
            stop < layer.extents and stop - first < MAX_FRAMES and (not total or total + layer.extent(stop)[1] <= size)
        ):
            total += layer.extent(stop)[1]
            stop += 1
        return stop

    async def _bring_extents(self, layer: ServedLayer, check: Check, first: int, stop: int) -> None:
        """Have the frames among extents [first, stop) fetched; the spool gets them on the way."""
        await self._until_welcome(layer)
        at, stop = max(first, 1), min(stop, layer.extents - 1)

        def wanted(extent: int) -> bool:
            return extent >= check.next and not check.spool.had(extent) and is_spooled(layer, extent)

        while at < stop:
            end = at
            while end < stop and wanted(end):
                end += 1
            if end > at:
                await self._remote.bring(layer, at - 1, end - 1, Priority.BACKGROUND)
            at = max(end, at + 1)

    async def _feed(self, layer: ServedLayer, check: Check) -> bool:
        """Feed the check with what the spool has of the next extents. Return whether it had the next one."""
        return await trio.to_thread.run_sync(partial(feed_spooled, layer, check), limiter=self._limiter)

    async def _one_extent(self, layer: ServedLayer, check: Check, extent: int) -> None:
        """Bring one extent that the spool does not have: lead and tail, or one that the disk would not keep."""
        if 0 < extent < layer.extents - 1 and check.spool.works and is_at_start(layer, check):
            await self._bring_extents(layer, check, extent, extent + 1)
            if check.spool.has(extent):
                return
        await self._until_welcome(layer)
        offset, size = layer.extent(extent)
        end, rest = offset + size, b""
        # Not from `offset`: another try goes on where the last one stopped.
        while (at := check.blob_offset + len(rest)) < end:
            ticket = self._scheduler.ticket(layer.host, Priority.BACKGROUND)
            # The spool's extents have passed `fetch_frames`; of these nobody has looked at the chunks' digests yet.
            unproven = 0 < extent < layer.extents - 1 and at == offset
            most = max(_PIECE, self._scheduler.segment(layer.host))
            piece = needed(layer.table, extent - 1) if unproven else min(most, end - at)
            # Counted as it comes: what came in one go would make the host's other requests look slow, see `slow`.
            job = partial(fetch_piece, layer, at, piece, None, ticket.flow)
            data, _ = await self._scheduler.run(ticket, job, piece)
            rest += data
            layer.bytes_by_priority[Priority.BACKGROUND] += piece
            if extent == layer.extents - 1:
                await trio.to_thread.run_sync(check.whole.feed_tail, rest, limiter=self._limiter)
                rest = b""
            else:
                if unproven:
                    await trio.to_thread.run_sync(prove_frame, layer, extent - 1, rest, limiter=self._limiter)
                feed = partial(feed_frames, check.whole, rest, at + piece == end)
                rest = await trio.to_thread.run_sync(feed, limiter=self._limiter)
        check.next = extent + 1


class _Pause:
    """Whether a check gives way: until `end`, to those who wait for the network and those who read what is here."""

    def __init__(self, end: float, answered: Callable[[], int]) -> None:
        self.end = end
        self._answered = answered
        self._seen = answered()
        self._seen_at = float("-inf")  # when it had last become more

    def is_somebody_reading(self) -> bool:
        """Tell whether somebody was given something a moment ago. Doesn't block."""
        now, seen = trio.current_time(), self._answered()
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        return now < self._seen_at + _STILL


class _Coming:
    """Requests for frames of one layer that are under way side by side."""

    def __init__(self, remote: Remote, layer: ServedLayer, priority: Priority) -> None:
        self._remote = remote
        self._layer = layer
        self._priority = priority
        self._changed = trio.Event()
        self._count = 0
        self.kept = True  # the store keeps what comes

    async def fewer_than(self, most: int) -> None:
        """Wait until fewer than `most` are under way. A checkpoint unless they are."""
        while self._count >= most:
            self._changed = trio.Event()
            await self._changed.wait()

    def begin(self) -> None:
        """Count one more, to be brought."""
        self._count += 1

    async def bring(self, first: int, stop: int) -> None:
        """Have frames [first, stop) fetched, and see whether they stay."""
        try:
            await self._remote.bring(self._layer, first, stop, self._priority)
            self.kept = self.kept and not self._layer.frame_missing(stop - 1)
        finally:
            self._count -= 1
            self._changed.set()


def _is_proof(error: LazyfsError) -> bool:
    """Tell whether the blob had the promised digest when the error was found: then no source can mend it."""
    return isinstance(error, (DiffIdMismatch, TocMismatch))


def _is_far(layer: ServedLayer, check: Check, ahead: int) -> bool:
    """Tell whether as much has come before extent `ahead` as may before the check sees it: the spool takes disk."""
    return ahead > check.next and layer.extent(ahead - 1)[0] > check.blob_offset + _AHEAD


def is_spooled(layer: ServedLayer, extent: int) -> bool:
    """Tell whether whoever fetches the frame of an extent fetches all of the extent, so that the spool gets it."""
    return needed(layer.table, extent - 1) == layer.extent(extent)[1]


def is_at_start(layer: ServedLayer, check: Check) -> bool:
    """Tell whether the check has seen nothing yet of its next extent, rather than the pieces before a failed one."""
    return check.blob_offset == layer.extent(check.next)[0]


def feed_spooled(layer: ServedLayer, check: Check) -> bool:
    """Give the check extents that the spool has in a row from its next one, up to _FED bytes. Blocking.

    Tell whether any was. Raise FrameInvalid.
    """
    fed = 0
    while check.next < layer.extents and fed < _FED and is_at_start(layer, check):
        extent = check.next
        data = check.spool.take(extent)
        if data is None:
            break
        if extent == layer.extents - 1:
            check.whole.feed_tail(data)
        else:
            feed_frames(check.whole, data, True)
        check.next = extent + 1
        fed += max(len(data), 1)
    return fed > 0
