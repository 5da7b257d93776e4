"""Asking before a command changes the node."""

from __future__ import annotations

import sys

from lazyfs.cli.output import Output
from lazyfs.errors import UsageError


def ask(question: str, out: Output, *, yes: bool, dry_run: bool) -> bool:
    """Tell whether to go on: as the flags say, or the user on a terminal. Blocking.

    Raise UsageError where there is no flag and no terminal.
    """
    if dry_run:
        out.note("nothing was changed (--dry-run)")
        return False
    if yes:
        return True
    if out.is_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("nothing was changed: there is nobody to ask", hint="look at what it shows, then add --yes")
    out.line(f"{question} [y/N]")
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    out.note("nothing was changed")
    return False
