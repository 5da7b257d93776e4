"""What the holder tells a crash from: somebody's hand, which no request is to blame for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs.mount import children


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_the_signal_is_known_before_the_process_is_taken_away(number: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pidfd = os.pidfd_open(child.pid)
    try:
        os.kill(child.pid, number)
        assert select.select([pidfd], [], [], 10)[0]
        assert children.died_of(child.pid) == number
    finally:
        os.close(pidfd)
        child.wait()
    assert children.died_of(child.pid) == 0  # nobody knows any more


def test_an_orderly_end_has_no_signal() -> None:
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(9)"])
    pidfd = os.pidfd_open(child.pid)
    try:
        assert select.select([pidfd], [], [], 10)[0]
        assert children.died_of(child.pid) == 0
    finally:
        os.close(pidfd)
        child.wait()


def test_the_end_of_a_canary_is_told_while_its_process_lives_on() -> None:
    canary = "import threading, time; t = threading.Thread(target=time.sleep, args=(0.2,)); t.start()"
    words = f"{canary}; print(t.native_id, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        one = children.Child(leash=None)  # type: ignore[arg-type]
        one.name(child.pid, int(child.stdout.readline()))
        assert one.canary >= 0 and not select.select([one.pidfd], [], [], 0)[0]
        assert select.select([one.canary], [], [], 10)[0]
        assert not select.select([one.pidfd], [], [], 0)[0] and not children.is_over(child.pid)
        child.kill()
        assert select.select([one.pidfd], [], [], 10)[0] and children.is_over(child.pid)
        one.forget()
        assert one.pidfd == one.canary == -1


def test_processes_killed_for_want_of_memory_are_counted() -> None:
    lines = Path("/proc/vmstat").read_text().splitlines()
    assert children.oom_kills() == int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
