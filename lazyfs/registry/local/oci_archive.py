"""A tar of an OCI layout as a repository: read by ranges where it lies, written anew whole.

What is pushed waits in an unnamed temporary file beside the archive. When a name is given to a manifest, a new archive
is put together of the old one and what waits, and takes the old one's place by rename: readers see one or the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lazyfs import digest as digests
from lazyfs.errors import BlobMissing, PushRejected
from lazyfs.registry.local.files import PIECE, OpenRange, fault
from lazyfs.registry.local.layout import locked
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
from lazyfs.registry.local.tar_members import ArchiveFile
from lazyfs.registry.repository import Repository

_TRIES = 5  # of putting an archive together, while others replace it meanwhile
_COPY = 64 << 20  # bytes copied by one system call


class OciArchiveRepository(LayoutReader):
    """One archive (the Repository protocol). Thread-safe. What was pushed and not named is gone with `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name or str(path)
        self.host = str(path)
        self._archive = ArchiveFile(path)
        self._lock = threading.Lock()
        self._staging: IO[bytes] | None = None
        self._end = 0  # of what is taken of the staging file
        self._staged: dict[str, tuple[int, int]] = {}  # name in the layout: (offset, size) in the staging file

    def close(self) -> None:
        """Drop what waits to be named."""
        with self._lock:
            staging, self._staging = self._staging, None
            self._staged.clear()
            self._end = 0
        if staging is not None:
            staging.close()

    def open_file(self, name: str, what: str, missing: Missing) -> OpenRange:
        """Return a file of the layout; see LayoutReader. Raise DocumentInvalid for an archive that can't be read."""
        with self._lock:
            place = self._staged.get(name)
            if place is not None and self._staging is not None:
                return OpenRange(os.dup(self._staging.fileno()), *place)
        return self._open_index(what, missing) if name == INDEX else self._archive.open(name, what, missing)

    def _open_index(self, what: str, missing: Missing) -> OpenRange:
        try:
            return self._archive.open(INDEX, what, missing)
        except missing as error:
            if self._archive.identity() is not None and "manifest.json" in self._archive.members()[1]:
                raise missing(
                    self.host, f"{self.host} is no archive of an OCI layout", hint="docker-archive: reads it"
                ) from None
            raise error

    # -- write -----------------------------------------------------------------------------------------------------

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Take a blob, hashing on the way; see Repository. Raise PushRejected for other bytes than promised."""
        if self.has_blob(digest):
            return False
        descriptor, start = self._room(size)
        hasher = hashlib.sha256()
        at = start
        try:
            while at < start + size and (piece := source.read(min(PIECE, start + size - at))):
                hasher.update(piece)
                _write(descriptor, piece, at)
                at += len(piece)
        except OSError as error:
            raise fault(self.host, "a temporary file for a blob", error) from None
        finally:
            os.close(descriptor)
        actual = "sha256:" + hasher.hexdigest()
        if at < start + size or actual != digest:
            raise PushRejected(self.host, f"the bytes for blob {digest} have digest {actual}, or are too few")
        with self._lock:
            self._staged[blob_name(digest)] = (start, size)
        return True

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Store a manifest. Unless `target` is a digest the archive is written, with all that was pushed before."""
        digest = digests.of(raw)
        if digests.is_digest(target) and target != digest:
            raise PushRejected(self.host, f"the manifest for {target} has digest {digest}")
        changed = new_entry(target, media_type, raw)
        if not self.has_blob(digest):
            descriptor, start = self._room(len(raw))
            try:
                _write(descriptor, raw, start)
            except OSError as error:
                raise fault(self.host, "a temporary file for a manifest", error) from None
            finally:
                os.close(descriptor)
            with self._lock:
                self._staged[blob_name(digest)] = (start, len(raw))
        if changed is not None:
            self._commit(changed)

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """False: a blob of another archive is copied."""
        return False

    # -- inside ----------------------------------------------------------------------------------------------------

    def _room(self, size: int) -> tuple[int, int]:
        """Return (descriptor of its own, offset): room for `size` bytes in the staging file."""
        with self._lock:
            try:
                if self._staging is None:
                    if self._archive.identity() is not None:
                        self._names()  # nothing that can't be added to is found out only at the end
                    self._staging = tempfile.TemporaryFile(dir=self.path.absolute().parent)
                descriptor = os.dup(self._staging.fileno())
            except OSError as error:
                raise fault(self.host, "a temporary file beside it", error) from None
            start, self._end = self._end, self._end + size
            return descriptor, start

    def _commit(self, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replace the archive by one with what waits, and `changed` of its index."""
        for _ in range(_TRIES):
            before = self._archive.identity()
            names = [] if before is None else self._names()
            with self._new_archive() as (out, temporary):
                self._assemble(out, names, index_bytes(changed(self.index_document())))
                with locked(self.path.absolute().parent, self.host):
                    if self._archive.identity() == before:
                        out.flush()
                        os.fsync(out.fileno())
                        temporary.rename(self.path)
                        self.close()
                        return
        raise PushRejected(self.host, f"other processes keep replacing {self.host}")

    def _names(self) -> list[str]:
        """Return the files of the archive that is there. Raise PushRejected when it is nothing to add to."""
        _, members = self._archive.members()
        if MARKER not in members:
            raise PushRejected(self.host, f"{self.host} exists and is no archive of an OCI layout", hint="remove it")
        for member in members.values():
            if not member.is_file and not member.is_directory:
                raise PushRejected(self.host, f"{self.host} holds {member.name[:200]!r}, which is no file")
        return [member.name for member in members.values() if member.is_file]

    def _assemble(self, out: IO[bytes], old: list[str], index: bytes) -> None:
        """Write the archive: documents first, then blobs by name, so that equal contents are equal bytes."""
        with self._lock:
            blobs = {*old, *self._staged} - {MARKER, INDEX}
        for name, content in ((MARKER, marker_bytes()), (INDEX, index)):
            out.write(_header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        for directory in ("blobs", "blobs/sha256"):
            out.write(_header(directory, 0, tarfile.DIRTYPE))
        for name in sorted(blobs):
            whole = self.open_file(name, name, BlobMissing)
            try:
                out.write(_header(name, whole.size))
                out.flush()
                _copy(whole, out.fileno())
                out.seek(0, os.SEEK_END)
                out.write(bytes(-whole.size % tarfile.BLOCKSIZE))
            finally:
                whole.close()
        out.write(bytes(2 * tarfile.BLOCKSIZE))
        out.flush()

    @contextlib.contextmanager
    def _new_archive(self) -> Iterator[tuple[IO[bytes], Path]]:
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}")
        try:
            with temporary.open("xb") as out:
                yield out, temporary
        except OSError as error:
            raise fault(self.host, "the new archive", error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a member's header, the same whoever writes it and whenever."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.mode = size, kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _write(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def _copy(source: OpenRange, target: int) -> None:
    """Append a range to a file; within the kernel where the file systems allow it."""
    at, end = source.offset, source.offset + source.size
    while at < end:
        try:
            done = os.copy_file_range(source.descriptor, target, min(_COPY, end - at), at)
        except OSError:
            break
        if not done:
            break
        at += done
    while at < end:
        piece = os.pread(source.descriptor, min(PIECE, end - at), at)
        if not piece:
            raise OSError(0, "the file became shorter while it was copied")
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]
        at += len(piece)
