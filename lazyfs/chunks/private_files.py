"""Files that only we may own: opened relative to directory descriptors, never through a symbolic link.

The store lies in a directory of mode 0700, yet a link or foreign file planted there (a restored backup, a container
that got the directory as a volume) must not make root write elsewhere.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat

from lazyfs.errors import StoreBroken, StoreError, StoreFull

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_COUNTER = itertools.count()


class OwnedFd:
    """A descriptor that is closed when the last one who uses it lets go.

    A thread that is inside pread or pwrite holds a reference, so another thread's close can never hand the number to a
    new file under it.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def translate(error: OSError, what: str) -> StoreError:
    """Return the StoreFull or StoreBroken for `error`; `what` is the subject of the sentence."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFull(f"{what} can't be written: {reason}", hint="free some space, or lower store_size")
    return StoreBroken(f"{what} can't be used: {reason}")


def open_root(path: str) -> OwnedFd:
    """Open the store's own directory, made with mode 0700 where missing. A link TO it is the owner's choice.

    Blocking. Raise StoreFull or StoreBroken, also for a directory that others may write to.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        found = os.fstat(fd.number)
    except OSError as error:
        raise translate(error, f"the store {path}") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise StoreBroken(
            f"the store {path} belongs to another user or can be written by others", hint=f"chmod 700 {path}"
        )
    return fd


def open_directory(parent: OwnedFd, name: str, *, create: bool) -> OwnedFd | None:
    """Open a directory below `parent`, None when it is missing and not to be made. Blocking.

    Raise StoreFull or StoreBroken: also for a symbolic link, a foreign owner, and a `parent` that was removed.
    """
    try:
        if create:
            try:
                os.mkdir(name, 0o700, dir_fd=parent.number)
            except FileExistsError:
                pass
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = OwnedFd(os.open(name, flags, dir_fd=parent.number))
    except FileNotFoundError:
        if create and os.fstat(parent.number).st_nlink == 0:
            raise StoreBroken(
                f"the store's directory {name} can't be made: somebody has removed the store",
                hint="unmount its images, and the next command makes it anew",
            ) from None
        return None
    except OSError as error:
        raise translate(error, f"the store's directory {name}") from None
    if os.fstat(fd.number).st_uid != os.geteuid():
        raise StoreBroken(f"the store's directory {name} belongs to another user")
    return fd


def open_file(parent: OwnedFd, name: str, *, create: bool) -> OwnedFd | None:
    """Open a regular file of ours for reading and writing; read-only where the disk is.

    Anything else under that name (a link, a foreign or doubly linked file, a FIFO) is removed: all our files can be
    rebuilt. None when the file is missing and not to be made. Blocking. Raise OSError.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for _ in range(3):  # more rounds than one mean that somebody plants files faster than we remove them
        try:
            fd = OwnedFd(os.open(name, os.O_RDWR | flags, dir_fd=parent.number))
        except OSError as error:
            if error.errno == errno.EROFS:
                fd = OwnedFd(os.open(name, os.O_RDONLY | flags, dir_fd=parent.number))
            elif error.errno == errno.ENOENT:
                if not create:
                    return None
                try:
                    made = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=parent.number)
                except FileExistsError:
                    continue
                return OwnedFd(made)
            elif error.errno in (errno.ELOOP, errno.ENXIO):
                os.unlink(name, dir_fd=parent.number)
                continue
            else:
                raise
        found = os.fstat(fd.number)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink <= 1:
            return fd
        del fd
        os.unlink(name, dir_fd=parent.number)
    raise OSError(errno.ELOOP, f"{name} is being replaced all the time")


def read_whole(parent: OwnedFd, name: str, bound: int) -> bytes | None:
    """Return a file's content; None when it is missing, larger than `bound` bytes, unreadable or no file of ours."""
    try:
        found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent.number)
    except OSError:
        return None
    fd = OwnedFd(found)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode) or os.fstat(found).st_size > bound:
            return None
        parts: list[bytes] = []
        size = 0
        while size <= bound and (part := os.read(fd.number, min(1 << 20, bound + 1 - size))):
            parts.append(part)
            size += len(part)
    except OSError:
        return None
    return b"".join(parts) if size <= bound else None


def replace_file(parent: OwnedFd, name: str, data: bytes) -> None:
    """Write a file so that readers see the old content or the new. Blocking. Raise StoreFull or StoreBroken.

    Not synced: after a power cut the file may be empty, and every reader takes that for absent.
    """
    temporary = f".{name}.{os.getpid()}.{next(_COUNTER)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = OwnedFd(os.open(temporary, flags, 0o600, dir_fd=parent.number))
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd.number, view) :]
            os.rename(temporary, name, src_dir_fd=parent.number, dst_dir_fd=parent.number)
        except OSError:
            os.unlink(temporary, dir_fd=parent.number)
            raise
    except OSError as error:
        raise translate(error, f"the store's file {name}") from None


def remove_tree(parent: OwnedFd, name: str) -> None:
    """Remove a directory of ours with the files in it (one level; links are removed, not followed). Raise OSError."""
    fd = OwnedFd(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.number))
    for inner in os.listdir(fd.number):
        os.unlink(inner, dir_fd=fd.number)
    os.rmdir(name, dir_fd=parent.number)
