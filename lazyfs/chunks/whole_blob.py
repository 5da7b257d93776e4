"""A blob from its first byte to its last, over as many connections as make it faster.

It begins as one request for everything, which every server answers. Where the consumer mostly waits for the network, a
second connection is asked for a segment further on; once that is answered as asked, the rest comes in segments, on one
connection more at a time for as long as each brings a gain. What arrives early waits in bounded buffers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from lazyfs.chunks.lines import Lines
from lazyfs.errors import BadAnswer, RegistryError
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB

SEGMENT = 4 * MiB  # bytes of one request; a connection more than segments are read from hides the round trips
_BLOCK = MiB  # bytes of one read from a stream at most
_RESUMES = 5  # broken transfers in a row without a byte between them
_PAUSE = 0.05  # seconds before the first resume; doubled each time
_WINDOW = 0.5  # seconds over which a rate is taken
_STARVED = 0.6  # share of the time spent waiting for bytes, from which on the network is what is slow
_GAIN = 1.15  # times the rate before: what one more connection must bring to be followed by another
_IN_SEGMENTS = 2  # connections at least: with one, each segment would cost a round trip


class _Segment:
    """A part of the blob on its way: [blob_offset, blob_offset + size)."""

    __slots__ = ("blob_offset", "blocks", "error", "over", "size")

    def __init__(self, blob_offset: int, size: int) -> None:
        self.blob_offset = blob_offset
        self.size = size
        self.blocks: deque[bytes] = deque()
        self.over = False  # nothing more comes
        self.error: BaseException | None = None


class _Gauge:
    """What one window saw: the rate at which bytes came, and how much of the time the consumer waited for them."""

    def __init__(self, window: float) -> None:
        self._window = window
        self.begin()

    def begin(self) -> None:
        """Start a new window."""
        self._began = time.monotonic()
        self._waited = 0.0
        self.came = 0  # bytes

    @contextmanager
    def waiting(self) -> Generator[None, None, None]:
        """Count the time in the body as waiting."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def take(self) -> tuple[float, float] | None:
        """Return (share of the time waited, bytes a second) and start anew; None before the window's end."""
        seconds = time.monotonic() - self._began
        if seconds < self._window:
            return None
        seen = self._waited / seconds, self.came / seconds
        self.begin()
        return seen


