"""A start that is recorded: when it counts as ready, and the end of the daemon's recording."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazyfs.cli.main import Terminated
from lazyfs.cli.output import printable
from lazyfs.errors import ContainerFailed, DaemonFault, UsageError
from lazyfs.limits import LONGEST_START
from lazyfs.units import parse_duration

if TYPE_CHECKING:
    from lazyfs.control_client import Daemon

UNTIL_END = 30.0  # seconds after which a command that doesn't end counts as ready, unless something else is said
_CONNECT = 0.2  # seconds for a port of this machine
_KEPT = 2048  # bytes of the container's last words
_SHOWN = 300  # characters of them in an error


@dataclass(frozen=True, slots=True)
class Ready:
    """When a start is ready: `line` was written, `port` accepts, or `span` seconds have passed since the mount began.

    `ends`: so it is when its command ends well before that.
    """

    line: bytes = b""
    port: int = 0
    span: float = 0.0
    ends: bool = False

    def __str__(self) -> str:
        if self.line:
            return f"a line with {self.line.decode(errors='replace')!r}"
        return f"port {self.port}" if self.port else f"{self.span:g} s"


def parse_ready(text: str) -> Ready:
    """Return what `line:TEXT`, `port:N` or `time:SPAN` stands for. Raise UsageError."""
    kind, _, value = text.partition(":")
    if kind == "line" and value and "\n" not in value:
        return Ready(line=value.encode("utf-8", "surrogateescape"))
    if kind == "port" and value.isascii() and value.isdigit() and len(value) < 6 and 0 < int(value) < 65536:
        return Ready(port=int(value))
    if kind == "time" and 0 < (span := parse_duration(value)) < LONGEST_START:
        return Ready(span=span)
    raise UsageError(f"--ready-when can't be {text!r}", hint="line:TEXT, port:NUMBER or time:SPAN, as in time:10s")


class Recording:
    """Looks on while a container starts, and ends the daemon's recording once it is ready (`launch.Observer`).

    `patience`: seconds after which a start that is not ready has failed. Times are behind the beginning of the mount.
    """

    def __init__(self, ready: Ready, patience: float) -> None:
        self._ready = ready
        self._patience = patience
        self._daemon: Daemon | None = None
        self._mount: Any = None
        self._began = 0.0
        self._lock = threading.Lock()  # over the next three, which the threads that copy output write
        self._line_at: float | None = None
        self._pending = {1: b"", 2: b""}  # by stream: what may be the beginning of the text that is waited for
        self._last = b""
        self._ended_at: float | None = None
        self._failed = ""
        self._signal = 0
        self.manifest_digest = ""
        self.answer: dict[str, Any] | None = None  # the daemon's, when the recording is over

    def begin(self, daemon: Daemon) -> None:
        """The image is about to be mounted. Raise UsageError when the port that is waited for is taken already."""
        if self._ready.port and _accepts(self._ready.port):
            raise UsageError(
                f"port {self._ready.port} is answered before the container starts",
                hint="stop what listens there, or wait for another port",
            )
        self._daemon = daemon
        self._began = time.monotonic()

    def mounted(self, answer: dict[str, Any]) -> None:
        """The daemon has mounted the image, and said this."""
        self._mount = answer.get("mount")
        self.manifest_digest = str(answer.get("manifest_digest"))

    def finish(self, status: int) -> None:
        """The container is gone. Raise what kept it from being ready: ContainerFailed, KeyboardInterrupt, Terminated.

        Blocking: one call of the daemon's.
        """
        if self._signal:
            raise KeyboardInterrupt if self._signal == signal.SIGINT else Terminated
        if self._failed:
            raise ContainerFailed(self._failed + self._last_words())
        if self.answer is None and self._line_at is not None:
            self._end(self._line_at)  # it was ready in its last moment
        if self.answer is None and self._ready.ends and status == 0 and self._ended_at is not None:
            self._end(self._ended_at)
        if self.answer is None:
            waited = f" before there was {self._ready}" if not self._ready.ends else ""
            raise ContainerFailed(f"the container ended with status {status}{waited}{self._last_words()}")

    # -- launch.Observer

    def wrote(self, stream: int, block: bytes) -> None:
        line = self._ready.line
        with self._lock:
            self._last = (self._last + block)[-_KEPT:]
            if line and self._line_at is None:
                text = self._pending[stream] + block
                if line in text:
                    self._line_at = self._now()
                self._pending[stream] = text[-(len(line) - 1) :] if len(line) > 1 else b""

    def enough(self) -> bool:
        now = self._now()
        ready_at = self._line_at
        if ready_at is None and self._ready.port and _accepts(self._ready.port):
            ready_at = self._now()
        if ready_at is None and self._ready.span and now >= self._ready.span:
            ready_at = now
        if ready_at is not None:
            self._end(ready_at)
            return True
        if now < self._patience or self._ready.span:
            return False
        self._failed = f"after {self._patience:g} s there was not yet {self._ready}"
        return True

    def ended(self, status: int) -> None:
        self._ended_at = self._now()

    def cancelled(self, number: int) -> None:
        self._signal = number

    # -- inside

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _end(self, ready_at: float) -> None:
        """End the recording. Blocking. Raise what the daemon says, DaemonFault."""
        if self._daemon is None or self.answer is not None:
            return
        answer = self._daemon.call("trace_end", mount=self._mount, ready=round(ready_at, 3))
        if not isinstance(answer.get("path"), str):
            raise DaemonFault("lazyfsd's answer to trace_end has no path")
        self.answer = answer

    def _last_words(self) -> str:
        with self._lock:
            lines = self._last.decode(errors="replace").strip().splitlines()
        return f"; the last it said is {printable(lines[-1])[-_SHOWN:]!r}" if lines else "; it said nothing"


def _accepts(port: int) -> bool:
    """Tell whether something on this machine accepts connections on a TCP port. Blocking, at most half a second."""
    for address in ("127.0.0.1", "::1"):
        with contextlib.suppress(OSError), socket.create_connection((address, port), _CONNECT):
            return True
    return False
