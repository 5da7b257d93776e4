"""Files that a user names for traces and their pictures: read bounded and checked, written whole or not at all, never
over another file, and for its owner alone: the command line in them may hold a secret.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from lazyfs.errors import StoreBroken, TraceInvalid, UsageError
from lazyfs.format.trace import Trace, decode
from lazyfs.limits import MAX_TRACE


def read_trace(name: str) -> Trace:
    """Return the checked trace in a file. Blocking. Raise UsageError when it can't be read, TraceInvalid naming it."""
    try:
        # O_NONBLOCK: a FIFO would block for ever.
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"the trace {name} is no regular file")
            raw = file.read(MAX_TRACE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name holds a NUL byte"
        raise UsageError(f"the trace {name} can't be read: {reason}") from None
    try:
        return decode(raw)
    except TraceInvalid as error:
        raise TraceInvalid(f"{name}: {error.message}") from None


def check_place(name: str, *, force: bool) -> Path:
    """Return where a file can be written: in a directory that is there, and over another file only with `force`.

    Raise UsageError.
    """
    path = Path(name).absolute()
    parent = path.parent
    in_the_way = path.exists() and not path.is_file()  # a rename would put even a device away
    if not name or in_the_way or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{name or repr(name)} is no place for a file",
            hint="its directory must exist and be writable, and nothing but a file be there",
        )
    if not force and os.path.lexists(path):
        raise UsageError(f"{name} is there already", hint="name another file, or overwrite this one with --force")
    return path


def write_trace(path: Path, raw: bytes, *, force: bool) -> None:
    """Write a file, mode 0600, there whole or not at all. Blocking. Raise StoreBroken, UsageError as `check_place`."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        _put(temporary, path, force=force)
    except FileExistsError:
        raise UsageError(f"{path} is there already", hint="name another file, or overwrite it with --force") from None
    except OSError as error:
        raise StoreBroken(f"{path} can't be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _put(temporary: Path, path: Path, *, force: bool) -> None:
    """Give a file its name. Raise OSError, FileExistsError for a name that is taken unless `force`."""
    if not force:
        try:
            os.link(temporary, path)  # unlike a rename it replaces nothing
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
        if os.path.lexists(path):  # a file system without hard links
            raise FileExistsError
    temporary.rename(path)
