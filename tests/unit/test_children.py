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


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the top of a tree of cgroups in which this process is that of a unit, as systemd starts one."""
    monkeypatch.setattr(children, "_OWN_CGROUP", str(tmp_path / "own"))
    monkeypatch.setattr(children, "_CGROUPS", str(tmp_path / "top"))
    monkeypatch.setenv("INVOCATION_ID", "0123456789abcdef")
    (tmp_path / "own").write_text("1:name=systemd:/other.service\n0::/system.slice/lazyfsd.service\n")
    unit = tmp_path / "top/system.slice/lazyfsd.service"
    unit.mkdir(parents=True)
    return unit


def test_a_daemon_of_a_unit_leaves_the_holders_cgroup(cgroups: Path) -> None:
    children.own_cgroup()
    assert (cgroups / "daemon/cgroup.procs").read_text() == "0"  # for the kernel: the one that writes
    assert sorted(path.name for path in cgroups.iterdir()) == ["daemon"]
    children.own_cgroup()  # as the next daemon does
    assert (cgroups / "daemon/cgroup.procs").read_text() == "0"


@pytest.mark.parametrize(
    "own",
    [
        "0::/user.slice/user-0.slice/session-1.scope\n",  # a command has started it, in a unit's environment or not
        "0::/\n",
        "4:memory:/system.slice/lazyfsd.service\n",  # cgroups of version 1 alone
        "",
        None,
    ],
)
def test_a_daemon_that_is_no_unit_stays_where_it_is(cgroups: Path, tmp_path: Path, own: str | None) -> None:
    (tmp_path / "own").unlink() if own is None else (tmp_path / "own").write_text(own)
    children.own_cgroup()
    assert [path for path in (tmp_path / "top").rglob("*") if not path.is_dir() or path.name == "daemon"] == []


def test_a_unit_of_which_nothing_was_delegated_has_one_cgroup(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cgroups / "daemon").write_text("no directory")  # stands for a tree that is not ours to write to
    children.own_cgroup()
    assert (cgroups / "daemon").read_text() == "no directory"
    monkeypatch.delenv("INVOCATION_ID")
    (cgroups / "daemon").unlink()
    children.own_cgroup()  # in the cgroup of a unit that did not start it, such as a terminal's
    assert list(cgroups.iterdir()) == []
