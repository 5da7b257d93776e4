"""Removing what crashed runs left behind: runtime state, control groups, directories; and which mounts are ours."""

from __future__ import annotations

import logging
import os

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
