"""lazyfs-snapshotter, the control plane for containerd: puts the parts together, listens, and ends in good order.

It holds no mount: it may stop, crash and be replaced while containers run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc

from lazyfs import config, notify
from lazyfs import log as logs
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, StoreBroken, UsageError
from lazyfs.limits import CALL_THREADS, GRACE, MAX_CALLS, MAX_GRPC_MESSAGE
from lazyfs.process import harden
from snapshotter.collaborators import Connect, Handler, no_collaborators
from snapshotter.connect import connect
from snapshotter.directories import Directories
from snapshotter.overlay import Overlay, kernel_options
from snapshotter.service import Service
from snapshotter.snapshotter import Snapshotter
from snapshotter.sockets import Lock, make_room
from snapshotter.store import Store

log = logging.getLogger("snapshotter.server")  # also when it is run as __main__

DATABASE = "snapshots.db"
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_DUMPABLE = 4


Interceptor: TypeAlias = "grpc.ServerInterceptor[Any, Any]"


class Server:
    """The parts of a snapshotter that listens. `close` undoes all of it."""

    def __init__(self, settings: Settings, connect: Connect, interceptors: Sequence[Interceptor]) -> None:
        self.address = settings.snapshotter_address
        self._more: list[Handler] = []
        self._server: grpc.Server | None = None
        with contextlib.ExitStack() as stack:
            root = _own_root(settings.root)
            stack.callback(Lock(root / "snapshotter.lock", f"the store {root}").close)
            stack.callback(make_room(self.address).close)
            self.store = Store(root / DATABASE)
            stack.callback(self.store.close)
            self.directories = Directories(root)
            ours = connect(settings, self.store, self.directories)
            for close in reversed(ours.close):
                stack.callback(close)
            self.snapshotter = Snapshotter(
                self.store,
                self.directories,
                Overlay(self.directories, kernel_options(root)),
                ours.extraction,
                ours.chains,
                ours.collector,
            )
            self._interceptors = list(interceptors)
            self._more += ours.handlers
            self._note_call = ours.note_call
            self._stack = stack.pop_all()

    def add(self, handler: Handler) -> None:
        """Offer another service on the same socket. Before `start`."""
        self._more.append(handler)

    def start(self) -> None:
        """Listen. Raise UsageError when the address can't be listened on."""
        options: tuple[tuple[str, Any], ...] = (
            ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE),
            ("grpc.max_send_message_length", MAX_GRPC_MESSAGE),
            ("grpc.so_reuseport", 0),
        )
        server = grpc.server(
            ThreadPoolExecutor(CALL_THREADS, "call"),
            interceptors=self._interceptors,
            options=options,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        server.add_generic_rpc_handlers((Service(self.snapshotter, self._note_call).handler(), *self._more))
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self.address}")
        except RuntimeError as error:
            raise UsageError(f"the socket {self.address} can't be listened on: {error}") from None
        finally:
            os.umask(before)
        server.start()
        self._server = server
        log.info("ready: socket=%s root=%s", self.address, self.store.path.parent)

    def close(self, grace: float = GRACE) -> None:
        """Take no more calls, let those under way end within `grace` seconds, and close everything. Blocking."""
        if self._server is not None:
            self._server.stop(grace).wait(grace + 1)
            self._server = None
        self._stack.close()


def build(settings: Settings, connect: Connect = no_collaborators, interceptors: Sequence[Interceptor] = ()) -> Server:
    """Put a server together; it listens after `start`. Blocking, on the local disk.

    Raise StoreLocked (root or socket in use), StoreBroken, StoreFull, UsageError; then nothing is left.
    """
    return Server(settings, connect, interceptors)


def _own_root(root: Path) -> Path:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
    except OSError as error:
        raise StoreBroken(f"the store {root} can't be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise StoreBroken(
            f"the store {root} belongs to another user or can be written by others", hint=f"chmod 700 {root}"
        )
    return root


def serve(settings: Settings, connect: Connect = no_collaborators) -> None:
    """Serve until a signal says stop. Raise LazyfsError when it can't start."""
    stop = _stop_signals()
    server = build(settings, connect)
    try:
        if not select.select([stop], [], [], 0)[0]:
            server.start()
            notify.tell("READY=1")
        stop.recv(1)
        notify.tell("STOPPING=1")
        log.info("stopping")
    finally:
        server.close()


def _stop_signals() -> socket.socket:
    """Return what can be read once a signal has said stop.

    The kernel may give a signal to any thread, and then nothing wakes the main one from a lock that it waits for.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in _STOPS:
        signal.signal(number, lambda number, frame: None)
    return ours


def main(argv: list[str] | None = None) -> int:
    """Run lazyfs-snapshotter. Exit status 0 after an orderly end, 1 when it could not start or broke."""
    parser = argparse.ArgumentParser(
        prog="lazyfs-snapshotter", description="containerd's snapshotter: images start before they are pulled."
    )
    parser.add_argument("--address", help="the socket that containerd's proxy_plugins entry names")
    parser.add_argument("--root", help="the store")
    parser.add_argument("--run", help="sockets and the daemon's session")
    parser.add_argument(
        "--wait-for-daemon", action="store_true", help="start no lazyfsd: somebody else (systemd) keeps one"
    )
    parser.add_argument("-v", "--verbose", action="count", default=0)
    args = parser.parse_args(argv)
    logs.set_up(args.verbose + 1)
    harden()
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # who may read its memory: root alone
    try:
        serve(
            config.load({"root": args.root, "run": args.run, "snapshotter_socket": args.address}),
            partial(connect, start_daemon=not args.wait_for_daemon),
        )
        return 0
    except LazyfsError as error:
        log.error("can't start: %s", error)
    except Exception:
        log.exception("lazyfs-snapshotter broke")
    return 1


def entry() -> NoReturn:
    """Console script."""
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # a call that a dead daemon holds up would hold the process up


if __name__ == "__main__":
    entry()
