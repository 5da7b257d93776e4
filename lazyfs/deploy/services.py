"""systemctl, and containerd asked about itself: what is done on a running node besides writing files."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs.deploy import units
from lazyfs.errors import DaemonFault, ToolMissing, UsageError
from lazyfs.limits import TOOL_TIMEOUT, UNIT_TIMEOUT

_BOOTED = Path("/run/systemd/system")  # sd_booted(3)


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and what it is for."""

    argv: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.argv)


RELOAD = Step(("systemctl", "daemon-reload"))


def systemd_runs() -> bool:
    """Tell whether systemd is this machine's init."""
    return _BOOTED.is_dir()


def steps_to_start(changed_units: Sequence[str], restart_containerd: bool) -> list[Step]:
    """Return what has to be done so that the units run as they are written now. Blocking (asks systemd)."""
    steps = []
    if changed_units:
        steps.append(RELOAD)
    if changed_units or not all(_is("active", name) and _is("enabled", name) for name in units.NAMES):
        steps.append(Step(("systemctl", "enable", "--now", *units.NAMES)))
    snapshotter = units.NAMES[1]
    if snapshotter in changed_units and _is("active", snapshotter):
        # Not lazyfsd: containers read through it.
        steps.append(Step(("systemctl", "restart", snapshotter)))
    if restart_containerd:
        steps.append(Step(("systemctl", "restart", "containerd.service")))
    return steps


def steps_to_stop(restart_containerd: bool) -> list[Step]:
    """Return what stops the units, after containerd was told that they are gone."""
    steps = [Step(("systemctl", "restart", "containerd.service"))] if restart_containerd else []
    return [*steps, Step(("systemctl", "disable", "--now", *reversed(units.NAMES)))]


def perform(step: Step) -> None:
    """Run one step. Blocking, three minutes at most. Raise ToolMissing, DaemonFault."""
    try:
        done = subprocess.run(
            step.argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=UNIT_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise ToolMissing(step.argv[0]) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DaemonFault(f"{step} failed: {error}") from None
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise DaemonFault(f"{step} failed: {reason}", hint="journalctl -u lazyfsd -u lazyfs-snapshotter has more")


def containerd_major() -> int:
    """Return the major version of this machine's containerd; 0: not known. Blocking."""
    text = _output(("containerd", "--version"))
    found = re.search(r"\bv?(\d+)\.\d+", text)
    return int(found[1]) if found else 0


def what_containerd_reads(main: Path) -> dict[str, Any] | None:
    """Return the configuration as containerd merges it; None where it isn't installed. Blocking.

    Raise UsageError with containerd's own words when it refuses it.
    """
    containerd = shutil.which("containerd")
    if containerd is None:
        return None
    try:
        done = subprocess.run(
            (containerd, "-c", str(main), "config", "dump"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TOOL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise UsageError(f"containerd does not take its configuration: {reason}")
    try:
        return tomllib.loads(done.stdout.decode("utf-8", "replace"))
    except tomllib.TOMLDecodeError:
        return None


def _is(state: str, unit: str) -> bool:
    return _output(("systemctl", f"is-{state}", unit)).strip() == state


def _output(argv: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")
