"""What the daemon, the snapshotter and the commands do to their own process before they do anything else."""

from __future__ import annotations

import os
import resource

_FILES = 65536  # open files wanted: about four a layer, one a connection
LOGIN_VARIABLES = frozenset({"LAZYFS_CREDS", "LAZYFS_SRC_CREDS", "LAZYFS_DEST_CREDS"})  # USER:PASSWORD, of a command
_began_with: tuple[int, int] | None = None  # the limits of a core dump, before they were changed


def harden() -> None:
    """Allow many open files and no core dump, and make files for nobody else. Doesn't block; logs what it can't."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        import logging  # only now: a command starts in milliseconds, and comes here too

        logging.getLogger(__name__).info("the limit of open files stays: %s", error)
    keep_no_core()
    os.umask(0o077)


def keep_no_core() -> None:
    """Have no core of this process kept, nor of what it starts. Doesn't block."""
    global _began_with
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    if _began_with is None:
        _began_with = limits
    # Logins are in memory, and go to no disk. 1 byte holds no core either, and unlike 0 it also keeps the kernel from
    # sending one to a program of core_pattern's.
    resource.setrlimit(resource.RLIMIT_CORE, (1 if limits[1] else 0, limits[1]))


def environment() -> dict[str, str]:
    """Return the environment for a process that outlives a command: without the logins that this one was given."""
    return {name: value for name, value in os.environ.items() if name not in LOGIN_VARIABLES}


def core_limits() -> tuple[int, int]:
    """Return the limits (soft, hard; bytes, -1 for none) that this process was started with: a container gets them."""
    return _began_with if _began_with is not None else resource.getrlimit(resource.RLIMIT_CORE)
