"""mount(2), umount2(2), unshare(2) and the mount table, with failures as sentences.

No function here follows a path into a mount on its own, but the kernel does: call none of them from a thread that
serves a FUSE mount.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
from dataclasses import dataclass
from typing import Any

from lazyfs.errors import MountFailed, ToolMissing
from lazyfs.limits import FUSERMOUNT_TIMEOUT

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_FORCE = 0x1
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 0x1
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture that Linux runs Python on, but alpha
_BUSY_HINT = "close the files and leave the directories in it, or use --lazy"
_MAX_DATA = 4095  # bytes; mount(2) copies one page of options and cuts the rest off silently


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of /proc/self/mountinfo (proc(5)). `dir` is the mount point, `root` what shows there."""

    mount_id: int
    device: str  # "major:minor"
    root: bytes
    dir: bytes
    kind: str  # file system type, such as "overlay" or "fuse.lazyfs"
    source: bytes
    options: str  # of the file system, such as "rw,lowerdir=…"


class MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *args: Any) -> int:
    """Make a system call that the C library may have no function for; -1 leaves its error in ctypes.get_errno()."""
    call = _libc().syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), *args))


def _check(result: int, what: str, hint: str = "") -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise MountFailed(f"{what}: {os.strerror(number)}", errno=number, hint=hint)


def mount(source: bytes, target: bytes, kind: str = "", flags: int = 0, options: bytes = b"") -> None:
    """Call mount(2). Blocking: the kernel may read `source`. Raise MountFailed with the kernel's errno."""
    shown = os.fsdecode(target)
    if len(options) > _MAX_DATA:
        raise MountFailed(f"can't mount on {shown}: the options are longer than a page", errno=errnos.EINVAL)
    result = _libc().mount(source, target, kind.encode() or None, ctypes.c_ulong(flags), options or None)
    _check(result, f"can't mount {kind or os.fsdecode(source)} on {shown}")


def bind(source: bytes, target: bytes, *, recursive: bool = False) -> None:
    """Show the directory or file `source` at `target` too. Raise MountFailed."""
    mount(source, target, flags=MS_BIND | (MS_REC if recursive else 0))


