"""Removing one dead container: what its runtime still knows of it, its control groups, its directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lazyfs import private
from lazyfs.config import Settings
from lazyfs.container import directory as directories
from lazyfs.container import namespaces
from lazyfs.container.directory import ContainerDir
from lazyfs.container.runtime import Runtime
from lazyfs.errors import StoreBroken
from lazyfs.limits import DELETE_TIMEOUT

_RUNTIME_FILE = "runtime"


def note_runtime(found: ContainerDir, runtime: Runtime) -> None:
    """Write down which runtime has the container, for the sweep after a crash. Raise StoreBroken."""
    try:
        private.write_text(found.at(_RUNTIME_FILE), runtime.path)
    except OSError as error:
        raise StoreBroken(f"{found.path} can't be written: {error.strerror}") from None


def discard(settings: Settings, found: ContainerDir) -> None:
    """Remove a dead container: its state with the runtime where it still has any, its directory. Blocking.

    Raise StoreBroken, ContainerFailed or MountFailed when the directory can't be removed.
    """
    if runtime_state(settings).joinpath(found.identity).exists():
        _forget(settings, found)
    if os.geteuid() != 0:
        _remove_as_root_of_namespace(found.path)
    directories.remove(found)


def runtime_state(settings: Settings) -> Path:
    """Where runtimes keep their state: on the file system that a reboot empties."""
    return settings.run / "runtime"


def _forget(settings: Settings, found: ContainerDir) -> None:
    import subprocess

    try:
        path = found.at(_RUNTIME_FILE).read_text()
    except OSError:
        return  # it had not come to the runtime yet
    runtime = Runtime(path, str(runtime_state(settings)), os.geteuid() == 0)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # the program is gone or hangs: the rest still goes
        subprocess.run(
            runtime.delete_argv(found.identity),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=DELETE_TIMEOUT,
            check=False,
        )


def _remove_as_root_of_namespace(path: Path) -> None:
    """Delete a writable layer with files of subordinate users, which our own account may not touch."""
    maps = namespaces.find_id_maps()
    if maps.ids == 1 or not path.joinpath("upper").is_dir():
        return

    def body(report: namespaces.Report) -> int:
        for part in ("upper", "work"):
            directories.remove_tree(path / part)
        return 0

    child = namespaces.spawn(body, maps)
    os.waitpid(child.pid, 0)
    os.close(child.reports)
    os.close(child.alive)
