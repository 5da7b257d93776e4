"""Whether what the daemon shows can be idmapped: a mount as its driver makes them is tried."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from lazyfs import control_client
from lazyfs.config import Settings
from lazyfs.container import idmap, mounts
from lazyfs.errors import LazyfsError
from lazyfs.limits import DRIVER_PATIENCE

_LOOK = 0.1


def problem(settings: Settings) -> str | None:
    """Return "" when the mounts of the node's daemon can be idmapped, else why not; None while no daemon runs.

    Needs root, or the answer is that. Blocking.
    """
    if mounts.top_at(os.fsencode(settings.session)) is None:
        return None
    if _driver(settings) != "erofs":
        return idmap.problem(os.fsencode(settings.session))
    from lazyfs.mount import erofs_probe

    with tempfile.TemporaryDirectory(prefix="lazyfs-") as scratch:
        return erofs_probe.try_with(Path(scratch), lambda place: idmap.problem(os.fsencode(place)))


def _driver(settings: Settings) -> str:
    """Return the driver that the daemon has chosen; "" when it doesn't tell."""
    deadline = time.monotonic() + DRIVER_PATIENCE
    try:
        with control_client.connect(settings.socket) as daemon:
            while (found := str(daemon.call("status")["daemon"]["driver"])) == "auto":
                if time.monotonic() > deadline:
                    return ""
                time.sleep(_LOOK)
    except (LazyfsError, KeyError, TypeError):
        return ""
    return found
