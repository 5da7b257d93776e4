"""containerd's content store as a repository: images by the names that `ctr image ls` shows, in one namespace.

What is pushed is held by a lease until an image refers to it: a manifest by its labels to config and layers, an image
to the manifest. So containerd's garbage collector finds at each moment all that belongs together.
Source: containerd, docs/garbage-collection.md and docs/content-flow.md.
"""

from __future__ import annotations

import io
import logging
import threading
from typing import BinaryIO

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.containerd import gc_labels
from lazyfs.containerd.client import Client
from lazyfs.containerd.images import Image
from lazyfs.errors import (
    BlobMissing,
    DocumentInvalid,
    LazyfsError,
    ManifestMissing,
    PushRejected,
    ReferenceInvalid,
)
from lazyfs.limits import MAX_DOCUMENT
from lazyfs.reference import docker_name
from lazyfs.registry.local.files import PIECE
from lazyfs.registry.repository import ByteStream, Repository

log = logging.getLogger(__name__)

_NAMESPACES = 16  # looked through for an image that isn't in this one


class ContainerdRepository:
    """The images of one namespace (the Repository protocol). Thread-safe. `host` is the socket's path.

    `name` is the image's name, for messages and for `lazy_from`.
    """

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self.host = client.calls.address
        self.namespace = client.calls.namespace
        self._lock = threading.Lock()
        self._lease = ""

    def close(self) -> None:
        """End the lease on what was pushed, and the connection. A containerd that is gone ends the lease in a day."""
        with self._lock:
            lease, self._lease = self._lease, ""
        if lease:
            try:
                self.client.leases.delete(lease)
            except LazyfsError as error:
                log.warning("a lease of containerd's stays until it expires: %s", error)
        self.client.close()

    # -- read ------------------------------------------------------------------------------------------------------

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Return the manifest or index of an image, by its name as `ctr` shows it or as docker shortens it, or digest.

        See Repository. Raise ManifestMissing, DigestMismatch, DocumentInvalid.
        """
        media_type, digest = "", target
        if not digests.is_digest(target):
            found = self.find(target, deadline=deadline).target
            media_type, digest = found.media_type, found.digest
            digests.parse(digest, f"the digest of image {target} in containerd")
        try:
            raw = self._document(digest, deadline)
        except BlobMissing as error:
            raise ManifestMissing(self.host, error.message, hint=error.hint) from None
        if not media_type:
            declared = oci.load_json(raw, f"manifest {digest}").get("mediaType")
            media_type = declared if isinstance(declared, str) else ""
        return media_type, raw

    def blob(self, descriptor: oci.Descriptor, *, deadline: float | None = None) -> bytes:
        """Return a small document whole, verified; see Repository."""
        return self._document(descriptor.digest, deadline)

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Start reading a range of a blob; see Repository."""
        digests.parse(digest)
        return self.client.content.read(digest, blob_offset, size, deadline=deadline)

    def has_blob(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        digests.parse(digest)
        return self.client.content.info(digest) is not None

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[oci.Descriptor]:
        """[]: containerd keeps no list of what refers to an image."""
        return []

    def find(self, name: str, *, deadline: float | None = None) -> Image:
        """Return the image of this name, or of the name that docker shortens so. Raise ManifestMissing."""
        found = self.client.images.get(name, deadline=deadline)
        if found is not None:
            return found
        try:
            whole = docker_name(name)
        except ReferenceInvalid:
            whole = name
        if whole != name and (found := self.client.images.get(whole, deadline=deadline)) is not None:
            return found
        raise ManifestMissing(
            self.host,
            f"containerd at {self.host} has no image {name} in its namespace {self.namespace}",
            hint=self._elsewhere({name, whole}, deadline),
        )

    # -- write -----------------------------------------------------------------------------------------------------

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Write a blob, held by our lease; see Repository. An upload that broke off is gone on with."""
        digests.parse(digest)
        return self.client.content.write(digest, size, source, lease=self._our_lease())

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Store a manifest with labels that keep what it names, and unless `target` is a digest name an image."""
        digest = digests.of(raw)
        if digests.is_digest(target) and target != digest:
            raise PushRejected(self.host, f"the manifest for {target} has digest {digest}")
        lease = self._our_lease()
        labels = self._hold_children(media_type, raw, lease)
        if not self.client.content.write(digest, len(raw), io.BytesIO(raw), labels=labels, lease=lease) and labels:
            self.client.content.label(digest, labels)
        if not digests.is_digest(target):
            self.client.images.put(Image(target, oci.Descriptor(media_type, digest, len(raw))), lease=lease)

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """Take a blob over from another namespace of the same containerd, where those share their content."""
        if not isinstance(source, ContainerdRepository) or source.host != self.host:
            return False
        return self.client.content.take_over(digest, size, self._our_lease())

    # -- inside ----------------------------------------------------------------------------------------------------

    def _elsewhere(self, names: set[str], deadline: float | None) -> str:
        """Return a hint: another namespace that has the image, or where to look."""
        try:
            for namespace in self.client.images.namespaces(deadline=deadline)[:_NAMESPACES]:
                if namespace == self.namespace:
                    continue
                other = self.client.in_namespace(namespace)
                try:
                    for name in sorted(names):
                        if other.images.get(name, deadline=deadline) is not None:
                            return f"namespace {namespace} has it: containerd://{namespace}/{name}"
                finally:
                    other.close()
        except LazyfsError as error:
            log.debug("other namespaces can't be looked through: %s", error)
        return "the names are those of `ctr image ls`"

    def _document(self, digest: str, deadline: float | None) -> bytes:
        digests.parse(digest)
        info = self.client.content.info(digest, deadline=deadline)
        size = info.size if info is not None else 1  # reading it tells what is missing
        if size > MAX_DOCUMENT:
            raise DocumentInvalid(f"{digest} in containerd has {size} bytes, more than the {MAX_DOCUMENT} allowed")
        with self.client.content.read(digest, 0, size, deadline=deadline) as stream:
            raw = b"".join(iter(lambda: stream.read(PIECE), b""))
        digests.check(raw, digest, f"document {digest} in containerd")
        return raw

    def _our_lease(self) -> str:
        with self._lock:
            if not self._lease:
                self._lease = self.client.leases.create()
            return self._lease

    def _hold_children(self, media_type: str, raw: bytes, lease: str) -> dict[str, str]:
        """Put what a manifest names under our lease; return the labels by which it will keep it.

        An index may name manifests of other platforms, which need not be there. Raise PushRejected when a blob of a
        manifest is missing.
        """
        if oci.is_index(media_type, raw):
            index = oci.parse_index(raw, media_type)
            for child in index.manifests:
                self._hold(child, lease)
            return gc_labels.of_index(index)
        manifest = oci.parse_manifest(raw, media_type)
        for child in (manifest.config, *manifest.layers):
            if not self._hold(child, lease) and not child.urls:
                raise PushRejected(self.host, f"containerd does not have blob {child.digest}, which the manifest names")
        return gc_labels.of_manifest(manifest)

    def _hold(self, child: oci.Descriptor, lease: str) -> bool:
        """Put a blob under our lease. The lease first: what is there behind it stays there."""
        self.client.leases.hold(lease, child.digest)
        return self.client.content.info(child.digest) is not None
