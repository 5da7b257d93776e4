"""Calling an OCI runtime (runc, crun): its command lines, and its error messages as ours."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass

from lazyfs.errors import ContainerFailed, ToolMissing
from lazyfs.limits import MAX_RUNTIME_LOG
from lazyfs.process import environment

NOT_EXECUTABLE = 126
NOT_FOUND = 127
_SYSTEM_DIRS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The phrases of runc 1.0–1.3 and crun 1.x for a command that isn't there or can't be executed.
_MISSING = re.compile(r'exec: ".*": .*(not found|no such file or directory)|executable file .* not found', re.I | re.S)
_FORBIDDEN = re.compile(
    r'exec: ".*": .*(permission denied|is a directory)|open executable: permission denied', re.I | re.S
)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime program and where it keeps its state. `cgroups`: whether it is to make control groups."""

    path: str
    state: str
    cgroups: bool

    def _base(self) -> list[str]:
        argv = [self.path, "--root", self.state]
        if not self.cgroups:
            # runc takes what it needs for that out of this flag; crun has a flag for just that.
            argv += ["--cgroup-manager=disabled"] if "crun" in os.path.basename(self.path) else ["--rootless", "true"]
        return argv

    def run_argv(self, identity: str, bundle: str, terminal: bool) -> list[str]:
        """Return the command line that starts a container in the background; its log is bundle/log.json."""
        argv = [*self._base(), "--log", f"{bundle}/log.json", "--log-format", "json", "run", "--detach"]
        if terminal:
            # Relative: a socket's path has 107 bytes at most. The runtime changes to the bundle first.
            argv += ["--console-socket", "console"]
        return [*argv, "--bundle", bundle, "--pid-file", f"{bundle}/pid", identity]

    def delete_argv(self, identity: str) -> list[str]:
        """Return the command line that kills and forgets a container; it succeeds when there is none."""
        return [*self._base(), "delete", "--force", identity]


def find(name: str) -> str:
    """Return the path of the runtime program `name`. Raise ToolMissing."""
    path = _which(name)
    if path is None:
        package = os.path.basename(name) if os.path.basename(name) in ("runc", "crun") else "runc"
        raise ToolMissing(name, hint=f"apt install {package}")
    return os.path.abspath(path)


def _which(name: str) -> str | None:
    if "/" in name:
        return name if os.path.isfile(name) and os.access(name, os.X_OK) else None
    # An ordinary user's PATH often lacks the sbin directories, where distributions put runtimes.
    for part in f"{os.environ.get('PATH', '')}:{_SYSTEM_DIRS}".split(":"):
        path = os.path.join(part, name)
        if part and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def start(argv: list[str], stdin: int, stdout: int, stderr: int) -> int:
    """Start `argv` with the given descriptors as 0–2 and nothing else open; return its pid. Raise ContainerFailed."""
    try:
        return os.posix_spawn(
            argv[0],
            argv,
            environment(),
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout, stderr))],
            # Python ignores these two, and an ignored signal stays ignored in the container.
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except OSError as error:
        raise ContainerFailed(f"the runtime {argv[0]} can't be started: {error.strerror}") from None


def failure(log_path: str, command: str) -> ContainerFailed:
    """Return the error for a runtime that ended with a failure, from the last error in its JSON log.

    `status` is docker's: 127 for a command that is not there, 126 for one that can't be executed, else 125.
    """
    reason = ""
    try:
        with open(log_path, "rb") as handle:
            lines = handle.read(MAX_RUNTIME_LOG).splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal") and entry.get("msg"):
            reason = str(entry["msg"])
    shown = reason[:600] or "it gave no reason"
    if _MISSING.search(reason):
        return ContainerFailed(f"{command[:200]!r} is not in the image: {shown}", status=NOT_FOUND)
    if _FORBIDDEN.search(reason):
        return ContainerFailed(f"{command[:200]!r} can't be executed: {shown}", status=NOT_EXECUTABLE)
    return ContainerFailed(f"the runtime refused to start the container: {shown}")