class WholeBlob:
    """Iterate over it once, in one thread: the blocks of a blob in order, exactly `size` bytes or a RegistryError.

    The bytes are not verified: the caller hashes them. `connections` is the most that were used at a time.
    """

    def __init__(
        self,
        repository: Repository,
        digest: str,
        size: int,
        lines: Lines,
        *,
        segment: int = SEGMENT,
        window: float = _WINDOW,
        deadline: float | None = None,
    ) -> None:
        self._repository = repository
        self._digest = digest
        self._size = size
        self._lines = lines
        self._segment = segment
        self._window = window
        self._deadline = deadline
        self._gauge = _Gauge(window)
        self._rate = 0.0  # bytes a second before the last connection was added
        self._settled = False  # that one brought nothing: no more are added
        self.connections = 1
        self._changed = threading.Condition()  # guards all below
        self._coming: deque[_Segment] = deque()  # in blob order; the first is the one that is handed over
        self._stop = size  # where the first stream ends and the segments begin
        self._next = size  # where the segment begins that is asked for next
        self._wanted = 0  # connections that fetch segments
        self._running = 0
        self._proved = False  # a range was answered with that range
        self._closed = False

    def __iter__(self) -> Generator[bytes, None, None]:
        try:
            yield from self._first_stream()
            yield from self._segments()
        finally:
            with self._changed:
                self._closed = True
                self._coming.clear()
                self._changed.notify_all()

    def _first_stream(self) -> Iterator[bytes]:
        """Yield the whole blob, or what lies before the first segment."""
        done = 0
        with closing(self._fetch(0, self._size)) as blocks:
            while done < self._stop:
                with self._gauge.waiting():
                    data = next(blocks)
                if done + len(data) >= self._stop and not self._has_segments():
                    self._refuse()
                data = data[: self._stop - done]
                done += len(data)
                yield data
                if self._stop == self._size and not self._settled:
                    self._try_second(done)

    def _segments(self) -> Iterator[bytes]:
        """Yield the rest, where there is one, as it comes in segments."""
        if self._stop < self._size:
            self._gauge.begin()
            with self._changed:
                self._start(lent=False)  # in the place of the first stream's connection
        done = self._stop
        while done < self._size:
            with self._changed:
                with self._gauge.waiting():
                    while not self._coming or not (self._coming[0].blocks or self._coming[0].over):
                        self._changed.wait()
                segment = self._coming[0]
                if segment.error is not None:
                    raise segment.error
                data = segment.blocks.popleft() if segment.blocks else b""
                if not data:
                    self._coming.popleft()
                    self._changed.notify_all()
            if data:
                done += len(data)
                yield data
                self._try_more()

    # -- how many connections

    def _try_second(self, done: int) -> None:
        """Ask for a segment further on, where the network is what is slow."""
        measured = self._gauge.take()
        if measured is None or measured[0] < _STARVED:
            return
        # Far enough ahead for the answer to be there before the first stream is.
        begin = done + max(self._segment, int(measured[1] * 2 * self._window))
        if self._size - begin < self._segment or not self._lines.take(self._repository.host):
            return
        self._rate = measured[1]
        with self._changed:
            self._stop = self._next = begin
            self._start(lent=True)

    def _try_more(self) -> None:
        """Add a connection where the network is what is slow and the last one brought something."""
        measured = None if self._settled else self._gauge.take()
        if measured is None or measured[0] < _STARVED or self._next >= self._size:
            return
        if measured[1] < self._rate * _GAIN:
            self._settled = True
            with self._changed:
                self._wanted = max(_IN_SEGMENTS, self._wanted - 1)
        elif self._lines.take(self._repository.host):
            self._rate = measured[1]
            with self._changed:
                self._start(lent=True)

    def _start(self, *, lent: bool) -> None:
        """Start a thread; without one more the rest is as slow as before, which is all. Holds the lock."""
        try:
            threading.Thread(target=self._work, args=(lent,), name="lazyfs-range", daemon=True).start()
        except RuntimeError:
            if lent:
                self._lines.give_back(self._repository.host)
            self._settled = True
            if not self._running:
                self._stop = self._next = self._size
            return
        self._wanted += 1
        self._running += 1
        self.connections = max(self.connections, self._running + (lent and not self._proved))

    def _has_segments(self) -> bool:
        with self._changed:
            return self._proved

    def _refuse(self) -> None:
        """Go on with the one stream: ranges are not served, or not in time."""
        with self._changed:
            self._settled = True
            self._stop = self._next = self._size
            self._wanted = 0
            self._coming.clear()
            self._changed.notify_all()

    # -- threads

    def _work(self, lent: bool) -> None:
        """Fetch segments, one after another."""
        try:
            while (segment := self._take_segment(lent)) is not None:
                self._fill(segment)
        finally:
            if lent:
                self._lines.give_back(self._repository.host)

    def _take_segment(self, lent: bool) -> _Segment | None:
        with self._changed:
            while not self._closed and self._next < self._size and self._running <= self._wanted:
                if lent and self._running > 1 and not self._lines.is_calm(self._repository.host):
                    self._wanted = self._running - 1
                    self._settled, self._rate = False, 0.0  # once there is nobody else, begin to grow again
                elif len(self._coming) > self._wanted:
                    self._changed.wait()
                else:
                    segment = _Segment(self._next, min(self._segment, self._size - self._next))
                    self._next += segment.size
                    self._coming.append(segment)
                    return segment
            self._running -= 1  # here, so that one leaves at a time
            return None

    def _fill(self, segment: _Segment) -> None:
        try:
            with closing(self._fetch(segment.blob_offset, segment.size)) as blocks:
                for data in blocks:
                    with self._changed:
                        if self._closed or self._stop == self._size:
                            return
                        self._proved = True
                        segment.blocks.append(data)
                        self._changed.notify_all()
        except BaseException as error:  # it belongs to whoever iterates
            segment.error = error
            if not self._has_segments():
                self._refuse()
        finally:
            with self._changed:
                segment.over = True
                self._changed.notify_all()

    def _fetch(self, blob_offset: int, size: int) -> Generator[bytes, None, None]:
        """Yield a range, resumed where a connection broke."""
        done = failures = 0
        while done < size:
            try:
                with self._repository.fetch(
                    self._digest, blob_offset + done, size - done, deadline=self._deadline
                ) as stream:
                    while data := stream.read(_BLOCK):
                        done += len(data)
                        failures = 0
                        self._gauge.came += len(data)
                        yield data
                if done < size:
                    raise BadAnswer(self._repository.host, f"layer {self._digest} ends {size - done} bytes too early")
            except RegistryError as error:
                failures += 1
                if not error.temporary or failures > _RESUMES or self._closed:
                    raise
                time.sleep(_PAUSE * 2 ** (failures - 1))
