"""Mounting EROFS: metadata and devices as plain files where the kernel can, else behind read-only loop devices.

The mount API (fsopen(2) and its kin), because the names of 128 devices are longer than mount(2)'s page of options.
Everything here blocks, and the kernel opens the devices, which are files of our own FUSE session: never in the loop's
thread.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path

from lazyfs.container import mounts
from lazyfs.errors import MountFailed
from lazyfs.units import KiB, MiB

log = logging.getLogger(__name__)

# Bytes: what one FUSE request can have. Each is waited for by the reader, and more of them at once are slower
# (measured: 0.4 to 1.2 GB/s at 4 MiB, 1.5 to 2.5 at 1 MiB).
READ_AHEAD = 1 * MiB

_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 429, 430, 431, 432  # on every architecture
_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6  # commands of fsconfig(2)
_ATTR_RDONLY = 1
_EMPTY_PATH = 4  # MOVE_MOUNT_F_EMPTY_PATH
_MAX_STRING = 255  # bytes of a value of fsconfig(2)
_MAX_MESSAGE = 8192  # bytes of one line of the context's log

_LOOP_CONFIGURE, _LOOP_GET_FREE = 0x4C0A, 0x4C82
_LO_READ_ONLY, _LO_AUTOCLEAR = 1, 4
_LOOP_CONFIG = struct.Struct("<II232x64x")  # fd, block size, loop_info64, reserved
_LO_FLAGS_AT = 8 + 52  # bytes in front of lo_flags
_LOOP_TRIES = 20  # somebody else may take the free device first

_BDI = Path("/sys/class/bdi")
_bdi_lock = threading.Lock()  # a mount's read-ahead is known by its being new


class Method(StrEnum):
    """How the kernel gets at the files of a mount."""

    FILES = "files"
    LOOPS = "loops"


def mount(image: Path, devices: Sequence[Path], target: Path, method: Method) -> None:
    """Mount an image with its devices, in slot order, read-only on the directory `target`. Blocking.

    Setuid bits and devices count. Raise MountFailed with what the kernel says.
    """
    with ExitStack() as stack:
        if method is Method.LOOPS:
            loops = [_loop(path, stack) for path in (image, *devices)]
            _mount(loops[0], loops[1:], target)
            _tune_loops(loops)
        else:
            with _bdi_lock:
                before = _bdis()
                _mount(_name(image, stack), [_name(path, stack) for path in devices], target)
                for name in _bdis() - before:
                    _set_read_ahead(name)


def unmount(target: Path) -> None:
    """Take every EROFS mount at `target` away, also while it is in use, and the directory. Blocking; logs failures."""
    path = os.fsencode(target)
    try:
        while (found := mounts.top_at(path)) is not None and found.kind == "erofs":
            mounts.umount(path, lazy=True)
        with suppress(FileNotFoundError):
            target.rmdir()
    except (MountFailed, OSError) as error:
        log.warning("%s stays mounted: %s", target, error)


def _mount(source: bytes, devices: Sequence[bytes], target: Path) -> None:
    context = _call(_SYS_FSOPEN, b"erofs", ctypes.c_uint(_CLOEXEC), what="this kernel has no erofs")
    try:
        _configure(context, _SET_STRING, b"source", source)
        for device in devices:
            _configure(context, _SET_STRING, b"device", device)
        _configure(context, _SET_FLAG, b"ro", None)
        _configure(context, _CREATE, None, None)
        made = _call(
            _SYS_FSMOUNT, ctypes.c_int(context), ctypes.c_uint(_CLOEXEC), ctypes.c_uint(_ATTR_RDONLY),
            what="erofs can't be mounted",
        )  # fmt: skip
    finally:
        os.close(context)
    try:
        _call(
            _SYS_MOVE_MOUNT, ctypes.c_int(made), b"", ctypes.c_int(-100), os.fsencode(target),
            ctypes.c_uint(_EMPTY_PATH), what=f"erofs can't be shown at {target}",
        )  # fmt: skip
    finally:
        os.close(made)


def _call(number: int, *args: object, what: str) -> int:
    found = mounts.syscall(number, *args)
    if found < 0:
        error = ctypes.get_errno()
        raise MountFailed(f"{what}: {os.strerror(error)}", errno=error)
    return found


def _configure(context: int, command: int, key: bytes | None, value: bytes | None) -> None:
    done = mounts.syscall(
        _SYS_FSCONFIG, ctypes.c_int(context), ctypes.c_uint(command), ctypes.c_char_p(key), ctypes.c_char_p(value),
        ctypes.c_int(0),
    )  # fmt: skip
    if done < 0:
        error = ctypes.get_errno()
        said = _messages(context) or os.strerror(error)
        raise MountFailed(f"erofs refuses {(key or b'the mount').decode()}: {said}", errno=error)


def _messages(context: int) -> str:
    """Return what the kernel wrote to the context's log."""
    lines: list[str] = []
    with suppress(OSError):  # ENODATA: that was all
        while len(lines) < 10:
            lines.append(os.read(context, _MAX_MESSAGE).decode("utf-8", "replace").strip())
    return "; ".join(lines)


def _name(path: Path, stack: ExitStack) -> bytes:
    """Return a name for a file that fsconfig(2) takes."""
    name = os.fsencode(path)
    if len(name) <= _MAX_STRING:
        return name
    try:
        fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountFailed(f"{path.parent} can't be opened: {error.strerror}", errno=error.errno or 0) from None
    stack.callback(os.close, fd)
    return b"/proc/self/fd/%d/%s" % (fd, os.fsencode(path.name))


def _bdis() -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir(_BDI) if name.startswith("erofs-"))
    except OSError:
        return frozenset()


def _set_read_ahead(name: str) -> None:
    try:
        (_BDI / name / "read_ahead_kb").write_text(str(READ_AHEAD // KiB))
    except OSError as error:
        log.info("the read-ahead of %s stays as it is: %s", name, error.strerror)


# -- loop devices: they go with the last user, which is the mount


def _loop(path: Path, stack: ExitStack) -> bytes:
    """Return the name of a new loop device with `path` behind it; it stays while `stack` is open, or is mounted."""
    try:
        backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _attach(backing, stack)
        finally:
            os.close(backing)
    except OSError as error:
        raise MountFailed(f"no loop device for {path}: {error.strerror}", errno=error.errno or 0) from None


def _attach(backing: int, stack: ExitStack) -> bytes:
    config = bytearray(_LOOP_CONFIG.pack(backing, 4096))
    struct.pack_into("<I", config, _LO_FLAGS_AT, _LO_READ_ONLY | _LO_AUTOCLEAR)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_TRIES):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
            device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, bytes(config))
            except OSError as error:
                os.close(device)
                if error.errno != errnos.EBUSY:
                    raise
            else:
                stack.callback(os.close, device)
                return os.fsencode(name)
    finally:
        os.close(control)
    raise OSError(errnos.EBUSY, "others take the free ones")


def _tune_loops(loops: Sequence[bytes]) -> None:
    for name in loops:
        with suppress(OSError):
            number = os.stat(name).st_rdev
            _set_read_ahead(f"{os.major(number)}:{os.minor(number)}")
