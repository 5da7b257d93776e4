"""Work side by side: results in order, the first error, and what hangs holds up no interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from indexer import threads
from indexer.threads import side_by_side
from lazyfs.errors import Interrupted, StoreFull


def test_results_are_in_order_and_so_many_at_once() -> None:
    both = threading.Barrier(2)

    def action(number: int) -> int:
        both.wait(10)
        return -number

    assert side_by_side(action, range(8), 2, "test") == [-number for number in range(8)]
    assert side_by_side(action, [], 2, "test") == []


def test_the_first_error_ends_it() -> None:
    begun: list[int] = []
    stopped = threading.Event()

    def action(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise StoreFull("no room")
        assert stopped.wait(10)
        raise Interrupted("follows from it")

    with pytest.raises(StoreFull):
        side_by_side(action, range(100), 2, "test", stopped.set)
    assert begun == [0, 1]


def test_what_hangs_holds_up_no_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "INTERRUPT_PATIENCE", 0.1)
    never, begun = threading.Event(), threading.Event()

    def action(number: int) -> None:
        begun.set()
        never.wait()

    def press() -> None:
        begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: to the process, not to this thread

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side(action, range(4), 2, "test")
    finally:
        signal.signal(signal.SIGINT, before)
        presser.join()
        never.set()


def test_nor_the_end_of_the_process() -> None:
    program = (
        "import threading\nfrom indexer import threads\nthreads.INTERRUPT_PATIENCE = 0.1\n"
        "def action(number):\n    if number == 0: threading.Event().wait()\n    raise KeyboardInterrupt\n"
        "threads.side_by_side(action, [0, 1], 2, 'test')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert "KeyboardInterrupt" in done.stderr and done.returncode
