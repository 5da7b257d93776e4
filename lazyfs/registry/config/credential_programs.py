"""Asking docker-credential-NAME programs for logins: with a deadline, bounded, and not more often than needed.

Protocol (docker-credential-helpers, README): `docker-credential-NAME get`, the server on standard input, a JSON object
with Username and Secret on standard output; "credentials not found" and status 1 where there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass

from lazyfs.errors import UsageError
from lazyfs.limits import END_TIMEOUT, MAX_PROGRAM_ANSWER, MAX_PROGRAM_LOGINS, MAX_PROGRAM_WORDS, PROGRAM_TIMEOUT
from lazyfs.registry.config.credentials import Credentials

KEEP_FOUND = 300.0  # seconds
KEEP_NONE = 60.0  # seconds, failures too: a program that hangs must not cost its deadline each time
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_NONE = "credentials not found"
_TOKEN_USER = "<token>"  # the secret is an identity token then


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a program said last: a login, none, or how it failed."""

    since: float  # time.monotonic() when the program was started
    found: Credentials | None
    problem: str = ""

    @property
    def keep(self) -> float:
        """Seconds for which this holds."""
        return KEEP_FOUND if self.found is not None else KEEP_NONE


class CredentialPrograms:
    """Ask programs; remember what they said for some minutes, in memory alone. Thread-safe."""

    def __init__(self, patience: float = PROGRAM_TIMEOUT) -> None:
        self._patience = patience
        self._lock = threading.Lock()
        self._asking: dict[tuple[str, ...], threading.Lock] = {}
        self._kept: dict[tuple[str, ...], _Kept] = {}

    def ask(
        self,
        name: str,
        server: str,
        environment: tuple[tuple[str, str], ...],
        deadline: float,
        not_before: float = 0.0,
    ) -> Credentials | None:
        """Return what docker-credential-`name` has for `server`, None when it has nothing. Blocking.

        An answer from before `not_before` (time.monotonic()) is asked for anew. Several threads asking the same make
        the program run once. Raise UsageError for a program that is missing, fails, hangs or prints rubbish.
        """
        key = (name, server, *(f"{variable}={value}" for variable, value in environment))
        with self._lock:
            if len(self._kept) >= MAX_PROGRAM_LOGINS:
                self._kept.clear()
                self._asking.clear()
            mine = self._asking.setdefault(key, threading.Lock())
        if not mine.acquire(timeout=max(0.0, min(deadline - time.monotonic(), self._patience))):
            raise UsageError(f"the credential helper docker-credential-{name} is still at work for {server}")
        try:
            kept = self._kept.get(key)
            now = time.monotonic()
            if kept is None or kept.since < not_before or now >= kept.since + kept.keep:
                kept = self._run(name, server, dict(environment), min(deadline, now + self._patience))
                self._kept[key] = kept
        finally:
            mine.release()
        if kept.problem:
            raise UsageError(kept.problem, hint="log in anew with docker or podman, or give --creds-file")
        return kept.found

    def _run(self, name: str, server: str, environment: dict[str, str], deadline: float) -> _Kept:
        since = time.monotonic()
        try:
            return _Kept(since, _get(name, server, environment, deadline))
        except UsageError as error:
            return _Kept(since, None, error.message)


def _get(name: str, server: str, environment: dict[str, str], deadline: float) -> Credentials | None:
    program = f"docker-credential-{name[:64]}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:64]!r} is no name of a credential helper")
    path = shutil.which(program, path=environment.get("PATH") or os.defpath)
    if path is None:
        raise UsageError(f"the credential helper {program} is not installed")
    status, answer, words = _converse([path, "get"], server, environment, deadline, program)
    text = answer.decode("utf-8", "replace").strip()
    if status:
        if _NONE in text.lower():
            return None
        # What it printed on standard output is not repeated: that is where secrets come.
        said = _printable(words.decode("utf-8", "replace") if words.strip() else "")
        raise UsageError(f"the credential helper {program} failed with status {status}{': ' + said if said else ''}")
    try:
        document = json.loads(text)
        username, secret = document["Username"], document["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"the credential helper {program} did not answer with a login") from None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise UsageError(f"the credential helper {program} did not answer with a login")
    if not secret:
        return None
    if username == _TOKEN_USER:
        return Credentials("", "", secret, program)
    return Credentials(username, secret, "", program) if username else None


def _converse(
    command: list[str], server: str, environment: dict[str, str], deadline: float, program: str
) -> tuple[int, bytes, bytes]:
    """Run a program in a process group of its own, which is killed whatever happens. Return (status, out, err)."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it can't be called"
        raise UsageError(f"the credential helper {program} can't be started: {reason}") from None
    try:
        out, err = _exchange(process, server.encode(), deadline, program)
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise _hangs(program) from None
        return status, out, err
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT)


def _exchange(process: subprocess.Popen[bytes], question: bytes, deadline: float, program: str) -> tuple[bytes, bytes]:
    """Write the question and read both outputs until the program has ended; children it left behind may go on."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # it may know the answer without reading; 255 bytes fit a pipe
        process.stdin.write(question)
        process.stdin.close()
    out, err = process.stdout.fileno(), process.stderr.fileno()
    parts: dict[int, bytearray] = {out: bytearray(), err: bytearray()}
    try:
        ended = os.pidfd_open(process.pid)
    except OSError as error:
        raise UsageError(f"the credential helper {program} can't be watched: {error.strerror}") from None
    try:
        with selectors.DefaultSelector() as selector:
            for fd in (out, err, ended):
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                ready = {key.fd for key, _ in selector.select(left)} if left > 0 else set()
                if not ready:
                    raise _hangs(program)
                for fd in ready - {ended}:
                    if not _read(fd, parts[fd]):
                        selector.unregister(fd)
                if len(parts[out]) > MAX_PROGRAM_ANSWER:
                    raise UsageError(f"the credential helper {program} printed more than {MAX_PROGRAM_ANSWER} bytes")
                del parts[err][MAX_PROGRAM_WORDS:]
                if ended in ready and ready <= {ended}:
                    return bytes(parts[out]), bytes(parts[err])
    finally:
        os.close(ended)


def _read(fd: int, into: bytearray) -> bool:
    try:
        data = os.read(fd, 1 << 16)
    except BlockingIOError:
        return True
    into += data
    return bool(data)


def _hangs(program: str) -> UsageError:
    return UsageError(f"the credential helper {program} did not answer in time")


def _printable(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(c if c.isprintable() else " " for c in line).strip()[:200]
