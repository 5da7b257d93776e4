"""lazyfsd, the data plane: begins its parts, serves the FUSE session and the control socket, and takes all down.

One daemon a store, held by a lock on it. An ordinary user, who can't bind-mount, gets one a mount point (`--solo`);
these share the store.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import trio

from lazyfs import config, notify
from lazyfs import log as logs
from lazyfs.answer import encode_error
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.store import Store
from lazyfs.config import Settings
from lazyfs.container import sweep
from lazyfs.control_client import holder_words, prepare_run, socket_of
from lazyfs.errors import DaemonFault, LazyfsError, StoreLocked, first_of
from lazyfs.limits import CLOSING_TIMEOUT, RELEASE_TIMEOUT
from lazyfs.mount import heap, pressure
from lazyfs.mount.assembly import Parts, Role, assemble
from lazyfs.mount.control import ControlServer
from lazyfs.mount.held import Leash, Order, Template
from lazyfs.mount.mounted import Mounted
from lazyfs.mount.session import Session
from lazyfs.mount.succession import Succession
from lazyfs.process import harden

log = logging.getLogger(__name__)

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOCK_AGAIN, _LOCK_TOLD = 0.05, 60.0  # seconds between tries for the store, and until that is told
_LAST_WORDS = 0.1  # seconds
_AFTER_THEM = 0.05  # seconds after a take-over in which readers come before commands
_BREATH = 0.5  # seconds after a take-over in which readers come before all else
_LAST_REQUESTS = 3.0  # seconds for requests under way, once nothing is shown any more
_SWITCH = 0.0005  # seconds after which a thread gives up the interpreter: a waiting read is worth more than throughput


class Daemon:
    """One data plane. `ready_fd`: where to write one line once it listens, or why it can't; -1 for nowhere."""

    def __init__(
        self,
        settings: Settings,
        role: Role,
        *,
        until_idle: bool,
        ready_fd: int,
        leash: Leash | None = None,
    ) -> None:
        self._settings = settings
        self._role = role
        self._until_idle = until_idle
        self._ready_fd = ready_fd
        self._leash = leash
        self._order: Order | None = None
        self._scope = trio.CancelScope()
        self._stop = trio.Event()  # a client asked for the end
        self._signalled = False
        self._is_ready = False
        self._last = threading.Timer(_LAST_REQUESTS, _end_now)
        self._last.daemon = True

    def hold_signals(self) -> None:
        """Keep the signals that end the daemon from killing it while it starts or takes its mounts down."""

        def note(number: int, frame: object) -> None:
            self._signalled = True

        for number in _STOPS:
            signal.signal(number, note)

    async def run(self) -> None:
        """Serve until stopped. Raise LazyfsError when it can't start."""
        settings = self._settings
        prepare_run(settings)
        settings.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        catalog = Catalog(settings.root / "catalog.db", anew=self._leash is None or not self._leash.is_spare)
        try:
            store = Store(settings.root, settings.store_size, catalog)
            try:
                if self._leash is None:
                    self._lock(store)
                await self._serve(catalog, store)
            finally:
                store.close()
        finally:
            catalog.close()
            self._last.cancel()

    def _lock(self, store: Store) -> bool:
        """Take the store. False: threads of the daemon before us are left in the kernel, and run no code any more.

        They wait for our answers. Raise StoreLocked where somebody else has it.
        """
        try:
            store.lock(exclusive=self._role.is_alone)
        except StoreLocked:
            if not self._inherits:
                raise
            return False
        return True

    async def _lock_late(self, store: Store) -> None:
        """Take the store once what is left of the daemon before us has gone. Until then it is as if it were shared."""
        warn_at = trio.current_time() + _LOCK_TOLD
        while not self._lock(store):
            if trio.current_time() > warn_at:
                log.error("something of the daemon before us still holds the store %s", self._settings.root)
                warn_at = float("inf")
            await trio.sleep(_LOCK_AGAIN)

    async def _serve(self, catalog: Catalog, store: Store) -> None:
        settings = self._settings
        async with trio.open_nursery() as nursery:
            parts = assemble(
                settings,
                self._role,
                catalog,
                store,
                nursery,
                estate=None if self._leash is None else self._leash.estate,
                stop=self._stop.set,
            )
            nursery.start_soon(heap.give_back)
            if self._leash is not None:
                nursery.start_soon(self._leash.beat)
                self._order = await self._follow(self._leash, parts.succession)
                if self._order is None:
                    nursery.cancel_scope.cancel()
                    return
                store.take()
                if not self._lock(store):
                    nursery.start_soon(self._lock_late, store)
            if not self._inherits:
                parts.preparer.builder.warm()
            nursery.start_soon(parts.chains.keeping.watch)
            nursery.start_soon(pressure.watch, parts.memory)
            store.irreplaceable = parts.images.layers.offline
            server = ControlServer(
                socket_of(settings, self._role.solo, store_only=self._role.store_only), parts.mounted
            )
            if parts.session is not None:
                parts.session.open(self._order)
            try:
                with self._scope, parts.scraped or nullcontext():
                    await self._work(parts, server)
            except BaseException as error:
                if self._hands_over(error):
                    raise
                await self._take_down(parts, server)
                nursery.cancel_scope.cancel()
                raise
            await self._take_down(parts, server)
            nursery.cancel_scope.cancel()

    async def _take_down(self, parts: Parts, server: ControlServer) -> None:
        """End in order: nothing is mounted any more then, and the holder has nothing to hold."""
        with trio.CancelScope(shield=True):
            server.unlink()
            with trio.move_on_after(RELEASE_TIMEOUT):
                await parts.mounted.release_all()
            with trio.move_on_after(CLOSING_TIMEOUT):
                await parts.showing.close()
            with trio.move_on_after(CLOSING_TIMEOUT):
                await parts.images.close()
        if parts.session is not None:
            parts.session.close()
        if self._leash is not None:
            self._leash.ends()
        self._last.start()

    async def _follow(self, leash: Leash, succession: Succession) -> Order | None:
        """Keep ready until we are to serve. None: we never are."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(succession.follow, leash.is_warm)
            order = await leash.order()
            nursery.cancel_scope.cancel()
        self.hold_signals()  # from now on there is something to take down
        return order

    def _hands_over(self, error: BaseException) -> bool:
        """Tell whether somebody else takes over after a fault of ours: then all that is shown stays as it is.

        `error` may be that another task broke, which is told on the way out; that takes some milliseconds at most.
        """
        served = self._inherits or self._is_ready
        if self._leash is None or self._leash.is_lost or not served or self._scope.cancel_called:
            return False
        log.error("lazyfsd broke, another one takes over", exc_info=error if isinstance(error, Exception) else None)
        end = threading.Timer(_LAST_WORDS, os._exit, (1,))
        end.daemon = True
        end.start()
        return True

    @property
    def _inherits(self) -> bool:
        return self._order is not None and self._order.inherits

    async def _work(self, parts: Parts, server: ControlServer) -> None:
        inherits, session, scraped = self._inherits, parts.session, parts.scraped
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals)
            if self._leash is not None:
                await parts.succession.run()
            if session is not None:
                if inherits:
                    session.take_over()
                nursery.start_soon(self._serve_session, session)
                if not inherits:
                    await session.tune()
            if self._leash is not None:
                self._leash.serves()
                nursery.start_soon(self._watch_holder, self._leash, session)
                nursery.start_soon(self._calm_down, self._leash, parts)
            if inherits:
                await trio.sleep(_AFTER_THEM)
                if scraped is not None:
                    nursery.start_soon(scraped.begin_late)
            elif scraped is not None:
                scraped.begin()
            if self._role.is_alone and not inherits:
                await parts.mounted.clean_up_crashed()
                await parts.showing.clean_up_crashed()
            await server.listen()
            nursery.start_soon(server.serve)
            nursery.start_soon(parts.mounted.watch_table)
            nursery.start_soon(self._watch_idle, server, parts.mounted)
            nursery.start_soon(self._watch_stop)
            log.info("ready: root=%s session=%s", self._settings.root, self._role.solo or self._settings.session)
            self._report({"ok": True})
            self._is_ready = True
            notify.tell("READY=1")
            if not inherits:  # what is shown is shown; the next mount may wait for the test
                nursery.start_soon(parts.showing.test_early)
            if self._role.is_alone and not inherits:
                await self._sweep()

    async def _watch_holder(self, leash: Leash, session: Session | None) -> None:
        """Go on without the holder when it ends: what is mounted lasts as long as we do, and `status` says so."""
        await leash.watch()
        if self._scope.cancel_called:
            return
        log.error("the holder has ended: what is mounted goes when this lazyfsd ends")
        if session is not None:
            session.holder = 0

    async def _calm_down(self, leash: Leash, parts: Parts) -> None:
        """Do what can wait, once those are answered who waited for us."""
        if self._inherits:
            await trio.sleep(_BREATH)
        leash.is_calm()
        await parts.succession.clear()
        if self._inherits:
            await parts.showing.clear_unknown()
            if self._role.is_alone:
                await self._sweep()
            await parts.mounted.watch_callers()

    async def _sweep(self) -> None:
        await trio.to_thread.run_sync(partial(sweep.sweep, self._settings))

    async def _serve_session(self, session: Session) -> None:
        """Serve FUSE; when somebody unmounts the session the daemon has nothing left to do."""
        await session.run()
        log.info("the session was unmounted")
        self._scope.cancel()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(*_STOPS) as signals:
            if self._signalled:
                self._scope.cancel()
            async for number in signals:
                log.info("stopping: %s", signal.Signals(number).name)
                self._scope.cancel()

    async def _watch_stop(self) -> None:
        await self._stop.wait()
        await trio.sleep(_LAST_WORDS)  # whoever asked wants an answer
        log.info("stopping: asked to")
        self._scope.cancel()

    async def _watch_idle(self, server: ControlServer, mounted: Mounted) -> None:
        """End the daemon some seconds after its last mount and client, where a command started it."""
        if not self._until_idle:
            return
        while True:
            changed = mounted.changed
            with trio.move_on_after(self._settings.daemon_linger):
                await changed.wait()
            if changed.is_set() or len(mounted) or server.clients:
                continue
            log.info("idle: stopping")
            self._scope.cancel()
            return

    def _report(self, message: dict[str, Any]) -> None:
        if self._ready_fd >= 0:
            fd, self._ready_fd = self._ready_fd, -1
            try:
                os.write(fd, json.dumps(message).encode() + b"\n")
            except OSError:
                pass  # whoever started us is gone
            os.close(fd)

    def fail(self, error: LazyfsError) -> None:
        """Tell whoever started us why it can't be."""
        log.error("can't start: %s", error)
        self._report({"error": encode_error(error)})


