"""An OCI layout directory as a repository. Source: OCI image-spec 1.1, image-layout.md.

Blobs appear by rename, and index.json is replaced whole under a lock: readers never see half of anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DocumentInvalid,
    FormatError,
    ManifestMissing,
    PushRejected,
    RegistryFault,
    RegistryTimeout,
    TrustError,
)
from lazyfs.registry.referrers import MAX_REFERRERS, by_fallback_tag, described
from lazyfs.registry.repository import ByteStream, Repository

REF_NAME = "org.opencontainers.image.ref.name"
VERSION = "1.0.0"  # of the layout format
PIECE = 256 << 10  # bytes per read
LOCK_TIMEOUT = 10.0  # seconds
LOCK_POLL = 0.02  # seconds


class FileStream:
    """A ByteStream over a range of an open file. Owns the descriptor; reads by pread, so nothing is shared."""

    def __init__(self, descriptor: int, offset: int, size: int, host: str, what: str) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._left = size
        self._host = host
        self._what = what

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end. Raise BadAnswer when the file is too short, RegistryFault (EIO)."""
        if not self._left or self._descriptor < 0:
            return b""
        try:
            data = os.pread(self._descriptor, min(size, self._left, PIECE), self._offset)
        except OSError as error:
            raise _fault(self._host, self._what, error) from None
        if not data:
            raise BadAnswer(self._host, f"{self._what} in {self._host} is {self._left} bytes shorter than asked for")
        self._offset += len(data)
        self._left -= len(data)
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def reject(self, reason: str) -> None:
        """There is no other source to turn to."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LayoutRepository:
    """One OCI layout directory (the Repository protocol). Thread-safe: it holds nothing but its path.

    Writing creates the directory and what belongs into it. `host` is the path, for error messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name or str(path)
        self.host = str(path)

    def close(self) -> None:
        """Nothing is held open between calls."""

    # -- read ------------------------------------------------------------------------------------------------------

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Return the manifest or index named by a ref or digest; "" is the only image of the layout. See Repository."""
        media_type = ""
        digest = target
        if not digests.is_digest(target):
            found = self._find(target)
            media_type, digest = found.media_type, found.digest
        what = f"manifest {digest}"
        try:
            raw = self._read_blob(digest, oci.MAX_DOCUMENT, what)
        except BlobMissing as error:
            raise ManifestMissing(self.host, error.message) from None
        digests.check(raw, digest, f"{what} in {self.host}")
        if not media_type:
            declared = oci.load_json(raw, what).get("mediaType")
            media_type = declared if isinstance(declared, str) else ""
        return media_type, raw

    def blob(self, descriptor: oci.Descriptor, *, deadline: float | None = None) -> bytes:
        """Return a small document, verified; see Repository."""
        what = f"document {descriptor.digest}"
        raw = self._read_blob(descriptor.digest, oci.MAX_DOCUMENT, what)
        digests.check(raw, descriptor.digest, f"{what} in {self.host}")
        return raw

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Open a range of a blob file; see Repository. Raise BadAnswer when the file is shorter."""
        what = f"blob {digest}"
        descriptor, total = self._open_blob(digest, what)
        if blob_offset + size > total:
            os.close(descriptor)
            error = BadAnswer(self.host, f"{self.host} has no bytes {blob_offset}+{size} of {what}: it has {total}")
            error.temporary = False
            raise error
        return FileStream(descriptor, blob_offset, size, self.host, what)

    def has_blob(self, digest: str) -> bool:
        """Tell whether the blob's file is there."""
        return self._blob_path(digest).is_file()

    # -- write -----------------------------------------------------------------------------------------------------

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Write a blob file, hashing on the way; see Repository. Raise PushRejected for other bytes than promised."""
        if self.has_blob(digest):
            return False
        self._create()
        hasher = hashlib.sha256()
        left = size
        with self._new_file(self._blob_path(digest)) as out:
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
        self._create()
        if not self.has_blob(digest):
            with self._new_file(self._blob_path(digest)) as out:
                out.write(raw)
        about = described(media_type, raw)
        if not digests.is_digest(target):
            annotations = {REF_NAME: target} if target else {}
            entry = oci.Descriptor(media_type, digest, len(raw), annotations)
            self._list(entry, lambda old: _ref_name(old) == target)
        elif (
            about is not None
        ):  # how layouts keep referrers: in index.json, without a name (image-spec, "Image Layout")
            self._list(about[1], lambda old: old.get("digest") == digest)

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[oci.Descriptor]:
        """Return the manifests in index.json whose subject is `digest`, and what a fall-back tag lists."""
        found = {entry.digest: entry for entry in by_fallback_tag(self.manifest, digest)}
        try:
            raw = self._read(self.path / "index.json", oci.MAX_DOCUMENT, "index.json", ManifestMissing)
        except ManifestMissing:
            return list(found.values())
        for entry in oci.parse_index(raw).manifests:
            try:
                about = described(*self.manifest(entry.digest))
            except (ManifestMissing, FormatError, TrustError):
                continue  # listed, but not there or not sound: it refers to nothing
            if about is not None and about[0] == digest:
                found.setdefault(entry.digest, replace(about[1], media_type=entry.media_type))
        return list(found.values())[:MAX_REFERRERS]

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """False: a blob of another directory is copied."""
        return False

    # -- inside ----------------------------------------------------------------------------------------------------

    def _list(self, entry: oci.Descriptor, replaces: Callable[[dict[str, Any]], bool]) -> None:
        with self._locked():
            document = self._load_index()
            kept = [old for old in document["manifests"] if not replaces(old)]
            document["manifests"] = [*kept, entry.to_json()]
            with self._new_file(self.path / "index.json") as out:
                out.write(json.dumps(document, indent=2).encode())

    def _find(self, ref: str) -> oci.Descriptor:
        index = oci.parse_index(self._read(self.path / "index.json", oci.MAX_DOCUMENT, "index.json", ManifestMissing))
        names = sorted({name for entry in index.manifests if (name := entry.annotations.get(REF_NAME))})
        # What refers to an image is no image of its own: "the only image" stays the only one beside its SBOM.
        fits = [e for e in index.manifests if (e.annotations.get(REF_NAME) == ref if ref else not e.artifact_type)]
        if len({entry.digest for entry in fits}) == 1:
            return fits[0]
        has = f"it has: {', '.join(names)[:1000] or 'no named image'}"
        if fits:
            problem = f"{self.host} holds several images" + (f" named {ref}" if ref else "")
        else:
            problem = f"{self.host} has no image {ref}".rstrip()
        raise ManifestMissing(self.host, problem, hint=has)

    def _blob_path(self, digest: str) -> Path:
        return self.path / "blobs" / "sha256" / digests.hex_of(digest)

    def _open(self, path: Path, what: str, missing: type[BlobMissing | ManifestMissing]) -> tuple[int, int]:
        """Return (descriptor, size). O_NONBLOCK: a FIFO in a stranger's layout would block for ever."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise missing(self.host, f"{self.host} has no {what}") from None
            raise _fault(self.host, what, error) from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise missing(self.host, f"{what} in {self.host} is not a regular file")
        return descriptor, status.st_size

    def _open_blob(self, digest: str, what: str) -> tuple[int, int]:
        return self._open(self._blob_path(digest), what, BlobMissing)

    def _read(self, path: Path, limit: int, what: str, missing: type[BlobMissing | ManifestMissing]) -> bytes:
        descriptor, size = self._open(path, what, missing)
        with FileStream(descriptor, 0, size, self.host, what) as stream:
            if size > limit:
                raise DocumentInvalid(f"{what} in {self.host} has {size} bytes, more than the {limit} allowed")
            return b"".join(iter(lambda: stream.read(PIECE), b""))

    def _read_blob(self, digest: str, limit: int, what: str) -> bytes:
        return self._read(self._blob_path(digest), limit, what, BlobMissing)

    def _load_index(self) -> dict[str, Any]:
        try:
            raw = self._read(self.path / "index.json", oci.MAX_DOCUMENT, "index.json", ManifestMissing)
        except ManifestMissing:
            return {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": []}
        oci.parse_index(raw)
        return oci.load_json(raw, "index.json")

    def _create(self) -> None:
        try:
            (self.path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _fault(self.host, "layout directory", error) from None
        marker = self.path / "oci-layout"
        if not marker.exists():
            with self._new_file(marker) as out:
                out.write(json.dumps({"imageLayoutVersion": VERSION}).encode())

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
            raise _fault(self.host, path.name, error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory's flock: one writer of index.json at a time on the machine. Raise RegistryTimeout."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _fault(self.host, "layout directory", error) from None
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RegistryTimeout(self.host, f"{self.host} is locked by another process") from None
                    time.sleep(LOCK_POLL)
            yield
        finally:
            os.close(descriptor)


def _ref_name(entry: dict[str, Any]) -> str:
    return str((entry.get("annotations") or {}).get(REF_NAME, ""))


def _fault(host: str, what: str, error: OSError) -> RegistryFault:
    failed = RegistryFault(host, f"{what} in {host}: {error.strerror or error}", status=0)
    failed.temporary = False
    return failed
