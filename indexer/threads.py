"""Work side by side, in threads that hold up neither an interruption nor the end of the process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TypeVar

from lazyfs.errors import Interrupted
from lazyfs.limits import INTERRUPT_PATIENCE

T = TypeVar("T")
R = TypeVar("R")

_POLL = 0.5  # seconds between two looks at signals


def side_by_side(
    action: Callable[[T], R],
    items: Sequence[T],
    threads: int,
    name: str,
    stop: Callable[[], None] = lambda: None,
) -> list[R]:
    """Return what `action` makes of each item, in order. Blocks; `threads` at once, called `name`.

    The first error ends it: no more is begun, `stop` is called, and the error raised when what is under way has ended.
    An interruption waits for that for some seconds only: a registry that hangs would hold up whoever pressed Ctrl-C.
    """
    futures: list[Future[R]] = [Future() for _ in items]
    waiting = deque(zip(items, futures, strict=True))

    def work() -> None:
        while waiting:
            try:
                item, future = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                future.set_result(action(item))
            except BaseException as error:  # whatever it is, it belongs to the one who waits for us
                waiting.clear()
                future.set_exception(error)

    running = [threading.Thread(target=work, name=name, daemon=True) for _ in range(min(threads, len(items)))]
    try:
        for thread in running:
            thread.start()
        pending: set[Future[R]] = set(futures)
        while pending:
            # Not for ever: a signal that came just before the wait would be noticed at its end only.
            done, pending = wait(futures, timeout=_POLL, return_when=FIRST_EXCEPTION)
            if any(future.exception() is not None for future in done):
                break
        _raise_first(futures)
        return [future.result() for future in futures]
    except BaseException as error:
        waiting.clear()
        stop()
        deadline = time.monotonic() + INTERRUPT_PATIENCE
        for thread in running:
            if thread.ident is not None:
                thread.join(None if isinstance(error, Exception) else max(0.0, deadline - time.monotonic()))
        raise


def _raise_first(futures: Sequence[Future[R]]) -> None:
    """Raise the error that ended the work, not the interruptions that followed from it."""
    errors = [error for future in futures if future.done() and (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, Interrupted):
            raise error
    if errors:
        raise errors[0]
