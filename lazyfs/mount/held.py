"""A daemon's end of the leash: told by the holder when to serve, and with what.

Just before it serves, a daemon forks the next standby: that one has everything loaded, shares our memory, and is
ready in milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.errors import DaemonFault
from lazyfs.mount import greeting as greetings
from lazyfs.mount.greeting import Greeting
from lazyfs.mount.holder import ENDS, SERVES, WARM

_URGENT = -10  # nice value of who takes over: every reader of the node waits for it, and others may fill the processors
_REST = 3.0  # seconds before a standby loads what is missing: the first container's start is over by then
_MAX_ORDER = 64 * 1024  # bytes
# What a daemon imports when it is first wanted: a standby has the time, and whoever takes over has not.
_LATER = ("lazyfs.chunks", "lazyfs.mount", "lazyfs.registry")


@dataclass(frozen=True, slots=True)
class Order:
    """To serve the connection `fuse`, which the process `holder` holds. Its fds are ours to keep.

    `estate`: the memory of what daemons leave to each other. `inherits`: a daemon served before us, and has ended.
    `careful`: several of them died in a row.
    """

    fuse: int
    estate: int
    greeting: Greeting
    inherits: bool
    careful: bool
    holder: int


class Leash:
    """The socket to the holder. Synchronous. `on_fork` is called in each standby that is forked."""

    def __init__(self, fd: int, on_fork: Callable[[], None] = lambda: None) -> None:
        self._socket = socket.socket(fileno=fd)
        self._on_fork = on_fork
        os.set_inheritable(fd, False)

    def wait(self) -> Order | None:
        """Say that we are warm and wait until we are to serve; leave another standby behind. No threads are there yet.

        Blocking, for as long as another daemon lives. None: the holder has ended, or needs us no more. Raise
        DaemonFault for an order that can't be followed.
        """
        while True:
            try:
                self._socket.send(WARM + str(os.getpid()).encode())
                data, fds, _, _ = socket.recv_fds(self._socket, _MAX_ORDER, 3)
            except OSError:
                return None
            if not data:
                return None
            order, following = _decode(data, fds)
            gc.freeze()  # what is loaded stays shared
            if os.fork():
                os.close(following)
                return order
            self._on_fork()
            for fd in (order.fuse, order.estate):
                os.close(fd)
            self._socket.close()
            self._socket = socket.socket(fileno=following)
            if order.inherits or not select.select([self._socket], [], [], _REST)[0]:
                _import_all()
            _set_priority(_URGENT)

    def serves(self) -> None:
        """Say that requests are answered, and be no more urgent than others from now on. Doesn't block."""
        _set_priority(0)
        self._say(SERVES)

    def ends(self) -> None:
        """Say that we end in order, with nothing mounted any more. Doesn't block."""
        self._say(ENDS)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the holder has ended; who serves goes on
            self._socket.send(word, socket.MSG_DONTWAIT)


def _set_priority(nice: int) -> None:
    """Set the nice value of all of our threads, as far as we may (RLIMIT_NICE, CAP_SYS_NICE)."""
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def _import_all() -> None:
    for package in _LATER:
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            importlib.import_module(module.name)


def _decode(data: bytes, fds: list[int]) -> tuple[Order, int]:
    """Return an order, and the leash of the standby after us."""
    try:
        order = json.loads(data)
        fuse, estate, following = fds
        greeting = greetings.decode(bytes.fromhex(order["greeting"]))
        return Order(
            fuse, estate, greeting, bool(order["inherits"]), bool(order["careful"]), int(order["holder"])
        ), following
    except (ValueError, KeyError, TypeError) as error:
        raise DaemonFault(f"the holder's order makes no sense: {error}") from None
