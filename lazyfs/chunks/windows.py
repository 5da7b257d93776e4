"""What is asked for beyond the frame that is missing: windows that double while reads are in order, and neighbours.

Windows are those of sequential readers. Small frames of a crowd come along with one that is missing, and the pieces of
a pattern of reads before they are wanted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict

from lazyfs.chunks.crowds import STRETCH, Crowds
from lazyfs.chunks.flight import Flight
from lazyfs.chunks.flights import Flights
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.strides import Strides
from lazyfs.format.table import NO_FRAME, Place
from lazyfs.limits import MAX_FRAMES, MAX_STREAMS, MAX_WINDOW
from lazyfs.units import KiB, MiB

WINDOW = 4 * MiB  # compressed bytes of the largest read-ahead; two are under way where the link holds no more
_IN_ORDER = 2  # round trips of bytes under way for a sequential reader: the link never waits for what he takes next
_FIRST_WINDOW = 512 * KiB  # compressed bytes of the first read-ahead after two reads in order
# Files that a reader has gone on from to what lies behind, from which on he is taken for one who walks a tree and reads
# all of it. He has the next files on their way, or each of their frames would cost a round trip.
_WALKED = 2
_SKIP = 32  # frames that a read-ahead steps over because they are here already
_MARKS = 4 * MAX_STREAMS  # windows whose middle somebody may come to


class _Run:
    """A reader in order: where its next read-ahead begins (a frame), where the last one ends, and its bytes.

    `walked`: how many files he has gone on from; `walks`: what he is sent goes over their ends.
    """

    __slots__ = ("first", "limit", "walked", "walks", "window")

    def __init__(self, first: int, limit: int, window: int, walked: int, walks: bool) -> None:
        self.first = first
        self.limit = limit
        self.window = window
        self.walked = walked
        self.walks = walks


class Windows:
    """How readers read, and what they are therefore sent. Belongs to one trio loop; never blocks."""

    def __init__(self, flights: Flights, scheduler: Scheduler) -> None:
        self._flights = flights
        self._scheduler = scheduler
        self._crowds = Crowds()
        self._strides = Strides()
        # (layer, frame that continues the stream) -> whose it is
        self._streams: OrderedDict[tuple[int, int], _Run] = OrderedDict()
        # (layer, frame whose reading triggers more windows) -> whose they are
        self._marks: OrderedDict[tuple[int, int], _Run] = OrderedDict()

    def depart(
        self, layer: ServedLayer, frame: int, priority: Priority, last_chunk: int, read: tuple[int, int] | None
    ) -> Flight:
        """Ask for a frame that is missing, with what its reader will want next.

        `last_chunk`, `read`: see Remote.get.
        """
        limit = _frame_at(layer, last_chunk) + 1
        begin, through = (frame, frame) if read is None else (_frame_at(layer, read[0]), _frame_at(layer, read[1]))
        first = frame
        while first > begin and self._flights.is_wanted(layer, first - 1):
            first -= 1
        run = self._follow(layer, first, limit, priority)
        stop = self._reach(layer, first, run.window, run.limit, max(frame, through))
        if priority is Priority.DEMAND:
            stop = self._take_along(layer, frame, stop)
        fetch = self._flights.launch(layer, first, stop, priority, is_guess=run.walks)
        self._remember(layer, first, stop, run)
        return fetch.flights[frame]

    def _follow(self, layer: ServedLayer, first: int, limit: int, priority: Priority) -> _Run:
        """Return whose request begins at frame `first`: of the reader whose last one ended there, or of a new one.

        `limit`: the frame behind the file that is read.
        """
        last = self._streams.pop((layer.serial, first), None)
        if last is None:
            return _Run(first, limit, 0, 0, False)
        walked = last.walked + (first >= last.limit)
        # What nobody has asked for yet pushes nothing out of a full store, and then there is no use in fetching it.
        walks = priority is Priority.DEMAND and walked >= _WALKED and layer.store.takes_spare
        if walks:
            limit = layer.table.frame_count
        window = last.window if last.walks or not walks else _FIRST_WINDOW
        return _Run(first, limit, window, walked, walks)

    def note_read(self, layer: ServedLayer, chunk: int) -> None:
        """Tell that a reader took a chunk that was here already: a stream of reads may want its next window."""
        if self._streams:
            frame = layer.table.chunk_frame[chunk]
            self.pass_over(layer, frame)
            self.read_on(layer, frame)

    def is_foreseen(self, layer: ServedLayer, data_offset: int) -> bool:
        """Tell whether a pattern of reads wants a piece that begins here."""
        return self._strides.expects(layer.serial, data_offset)

    def note_piece(self, layer: ServedLayer, first: Place, last: Place, last_chunk: int, first_chunk: int = 0) -> None:
        """Tell of a read from `first` to `last` before its chunks are wanted: it may be one of a pattern.

        `first_chunk`, `last_chunk`: those of the file, as far as known. What the pattern wants next is asked for, if
        connections are free.
        """
        starts = layer.table.chunk_data_offset
        begin = starts[first.chunk] + first.offset
        if layer.store.has(first.chunk) and not self.is_foreseen(layer, begin):
            return
        end = starts[last.chunk] + last.offset + last.size
        limit = starts[last_chunk] + layer.table.chunk_size[last_chunk]
        room = self._scheduler.room(layer.host)
        for at, stop in self._strides.note(layer.serial, begin, end, limit, starts[first_chunk]):
            chunks = [place.chunk for _, place in layer.table.data_places(at, stop - at)]
            if not chunks or layer.is_plain:
                continue
            frame, through = _frame_at(layer, chunks[0]), _frame_at(layer, chunks[-1])
            while frame <= through and room > 0:
                end_frame = frame
                while end_frame <= min(through, frame + MAX_FRAMES - 1) and self._flights.is_wanted(layer, end_frame):
                    end_frame += 1
                if end_frame > frame:
                    self._flights.launch(layer, frame, end_frame, Priority.DEMAND)
                    room -= 1
                frame = max(frame + 1, end_frame)

    def _reach(self, layer: ServedLayer, first: int, window: int, limit: int, through: int) -> int:
        """Return where a request that begins at `first` ends: behind `through` or at `window` bytes, whichever is more.

        Before that at a frame that is here, or at `limit`.
        """
        table = layer.table
        end = table.frame_blob_offset[first] + window
        limit = min(limit, table.frame_count, first + MAX_FRAMES)
        stop = first + 1
        while stop < limit and (stop <= through or table.frame_blob_end[stop] <= end):
            if not self._flights.is_wanted(layer, stop):
                break
            stop += 1
        return stop

    def _take_along(self, layer: ServedLayer, frame: int, stop: int) -> int:
        """Return where a request for `frame` and what lies before `stop` ends, small neighbours included."""
        table = layer.table
        start = table.frame_blob_offset[frame]
        if not self._crowds.note(layer.serial, start):
            return stop
        end = start + min(STRETCH, self._scheduler.bytes_in_a_round_trip(layer.host))
        limit = min(table.frame_count, frame + MAX_FRAMES)
        while stop < limit and table.frame_blob_end[stop] <= end and self._flights.is_wanted(layer, stop):
            stop += 1
        return stop

    def _remember(self, layer: ServedLayer, first: int, stop: int, run: _Run) -> None:
        """Note that `run` goes on behind [first, stop), which was asked for just now, with twice its window."""
        began = run.window > 0
        run.first = stop
        run.window = min(max(2 * run.window, _FIRST_WINDOW), WINDOW)
        self._streams[layer.serial, stop] = run
        if began and first < run.limit:
            # Half-way through this window the next one departs, so that a sequential reader never waits for it.
            self._marks[layer.serial, (first + stop) // 2] = run
        while len(self._marks) > _MARKS:
            self._marks.popitem(last=False)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)

    def pass_over(self, layer: ServedLayer, frame: int) -> None:
        """Let a sequential reader keep its window over a frame that somebody else has fetched."""
        stream = self._streams.pop((layer.serial, frame), None)
        if stream is not None:
            self._streams[layer.serial, frame + 1] = stream

    def read_on(self, layer: ServedLayer, frame: int) -> None:
        """Where a sequential reader has come to the middle of a window, ask for the next one.

        For as many as keep a long link busy, if connections are free that no other reader could want.
        """
        run = self._marks.pop((layer.serial, frame), None)
        if run is None:
            return
        starts = layer.table.frame_blob_offset
        reach = min(MAX_WINDOW, _IN_ORDER * self._scheduler.bytes_in_a_round_trip(layer.host))
        reach = starts[frame] + max(run.window, reach)
        most = room = max(1, self._scheduler.room(layer.host))
        while room and self._next_wanted(layer, run) and starts[run.first] < reach:
            self._streams.pop((layer.serial, run.first), None)
            first, stop = run.first, self._reach(layer, run.first, run.window, run.limit, run.first)
            self._flights.launch(layer, first, stop, Priority.DEMAND, is_guess=run.walks)
            self._remember(layer, first, stop, run)
            room -= 1
        if room == most and run.first < run.limit and (frame + run.first) // 2 > frame:
            # Enough is under way: look again further on, if no window's middle comes first.
            self._marks.setdefault((layer.serial, (frame + run.first) // 2), run)

    def _next_wanted(self, layer: ServedLayer, run: _Run) -> bool:
        """Step over frames that are here already. Tell whether the next one is missing, and within the bounds."""
        limit = min(run.limit, layer.table.frame_count)
        for _ in range(_SKIP):
            if run.first >= limit or self._flights.is_wanted(layer, run.first):
                break
            self.pass_over(layer, run.first)
            run.first += 1
        return run.first < limit and self._flights.is_wanted(layer, run.first)


def _frame_at(layer: ServedLayer, chunk: int) -> int:
    """Return the frame of a chunk; for a hole the last frame before it."""
    table = layer.table
    frame = int(table.chunk_frame[chunk])
    return frame if frame != NO_FRAME else max(0, bisect_right(table.frame_first_chunk, chunk) - 1)
