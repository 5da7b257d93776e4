"""Removing the store: only one that is ours, that nobody holds, and never across a mount."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from lazyfs.config import Settings
from lazyfs.container import mounts
from lazyfs.deploy import units
from lazyfs.deploy.changes import FileChange
from lazyfs.deploy.node import Node
from lazyfs.errors import StoreBroken, StoreLocked, UsageError
from lazyfs.limits import GREETING_TIMEOUT

_MARKS = ("catalog.db", "snapshots.db")  # one of them is in every store; a "lock" is in many other directories


def check(node: Node, settings: Settings, *, stops: bool) -> None:
    """Raise UsageError where the store's directory is not one that may be removed.

    `stops`: the services are stopped before, so that what they hold now is no reason.
    """
    root = node.real(settings.root)
    if not root.exists():
        return
    if not any((root / mark).exists() for mark in _MARKS):
        raise UsageError(f"{settings.root} does not look like a store of lazyfs, and is not removed")
    inside = mounts.below(os.fsencode(root))
    if inside and not stops:
        raise UsageError(f"{os.fsdecode(inside[0].dir)} is mounted in the store", hint="stop its containers first")


def purge(node: Node, settings: Settings) -> None:
    """Remove the store. Blocking, as long as that takes. Raise StoreLocked, StoreBroken, UsageError."""
    check(node, settings, stops=False)
    root = node.real(settings.root)
    if node.is_this and settings.socket.exists() and _answers(settings):
        raise StoreLocked(f"a lazyfsd still runs on {settings.root}", hint="stop it, then remove the directory")
    try:
        if root.exists():
            shutil.rmtree(root)
    except OSError as error:
        raise StoreBroken(f"{settings.root} can't be removed: {error}") from None


def split(found: Iterable[FileChange]) -> tuple[list[FileChange], list[FileChange]]:
    """Return the changes of units, and the others."""
    of_units: list[FileChange] = []
    others: list[FileChange] = []
    for one in found:
        (of_units if one.path.parent == units.DIRECTORY else others).append(one)
    return of_units, others


def _answers(settings: Settings) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        ours.settimeout(GREETING_TIMEOUT)
        try:
            ours.connect(os.fspath(settings.socket))
        except OSError:
            return False
    return True
