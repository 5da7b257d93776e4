"""The holder's own bad days: daemons that hang or break, and systemd when the holder itself is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.container import mounts
from tests.faults.cases import Area, Case, shows
from tests.helpers.daemon import Node, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.takeover import IMPATIENT, Held, contents, held, image_of, readers, sabotaged

pytestmark = [pytest.mark.fuse, pytest.mark.faults]


@shows(
    Case(
        "processes-held-hangs",
        Area.PROCESSES,
        "lazyfsd hangs (SIGSTOP) for longer than a minute, with a holder",
        "wait as long, then right bytes",
        "another one takes over; its log says that the one before hung",
    ),
)
def test_a_daemon_that_hangs_is_replaced(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    with sabotaged(node, tmp_path, IMPATIENT) as daemon:
        tree = node.mount(image_of(registry))
        daemon.standby()
        hanging = daemon.pid()
        os.kill(hanging, signal.SIGSTOP)
        assert node.read(tree / "f1", timeout=60) == contents()["f1"]
        assert daemon.pid() != hanging and "hangs, and is ended" in node.log()
        node.umount(tree)


_BREAKS = """
import os, sys
if "lazyfs.mount.daemon" in sys.orig_argv:
    import trio
    from lazyfs.mount import pressure  # which whoever serves watches, and no standby
    flag = os.path.join(os.path.dirname(__file__), "break")
    async def watch(memory):
        while not os.path.exists(flag):
            await trio.sleep(0.05)
        os.unlink(flag)
        raise RuntimeError("can't start new thread")
    pressure.watch = watch
"""


@shows(
    Case(
        "processes-held-broken",
        Area.PROCESSES,
        "a fault of lazyfsd's own ends it, with a holder",
        "right bytes, after some milliseconds",
        "nothing: another one takes over; its log has the fault",
    ),
)
def test_a_fault_of_the_daemon_ends_in_a_hand_over(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    with sabotaged(node, tmp_path, _BREAKS) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree, ("held", "names")) as results:
            before = daemon.pid()
            (tmp_path / "break").touch()
            until(lambda: daemon.pid() != before, "another daemon serves")
        assert not [reading.wrong for reading in results if reading.wrong]
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        assert "another one takes over" in node.log()
        node.umount(tree)
    log = node.run_dir / "lazyfsd.log"  # what is in it was meant
    log.write_text(log.read_text(errors="replace").replace("Traceback", "traceback"))


# Gives fds of whatever number as 3, 4 …, and becomes a program.
_AS_SYSTEMD = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",") if fd]
for place, fd in enumerate(fds, 3):
    os.dup2(fd, place)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class _Supervisor:
    """What systemd does for a holder: it keeps the fds that it is told, and gives them to the next one."""

    def __init__(self, node: Node) -> None:
        self.kept: dict[str, int] = {}
        self._node = node
        self._path = node.place / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            state, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            if state == b"over":
                return
            words = dict(line.split("=", 1) for line in state.decode().splitlines())
            name = words.get("FDNAME", "")
            if "FDSTORE" in words:
                (self.kept[name],) = fds
            elif "FDSTOREREMOVE" in words and name in self.kept:
                os.close(self.kept.pop(name))

    def start(self) -> subprocess.Popen[bytes]:
        """Start a holder, with what the one before left."""
        node, names = self._node, list(self.kept)
        told = {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names), "NOTIFY_SOCKET": str(self._path)}
        words = ["-m", "lazyfs.mount.daemon", "--hold", "--root", str(node.root), "--run", str(node.run_dir)]
        fds = [self.kept[name] for name in names]
        node.run_dir.mkdir(exist_ok=True, mode=0o700)
        with open(node.run_dir / "lazyfsd.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", _AS_SYSTEMD, ",".join(map(str, fds)), sys.executable, *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                env=node.environment | {"LAZYFS_READ_TIMEOUT": "60"} | told, pass_fds=fds,
            )  # fmt: skip

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
            ours.sendto(b"over", str(self._path))
        self._thread.join(10)
        self._socket.close()
        for fd in self.kept.values():
            os.close(fd)


@contextlib.contextmanager
def _supervised(node: Node) -> Iterator[_Supervisor]:
    one = _Supervisor(node)
    try:
        yield one
    finally:
        one.close()
        (node.place / "notify").unlink()


def _end_all(node: Node) -> None:
    for pid in node.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not node.processes(), "all of the unit is gone")


@shows(
    Case(
        "processes-unit-killed",
        Area.PROCESSES,
        "under systemd: the holder is killed (-9), and systemd kills lazyfsd and all that is left of the unit",
        "wait until the unit is started again, then right bytes",
        "nothing: the next holder goes on with the mounts",
    ),
)
def test_a_unit_that_is_killed_goes_on_with_its_mounts(node: Node, registry: FakeRegistry) -> None:
    with _supervised(node) as systemd:
        first = systemd.start()
        daemon = Held(node, first)
        daemon.pid()
        tree = node.mount(image_of(registry), "--driver", "fuse")
        on_erofs = node.mount(image_of(registry), "--driver", "erofs")
        until(lambda: set(systemd.kept) == {"lazyfs-fuse", "lazyfs-estate"}, "it is kept")
        with readers(node, tree) as results, readers(node, on_erofs, ("held", "opened")) as more:
            first.kill()
            first.wait(10)
            _end_all(node)
            second = systemd.start()
            again = Held(node, second)
            again.pid()
            assert node.read(tree / "f5") == contents()["f5"]
        assert not [reading.wrong for reading in [*results, *more] if reading.wrong]
        assert {mount["dir"] for mount in node.status()["mounts"]} == {str(tree), str(on_erofs)}
        assert node.status()["daemon"]["holder"] == second.pid
        again.kill()
        assert node.read(tree / "f2") == contents()["f2"]
        node.umount(tree)
        node.umount(on_erofs)
        second.terminate()
        assert second.wait(30) == 0
        until(lambda: not systemd.kept, "nothing is kept after an orderly end")
    assert not mounts.below(os.fsencode(node.run_dir))


def test_what_is_left_of_a_mount_that_is_gone_is_not_taken(node: Node, registry: FakeRegistry) -> None:
    with _supervised(node) as systemd:
        first = systemd.start()
        Held(node, first).pid()
        until(lambda: len(systemd.kept) == 2, "it is kept")
        first.kill()
        first.wait(10)
        _end_all(node)
        mounts.umount(os.fsencode(node.run_dir / "mnt"), lazy=True)
        second = systemd.start()
        Held(node, second).pid()
        tree = node.mount(image_of(registry))
        assert node.read(tree / "f1") == contents()["f1"]
        node.umount(tree)
        second.terminate()
        second.wait(30)


def test_the_holder_of_an_ordinary_start_is_asked_for_nothing(node: Node, registry: FakeRegistry) -> None:
    with held(node, LISTEN_FDS="1", LISTEN_FDNAMES="other", LISTEN_PID="1") as daemon:
        tree = node.mount(image_of(registry))
        assert node.read(tree / "f1") == contents()["f1"]
        daemon.kill()
        node.umount(tree)
