"""The daemon's control socket from the other side: find a daemon, start one where none runs, call it. Synchronous.

Kept small and free of heavy imports: `lazyfs run` pays for them before a container starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lazyfs import private
from lazyfs.answer import decode_error
from lazyfs.config import Settings
from lazyfs.errors import DaemonFault, DaemonUnreachable, FuseUnavailable, LazyfsError, StoreLocked
from lazyfs.limits import CALL_TIMEOUT, END_TIMEOUT, GREETING_TIMEOUT, MAX_LINE, MAX_LOG, START_TIMEOUT
from lazyfs.process import environment

PROTOCOL = 1
_NEEDED = {"pyfuse3": "pyfuse3", "trio": "trio", "lru-dict": "lru"}  # the extra "mount": package → module
_UCRED = struct.Struct("3i")  # pid, uid, gid (unix(7), SO_PEERCRED)
_SOCKET = "lazyfsd.sock"  # of the node's own daemon, the one that may have a holder
_HOLDER_LOCK = "holder.lock"  # see mount.holder, which imports nothing of ours
_RACE = 0.05  # seconds between looks while somebody else's daemon starts or ends


class Daemon:
    """A connection to a daemon. Use it in a `with`; leases taken through it end with it. Not thread-safe."""

    def __init__(self, sock: socket.socket, greeting: dict[str, Any]) -> None:
        self._socket = sock
        self._buffer = b""
        self._number = 0
        self._spent = ""  # the call that was not answered in time
        self.greeting = greeting

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. The daemon releases what this connection leased."""
        self._socket.close()

    def hang_up(self) -> None:
        """End the connection from another thread: whoever waits in `wait_for_end` or `call` comes back."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def wait_for_end(self) -> None:
        """Return when the daemon has gone or `hang_up` was called. Blocking, no deadline: for idle ones."""
        with contextlib.suppress(OSError):
            self._socket.settimeout(None)
            while self._socket.recv(1 << 16):
                pass

    def call(
        self,
        name: str,
        on_event: Callable[[str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        timeout: float | None = None,
        **args: Any,
    ) -> dict[str, Any]:
        """Make one call and wait for its answer; `on_event` gets the daemon's remarks before it. Blocking.

        `on_progress` gets (done, total) in bytes where the daemon tells how far the call is. `timeout`: seconds for the
        whole call; after them the connection is of no use any more, because the answer may still come.
        Raise the error that the daemon answers with, DaemonUnreachable when it goes away or hangs, DaemonFault when it
        breaks the protocol.
        """
        if self._spent:
            raise DaemonUnreachable(f"this connection to lazyfsd is of no use since {self._spent} was not answered")
        deadline = None if timeout is None else time.monotonic() + timeout
        self._number += 1
        line = json.dumps({"id": self._number, "call": name, "args": args}).encode() + b"\n"
        try:
            return self._exchange(name, line, deadline, on_event, on_progress)
        except TimeoutError:
            self._spent = name
            if timeout is None:
                raise DaemonUnreachable("lazyfsd does not answer", hint="see its log, or kill it") from None
            raise DaemonUnreachable(f"lazyfsd did not answer {name} within {timeout:g} s", hint="see its log") from None

    def _exchange(
        self,
        name: str,
        line: bytes,
        deadline: float | None,
        on_event: Callable[[str], None] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> dict[str, Any]:
        """Send a call and return its answer. Raise TimeoutError when it takes too long, else as `call`."""
        try:
            self._limit(deadline)
            self._socket.sendall(line)
        except TimeoutError:
            raise
        except OSError as error:
            raise DaemonUnreachable(f"lazyfsd went away: {error.strerror or error}") from None
        while True:
            message = self._receive(deadline)
            if message.get("id") != self._number:
                continue
            if "event" in message:
                _pass_on(message["event"], on_event, on_progress)
            elif "error" in message:
                raise decode_error(message["error"], DaemonFault)
            else:
                answer = message.get("ok")
                if not isinstance(answer, dict):
                    raise DaemonFault(f"lazyfsd's answer to {name} is no object")
                return answer

    def _limit(self, deadline: float | None) -> None:
        """Bound the next wait for the socket. Raise TimeoutError when no time is left."""
        left = CALL_TIMEOUT if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _receive(self, deadline: float | None = None) -> dict[str, Any]:
        """Return the next message. Raise TimeoutError when it takes too long, else as `call`."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise DaemonFault("lazyfsd sent a line that is too long")
            try:
                if deadline is not None:
                    self._limit(deadline)
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise DaemonUnreachable(f"lazyfsd went away: {error.strerror or error}") from None
            if not data:
                raise DaemonUnreachable("lazyfsd went away in the middle of a call")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise DaemonFault("lazyfsd sent something that is no JSON object")
        return message