def main(argv: list[str] | None = None) -> int:
    """Run lazyfsd. Exit status 0 after an orderly end, 1 when it could not start or broke."""
    parser = argparse.ArgumentParser(prog="lazyfsd", description="The data plane of lazyfs: one for each store.")
    parser.add_argument("--root", help="the store")
    parser.add_argument("--run", help="sockets and the session's mount")
    parser.add_argument("--solo", type=Path, metavar="DIR", help="serve one image, mounted on DIR itself")
    parser.add_argument("--store-only", action="store_true", help="show nothing, only fill the store; needs no FUSE")
    parser.add_argument("--until-idle", action="store_true", help="end with the last mount")
    parser.add_argument("--hold", action="store_true", help="have a holder keep the FUSE connection beyond our end")
    parser.add_argument("--leash", type=int, default=-1, help="the holder's socket; it says when to serve")
    parser.add_argument("--ready-fd", type=int, default=-1, help="write one line of JSON there once it listens")
    parser.add_argument("-v", "--verbose", action="count", default=0)
    args = parser.parse_args(argv)
    logs.set_up(args.verbose + 1)
    harden()
    heap.one_arena()
    sys.setswitchinterval(_SWITCH)
    daemon: Daemon | None = None
    try:
        settings = config.load({"root": args.root, "run": args.run})
        if args.hold and args.solo is None and not args.store_only and os.geteuid() == 0:
            _become_holder(settings, args)
        ready_fd = args.ready_fd

        def forked() -> None:
            nonlocal ready_fd
            if ready_fd >= 0:
                os.close(ready_fd)
                ready_fd = -1

        leash = None
        if args.leash >= 0:
            leash = Template(args.leash, forked).run()
            if leash is None:
                return 0
        role = Role(args.solo, args.store_only)
        daemon = Daemon(settings, role, until_idle=args.until_idle, ready_fd=ready_fd, leash=leash)
        if leash is None:
            daemon.hold_signals()
        trio.run(daemon.run, strict_exception_groups=True)
        return 0
    except* LazyfsError as group:
        _fail(daemon, group)
    except* Exception as group:
        log.exception("lazyfsd broke")
        _fail(daemon, group)
    return 1


def _become_holder(settings: Settings, args: argparse.Namespace) -> NoReturn:
    """Turn this process into the holder, which starts lazyfsd anew, again and again. Raise DaemonUnreachable."""
    prepare_run(settings)
    words = [os.fspath(settings.session), str(args.ready_fd), *holder_words(settings, until_idle=args.until_idle)]
    words += ["-v"] * args.verbose
    if args.ready_fd >= 0:
        os.set_inheritable(args.ready_fd, True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lazyfs.mount.holder", *words])


def _end_now() -> None:
    """End the process under threads that a registry holds: the next daemon wants the store. A crash loses no more."""
    log.info("ending while requests are under way")
    logging.shutdown()
    os._exit(0)


def _fail(daemon: Daemon | None, group: BaseExceptionGroup[Exception]) -> None:
    error = first_of(group)
    if daemon is not None:
        if not isinstance(error, LazyfsError):
            error = DaemonFault(f"lazyfsd broke: {type(error).__name__}: {error}", hint="this is a bug in lazyfs")
        daemon.fail(error)


def entry() -> NoReturn:
    """Console script."""
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # worker threads inside a stalled request would hold the process up


if __name__ == "__main__":
    entry()
