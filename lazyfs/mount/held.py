"""A daemon's end of the leash: told by the holder when to serve, and with what.

The process that the holder starts is a template: it has everything loaded, runs nothing, and forks a daemon whenever
the holder asks for one. That one shares its memory, gets everything ready that it can while another daemon serves, and
waits for the order: what is left to be done then takes some milliseconds.
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
import threading
from collections.abc import Callable
from dataclasses import dataclass

import trio

from lazyfs.errors import DaemonFault
from lazyfs.limits import MAX_ORDER
from lazyfs.mount import greeting as greetings
from lazyfs.mount.greeting import Greeting
from lazyfs.mount.holder import ALIVE, ENDS, FORK, FORK_AT_ONCE, IS, SERVES, WARM

_URGENT = -10  # nice value of who takes over: every reader of the node waits for it, and others may fill the processors
_BEAT = 5.0  # seconds between words that say that the loop goes round
_REST = 3.0  # seconds before a template loads what is missing: the first container's start is over by then
# What a daemon imports when it is first wanted: a standby has the time, and whoever takes over has not.
_LATER = ("lazyfs.chunks", "lazyfs.mount", "lazyfs.registry")


@dataclass(frozen=True, slots=True)
class Order:
    """To serve the connection `fuse`, which the process `holder` holds. The fd is ours to keep.

    `inherits`: a daemon served before us, and has ended. `careful`: several of them died in a row.
    """

    fuse: int
    greeting: Greeting
    inherits: bool
    careful: bool
    holder: int


class Template:
    """Forks daemons. Synchronous, without threads. `on_fork` is called in all of these but the first, and in itself."""

    def __init__(self, fd: int, on_fork: Callable[[], None] = lambda: None) -> None:
        self._socket = socket.socket(fileno=fd)
        self._on_fork = on_fork
        os.set_inheritable(fd, False)

    def run(self) -> Leash | None:
        """Fork a daemon each time that the holder asks; return in each of them its leash.

        Blocking, as long as the holder lives. None, in the template itself: the holder has ended, or has another one.
        """
        is_first, is_loaded = True, False
        while True:
            # Whoever asks within that time may be waited for.
            if not is_first and not is_loaded and not select.select([self._socket], [], [], _REST)[0]:
                _import_all()
                is_loaded = True
            try:
                word, fds, _, _ = socket.recv_fds(self._socket, 1, 2)
            except OSError:
                return None
            if len(fds) != 2:
                return None
            if word != FORK_AT_ONCE and not is_loaded:
                _import_all()
                is_loaded = True
            gc.freeze()  # what is loaded stays shared
            if _fork_away():
                self._socket.close()
                if not is_first:
                    self._on_fork()
                return Leash(*fds, is_spare=word == FORK)
            for fd in fds:
                os.close(fd)
            if is_first:
                self._on_fork()
            is_first = False


class Leash:
    """The socket to the holder. `estate`: the memory of what daemons leave to each other. Belongs to one trio loop.

    `is_spare`: another daemon serves meanwhile.
    """

    def __init__(self, fd: int, estate: int, *, is_spare: bool = False) -> None:
        self.is_spare = is_spare
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self.estate = estate
        self.is_lost = False  # the holder has ended: nobody takes over from us any more
        # Freeing our memory is most of the time that our death takes. Of this thread the kernel tells the end at once.
        canary = threading.Thread(target=threading.Event().wait, name="canary", daemon=True)
        canary.start()
        self._say(IS + f"{os.getpid()} {canary.native_id}".encode())
        self._say(ALIVE)

    async def order(self) -> Order | None:
        """Wait until we are to serve. None: the holder has ended, or needs us no more. A checkpoint.

        Raise DaemonFault for an order that can't be followed.
        """
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, MAX_ORDER, 1)
            except BlockingIOError:
                continue
            except OSError:
                return None
            if not data:
                return None
            order = _decode(data, fds)
            if order.inherits:
                _set_priority(_URGENT)
            return order

    async def beat(self) -> None:
        """Say again and again that the loop goes round: one that hangs is ended. Runs until cancelled."""
        while True:
            self._say(ALIVE)
            await trio.sleep(_BEAT)

    async def watch(self) -> None:
        """Return once the holder has ended. After `order`. A checkpoint, for as long as it lives."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                if not self._socket.recv(1):
                    break
            except BlockingIOError:
                continue
            except OSError:
                break
        self.is_lost = True

    def is_warm(self) -> None:
        """Say that all is ready that can be before the order, which is to find us before all else. Doesn't block."""
        _set_priority(_URGENT)
        self._say(WARM)

    def serves(self) -> None:
        """Say that requests are answered. Doesn't block."""
        self._say(SERVES)

    def is_calm(self) -> None:
        """Be no more urgent than others from now on: whoever waited for us has been answered. Doesn't block."""
        _set_priority(0)

    def ends(self) -> None:
        """Say that we end in order, with nothing mounted any more. Doesn't block."""
        self._say(ENDS)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the holder has ended; who serves goes on
            self._socket.send(word, socket.MSG_DONTWAIT)


def _fork_away() -> bool:
    """Fork a process whose parent is the holder, which tells how it ended. True in that one."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return False
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        os._exit(1)  # the holder sees that the leash has no other end
    return True


def _set_priority(nice: int) -> None:
    """Set the nice value of all of our threads, as far as we may (RLIMIT_NICE, CAP_SYS_NICE)."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended, or we may not
            os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def _import_all() -> None:
    """Load all that may be needed, and be as urgent as others from then on: the holder starts us gently."""
    for package in _LATER:
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            importlib.import_module(module.name)
    _set_priority(0)


def _decode(data: bytes, fds: list[int]) -> Order:
    try:
        order = json.loads(data)
        (fuse,) = fds
        greeting = greetings.decode(bytes.fromhex(order["greeting"]))
        return Order(fuse, greeting, bool(order["inherits"]), bool(order["careful"]), int(order["holder"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DaemonFault(f"the holder's order makes no sense: {error}") from None
