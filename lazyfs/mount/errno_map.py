"""What a reader's system call returns for each error. A blob that is missing is EIO, never ENOENT: the name exists."""

from __future__ import annotations

import errno

from lazyfs import errors

# The most specific class wins; every leaf of LazyfsError is covered (a test asserts it).
TABLE: dict[type[errors.LazyfsError], int] = {
    errors.LazyfsError: errno.EIO,
    errors.UsageError: errno.EINVAL,
    errors.ReferenceInvalid: errno.EINVAL,
    errors.PlatformMissing: errno.EIO,
    errors.RegistryError: errno.EIO,
    errors.TrustError: errno.EIO,
    errors.FormatError: errno.EIO,
    errors.StoreError: errno.EIO,
    errors.ReadDeadline: errno.EIO,
    errors.FuseUnavailable: errno.ENODEV,
    errors.MountPointInvalid: errno.EINVAL,
    errors.MountFailed: errno.EIO,
    errors.DaemonUnreachable: errno.EIO,
    errors.DaemonFault: errno.EIO,
    errors.ToolMissing: errno.ENOENT,
    errors.ContainerFailed: errno.EIO,
    errors.SnapshotError: errno.EIO,
    errors.Interrupted: errno.EINTR,
}


def errno_of(error: errors.LazyfsError) -> int:
    """Return the errno for an error, by its class or the nearest base in the table."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return errno.EIO
