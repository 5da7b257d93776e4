"""The mounts of a snapshot: a bind where one directory is enough, else one overlay of all.

Sources: Linux, Documentation/filesystems/overlayfs.rst; containerd mounts what is said here with mount(2), whose
options have one page. So directories have short names.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lazyfs.errors import DaemonFault, SnapshotInvalid
from snapshotter.directories import Directories
from snapshotter.labels import PARENT_CHAIN
from snapshotter.model import GID_LABEL, UID_LABEL, Kind, Mount, Snapshot

log = logging.getLogger(__name__)

_INDEX = "/sys/module/overlay/parameters/index"
_WHOLE_MAP = ["0", "0", "4294967295"]  # the user namespace that is none
_MAX_ID = (1 << 32) - 2
_MNT_DETACH = 2
_MS_RDONLY = 1


@dataclass(frozen=True, slots=True)
class Overlay:
    """Makes mounts. `options` are those that this kernel needs on every overlay."""

    directories: Directories
    options: tuple[str, ...] = ()

    def mounts(self, snapshot: Snapshot, parents: Sequence[int], lazy: Sequence[str] = ()) -> list[Mount]:
        """Return the mounts of an active snapshot or a view.

        `parents`: the numbers of the ordinary snapshots below it, nearest first; `lazy`: the directories of what lies
        below them, as the daemon gave them. Raise DaemonFault for directories that can't be.
        """
        mapped = _mapping(snapshot.labels)
        view = snapshot.kind == Kind.VIEW
        lower = [*map(self.directories.fs, parents), *map(_check, lazy)]
        if snapshot.lazy is not None:  # staged: nothing is to be written, the layer is there
            return [Mount("bind", self.directories.fs(snapshot.number), ("ro", "rbind"))]
        if not lower and not view and snapshot.labels.get(PARENT_CHAIN):
            # Prepared apart from its parent (containerd 2.3 and newer, in parallel): who unpacks into a bind carries
            # out whiteouts, though they must be kept; into an overlay's upper directory they are written down.
            return [Mount("overlay", "overlay", self._upper(snapshot.number))]
        if not lower:
            source = self.directories.fs(snapshot.number)
            return [Mount("bind", source, (*mapped, "ro" if view else "rw", "rbind"))]
        if view and len(lower) == 1:
            return [Mount("bind", lower[0], (*mapped, "ro", "rbind"))]
        upper: tuple[str, ...] = ()
        if not view:
            upper = self._upper(snapshot.number)
        return [Mount("overlay", "overlay", (*mapped, *upper, "lowerdir=" + ":".join(lower), *self.options))]

    def _upper(self, number: int) -> tuple[str, str]:
        return f"workdir={self.directories.work(number)}", f"upperdir={self.directories.fs(number)}"


def _check(directory: str) -> str:
    if not directory.startswith("/") or any(c in ":,\\\n" for c in directory):
        raise DaemonFault(f"lazyfsd shows a chain at {directory[:200]!r}, which overlayfs can't take")
    return directory


def _mapping(labels: Mapping[str, str]) -> tuple[str, ...]:
    uid, gid = labels.get(UID_LABEL), labels.get(GID_LABEL)
    return (f"uidmap={uid}", f"gidmap={gid}") if uid and gid else ()


def mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the node's user and group that are root in the pod's user namespace; None: the pod has none.

    Raise SnapshotInvalid for labels that map no root.
    """
    uid, gid = labels.get(UID_LABEL), labels.get(GID_LABEL)
    if not uid and not gid:
        return None
    return _root_of(uid or "", UID_LABEL), _root_of(gid or "", GID_LABEL)


def _root_of(mapping: str, label: str) -> int:
    for part in mapping.split(","):
        words = part.split(":")
        if len(words) != 3 or not all(word.isascii() and word.isdecimal() and len(word) <= 10 for word in words):
            raise SnapshotInvalid(label, f"the label {label} is no list of CONTAINER:HOST:SIZE: {mapping[:80]!r}")
        inside, outside, size = map(int, words)
        if inside == 0 and size > 0 and outside <= _MAX_ID:
            return outside
    raise SnapshotInvalid(label, f"the label {label} maps no root: {mapping[:80]!r}")


def kernel_options(root: Path) -> tuple[str, ...]:
    """Return the options that overlays need here. Blocking: inside a user namespace one is mounted below `root`."""
    options = []
    if _in_user_namespace() and _takes_userxattr(root):
        options.append("userxattr")
    if os.path.exists(_INDEX):
        options.append("index=off")  # with an index a lower directory can't be below two overlays
    return tuple(options)


def _in_user_namespace() -> bool:
    try:
        return Path("/proc/self/uid_map").read_text().split() != _WHOLE_MAP
    except OSError:
        return False


def _takes_userxattr(root: Path) -> bool:
    """Tell whether this kernel mounts an overlay with userxattr, by doing it."""
    libc = ctypes.CDLL(None, use_errno=True)
    scratch = tempfile.mkdtemp(prefix="overlay-check-", dir=root)
    try:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{scratch}/{name}")
        target = os.fsencode(f"{scratch}/merged")
        options = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work,userxattr"
        if libc.mount(b"overlay", target, b"overlay", ctypes.c_ulong(_MS_RDONLY), os.fsencode(options)) != 0:
            log.info("overlays are mounted without userxattr: %s", os.strerror(ctypes.get_errno()))
            return False
        libc.umount2(target, _MNT_DETACH)
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
