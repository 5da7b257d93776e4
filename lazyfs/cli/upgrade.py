"""lazyfs upgrade: have the lazyfs that is installed now serve the mounts, and no reader notice."""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.errors import DaemonFault, DaemonUnreachable, UsageError
from lazyfs.limits import UPGRADE_TIMEOUT

if TYPE_CHECKING:
    from lazyfs.cli.output import Output
    from lazyfs.config import Settings

_LOOK = 0.05
_EPILOG = """\
examples:
  pip install --upgrade lazyfs && lazyfs upgrade     readers wait some milliseconds, mounts stay as they are

The new code is loaded beside the old one before that ends. Where it can't be loaded the old one goes on.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("upgrade", epilog=_EPILOG)
    common.add_usual(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Have the holder put a new daemon in place of the one that serves. Blocking, a minute at most.

    Raise DaemonUnreachable where none runs, UsageError where none holds its connection, DaemonFault where the new one
    does not come.
    """
    settings = common.settings(args)
    before = _look(settings)
    holder = before["holder"]
    if not holder:
        raise UsageError(
            "this lazyfsd has no holder, so its mounts go when it ends",
            hint="lazyfs doctor says whether it could have one; unmount all, and the next command starts it anew",
        )
    try:
        os.kill(holder, signal.SIGHUP)
    except ProcessLookupError:
        raise DaemonFault("the holder has just ended, the old lazyfsd goes on", hint="try again") from None
    after = _await(settings, before["pid"])
    out.line(f"lazyfsd {before['version']} (pid {before['pid']}) → {after['version']} (pid {after['pid']})")
    out.json({"before": before, "after": after})
    return exit_codes.OK


def _await(settings: Settings, before: int) -> dict[str, Any]:
    deadline = time.monotonic() + UPGRADE_TIMEOUT
    while time.monotonic() < deadline:
        time.sleep(_LOOK)
        try:
            found = _look(settings)
        except DaemonUnreachable:
            continue  # between both
        if found["pid"] != before:
            return found
    raise DaemonFault("the new lazyfsd did not take over, the old one goes on", hint="its log says why")


def _look(settings: Settings) -> dict[str, Any]:
    """Return version, process and holder of the daemon that serves."""
    from lazyfs import control_client

    with control_client.open_daemon(settings, start=False) as daemon:
        found = daemon.call("status", timeout=UPGRADE_TIMEOUT)["daemon"]
    return {name: found.get(name) for name in ("version", "pid", "holder")}
