"""The one FUSE session of a process: mounted, tuned, run and taken down.

pyfuse3 mounts and unmounts (also for ordinary users, by fusermount3), the requests are served by `Connection`. pyfuse3
keeps its session in module globals: there is exactly one a process. INIT can make read-ahead smaller only, and it
decides cold throughput, so it is written through sysfs after the mount.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from lazyfs.container import mounts
from lazyfs.errors import FuseUnavailable, LazyfsError, MountFailed, MountPointInvalid
from lazyfs.mount.connection import Board, Connection, Handler
from lazyfs.mount.held import Order
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

READ_AHEAD = 4 * MiB  # bytes; at 50 ms a request 128 KiB gives 5 MB/s, this 121


def check_available() -> None:
    """Raise FuseUnavailable with how to mend it, unless a FUSE mount looks possible."""
    try:
        found = os.stat("/dev/fuse")
    except OSError:
        raise FuseUnavailable("there is no /dev/fuse", hint="load the kernel module: modprobe fuse") from None
    if not stat.S_ISCHR(found.st_mode):
        raise FuseUnavailable("/dev/fuse is not a device", hint="remove it and load the module again: modprobe fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise FuseUnavailable("/dev/fuse may not be opened", hint="chmod 0666 /dev/fuse, as udev's rules do")


class Session:
    """A session on the directory `mountpoint`, whose requests `operations` answer.

    `on_guilty` is told the node whose requests have killed several daemons, where that is known.
    """

    def __init__(
        self,
        operations: Handler,
        mountpoint: Path,
        *,
        allow_other: bool,
        board: Board | None = None,
        on_guilty: Callable[[int], None] = lambda node: None,
    ) -> None:
        self._operations = operations
        self._held: Order | None = None
        self.holder = 0  # the process that holds the connection beyond our end; 0: none does
        self._board = board
        self._on_guilty = on_guilty
        self._connection: Connection | None = None
        self._mountpoint = mountpoint
        self._allow_other = allow_other
        self.reason = ""  # why the session is slower than it could be; empty when it is tuned

    def open(self, held: Order | None = None) -> None:
        """Mount, or take what the holder has mounted. Blocking; nothing of the mount may be touched before `run`.

        Raise FuseUnavailable or MountPointInvalid.
        """
        if held is not None:
            self._held, self.holder = held, held.holder
            self._connection = Connection(held.fuse, self._operations, held.greeting)
            return
        check_available()
        self._clear_stale()
        options = set(pyfuse3.default_options)
        options |= {"fsname=lazyfs", "subtype=lazyfs", "ro"}
        if os.geteuid() == 0:
            options |= {"suid", "dev"}  # else `su` in a container loses its rights
        if self._allow_other:
            options.add("allow_other")
        else:
            options.discard("default_permissions")  # only the owner comes in, and the owners in images are not theirs
        try:
            pyfuse3.init(pyfuse3.Operations(), os.fspath(self._mountpoint), options)
        except RuntimeError as error:
            # libfuse writes the reason to stderr, which is the daemon's log
            raise FuseUnavailable(
                f"the FUSE file system can't be mounted on {self._mountpoint}: {error}",
                hint="lazyfsd.log in the run directory has the reason; lazyfs doctor checks what is needed",
            ) from None
        self._connection = Connection(_fuse_fd(), self._operations)

    def _clear_stale(self) -> None:
        """Take away what a crashed daemon left mounted there."""
        path = os.fsencode(self._mountpoint)
        while (found := mounts.top_at(path)) is not None and found.kind in ("fuse.lazyfs", "fuse"):
            try:
                if os.geteuid() == 0:
                    # By force: threads of that daemon may be in the kernel, waiting for answers that nobody gives.
                    mounts.umount(path, lazy=True, force=True)
                else:
                    mounts.umount_user(path, lazy=True)
            except LazyfsError as error:
                raise MountPointInvalid(os.fspath(self._mountpoint), f"is held by a dead mount: {error}") from None
        try:
            self._mountpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise MountPointInvalid(os.fspath(self._mountpoint), f"can't be made: {error.strerror}") from None
            raise MountPointInvalid(os.fspath(self._mountpoint), "is not a directory") from None

    def take_over(self) -> None:
        """Have what a daemon before us did not answer asked again. After `open`, before `run`. Doesn't block."""
        assert self._connection is not None and self._held is not None
        if self._board is not None:
            if self._held.careful:
                self._connection.go_carefully(self._board, self._on_guilty)
            else:
                self._board.set_trial(0)  # who was at one then is dead for another reason
        self._connection.take_over()

    async def run(self) -> None:
        """Serve until the mount goes away or `stop`. After `open`. A checkpoint."""
        assert self._connection is not None
        await self._connection.run()

    def stop(self) -> None:
        """End `run`."""
        if self._connection is not None:
            self._connection.stop()

    def close(self) -> None:
        """Unmount, also while something is open there. Blocking; never from the loop while it serves."""
        if self._held is None:
            pyfuse3.close(unmount=True)
            return
        try:
            mounts.umount(os.fsencode(self._mountpoint), lazy=True)
        except MountFailed as error:
            log.info("the session was unmounted already: %s", error)

    async def tune(self) -> None:
        """Set read-ahead, where we may. Works in a thread: sysfs can be slow."""
        await trio.to_thread.run_sync(self._tune, abandon_on_cancel=True)

    def _tune(self) -> None:
        # An answered request means that the kernel has our answer to INIT, which would undo the settings.
        os.statvfs(self._mountpoint)
        found = mounts.top_at(os.fsencode(self._mountpoint))
        if found is None:
            return
        problems = []
        read_ahead = Path(f"/sys/class/bdi/{found.device}/read_ahead_kb")
        problems += _write(read_ahead, READ_AHEAD // KiB)
        self.reason = "; ".join(problems)
        if problems:
            log.info("the mount is not tuned: %s", self.reason)


def _fuse_fd() -> int:
    """Return the fd of the connection that pyfuse3 has opened and keeps for itself."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            continue  # listdir's own
    raise FuseUnavailable("the FUSE file system was mounted, and its connection is not there")


def _write(path: Path, value: int) -> list[str]:
    try:
        path.write_text(str(value))
    except OSError as error:
        return [f"{path.name} stays as it is ({error.strerror})"]
    return []
