"""Cold starts, measured the way a user feels them: from the command to the first byte of its output."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import real

DEADLINE = 300.0  # seconds for a start


class StartFailed(Exception):
    """A start without the expected output, with what the command said instead."""


@dataclass(frozen=True, slots=True)
class Started:
    """One start: seconds until the first byte of output, seconds until the command's end, its whole output."""

    first_output: float
    end: float
    output: str


def start(
    command: list[str],
    log: Path,
    at_first_output: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
) -> Started:
    """Run a command until it ends; `at_first_output` is called while it may wait for the end of its stdin.

    Raise StartFailed when it ends with a status other than 0, says nothing, or takes longer than DEADLINE.
    """
    began = time.monotonic()
    with (
        log.open("ab") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], DEADLINE)
            first = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            first_output = time.monotonic() - began
            if first:
                at_first_output()
            process.stdin.close()
            rest = process.stdout.read()
            status = process.wait(DEADLINE)
        except BaseException:
            process.kill()
            raise
    if status or not first:
        raise StartFailed(f"{' '.join(command)} ended with {status}: {log.read_text(errors='replace')[-2000:]}")
    return Started(first_output, time.monotonic() - began, (first + rest).decode(errors="replace"))


def drop_caches() -> None:
    """Make the machine forget what it read. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def lazyfs(root: Path, *words: str) -> list[str]:
    """Return the command line of `lazyfs` of this tree with a store of its own."""
    return [str(Path(sys.executable).with_name("lazyfs")), "--root", str(root), *words]


def lazyfs_env(directory: Path) -> dict[str, str]:
    """Return our environment with lazyfs' defaults in it, and its sockets and mounts below `directory`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LAZYFS_")}
    return kept | {"LAZYFS_CONFIG": os.devnull, "LAZYFS_RUN": str(directory / "u")}


def until_gone(root: Path, seconds: float = 30.0) -> None:
    """Wait until the daemon of the store `root` has ended by itself, so that the next run has the machine alone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and real.processes_with(os.fsencode(root)):
        time.sleep(0.05)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a directory on disk with a short path; end, unmount and remove everything in it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="lazyfs-perf-", dir="/var/tmp"))
    try:
        yield directory
    finally:
        for pid, _ in real.processes_with(os.fsencode(directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        real.unmount_below(directory)
        shutil.rmtree(directory, ignore_errors=True)
