"""A container from image to exit status: bundle, supervisor, signals, output, tidying up."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from lazyfs import private
from lazyfs.config import Settings
from lazyfs.container import bundle, discard, host, namespaces, rootfs, supervisor, users
from lazyfs.container.directory import ContainerDir
from lazyfs.container.namespaces import Child
from lazyfs.container.options import RunOptions, parse_image_defaults
from lazyfs.container.runtime import Runtime
from lazyfs.container.terminal import Console
from lazyfs.errors import ContainerFailed, StoreBroken
from lazyfs.limits import CONSOLE_TIMEOUT, CONTAINER_STOP, MAX_REPORT, RUNTIME_START

_KILL_AT_INTERRUPT = 3  # a program that ignores Ctrl-C is killed at the third
_LOOK = 0.02  # seconds between two questions to an observer


@dataclass(frozen=True, slots=True)
class Image:
    """A mounted image: the directory that is its read-only root file system, and its whole config document."""

    path: str
    document: dict[str, Any]


class Observer(Protocol):
    """Looks on while a container runs, and has it stopped once it has seen enough. None of these may take long."""

    def wrote(self, stream: int, block: bytes) -> None:
        """The container wrote to its stdout (1) or stderr (2). Called from other threads; never raises."""
        ...

    def enough(self) -> bool:
        """Return whether the container is to be stopped. Asked some fifty times a second while it runs."""
        ...

    def ended(self, status: int) -> None:
        """The container ended with this exit status; what it wrote may still be on the way."""
        ...

    def cancelled(self, number: int) -> None:
        """SIGINT or SIGTERM came to us: the container is being stopped for it."""
        ...


def run(
    settings: Settings,
    place: ContainerDir,
    image: Image,
    options: RunOptions,
    runtime_path: str,
    observer: Observer | None = None,
) -> int:
    """Run one container in the foreground, with our stdin, stdout and stderr; return its exit status (128 + signal).

    With an observer all of its output goes to our stderr, and SIGINT stops it instead of being handed on.
    `place` is emptied and its runtime state forgotten at the end, but stays the caller's to discard. Blocking. Raise
    ContainerFailed (its `status` says 125, 126 or 127), MountFailed, UsageError, DocumentInvalid, StoreBroken.
    """
    defaults = parse_image_defaults(image.document)
    rootfs.check_system_directories(image.path)
    maps = namespaces.find_id_maps() if os.geteuid() != 0 else None
    machine = host.look(maps.ids if maps else 0)
    user = users.resolve(image.path, options.user or defaults.user)
    name = bundle.hostname(place.identity, options, machine)
    taken = {volume.target for volume in options.volumes}
    binds = [
        bundle.Bind(source, target, False)
        for source, target in rootfs.write_host_files(place.path, name, options.network)
        if target not in taken
    ]
    binds += [
        bundle.Bind(rootfs.staged_path(place.path, number), volume.target, volume.read_only)
        for number, volume in enumerate(options.volumes)
    ]
    config = bundle.build(
        place.identity,
        rootfs=str(place.at("rootfs")),
        options=options,
        image=defaults,
        user=user,
        host=machine,
        binds=binds,
    )
    runtime = Runtime(runtime_path, str(discard.runtime_state(settings)), bool(machine.cgroup))
    _write_bundle(place.path, config, runtime)
    console = Console(
        place.path,
        terminal=options.terminal,
        interactive=options.interactive,
        hears=None if observer is None else observer.wrote,
    )
    try:
        if not machine.rootless:
            console.own(user.uid, user.gid)
        plan = supervisor.Plan(
            place.identity,
            place.path,
            image.path,
            machine.rootless,
            options.volumes,
            config["process"]["args"][0],
            runtime,
            options.terminal,
            defaults.stop_signal,
            console.container_ends,
        )
        discard.note_runtime(place, runtime)
        child = namespaces.spawn(
            lambda report: supervisor.supervise(plan, report), maps, (*console.container_ends, place.lock)
        )
        console.close_container_ends()
        timeout = settings.read_timeout + RUNTIME_START if settings.read_timeout else None
        return _Attendance(child, console, defaults.stop_signal, observer).attend(timeout)
    finally:
        console.close()


def _write_bundle(path: Path, config: dict[str, Any], runtime: Runtime) -> None:
    try:
        private.make_directory(Path(runtime.state))
        private.write_text(path / "config.json", json.dumps(config))
    except OSError as error:
        raise StoreBroken(f"the container's bundle can't be written to {path}: {error.strerror}") from None


class _Attendance:
    """Watches over one supervised container: hands signals on, carries its output, learns how it ended."""

    def __init__(self, child: Child, console: Console, stop_signal: int, observer: Observer | None = None) -> None:
        self._observer = observer
        self._child = child
        self._console = console
        self._stop_signal = stop_signal
        self._kill_at: float | None = None
        self._terms = 0
        self._interrupts = 0
        self._started = False
        self._status: int | None = None
        self._error: ContainerFailed | None = None
        self._pending = b""

    def attend(self, start_timeout: float | None) -> int:
        """Return the container's exit status. Blocks until its end. Raise ContainerFailed when it did not start.

        An exception on the way (Ctrl-C before the start, say) kills everything that runs in the namespaces.
        """
        if start_timeout is not None:
            self._kill_at = time.monotonic() + start_timeout
        reaped = False
        try:
            with _waker() as wake:
                self._watch(wake)
                if self._started:
                    self._console.drain(lambda: self._terms + self._interrupts > 1)
                _, status = os.waitpid(self._child.pid, 0)
                reaped = True
        finally:
            if not reaped:
                self._kill()
                os.waitpid(self._child.pid, 0)
            os.close(self._child.reports)
            os.close(self._child.alive)
        if self._error is not None:
            raise self._error
        if not self._started:
            raise ContainerFailed("the container did not start in time, or its supervisor was killed")
        return self._status if self._status is not None else 128 + (os.WTERMSIG(status) or signal.SIGKILL)

    def _watch(self, wake: int) -> None:
        """Serve events until the supervisor closes its end of the reports."""
        poll = select.poll()
        poll.register(self._child.reports, select.POLLIN)
        poll.register(wake, select.POLLIN)
        listener = self._console.waiting
        if listener is not None:
            poll.register(listener, select.POLLIN)
        while True:
            left = None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic()) * 1000
            if self._is_observed:
                left = _LOOK * 1000  # until it is stopped there is no time at which it is killed
            ready = {descriptor for descriptor, _ in poll.poll(left)}
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill_at = None
                self._kill()
            if wake in ready:
                os.read(wake, 64)
            if listener is not None and listener in ready:
                poll.unregister(listener)
                listener = None
                self._console.receive(CONSOLE_TIMEOUT)
            if self._child.reports in ready and not self._take_reports():
                return
            if self._is_observed and self._observer is not None and self._observer.enough():
                self._stop()

    @property
    def _is_observed(self) -> bool:
        """Whether the container runs, and nobody has stopped it yet."""
        return self._observer is not None and self._started and self._status is None and not self._terms

    def _take_reports(self) -> bool:
        block = os.read(self._child.reports, 4096)
        self._pending += block
        *lines, self._pending = self._pending.split(b"\n")
        if len(self._pending) > MAX_REPORT:
            raise ContainerFailed("the supervisor reports without end")
        for line in lines:
            report = json.loads(line)
            if "started" in report:
                self._started = True
                self._kill_at = None
                for number in supervisor.PASSED_ON:
                    signal.signal(number, self._on_signal)
                self._console.connect()
            elif "ended" in report:
                self._status = int(report["ended"])
                self._kill_at = None
                if self._observer is not None:
                    self._observer.ended(self._status)
            elif "error" in report:
                self._error = ContainerFailed(report["error"], hint=report["hint"], status=report["status"])
        return bool(block)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._observer is not None and number in (signal.SIGINT, signal.SIGTERM):
            self._observer.cancelled(number)
            self._stop()
        elif number == signal.SIGTERM:
            self._stop()
        elif number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= _KILL_AT_INTERRUPT:
                self._kill()
            else:
                self._send(number)
        else:
            if number == signal.SIGWINCH:
                self._console.resize()
            self._send(number)

    def _stop(self) -> None:
        """Ask the container to end, and see to it that it does; the second time kill it."""
        self._terms += 1
        if self._terms > 1:
            self._kill()
        else:
            self._kill_at = time.monotonic() + CONTAINER_STOP
            self._send(self._stop_signal)

    def _kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self._status is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago; we have not reaped it yet
                os.kill(self._child.pid, number)


@contextlib.contextmanager
def _waker() -> Iterator[int]:
    """Make signals end a poll: yield a descriptor that turns readable with each. Handlers are put back at the end."""
    before = {number: signal.getsignal(number) for number in supervisor.PASSED_ON}
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
