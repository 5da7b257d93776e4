"""A child process that is pid 1 of its own pid namespace and lives in its own mount namespace.

Whatever the child mounts and starts ends with it, because the kernel kills a pid namespace with its pid 1 and drops a
mount namespace with its last process; and the child ends with us, even by SIGKILL (PR_SET_PDEATHSIG). Nothing has to be
remembered to clean up mounts and processes after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from lazyfs.container import mounts
from lazyfs.errors import ContainerFailed, LazyfsError
from lazyfs.limits import NAMESPACES_TIMEOUT, TOOL_TIMEOUT

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class IdMaps:
    """Which ids of the host a user namespace has, beyond ourselves as its root: (first, count); count 0 means none."""

    uids: tuple[int, int] = (0, 0)
    gids: tuple[int, int] = (0, 0)

    @property
    def ids(self) -> int:
        """How many user and group ids the namespace has, counted from 0."""
        return 1 + min(self.uids[1], self.gids[1])


@dataclass(frozen=True, slots=True)
class Child:
    """A running child: its pid for us, and where its reports come from (one JSON object a line)."""

    pid: int
    reports: int  # descriptor, for the caller to close
    alive: int  # descriptor that tells the child that we live, for the caller to close after the child's end


def find_id_maps() -> IdMaps:
    """Return the subordinate ids of our account (subuid(5)); none when there are none or newuidmap is missing."""
    if not (_tool("newuidmap") and _tool("newgidmap")):
        return IdMaps()
    uid = os.getuid()
    names = {str(uid)}
    with contextlib.suppress(KeyError):  # an account without a name: its number may still be listed
        names.add(pwd.getpwuid(uid).pw_name)
    maps = IdMaps(_subordinate("/etc/subuid", names), _subordinate("/etc/subgid", names))
    return maps if maps.ids > 1 else IdMaps()


def _tool(name: str) -> bool:
    return any(os.access(os.path.join(part, name), os.X_OK) for part in os.get_exec_path())


def _subordinate(path: str, names: set[str]) -> tuple[int, int]:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            for line in handle:
                fields = line.strip().split(":")
                if len(fields) == 3 and fields[0] in names and fields[1].isdigit() and fields[2].isdigit():
                    return int(fields[1]), int(fields[2])
    except OSError:
        return 0, 0
    return 0, 0


def spawn(body: Callable[[Report], int], maps: IdMaps | None, keep: Iterable[int] = ()) -> Child:
    """Fork a child that calls `body(report)` in new mount and pid namespaces and exits with what that returns.

    With `maps` also in a new user namespace, as its root. The child keeps descriptors 0–2 and `keep`, and starts a
    session of its own, so that a terminal's signals reach us alone. A LazyfsError in it becomes the report
    {"error": message, "hint": …, "status": …} and exit status 125. Blocks until the namespaces stand. Raise
    ContainerFailed. Of several threads only the calling one goes on in the child.
    """
    mounts.adopt_orphans()
    sys.stdout.flush()
    sys.stderr.flush()
    reports, report_end = os.pipe()
    go, alive = os.pipe()
    first = os.fork()
    if first == 0:
        with _no_return(report_end):
            os.close(reports)
            os.close(alive)
            _first(body, maps, report_end, go, (*keep, report_end, go))
    os.close(report_end)
    os.close(go)
    try:
        if maps is not None:
            _expect(reports, "unshared")
            _write_maps(first, maps)
            os.write(alive, b"m")
        pid = int(_expect(reports, "pid")["pid"])
        os.waitpid(first, 0)  # from here on we are the child's parent, and PR_SET_PDEATHSIG means us
        os.write(alive, b"g")
        return Child(pid, reports, alive)
    except BaseException:
        os.close(alive)  # the child reads the end of file and goes
        os.close(reports)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(first, 0)
        raise


def _first(body: Callable[[Report], int], maps: IdMaps | None, out: int, go: int, keep: tuple[int, ...]) -> None:
    """The intermediate process: only a child of a process that called unshare(CLONE_NEWPID) is in the new namespace."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    _close_others(keep)
    if maps is not None:
        mounts.unshare(mounts.CLONE_NEWUSER)
        _send(out, {"unshared": True})
        if os.read(go, 1) != b"m":
            os._exit(1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    mounts.unshare(mounts.CLONE_NEWNS | mounts.CLONE_NEWPID)
    second = os.fork()
    if second:
        _send(out, {"pid": second})
        os._exit(0)
    with _no_return(out):
        _second(body, out, go)


def _second(body: Callable[[Report], int], out: int, go: int) -> NoReturn:
    if os.read(go, 1) != b"g":
        os._exit(1)
    mounts.die_with_parent(signal.SIGKILL)
    poll = select.poll()
    poll.register(go, select.POLLIN)
    if poll.poll(0):  # the parent ended before the line above took effect
        os._exit(1)
    status = body(lambda value: _send(out, value))
    os._exit(status)


@contextlib.contextmanager
def _no_return(out: int) -> Iterator[None]:
    """Keep a forked child from ever running its parent's code: report what went wrong, then end."""
    try:
        yield
        os._exit(1)
    except LazyfsError as error:
        _send(out, {"error": error.message, "hint": error.hint, "status": getattr(error, "status", 125)})
        os._exit(125)
    except BaseException as error:
        import traceback

        _send(out, {"error": f"bug in the supervisor: {error!r}", "hint": "", "status": 125})
        traceback.print_exc()
        os._exit(125)


def _send(out: int, value: dict[str, Any]) -> None:
    os.write(out, json.dumps(value).encode() + b"\n")  # far below PIPE_BUF: atomic, never blocks on a fresh pipe


def _expect(reports: int, key: str) -> dict[str, Any]:
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    if not poll.poll(NAMESPACES_TIMEOUT * 1000):
        raise ContainerFailed(f"the namespaces were not there within {NAMESPACES_TIMEOUT:.0f} s")
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(reports, 1)  # no more than this line: the caller of spawn reads the next ones
        if not byte:
            raise ContainerFailed("the process for the container's namespaces ended early")
        line += byte
    value: dict[str, Any] = json.loads(line)
    if key not in value:
        raise ContainerFailed(str(value.get("error", value)), hint=str(value.get("hint", "")))
    return value


def _write_maps(pid: int, maps: IdMaps) -> None:
    import subprocess

    uid, gid = os.geteuid(), os.getegid()
    if maps.ids > 1:
        for tool, own, (first, count) in (("newuidmap", uid, maps.uids), ("newgidmap", gid, maps.gids)):
            argv = [tool, str(pid), "0", str(own), "1", "1", str(first), str(count)]
            try:
                subprocess.run(argv, check=True, capture_output=True, timeout=TOOL_TIMEOUT, stdin=subprocess.DEVNULL)
            except subprocess.CalledProcessError as error:
                reason = error.stderr.decode("utf-8", "replace").strip()[:300]
                raise ContainerFailed(f"{tool} refused to give the container its ids: {reason}") from None
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ContainerFailed(f"{tool} failed: {error}") from None
        return
    try:
        for name, text in (("setgroups", "deny"), ("gid_map", f"0 {gid} 1"), ("uid_map", f"0 {uid} 1")):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as handle:
                handle.write(text)
    except OSError as error:
        raise ContainerFailed(f"the user namespace can't be set up: {error.strerror}") from None


def _close_others(keep: tuple[int, ...]) -> None:
    wanted = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in wanted:
            with contextlib.suppress(OSError):  # the listing's own descriptor is among them
                os.close(int(name))
