"""Blocking work on several layers at once, for commands that the user may stop at any moment."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from lazyfs.errors import LazyfsError

T = TypeVar("T")


def side_by_side(works: Sequence[Callable[[], T]], threads: int) -> list[T | LazyfsError]:
    """Do all of `works` in at most `threads` threads; return results or errors in the order of `works`.

    Blocks until all are done; each work brings its own deadline. A LazyfsError is a result, because the other layers
    are worth finishing; any other exception is raised here. The threads are daemons: Ctrl-C ends the process at once.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(works)):
        waiting.put(number)
    done: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()

    def drain() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, works[number]()))
            except BaseException as error:  # a thread's error must reach the caller, whatever it is
                done.put((number, error))

    for _ in range(min(threads, len(works))):
        threading.Thread(target=drain, daemon=True, name="lazyfs-layer").start()
    results: dict[int, T | LazyfsError] = {}
    for _ in works:
        number, result = done.get()
        if isinstance(result, BaseException) and not isinstance(result, LazyfsError):
            raise result
        results[number] = result
    return [results[number] for number in range(len(works))]
