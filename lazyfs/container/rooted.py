"""Reading files of an image as the image's own processes would see them: no name leads out of its root.

`/etc/passwd` of an image may be a symlink to `/proc/1/root/etc/passwd` or `../../../etc/shadow`. The walk here resolves
every component by hand with O_NOFOLLOW, so links lead where they would lead inside a chroot.
"""

from __future__ import annotations

import os
import stat

from lazyfs.errors import ContainerFailed
from lazyfs.limits import MAX_SYMLINKS

_DIR = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


def read_in_root(root: str, path: bytes, limit: int) -> bytes | None:
    """Return the regular file `path` (absolute in the image) below the directory `root`, at most `limit` bytes of it.

    None when there is no such file, or it is none. Blocking: a lazy file is fetched. Raise ContainerFailed when it
    can't be read or is longer than `limit`.
    """
    try:
        handle = _open(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ContainerFailed(f"{os.fsdecode(path)} of the image can't be opened: {error.strerror}") from None
    if handle is None:
        return None
    try:
        with open(handle, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise ContainerFailed(f"{os.fsdecode(path)} of the image can't be read: {error.strerror}") from None
    if len(raw) > limit:
        raise ContainerFailed(f"{os.fsdecode(path)} of the image is longer than {limit} bytes")
    return raw


def _open(root: str, path: bytes) -> int | None:
    # A stack of descriptors instead of "..": the kernel's ".." at the image's root would lead out of it.
    stack = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        parts = [part for part in path.split(b"/") if part]
        links = 0
        while parts:
            part = parts.pop(0)
            if part == b".":
                continue
            if part == b"..":
                if len(stack) > 1:
                    os.close(stack.pop())
                continue
            mode = os.stat(part, dir_fd=stack[-1], follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                links += 1
                if links > MAX_SYMLINKS:
                    return None
                target = os.readlink(part, dir_fd=stack[-1])
                if target.startswith(b"/"):
                    while len(stack) > 1:
                        os.close(stack.pop())
                parts = [piece for piece in target.split(b"/") if piece] + parts
            elif stat.S_ISDIR(mode):
                stack.append(os.open(part, _DIR, dir_fd=stack[-1]))
            elif parts or not stat.S_ISREG(mode):
                return None
            else:
                # O_NONBLOCK: should the name have become a FIFO since the stat, the open must not hang.
                return os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=stack[-1])
        return None
    finally:
        for handle in stack:
            os.close(handle)
