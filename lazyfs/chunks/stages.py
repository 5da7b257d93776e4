"""Threads that hand work to each other in order and within bounds: reader, decoder, hashers and writer side by side.

Each does what releases the interpreter lock (reading, inflating, hashing, writing); Python itself runs in one thread
at a time. The threads end with their process at the latest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Channel(Generic[T]):
    """A queue of at most `depth` items between two threads, which either side can end."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False  # nothing more comes
        self._dropped = False  # nothing more is wanted

    def put(self, item: T) -> bool:
        """Add an item, blocking while the queue is full. False: nothing is wanted any more."""
        with self._changed:
            while len(self._items) >= self._depth and not self._dropped:
                self._changed.wait()
            if not self._dropped:
                self._items.append(item)
                self._changed.notify_all()
            return not self._dropped

    def close(self) -> None:
        """Tell that nothing more comes. Doesn't block."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drop(self) -> None:
        """Tell that nothing more is wanted: what waits is forgotten, and nobody blocks any more."""
        with self._changed:
            self._dropped = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Take items in order until the queue is closed and empty, or dropped. Blocking while it is empty."""
        while True:
            with self._changed:
                while not self._items and not self._closed and not self._dropped:
                    self._changed.wait()
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item  # or its memory lives on while we wait for the next


class Ahead(Generic[T]):
    """An iterable that a thread works ahead on, `depth` items at most. What it raises comes out behind its items."""

    def __init__(self, items: Iterable[T], depth: int, *, to_the_end: bool = False) -> None:
        """`to_the_end`: the source is exhausted even after `drop`, for the sake of what it does on the way."""
        self._items = items
        self._to_the_end = to_the_end
        self._channel: Channel[T] = Channel(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        yield from self._channel
        if self._error is not None:
            raise self._error

    def drop(self) -> None:
        """Take no more items. Doesn't block."""
        self._channel.drop()

    def wait(self) -> None:
        """Wait until the source is at its end, and raise what it raised. Nobody may be needed to take its items."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._channel.put(item) and not self._to_the_end:
                    return
                del item
        except BaseException as error:  # it belongs to whoever iterates
            self._error = error
        finally:
            self._channel.close()


class Sink(Generic[T]):
    """A thread that does `work` on each item in order; `depth` items at most wait for it, then `put` does.

    Once `work` has raised nothing more is worked on: `put` and `finish` raise what it raised.
    """

    def __init__(self, work: Callable[[T], object], depth: int) -> None:
        self._work = work
        self._channel: Channel[T] = Channel(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand over one item; it belongs to the thread now. Blocking while the thread is behind."""
        if not self._channel.put(item):
            self.finish()

    def finish(self) -> None:
        """Wait until all is done, and end the thread."""
        self._channel.close()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for item in self._channel:
                self._work(item)
                del item
        except BaseException as error:  # it belongs to whoever puts and finishes
            self._error = error
            self._channel.drop()
