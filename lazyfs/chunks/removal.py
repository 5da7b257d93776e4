"""Layer directories on their way out of the store, in two steps: out of everybody's sight, then removed.

What a crash leaves between the two, and files that were only half made, are swept by the next one who has the store
alone. Functions on the directory of all layers; they block on the local disk and raise OSError where nothing else is
named.
"""

from __future__ import annotations

import fcntl
import logging
import os

from lazyfs import digest as digests
from lazyfs.chunks.private_files import OwnedFd, open_directory, open_file, remove_tree
from lazyfs.errors import StoreBroken

log = logging.getLogger(__name__)

_GONE = ".gone-"  # directories on their way out
_UNFINISHED = 3600.0  # seconds after which a directory without chunks is taken for the rest of a crash
_HALVES = (".new", ".again", ".tmp")  # endings of files that get their name only when they are whole


def sweep(layers: OwnedFd) -> None:
    """Finish removals that a crash cut short, and drop files that were only half made. Raise StoreError too."""
    for name in os.listdir(layers.number):
        if name.startswith(_GONE):
            remove_tree(layers, name)
        elif digests.is_digest(f"sha256:{name}"):
            _drop_halves(layers, name)


def _drop_halves(layers: OwnedFd, name: str) -> None:
    directory = open_directory(layers, name, create=False)
    for inner in os.listdir(directory.number) if directory is not None else ():
        if directory is not None and (inner.startswith(".") or inner.endswith(_HALVES)):
            log.info("left by a crash: layer=sha256:%s file=%s", name, inner)
            os.unlink(inner, dir_fd=directory.number)


def hide(layers: OwnedFd, digest: str, now: float) -> str | None:
    """Take a layer's directory out of everybody's sight; return the name that `remove_tree` takes.

    None: another process has it open, or is just filling it (no chunks yet, younger than an hour). Raise StoreBroken
    when it isn't there.
    """
    directory = open_layer(layers, digest)
    chunks = open_file(directory, "chunks", create=False)
    if chunks is None:
        if now - os.fstat(directory.number).st_mtime < _UNFINISHED:
            return None
    else:
        try:
            fcntl.flock(chunks.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    name = digests.hex_of(digest)
    gone = f"{_GONE}{name}-{os.getpid()}"
    os.rename(name, gone, src_dir_fd=layers.number, dst_dir_fd=layers.number)
    return gone


def is_open(layers: OwnedFd, digest: str) -> bool:
    """Tell whether any process has a layer's chunks open, this one included."""
    chunks = open_file(open_layer(layers, digest), "chunks", create=False)
    try:
        if chunks is not None:
            fcntl.flock(chunks.number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go with the descriptor
    except BlockingIOError:
        return True
    return False


def usage(layers: OwnedFd, digest: str) -> int:
    """Return the bytes that a layer's directory takes on disk, all files together. Never raises."""
    used = 0
    try:
        directory = open_layer(layers, digest)
        with os.scandir(directory.number) as entries:
            for entry in entries:
                used += entry.stat(follow_symlinks=False).st_blocks * 512
    except (OSError, StoreBroken):
        return used  # a file or the directory has gone meanwhile
    return used


def inodes(layers: OwnedFd, digest: str) -> int:
    """Return how many inodes a layer's directory takes, itself included. Never raises."""
    try:
        directory = open_layer(layers, digest)
        return 1 + len(os.listdir(directory.number))
    except (OSError, StoreBroken):
        return 0


def open_layer(layers: OwnedFd, digest: str) -> OwnedFd:
    """Open a layer's directory. Raise StoreBroken when it isn't there."""
    directory = open_directory(layers, digests.hex_of(digest), create=False)
    if directory is None:
        raise StoreBroken(f"layer {digest} is not in the store")
    return directory
