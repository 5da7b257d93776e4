"""What the daemon and the snapshotter do to their own process before they do anything else."""

from __future__ import annotations

import logging
import os
import resource

log = logging.getLogger(__name__)

_FILES = 65536  # open files wanted: about four a layer, one a connection


def harden() -> None:
    """Allow many open files and no core dump, and make files for nobody else. Doesn't block; logs what it can't."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        log.info("the limit of open files stays: %s", error)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    # Logins are in memory, and go to no disk. 1 byte holds no core either, and unlike 0 it also keeps the kernel from
    # sending one to a program of core_pattern's.
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
    os.umask(0o077)
