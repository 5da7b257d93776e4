"""An OCI layout directory as a repository. Source: OCI image-spec 1.1, image-layout.md.

Blobs appear by rename, and index.json is replaced whole under a lock: readers never see half of anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lazyfs import digest as digests
from lazyfs.errors import PushRejected, RegistryTimeout
from lazyfs.limits import LOCK_TIMEOUT
from lazyfs.registry.local.files import PIECE, OpenRange, fault
from lazyfs.registry.local.layout_read import (
    INDEX,
    MARKER,
    LayoutReader,
    Missing,
    blob_name,
    index_bytes,
    marker_bytes,
    new_entry,
)
from lazyfs.registry.repository import Repository

LOCK_POLL = 0.02  # seconds


class LayoutRepository(LayoutReader):
    """One OCI layout directory (the Repository protocol). Thread-safe: it holds nothing but its path.

    Writing creates the directory and what belongs into it. `host` is the path, for error messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name or str(path)
        self.host = str(path)

    def close(self) -> None:
        """Nothing is held open between calls."""

    def open_file(self, name: str, what: str, missing: Missing) -> OpenRange:
        """Return a file of the directory; see LayoutReader."""
        return open_regular(self.path / name, self.host, what, missing)

    # -- write -----------------------------------------------------------------------------------------------------

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Write a blob file, hashing on the way; see Repository. Raise PushRejected for other bytes than promised."""
        if self.has_blob(digest):
            return False
        self._create()
        hasher = hashlib.sha256()
        left = size
        with self._new_file(self.path / blob_name(digest)) as out:
            while left and (piece := source.read(min(PIECE, left))):
                hasher.update(piece)
                out.write(piece)
                left -= len(piece)
            actual = "sha256:" + hasher.hexdigest()
            if left or actual != digest:
                raise PushRejected(self.host, f"the bytes for blob {digest} have digest {actual}, or are too few")
        return True

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Store a manifest, and unless `target` is a digest name it in index.json. See Repository."""
        digest = digests.of(raw)
        if digests.is_digest(target) and target != digest:
            raise PushRejected(self.host, f"the manifest for {target} has digest {digest}")
        changed = new_entry(target, media_type, raw)
        self._create()
        if not self.has_blob(digest):
            with self._new_file(self.path / blob_name(digest)) as out:
                out.write(raw)
        if changed is not None:
            with locked(self.path, self.host):
                document = changed(self.index_document())
                with self._new_file(self.path / INDEX) as out:
                    out.write(index_bytes(document))

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """False: a blob of another directory is copied."""
        return False

    # -- inside ----------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        try:
            (self.path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise fault(self.host, "layout directory", error) from None
        marker = self.path / MARKER
        if not marker.exists():
            with self._new_file(marker) as out:
                out.write(marker_bytes())

    @contextlib.contextmanager
    def _new_file(self, path: Path) -> Iterator[BinaryIO]:
        """A file that appears under `path` when the block ends well, durable, and not at all when it raises."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            with temporary.open("xb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            temporary.rename(path)
        except OSError as error:
            raise fault(self.host, path.name, error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def open_regular(path: Path, host: str, what: str, missing: Missing, absent: str = "") -> OpenRange:
    """Open a regular file. O_NONBLOCK: a FIFO in a stranger's layout would block for ever. Raise `missing`.

    `absent` is the sentence for a file that is not there, when it is not "HOST has no WHAT".
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise missing(host, absent or f"{host} has no {what}") from None
        raise fault(host, what, error) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise missing(host, f"{what} in {host} is not a regular file")
    return OpenRange(descriptor, 0, status.st_size)


@contextlib.contextmanager
def locked(directory: Path, host: str) -> Iterator[None]:
    """Hold a directory's flock: one writer at a time on the machine. Raise RegistryTimeout, RegistryFault."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise fault(host, "its directory", error) from None
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RegistryTimeout(host, f"{host} is locked by another process") from None
                time.sleep(LOCK_POLL)
        yield
    finally:
        os.close(descriptor)
