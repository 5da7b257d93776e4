"""Removing what crashed runs left behind: runtime state, control groups, directories; and which mounts are ours."""

from __future__ import annotations

import logging
import os
import shutil

from lazyfs.config import Settings
from lazyfs.container import attached, mounts
from lazyfs.container import directory as directories
from lazyfs.container.discard import discard
from lazyfs.errors import LazyfsError

log = logging.getLogger(__name__)


def sweep(settings: Settings) -> int:
    """Remove every container of `settings.root` whose owner is gone; return how many. Blocking; logs what fails.

    Writable layers of mounts before the last boot go too.
    Cheap when there is nothing to do: one directory listing and a flock for each container that runs.
    """
    count = 0
    try:
        for state in attached.stale_states(settings):
            try:
                directories.remove_tree(state)
            except LazyfsError as error:
                log.warning("the writable layer of a mount before the last boot stays: %s", error)
    except LazyfsError as error:
        log.warning("writable layers of earlier mounts can't be swept: %s", error)
    try:
        for found in directories.leftovers(settings):
            try:
                discard(settings, found)
                count += 1
            except LazyfsError as error:
                log.warning("container %s of a crashed run stays: %s", found.identity, error)
    except LazyfsError as error:
        log.warning("crashed runs can't be swept: %s", error)
    return count


def is_ours(settings: Settings, directory: str) -> bool:
    """Tell whether what is mounted at `directory` is what `lazyfs mount` put there: it may be another mount by now.

    Blocking (the mount table, a small file).
    """
    found = mounts.top_at(os.fsencode(directory))
    known = attached.recall(settings, directory)
    if found is None or known is None:
        return found is not None and found.kind == "fuse.lazyfs"
    return found.device == known.device


def is_below(settings: Settings, path: str) -> bool:
    """Tell whether a directory to be removed later lies where we keep such directories. Doesn't block."""
    clean = os.path.normpath(path)
    return any(clean.startswith(f"{root}/") for root in (settings.root, settings.run))


def take_away(settings: Settings, directory: str, kind: str, state_dir: str) -> None:
    """Unmount a directory that shows an image, and remove its writable layer. Blocking; logs what fails."""
    try:
        if directory and kind != "container" and is_ours(settings, directory):
            if os.geteuid() == 0:
                mounts.umount(os.fsencode(directory), lazy=True)
            else:
                mounts.umount_user(os.fsencode(directory), lazy=True)
    except (LazyfsError, OSError) as error:
        log.warning("%s stays mounted: %s", directory, error)
    remove_state(state_dir)


def remove_state(state_dir: str) -> None:
    """Remove a writable layer, as far as it goes; "" is none. Blocking."""
    if state_dir:
        shutil.rmtree(state_dir, ignore_errors=True)