def _pass_on(
    event: object, on_event: Callable[[str], None] | None, on_progress: Callable[[int, int], None] | None
) -> None:
    if not isinstance(event, dict):
        return
    done, total = event.get("done"), event.get("total")
    if isinstance(done, int) and isinstance(total, int):
        if on_progress is not None:
            on_progress(done, total)
    elif on_event is not None:
        on_event(str(event.get("text", "")))


def connect(path: Path) -> Daemon:
    """Connect to a daemon's socket and read its greeting. Blocking, 10 s at most.

    Where a holder is about to put another daemon in the place of one, that one is waited for. Raise DaemonUnreachable
    when nobody listens (without a hint) or nobody answers (with one), DaemonFault for a daemon of another protocol or
    of another user, who could have us run what he likes.
    """
    deadline = time.monotonic() + GREETING_TIMEOUT
    while True:
        try:
            return _connect(path)
        except DaemonUnreachable as error:
            if error.hint or path.name != _SOCKET or time.monotonic() > deadline or not _is_held(path.parent):
                raise
        time.sleep(_RACE)


def _is_held(run: Path) -> bool:
    """Tell whether a holder is at work in the directory of a daemon's sockets."""
    try:
        lock = os.open(run / _HOLDER_LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def _connect(path: Path) -> Daemon:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(GREETING_TIMEOUT)
    try:
        sock.connect(os.fspath(path))
        _check_peer(sock, path)
        daemon = Daemon(sock, {})
        daemon.greeting = daemon._receive()
    except TimeoutError:
        sock.close()
        raise DaemonUnreachable("lazyfsd does not answer", hint="see its log, or kill it") from None
    except OSError as error:
        sock.close()
        raise DaemonUnreachable(f"no lazyfsd listens on {path}: {error.strerror or error}") from None
    except LazyfsError:
        sock.close()
        raise
    if daemon.greeting.get("protocol") != PROTOCOL:
        sock.close()
        raise DaemonFault(
            f"lazyfsd {daemon.greeting.get('lazyfsd')} speaks another protocol",
            hint="stop it: lazyfs umount its mounts",
        )
    return daemon


def _check_peer(sock: socket.socket, path: Path) -> None:
    uid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    if uid not in (0, os.geteuid()):
        raise DaemonFault(f"what listens on {path} belongs to user {uid}", hint="set LAZYFS_RUN to a place of your own")


def socket_of(settings: Settings, solo: Path | None, *, store_only: bool = False) -> Path:
    """Return the socket of the node's daemon, or of the one that serves the mount point `solo` alone.

    `store_only`: of the one that fills the store and shows nothing, beside others.
    """
    if store_only:
        return settings.run / "store.sock"
    if solo is None:
        return settings.socket
    name = hashlib.sha256(os.fsencode(solo.absolute())).hexdigest()[:16]
    return settings.run / f"solo-{name}.sock"


def sockets(settings: Settings) -> list[Path]:
    """Return the sockets of all daemons of this store, living or not."""
    return sorted(settings.run.glob("*.sock"))


def prepare_run(settings: Settings) -> None:
    """Make the directory of sockets, ours alone. Raise DaemonUnreachable when somebody else has it."""
    try:
        settings.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(settings.run)
    except OSError as error:
        raise DaemonUnreachable(f"{settings.run} can't be made: {error.strerror}", hint="set LAZYFS_RUN") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise DaemonUnreachable(f"{settings.run} belongs to somebody else", hint="remove it, or set LAZYFS_RUN")
    if (above := private.find_loose(settings.run)) is not None:
        raise DaemonUnreachable(f"{above}, where {settings.run} lies, is in other users' hands", hint="set LAZYFS_RUN")
    try:
        if found.st_mode & 0o077:
            os.chmod(settings.run, 0o700)
        links = [entry.path for entry in os.scandir(settings.run) if entry.is_symlink()]
    except OSError as error:
        raise DaemonUnreachable(f"{settings.run} can't be used: {error.strerror}", hint="set LAZYFS_RUN") from None
    if links:
        raise DaemonUnreachable(f"{links[0]} is a symbolic link, and lazyfs follows none there", hint="remove it")


@contextlib.contextmanager
def open_daemon(
    settings: Settings, solo: Path | None = None, *, start: bool = True, store_only: bool = False
) -> Iterator[Daemon]:
    """Yield a connection to the daemon of this store, started where none runs. Blocking, 30 s at most.

    `solo`: the daemon that serves this mount point alone (for ordinary users, who can't bind-mount). `store_only`: one
    that needs no FUSE, because it shows nothing. Raise DaemonUnreachable, or what kept the daemon from starting
    (FuseUnavailable, StoreLocked, MountFailed …).
    """
    with reach_daemon(settings, solo, start=start, store_only=store_only) as daemon:
        yield daemon


def reach_daemon(
    settings: Settings, solo: Path | None = None, *, start: bool = True, store_only: bool = False
) -> Daemon:
    """Return what `open_daemon` yields; the caller closes it."""
    path = socket_of(settings, solo, store_only=store_only)
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return connect(path)
        except DaemonUnreachable:
            if not start or time.monotonic() >= deadline:
                raise
        try:
            prepare_run(settings)
            _start(settings, solo, deadline, store_only)
        except StoreLocked:
            # Another one starts, or the last one is on its way out: either ends soon.
            if time.monotonic() >= deadline - START_TIMEOUT / 2:
                raise
            time.sleep(_RACE)


def _start(settings: Settings, solo: Path | None, deadline: float, store_only: bool) -> None:
    """Start a daemon and wait until it listens. Raise what it reports."""
    _bound_log(settings.run / "lazyfsd.log")
    ready, theirs = os.pipe()
    try:
        with open(settings.run / "lazyfsd.log", "ab", opener=private.opened) as log:
            process = subprocess.Popen(
                _command(settings, solo, theirs, store_only),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs,),
                start_new_session=True,
                cwd="/",
                env=environment(),
            )
    except OSError as error:
        os.close(ready)
        raise DaemonUnreachable(f"lazyfsd can't be started: {error}") from None
    finally:
        os.close(theirs)
    try:
        answer = _read_line(ready, deadline)
    finally:
        os.close(ready)
    if not answer:
        with contextlib.suppress(ProcessLookupError):  # it ended already, or would come up after we have given it up
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel, for a disk, is left to it
            process.wait(END_TIMEOUT)
        _check_extra()
        raise DaemonUnreachable("lazyfsd did not start", hint=f"see {settings.run / 'lazyfsd.log'}")
    message = json.loads(answer)
    if "error" in message:
        raise decode_error(message["error"], DaemonUnreachable)


