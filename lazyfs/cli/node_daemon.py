"""The daemon for what shows nothing: the node's own where there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from lazyfs import control_client
from lazyfs.config import Settings
from lazyfs.control_client import Daemon
from lazyfs.errors import FuseUnavailable


@contextlib.contextmanager
def open_node_daemon(settings: Settings) -> Iterator[Daemon]:
    """Yield a connection to the store's daemon, started where none runs. Blocking, 30 s at most.

    An ordinary user's daemons serve one mount each, and a machine may lack FUSE: then it is one that shows nothing.
    Raise as `control_client.open_daemon`.
    """
    with contextlib.ExitStack() as stack:
        daemon = None
        if os.geteuid() == 0:
            with contextlib.suppress(FuseUnavailable):
                daemon = stack.enter_context(control_client.open_daemon(settings))
        yield daemon or stack.enter_context(control_client.open_daemon(settings, store_only=True))
