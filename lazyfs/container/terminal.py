"""The user's side of a container's input and output: pipes or a pseudo-terminal, and the threads that carry the bytes.

A container never gets the user's own descriptors: with a terminal's it could type into it, and with a file's reopen
that through /proc/self/fd. Threads copy between the two sides, 64 KiB at a time.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import termios
import threading
import tty
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lazyfs.errors import ContainerFailed

_BUFFER = 1 << 16  # bytes in flight in each direction
_CLOSED = -1
_LOOK = 0.2  # seconds between two looks whether to give up


class Console:
    """Three pipes, or with `terminal` one pseudo-terminal, between us and a container.

    Create it before the fork, give `container_ends` to the child, then `close_container_ends()`; once the container
    runs, `connect()`; at its end `drain()`, and always `close()`. `hears`, where given, is told of each block of its
    output by the threads that copy it, with 1 or 2 for the stream; both streams then go to our stderr.
    """

    def __init__(
        self, directory: Path, *, terminal: bool, interactive: bool, hears: Callable[[int, bytes], None] | None = None
    ) -> None:
        self._hears = hears
        self._terminal = terminal
        self._interactive = interactive
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._ours: list[int] = []  # our ends, stdin first
        self._theirs: list[int] = []
        self._master = _CLOSED
        self._saved: list[Any] | None = None
        self._listener: socket.socket | None = None
        self._copies: list[threading.Thread] = []
        if terminal:
            self._listener = _listen(directory)
            self.container_ends = (self._null, self._null, self._null)
            return
        stdin = self._null
        if interactive:
            stdin, ours = os.pipe()
            self._ours.append(ours)
            self._theirs.append(stdin)
        outputs = []
        for _ in range(2):
            ours, theirs = os.pipe()
            self._ours.append(ours)
            self._theirs.append(theirs)
            outputs.append(theirs)
        self.container_ends = (stdin, outputs[0], outputs[1])

    def close_container_ends(self) -> None:
        """Close what only the child needs, so that the end of the container is the end of its output."""
        while self._theirs:
            os.close(self._theirs.pop())

    def own(self, uid: int, gid: int) -> None:
        """Give the pipes to the container's user, who may then open /dev/stdout. Does nothing for a terminal."""
        for descriptor in self._theirs:
            with contextlib.suppress(PermissionError):  # without root only subordinate users differ from us
                os.fchown(descriptor, uid, gid)

    def receive(self, timeout: float) -> None:
        """Take the pseudo-terminal that the runtime sends while it creates the container. Blocking, `timeout` seconds.

        Raise ContainerFailed. Does nothing without a terminal.
        """
        if self._listener is None:
            return
        try:
            self._listener.settimeout(timeout)
            with self._listener.accept()[0] as connection:
                connection.settimeout(timeout)
                room = socket.CMSG_SPACE(array.array("i").itemsize)
                _, ancillary, _, _ = connection.recvmsg(4096, room)
        except OSError as error:
            raise ContainerFailed(f"the runtime did not hand over the container's terminal: {error}") from None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._master = array.array("i", data[:4])[0]
                os.set_inheritable(self._master, False)
                self.resize()
                return
        raise ContainerFailed("the runtime sent no terminal")

    @property
    def waiting(self) -> int | None:
        """The descriptor that turns readable when the runtime wants to hand over the terminal, or None."""
        return self._listener.fileno() if self._listener is not None and self._master == _CLOSED else None

    def connect(self) -> None:
        """Start to copy. With a terminal and input, the user's terminal goes to raw mode until `close()`."""
        if self._terminal:
            if self._interactive and os.isatty(0):
                self._saved = termios.tcgetattr(0)
                tty.setraw(0, termios.TCSADRAIN)
            self._copy(self._master, 1, wait=True)
            if self._interactive:
                self._copy(0, self._master)
            return
        # From here on each pipe is its thread's, to close at the end.
        if self._interactive:
            self._copy(0, self._ours.pop(0), close_target=True)
        for stream in (1, 2):
            hears = None if self._hears is None else partial(self._hears, stream)
            target = stream if hears is None else 2
            self._copy(self._ours.pop(0), target, close_source=True, wait=True, hears=hears)

    def resize(self) -> None:
        """Give the container's terminal the size of ours."""
        if self._master == _CLOSED:
            return
        for ours in (0, 1, 2):
            with contextlib.suppress(OSError):  # that one is no terminal; the next may be
                size = fcntl.ioctl(ours, termios.TIOCGWINSZ, b"\0" * 8)
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
                return

    def drain(self, give_up: Callable[[], bool]) -> None:
        """Wait until all that the ended container wrote has been taken by our reader, or `give_up()` says so."""
        for thread in self._copies:
            while thread.is_alive() and not give_up():
                thread.join(_LOOK)

    def close(self) -> None:
        """Give the user's terminal its mode back and close what is ours. Idempotent."""
        if self._saved is not None:
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
            self._saved = None
        self.close_container_ends()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._null != _CLOSED:
            os.close(self._null)
            self._null = _CLOSED
        while self._ours:
            os.close(self._ours.pop())
        # The master stays with the threads that may still sit in a read or write of it, up to the process's end.

    def _copy(
        self,
        source: int,
        target: int,
        *,
        close_source: bool = False,
        close_target: bool = False,
        wait: bool = False,
        hears: Callable[[bytes], None] | None = None,
    ) -> None:
        thread = threading.Thread(target=_carry, args=(source, target, close_source, close_target, hears), daemon=True)
        thread.start()
        if wait:
            self._copies.append(thread)


def _carry(
    source: int, target: int, close_source: bool, close_target: bool, hears: Callable[[bytes], None] | None
) -> None:
    """Copy until the source ends. With the target's reader gone the source is closed, so that its writer learns it."""
    gone = False
    while not (gone and (close_source or close_target)):
        try:
            block = os.read(source, _BUFFER)
        except OSError:  # EIO: the last process with the pseudo-terminal ended
            break
        if not block:
            break
        if hears is not None:
            hears(block)
        view = memoryview(block)
        while view and not gone:
            try:
                view = view[os.write(target, view) :]
            except BlockingIOError:  # somebody else made our stdout non-blocking
                select.select([], [target], [])
            except OSError:
                gone = True  # a pseudo-terminal is read on, and dropped: its writer would hang otherwise
    if close_source:
        os.close(source)
    if close_target:
        os.close(target)


def _listen(directory: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Through the descriptor: a Unix socket's path has at most 107 bytes, and a store's path may have more.
        listener.bind(f"/proc/self/fd/{handle}/console")
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise ContainerFailed(f"the socket for the container's terminal can't be made: {error.strerror}") from None
    finally:
        os.close(handle)
    return listener
