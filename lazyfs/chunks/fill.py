"""Background: prefetch up to the landmark, then the whole layer in blob order, checked as it comes.

The TOC does not prove the diff ID, and containerd shares snapshots by it. So each lazy layer is read whole once, and
its blob digest, its diff ID and its tar headers are held against what was promised; see `WholeCheck`.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import partial

import trio

from lazyfs.chunks.frames import decode_extent, read_exactly
from lazyfs.chunks.layer import Check, ServedLayer
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Priority, Scheduler
from lazyfs.errors import FrameInvalid, LazyfsError, TrustError
from lazyfs.format.codec import MAX_FRAME
from lazyfs.units import MiB

log = logging.getLogger(__name__)

SEGMENT = 4 * MiB  # compressed bytes of one background request while nobody reads
_AHEAD = 2  # requests under way: while one is decoded the next one crosses the network
_PAUSE = 5.0  # seconds before a failed fill is tried again, growing to _LONG_PAUSE
_LONG_PAUSE = 60.0
_CALM = 1.0  # seconds that background waits for running demand reads before its next small request
_EXTENT_BOUND = MAX_FRAME  # bytes that one extent may decode to
_CHECK_THREADS = 2


class Filler:
    """Fill layers one after another or side by side; one `fill` task a layer. Belongs to one trio loop."""

    def __init__(self, scheduler: Scheduler, remote: Remote) -> None:
        self._scheduler = scheduler
        self._remote = remote
        self._limiter = trio.CapacityLimiter(_CHECK_THREADS)

    async def prefetch(self, layer: ServedLayer) -> None:
        """Bring the frames before the landmark, in few large requests. Errors are left to the readers."""
        table = layer.table
        stop = 0
        while stop < table.frame_count and table.frame_blob_offset[stop] < table.landmark:
            stop += 1
        try:
            for first, end in self._segments(layer, 0, stop, SEGMENT):
                await self._remote.bring(layer, first, end, Priority.PREFETCH)
        except LazyfsError as error:
            log.warning("prefetch gave up: layer=%s error=%s", layer.digest, error)

    async def fill(self, layer: ServedLayer) -> str:
        """Fetch all that is missing and run the whole check where it is due. Try until it is done or found false.

        A checkpoint. Return "" when the layer is complete and verified, else why it must not be read any more.
        """
        pause = _PAUSE
        while True:
            try:
                if layer.check is not None:
                    await self._check(layer, layer.check)
                else:
                    await self._complete(layer)
                return ""
            except (TrustError, FrameInvalid) as error:
                if layer.check is None or layer.check.restarts:
                    return error.message
                log.warning("the whole check begins again: layer=%s error=%s", layer.digest, error)
                layer.check.restart()
                continue
            except LazyfsError as error:
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
        if layer.is_plain:
            return
        at = 0
        while at < layer.table.frame_count:
            quiet = self._scheduler.is_quiet(layer.host)
            if not quiet:
                await self._scheduler.until_calm(layer.host, trio.current_time() + _CALM)
            runs = self._segments(layer, at, min(at + 256, layer.table.frame_count), SEGMENT if quiet else 1)
            if not runs:
                at = min(at + 256, layer.table.frame_count)
                await trio.lowlevel.checkpoint()
                continue
            await self._remote.bring(layer, *runs[0], Priority.BACKGROUND)
            at = runs[0][1]

    # -- the whole check

    async def _check(self, layer: ServedLayer, check: Check) -> None:
        coming: deque[int] = deque()  # first extents behind requests under way
        ahead = check.next
        try:
            async with trio.open_nursery() as nursery:
                while check.next < layer.extents:
                    while len(coming) < (_AHEAD if self._scheduler.is_quiet(layer.host) else 1):
                        stop = self._segment_end(layer, check, ahead)
                        if stop == ahead:
                            break
                        coming.append(stop)
                        nursery.start_soon(self._bring_extents, layer, check, ahead, stop)
                        ahead = stop
                    if not await self._feed(layer, check):
                        await self._one_extent(layer, check, check.next)
                    while coming and coming[0] <= check.next:
                        coming.popleft()
        except* LazyfsError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        await trio.to_thread.run_sync(check.whole.finish, limiter=self._limiter)
        layer.check = None
        layer.verified = True
        check.spool.close()

    def _segment_end(self, layer: ServedLayer, check: Check, first: int) -> int:
        """Return where the next request of the check ends (extent numbers)."""
        size = SEGMENT if self._scheduler.is_quiet(layer.host) else 1
        stop, total = first, 0
        while stop < layer.extents and (total == 0 or total + layer.extent(stop)[1] <= size):
            total += layer.extent(stop)[1]
            stop += 1
        return stop

    async def _bring_extents(self, layer: ServedLayer, check: Check, first: int, stop: int) -> None:
        """Have the frames among extents [first, stop) fetched; the spool gets them on the way."""
        if not self._scheduler.is_quiet(layer.host):
            await self._scheduler.until_calm(layer.host, trio.current_time() + _CALM)
        frames = [extent - 1 for extent in range(max(first, 1), min(stop, layer.extents - 1))]
        at = 0
        while at < len(frames):
            if check.spool.has(frames[at] + 1):
                at += 1
                continue
            end = at + 1
            while end < len(frames) and not check.spool.has(frames[end] + 1):
                end += 1
            await self._remote.bring(layer, frames[at], frames[end - 1] + 1, Priority.BACKGROUND)
            at = end

    async def _feed(self, layer: ServedLayer, check: Check) -> bool:
        """Feed the check with what the spool has of the next extents. Return whether it had the next one."""
        return await trio.to_thread.run_sync(partial(feed_spooled, layer, check), limiter=self._limiter)

    async def _one_extent(self, layer: ServedLayer, check: Check, extent: int) -> None:
        """Bring one extent that the spool does not have: lead and tail, or one that the disk would not keep."""
        if 0 < extent < layer.extents - 1:
            await self._bring_extents(layer, check, extent, extent + 1)
            if check.spool.has(extent):
                return
        offset, size = layer.extent(extent)
        if not size:
            data = b""
        else:
            ticket = self._scheduler.ticket(layer.host, Priority.BACKGROUND)
            data = await self._scheduler.run(ticket, partial(_fetch_bytes, layer, offset, size))
            layer.bytes_by_priority[Priority.BACKGROUND] += size
        await trio.to_thread.run_sync(partial(feed_extent, layer, check, extent, data), limiter=self._limiter)


def _fetch_bytes(layer: ServedLayer, blob_offset: int, size: int) -> bytes:
    with layer.repository.fetch(layer.digest, blob_offset, size, deadline=None) as stream:
        return read_exactly(stream, size)


def feed_spooled(layer: ServedLayer, check: Check) -> bool:
    """Give the check all extents that the spool has in a row from its next one. Blocking. Tell whether any was."""
    fed = False
    while check.next < layer.extents and check.spool.has(check.next):
        extent = check.next
        data = check.spool.take(extent)
        if data is None:
            break
        feed_extent(layer, check, extent, data)
        fed = True
    return fed


def feed_extent(layer: ServedLayer, check: Check, extent: int, data: bytes) -> None:
    """Give the check one extent's compressed bytes and go on to the next. Blocking. Raise TrustError, FrameInvalid."""
    if extent == layer.extents - 1:
        check.whole.feed_tail(data)
    elif data:
        check.whole.feed_frame(data, decode_extent(data, bound=_EXTENT_BOUND))
    check.next = extent + 1
