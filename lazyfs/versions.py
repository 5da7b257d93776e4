"""Which versions of a file on the disk are read: an upgrade, and a step back, must not cost a node its store.

Of files that hold what can't be made again (catalog, chunks' flags, what is known of a layer, snapshots) a release
changes the layout only so that the release before can go on with them: what is new is left aside by that one. So a file
of the next version is read as one of ours. What is made from these (tables, trees, images) is made again.
"""

from __future__ import annotations


def is_readable(version: object, ours: int) -> bool:
    """Tell whether a file of this version can be used as it is: ours, or the one that the next release writes."""
    return version in (ours, ours + 1)


def is_too_new(version: object, ours: int) -> bool:
    """Tell whether a file is of a release behind the next one: nothing is known of it, and it must stay as it is."""
    return isinstance(version, int) and version > ours + 1