def bind_read_only(source: bytes, target: bytes) -> None:
    """Bind `source` on `target` without the right to write; setuid bits and devices keep working. Raise MountFailed."""
    bind(source, target)
    try:
        mount(b"none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    except MountFailed:
        umount(target, lazy=True)
        raise


def make_read_only(target: bytes) -> None:
    """Make the mount at `target` and every mount below it read-only. Raise MountFailed.

    Kernels before 5.12 can't do the ones below; there only `target` itself changes, as with `mount -o ro,rbind`.
    """
    attr = MountAttr(attr_set=_MOUNT_ATTR_RDONLY)
    result = syscall(
        _SYS_MOUNT_SETATTR, ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(target),
        ctypes.c_uint(_AT_RECURSIVE), ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)),
    )  # fmt: skip
    if result != 0 and ctypes.get_errno() == errnos.ENOSYS:
        mount(b"none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    else:
        _check(result, f"can't make {os.fsdecode(target)} read-only")


def follow_host(target: bytes = b"/") -> None:
    """Take mounts over from the parent namespace and give none back, for `target` and all below. Raise MountFailed."""
    mount(b"none", target, flags=MS_REC | MS_SLAVE)


def umount(target: bytes, *, lazy: bool = False, force: bool = False) -> None:
    """Take the topmost mount at `target` away; with `lazy` also while it is in use. Raise MountFailed.

    `force`: whatever waits for an answer of a FUSE mount's server gets an error, from now on.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0) | (MNT_FORCE if force else 0)
    result = _libc().umount2(target, ctypes.c_int(flags))
    if result != 0 and ctypes.get_errno() == errnos.EBUSY:
        raise MountFailed(
            f"{os.fsdecode(target)} is in use",
            errno=errnos.EBUSY,
            hint=_BUSY_HINT,
        )
    _check(result, f"can't unmount {os.fsdecode(target)}")


def umount_user(target: bytes, *, lazy: bool = False) -> None:
    """Take a FUSE mount of our own away without being root, by the setuid fusermount3. Blocking.

    Raise MountFailed, or ToolMissing.
    """
    import subprocess

    argv = [b"fusermount3", b"-u", *([b"-z"] if lazy else []), b"--", target]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=FUSERMOUNT_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise ToolMissing("fusermount3", hint="apt install fuse3") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountFailed(f"can't unmount {os.fsdecode(target)}: {error}") from None
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip()[:300]
        busy = "busy" in reason
        raise MountFailed(
            f"{os.fsdecode(target)} is in use" if busy else f"can't unmount {os.fsdecode(target)}: {reason}",
            errno=errnos.EBUSY if busy else errnos.EIO,
            hint=_BUSY_HINT if busy else "",
        )


def overlay_options(lower: bytes, upper: bytes, work: bytes, *, extra: bytes = b"") -> bytes:
    """Return overlayfs's mount options for one lower directory, with the separators in paths escaped."""
    options = b"lowerdir=%s,upperdir=%s,workdir=%s" % (_escape(lower, b"\\:,"), _escape(upper), _escape(work))
    return options + (b"," + extra if extra else b"")


def _escape(path: bytes, special: bytes = b"\\,") -> bytes:
    return b"".join(b"\\" + bytes([c]) if c in special else bytes([c]) for c in path)


def unshare(flags: int) -> None:
    """Give this process new namespaces (CLONE_NEW…). Raise MountFailed."""
    hint = ""
    if flags & CLONE_NEWUSER:
        hint = "without root, containers need user namespaces: see sysctl user.max_user_namespaces"
    _check(_libc().unshare(ctypes.c_int(flags)), "can't create namespaces", hint)


def die_with_parent(signal: int) -> None:
    """Have the kernel send us `signal` when our parent ends. The caller checks that it hadn't ended before."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal), 0, 0, 0), "prctl PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends (PR_SET_CHILD_SUBREAPER)."""
    _check(_libc().prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0), "prctl PR_SET_CHILD_SUBREAPER")


def parse_mountinfo(raw: bytes) -> list[MountPoint]:
    """Parse mountinfo's lines, oldest mount first; lines that are none are left out."""
    found = []
    for line in raw.splitlines():
        left, separator, right = line.partition(b" - ")
        fields, rest = left.split(b" "), right.split(b" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            continue
        found.append(
            MountPoint(
                int(fields[0]),
                fields[2].decode("ascii", "replace"),
                _unescape(fields[3]),
                _unescape(fields[4]),
                rest[0].decode("ascii", "replace"),
                _unescape(rest[1]),
                os.fsdecode(rest[2]),
            )
        )
    return found


def _unescape(text: bytes) -> bytes:
    # mountinfo writes blank, tab, newline and backslash as \040 and so on
    if b"\\" not in text:
        return text
    parts = text.split(b"\\")
    out = [parts[0]]
    for part in parts[1:]:
        out.append(bytes([int(part[:3], 8) & 0xFF]) + part[3:] if part[:3].isdigit() else b"\\" + part)
    return b"".join(out)


def mount_table() -> list[MountPoint]:
    """Return this process's mounts, oldest first. Touches none of them."""
    with open("/proc/self/mountinfo", "rb") as handle:
        return parse_mountinfo(handle.read())


def top_at(directory: bytes) -> MountPoint | None:
    """Return the mount that shows at `directory` itself (the newest when several are stacked), or None."""
    return next((entry for entry in reversed(mount_table()) if entry.dir == directory), None)


def below(directory: bytes) -> list[MountPoint]:
    """Return the mounts at and below `directory`, newest first: the order in which to take them away."""
    prefix = directory.rstrip(b"/") + b"/"
    return [entry for entry in reversed(mount_table()) if entry.dir == directory or entry.dir.startswith(prefix)]
