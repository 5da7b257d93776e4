"""Whether a mount can be shown with other user ids (an idmapped mount, mount_setattr(2)), found out by trying.

It decides what a pod with a user namespace costs: without it the runtime chowns the whole root filesystem, which copies
every file of a lazy image.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import select
import subprocess
import sys

from lazyfs.container import mounts
from lazyfs.limits import IDMAP_TIMEOUT

_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 0x1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOUNT_ATTR_IDMAP = 0x100000
_MAP = "0 100000 65536"  # any but the identity
_CHILD = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).unshare(int(sys.argv[1])) == 0:
    os.write(1, b"x")
    signal.pause()
"""


def problem(directory: bytes) -> str:
    """Return "" when the mount at `directory` can be idmapped, else why not. Needs root; leaves nothing behind.

    Blocking: the kernel looks the directory up, so never call it from a thread that serves that mount.
    """
    try:
        namespace = _user_namespace()
    except OSError as error:
        return f"no user namespace to try it with: {error}"
    try:
        tree = _open_tree(directory)
        try:
            _idmap(tree, namespace)
        finally:
            os.close(tree)
    except OSError as error:
        if error.errno == errnos.ENOSYS:
            return "the kernel is older than 5.12"
        if error.errno == errnos.EINVAL:
            return "this file system can't be idmapped"
        return error.strerror or str(error)
    finally:
        os.close(namespace)
    return ""


def _open_tree(directory: bytes) -> int:
    found = mounts.syscall(
        _SYS_OPEN_TREE,
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(directory),
        ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
    )
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _idmap(tree: int, namespace: int) -> None:
    attr = mounts.MountAttr(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=namespace)
    done = mounts.syscall(
        _SYS_MOUNT_SETATTR,
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _user_namespace() -> int:
    """Return a descriptor of a new user namespace with a map. A child makes it and ends. Raise OSError.

    A new program, not a fork: gRPC, where it is loaded, starts threads in copies of this process, and a process with
    threads can't make a user namespace.
    """
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, str(mounts.CLONE_NEWUSER)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        end = child.stdout.fileno()
        try:
            if not select.select([end], [], [], IDMAP_TIMEOUT)[0] or os.read(end, 1) != b"x":
                raise OSError(errnos.EPERM, "a child could not make one")
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{child.pid}/{name}", "w", encoding="ascii") as handle:
                    handle.write(_MAP)
            return os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            child.kill()
