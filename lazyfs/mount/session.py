"""The one FUSE session of a process: mounted, tuned, run and taken down. The fd may be one that a holder opened.

pyfuse3 keeps its session in module globals: there is exactly one a process. It can set neither read-ahead nor
max_background, and both decide cold throughput, so they are written through sysfs and fusectl after the mount.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

import pyfuse3
import trio

from lazyfs.container import mounts
from lazyfs.errors import FuseUnavailable, LazyfsError, MountFailed, MountPointInvalid
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

READ_AHEAD = 4 * MiB  # bytes; at 50 ms a request 128 KiB gives 5 MB/s, this 121
# Requests that the kernel sends ahead of answers; 12 by default. All reads of EROFS's data files count among them,
# whatever their image, so that one whose registry is silent must not fill this: 64 did with 400 readers.
MAX_BACKGROUND = 1024
MAX_TASKS = 1024  # requests that may wait at once, some kilobytes each; further ones queue in the kernel
_FUSECTL = Path("/sys/fs/fuse/connections")


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
    """A mounted session. `mountpoint` is a directory, or "/dev/fd/N" for a connection that was opened elsewhere."""

    def __init__(self, operations: pyfuse3.Operations, mountpoint: Path, *, allow_other: bool) -> None:
        self._operations = operations
        self._mountpoint = mountpoint
        self._allow_other = allow_other
        self.reason = ""  # why the session is slower than it could be; empty when it is tuned

    def open(self) -> None:
        """Mount. Blocking; nothing of the mount may be touched before `run`.

        Raise FuseUnavailable or MountPointInvalid.
        """
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
            pyfuse3.init(self._operations, os.fspath(self._mountpoint), options)
        except RuntimeError as error:
            # libfuse writes the reason to stderr, which is the daemon's log
            raise FuseUnavailable(
                f"the FUSE file system can't be mounted on {self._mountpoint}: {error}",
                hint="lazyfsd.log in the run directory has the reason; lazyfs doctor checks what is needed",
            ) from None

    def _clear_stale(self) -> None:
        """Take away what a crashed daemon left mounted there."""
        path = os.fsencode(self._mountpoint)
        while (found := mounts.top_at(path)) is not None and found.kind in ("fuse.lazyfs", "fuse"):
            try:
                if os.geteuid() == 0:
                    mounts.umount(path, lazy=True)
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

    async def run(self) -> None:
        """Serve until the mount goes away or `stop`. A checkpoint."""
        await pyfuse3.main(min_tasks=2, max_tasks=MAX_TASKS)

    def stop(self) -> None:
        """End `run`."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Unmount, also while something is open there. Blocking; never from the loop while it serves."""
        pyfuse3.close(unmount=True)

    async def tune(self) -> None:
        """Set read-ahead and the number of requests in flight, where we may. Works in a thread: sysfs can be slow."""
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
        connection = _FUSECTL / found.device.partition(":")[2]
        if os.geteuid() == 0 and not connection.exists():
            try:
                mounts.mount(b"fusectl", os.fsencode(_FUSECTL), "fusectl")
            except MountFailed as error:
                log.info("no control over FUSE connections: %s", error)
        problems += _write(connection / "max_background", MAX_BACKGROUND)
        problems += _write(connection / "congestion_threshold", MAX_BACKGROUND * 3 // 4)
        self.reason = "; ".join(problems)
        if problems:
            log.info("the mount is not tuned: %s", self.reason)


def _write(path: Path, value: int) -> list[str]:
    try:
        path.write_text(str(value))
    except OSError as error:
        return [f"{path.name} stays as it is ({error.strerror})"]
    return []
