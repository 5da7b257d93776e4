"""pid 1 of a run: mounts the container's root, starts the runtime, hands signals on, waits for the container's end."""

from __future__ import annotations

import os
import signal
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lazyfs.container import mounts, rootfs, runtime
from lazyfs.container.namespaces import Report
from lazyfs.container.options import Volume
from lazyfs.errors import ContainerFailed, MountFailed

PASSED_ON = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the supervisor needs; config.json lies in `directory` already.

    `stdio` are descriptors for the container; the supervisor closes them once the runtime has them.
    """

    identity: str
    directory: Path
    lower: str
    rootless: bool
    volumes: tuple[Volume, ...]
    command: str  # the container's argv[0], for messages
    runtime: runtime.Runtime
    terminal: bool
    stop_signal: int
    stdio: tuple[int, int, int]


def supervise(plan: Plan, report: Report) -> int:
    """Run the container to its end and return its exit status (128 + n when signal n ended it).

    Reports {"started": true} when the command runs and {"ended": status} before tidying up. Runs as pid 1 of its own
    namespaces. Raise ContainerFailed or MountFailed when it can't be started.
    """
    os.chdir(plan.directory)
    os.umask(0o022)
    mounts.follow_host()
    rootfs.stage_volumes(plan.volumes, plan.directory)
    rootfs.mount_overlay(plan.lower, plan.directory, rootless=plan.rootless)
    # The runtime finds itself and the container by pid, and ours are other numbers than the host's.
    mounts.mount(b"proc", b"/proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
    signals = _Signals(plan.stop_signal)
    reaper = _Reaper()
    try:
        init = _start(plan, reaper)
        signals.direct_to(init)
        report({"started": True})
        status = reaper.wait(init)
        report({"ended": status})
    finally:
        _forget(plan, reaper)
    return status


class _Signals:
    """Hands signals on to the container's init; keeps those that come before there is one."""

    def __init__(self, stop_signal: int) -> None:
        self._target = 0
        self._early: deque[int] = deque(maxlen=16)
        for number in {*map(int, PASSED_ON), stop_signal} - {int(signal.SIGKILL), int(signal.SIGSTOP)}:
            signal.signal(number, self._pass)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        if not self._target:
            self._early.append(number)
            return
        try:
            os.kill(self._target, number)
        except ProcessLookupError:
            return  # it ended a moment ago; the wait below reports that

    def direct_to(self, pid: int) -> None:
        self._target = pid
        while self._early:
            self._pass(self._early.popleft(), None)


def _start(plan: Plan, reaper: _Reaper) -> int:
    bundle = str(plan.directory)
    child = runtime.start(plan.runtime.run_argv(plan.identity, bundle, plan.terminal), *plan.stdio)
    for descriptor in set(plan.stdio):
        os.close(descriptor)
    if reaper.wait(child) != 0:
        raise runtime.failure(f"{bundle}/log.json", plan.command)
    try:
        return int((plan.directory / "pid").read_text())
    except (OSError, ValueError):
        raise ContainerFailed(f"the runtime {plan.runtime.path} did not tell the container's pid") from None


class _Reaper:
    """Waits for one child of several. A container may end before the runtime that started it has."""

    def __init__(self) -> None:
        self._ended: dict[int, int] = {}  # few: orphans of the container go to its own pid 1

    def wait(self, wanted: int) -> int:
        """Reap children, as pid 1 must, until `wanted` ends; return its exit status in the shell's form."""
        while wanted not in self._ended:
            pid, status = os.waitpid(-1, 0)
            code = os.waitstatus_to_exitcode(status)
            self._ended[pid] = code if code >= 0 else 128 - code
        return self._ended.pop(wanted)


def _forget(plan: Plan, reaper: _Reaper) -> None:
    """Have the runtime forget the container, its control groups too; then let go of the root file system."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        reaper.wait(runtime.start(plan.runtime.delete_argv(plan.identity), null, null, null))
    except (ContainerFailed, ChildProcessError):
        return  # the next sweep does it
    finally:
        os.close(null)
    try:
        mounts.umount(os.fsencode(plan.directory / "rootfs"), lazy=True)
    except MountFailed:
        return  # the namespace ends with us anyway