def _command(settings: Settings, solo: Path | None, ready_fd: int, store_only: bool) -> list[str]:
    """Return what starts a daemon, or its holder: see `mount.holder`."""
    python, words = [sys.executable, "-P", "-m"], holder_words(settings, until_idle=True)
    if solo is None and not store_only and settings.hold and os.geteuid() == 0:
        return [*python, "lazyfs.mount.holder", os.fspath(settings.session), str(ready_fd), *words]
    if store_only:
        words.append("--store-only")
    if solo is not None:
        words += ["--solo", os.fspath(solo.absolute())]
    return [*python, "lazyfs.mount.daemon", *words, "--ready-fd", str(ready_fd)]


def holder_words(settings: Settings, *, until_idle: bool) -> list[str]:
    """Return the arguments of a daemon that serves the node's session, as its holder hands them on."""
    words = ["--root", os.fspath(settings.root), "--run", os.fspath(settings.run)]
    return [*words, "--until-idle"] if until_idle else words


def _check_extra() -> None:
    """Raise FuseUnavailable when lazyfs was installed without what a daemon imports."""
    import importlib.util

    missing = [name for name, module in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FuseUnavailable(
            f"run and mount need {', '.join(missing)}, not installed here", hint="pip install 'lazyfs[mount]'"
        )


def _bound_log(path: Path) -> None:
    """Put a log that has grown too long aside, in the place of the one before it."""
    with contextlib.suppress(OSError):  # none yet, or one that somebody else just moved
        if os.lstat(path).st_size > MAX_LOG:
            os.replace(path, path.with_name("lazyfsd.log.1"))


def _read_line(fd: int, deadline: float) -> bytes:
    data = b""
    coming = select.poll()
    coming.register(fd, select.POLLIN)
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not coming.poll(left * 1000):
            return b""
        part = os.read(fd, 1 << 16)
        if not part or len(data) > MAX_LINE:
            return b""
        data += part
    return data
