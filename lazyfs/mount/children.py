"""The processes of the holder: what tells that they end, how they ended, and how they are begun and taken away.

The standard library alone: the holder imports this, and must outlive everything else.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass

_OWN_CGROUP, _CGROUPS = "/proc/self/cgroup", "/sys/fs/cgroup"
_PIDFD_THREAD = os.O_EXCL  # to pidfd_open(2), Linux 6.9
_PF_EXITING = 0x4  # in the flags of proc(5)'s stat
_EXIT_CODE = 49  # its place there, behind the name


@dataclass(eq=False)
class Child:
    """A daemon, or the template. A daemon that is being forked has no number yet."""

    leash: socket.socket
    pid: int = 0
    pidfd: int = -1
    canary: int = -1  # a pidfd of one of its threads
    falling: float = 0.0  # when that thread was seen to have ended, monotonic seconds; 0: it has not
    warm: bool = False
    serving: bool = False
    ending: bool = False  # in order
    hung_up: bool = False
    silent: float = -1.0  # seconds in which we looked and it said nothing; below 0: it never says that it is alive
    signal: int = 0  # that it died of; 0: of none, or we may not know yet

    def name(self, pid: int, canary: int = 0) -> None:
        """Note its number, once it is known, and that of the thread whose end tells of its own.

        Of one that has ended already nothing is noted: it hangs up.
        """
        if self.pid:
            return
        try:
            self.pidfd = os.pidfd_open(pid)
            self.pid = pid
            self.canary = os.pidfd_open(canary, _PIDFD_THREAD) if canary else -1
        except OSError:
            pass

    def forget(self) -> None:
        """Close what tells of its end."""
        for fd in (self.pidfd, self.canary):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.canary = -1


def new_leash() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a leash: ours, which doesn't block, and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def say(leash: socket.socket, word: bytes, *fds: int) -> None:
    """Send a word with fds down a leash. Who has ended already misses it, which is seen next."""
    try:
        socket.send_fds(leash, [word], fds)
    except OSError:
        pass


def send(child: Child, number: int) -> None:
    """Send a signal; none where it has no number yet."""
    if not child.pid:
        return
    try:
        signal.pidfd_send_signal(child.pidfd, number)
    except ProcessLookupError:
        pass  # it has ended already


def is_readable(fd: int) -> bool:
    """Tell whether what a pidfd stands for has ended. Doesn't block."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def is_over(pid: int) -> bool:
    """Tell whether a process's main thread has ended, or is about to: it takes no request any more.

    In the midst of its end it may wait for an answer, too: for the last pages of a mount that goes with it.
    """
    fields = _stat(pid)
    if fields is None:
        return False  # out of memory or files: look again
    return not fields or fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


def died_of(pid: int) -> int:
    """Return the signal that ended a process which nobody has taken away yet; 0: none, or we may not know yet."""
    fields = _stat(pid) or []
    return int(fields[_EXIT_CODE]) & 0x7F if len(fields) > _EXIT_CODE else 0


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of proc(5)'s stat behind the name, state first; none where the process is gone.

    None: it can't be read just now.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            return handle.read().rpartition(b") ")[2].split()
    except OSError as error:
        return [] if error.errno in (errno.ENOENT, errno.ESRCH) else None


def oom_kills() -> int:
    """Return how many processes this machine has killed for want of memory, that of cgroups included."""
    try:
        with open("/proc/vmstat", "rb") as handle:
            return next((int(line[9:]) for line in handle if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0


def reap(pid: int) -> int | None:
    """Take a dead process away, once all of its threads have gone. Return the signal that ended it, 0 for none.

    None: it is not gone yet.
    """
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0  # it has been taken away already
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0) if found else None


def reap_strangers(known: set[int]) -> None:
    """Take away those who came to us because their parents died: children of dead daemons. Doesn't block."""
    try:
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid not in known:
            os.waitpid(found.si_pid, os.WNOHANG)
    except ChildProcessError:
        pass


def tell(text: str) -> None:
    """Say something on the standard error, which may be a full disk, or nobody."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def set_priority(nice: int, pid: int = 0) -> bool:
    """Set the nice value of a process (0: this one). False: we may not, or it has ended."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, nice)
        return True
    except OSError:
        return False


def own_cgroup() -> None:
    """Leave the holder's cgroup, where systemd has given us ours: what the kernel kills there is the daemon alone."""
    try:
        with open(_OWN_CGROUP) as handle:
            path = next(line[3:].strip() for line in handle if line.startswith("0::"))
        if "INVOCATION_ID" not in os.environ or not path.endswith(".service"):
            return
        group = f"{_CGROUPS}{path}/daemon"
        os.makedirs(group, exist_ok=True)
        with open(f"{group}/cgroup.procs", "w") as handle:
            handle.write("0")
    except (OSError, StopIteration):
        pass  # no delegation: one cgroup for both, as for any service
