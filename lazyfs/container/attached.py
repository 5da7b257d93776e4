"""What `lazyfs mount` has put where: a small file a mount, so that it can be taken away even when the daemon is dead.

<run>/attached/<hash of DIR>.json, gone with the next boot as the mounts are; the writable layers of --rw lie in
<root>/rw/<id>/{upper, work}.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lazyfs import private
from lazyfs.config import Settings
from lazyfs.errors import StoreBroken, StoreFull
from lazyfs.limits import MAX_ATTACHED

_KINDS = ("ro", "rw", "solo")


@dataclass(frozen=True, slots=True)
class Attached:
    """One mount. `dir` is absolute and free of symlinks; `kind` "ro", "rw" or "solo" (a daemon of its own on it).

    `mount` is the daemon's id for it; `state_dir` the writable layer's directory or ""; `boot` the boot it belongs to;
    `device` ("major:minor") that of its file system, to tell it from a mount that somebody puts over it.
    """

    dir: str
    kind: str
    mount: str
    state_dir: str
    boot: str
    device: str


def boot_id() -> str:
    """Return the identity of this boot of the machine (random(4))."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return handle.read().strip()
    except OSError as error:
        raise StoreBroken(f"the boot id can't be read: {error.strerror}") from None


def remember(settings: Settings, attached: Attached) -> None:
    """Write a mount down, in one step. Blocking. Raise StoreFull or StoreBroken."""
    path = _path(settings, attached.dir)
    with _disk(path.parent):
        private.make_directory(path.parent)
        fresh = path.with_suffix(".new")
        private.write_text(fresh, json.dumps(asdict(attached)))
        fresh.replace(path)


def recall(settings: Settings, directory: str) -> Attached | None:
    """Return what is known of the mount at `directory`; None for no file, a damaged one, or one of another boot."""
    found = _read(_path(settings, directory))
    return found if found is not None and (found.dir, found.boot) == (directory, boot_id()) else None


def forget(settings: Settings, directory: str) -> None:
    """Remove what is written down about `directory`. Raise StoreBroken."""
    with _disk(settings.run):
        _path(settings, directory).unlink(missing_ok=True)


def new_state(settings: Settings) -> Path:
    """Make the directory of a writable layer. Blocking. Raise StoreFull or StoreBroken."""
    path = settings.root / "rw" / os.urandom(8).hex()
    with _disk(path.parent):
        private.make_directory(path.parent)
        path.mkdir(mode=0o700)
        for part in ("upper", "work"):
            (path / part).mkdir(mode=0o755)
        private.write_text(path / "boot", boot_id())
    return path


def stale_states(settings: Settings) -> list[Path]:
    """Return the writable layers of earlier boots: nothing can be mounted on them any more. Blocking.

    Raise StoreBroken when they lie in a directory that is not ours.
    """
    base = settings.root / "rw"
    try:
        private.check_directory(base)
        entries = [Path(entry.path) for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    now = boot_id()
    return [path for path in entries if _boot_of(path) not in (now, "")]


def _boot_of(state: Path) -> str:
    try:
        with open(state / "boot", encoding="ascii", errors="replace", opener=private.opened) as handle:
            return handle.read(64).strip()
    except OSError:
        return ""


def _path(settings: Settings, directory: str) -> Path:
    return settings.run / "attached" / (hashlib.sha256(os.fsencode(directory)).hexdigest()[:32] + ".json")


def _read(path: Path) -> Attached | None:
    try:
        with open(path, encoding="utf-8", opener=private.opened) as handle:
            value = json.loads(handle.read(MAX_ATTACHED))
        found = Attached(**{name: str(value[name]) for name in Attached.__slots__})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.kind in _KINDS else None


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"no space left in {place}") from None
        raise StoreBroken(f"{place} can't be written: {error.strerror}") from None
