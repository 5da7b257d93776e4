"""A repository of a registry, over HTTP. Source: OCI distribution-spec 1.1, "Pull" and "Push"."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import BinaryIO
from urllib.parse import quote

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import BadAnswer, BlobMissing, DocumentInvalid, ManifestMissing, RegistryError
from lazyfs.limits import MAX_DOCUMENT
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.hops import HopKind
from lazyfs.registry.http.exchange import Exchange
from lazyfs.registry.http.pace import Pace
from lazyfs.registry.http.ranges import BodyStream, EmptyStream, SignedUrls, check_range, range_header
from lazyfs.registry.http.referrers_api import ReferrersApi
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.status import error_for
from lazyfs.registry.http.transport import Answer
from lazyfs.registry.http.upload import Uploader
from lazyfs.registry.referrers import by_fallback_tag, described, fallback_tag, listed_with
from lazyfs.registry.repository import ByteStream, Repository


class RemoteRepository:
    """One repository at one endpoint (the Repository protocol). Thread-safe; every call blocks.

    `close_transport` is called by close(): None when the transport belongs to somebody else.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        exchange: Exchange,
        retry: RetryPolicy,
        close_transport: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.health = exchange.health
        self.host = endpoint.host
        self.name = endpoint.repository
        self._exchange = exchange
        self._retry = retry
        self._close_transport = close_transport
        self._signed = SignedUrls()
        self._root = exchange.root
        self._uploader = Uploader(exchange, retry, self._root)
        self._referrers = ReferrersApi(exchange, retry, self._root)
        self._listing = threading.Lock()

    def close(self) -> None:
        """Close idle connections, unless the transport is shared."""
        if self._close_transport is not None:
            self._close_transport()

    # -- pull ------------------------------------------------------------------------------------------------------

    def manifest(self, target: str, *, deadline: float | None = None, pace: Pace | None = None) -> tuple[str, bytes]:
        """Return (media type, raw bytes) of a manifest or index; see Repository."""
        what = f"manifest {self.name}{'@' if ':' in target else ':'}{target}"
        limit = self._exchange.timeouts.deadline(deadline)

        def attempt() -> tuple[str, bytes, str]:
            answer = self._exchange.ask(
                "GET",
                f"{self._root}/manifests/{quote(target, safe=':')}",
                kind="manifest",
                what=what,
                deadline=limit,
                headers={"Accept": oci.ACCEPT},
                pace=pace,
            )
            if answer.status != 200:
                raise error_for(answer, ManifestMissing)
            media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            if media_type in oci.INDEX_TYPES:
                answer.kind = "index"
            return media_type, answer.read_all(MAX_DOCUMENT), answer.headers.get("Docker-Content-Digest", "")

        media_type, raw, declared = self._retry.run(attempt, limit)
        expected = target if digests.is_digest(target) else declared
        if digests.is_digest(expected):
            digests.check(raw, expected, what)
        return media_type, raw

    def blob(self, descriptor: oci.Descriptor, *, deadline: float | None = None, pace: Pace | None = None) -> bytes:
        """Return a small document whole, verified; see Repository."""
        digest, size = descriptor.digest, descriptor.size
        what = f"document {digest} of {self.name}"
        if size > MAX_DOCUMENT:
            raise DocumentInvalid(f"{what} has {size} bytes, more than the {MAX_DOCUMENT} allowed")
        limit = self._exchange.timeouts.deadline(deadline)

        def attempt() -> bytes:
            answer = self._blob_answer(digest, kind="config", what=what, deadline=limit, headers={}, pace=pace)
            if answer.status != 200:
                raise error_for(answer, BlobMissing)
            raw = answer.read_all(size)
            if len(raw) != size:
                raise BadAnswer(answer.host, f"{answer.host} sent {len(raw)} bytes of {what} instead of {size}")
            return raw

        raw = self._retry.run(attempt, limit)
        digests.check(raw, digest, what)
        return raw

    def fetch(
        self,
        digest: str,
        blob_offset: int,
        size: int,
        *,
        deadline: float | None = None,
        pace: Pace | None = None,
    ) -> ByteStream:
        """Start reading a range of a blob; see Repository. Retries until the answer's header is good."""
        digests.parse(digest, "blob digest")
        if size == 0:
            return EmptyStream()
        what = f"blob {digest} of {self.name}"
        limit = self._exchange.timeouts.deadline(deadline, size)

        def attempt() -> ByteStream:
            answer = self._blob_answer(
                digest, kind="blob", what=what, deadline=limit, headers=range_header(blob_offset, size), pace=pace
            )
            if answer.status == 416:
                answer.discard()
                error = BadAnswer(
                    answer.host, f"{answer.host} has no bytes {blob_offset}+{size} of {what}: it is shorter"
                )
                error.temporary = False
                raise error
            if answer.status not in (200, 206):
                raise error_for(answer, BlobMissing)
            check_range(answer, blob_offset, size)
            return BodyStream(answer, size)

        return self._retry.run(attempt, limit)

    def has_blob(self, digest: str) -> bool:
        """Tell whether the registry has the blob."""
        return self._has_blob(digest, pushes=False)

    # -- push ------------------------------------------------------------------------------------------------------

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Upload a blob in one PUT unless it is there; see Repository."""
        if self._has_blob(digest, pushes=True):
            return False
        self._uploader.blob(digest, size, source)
        return True

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Store a manifest or index under a tag or its digest; see Repository."""
        listed = self._uploader.manifest(target, media_type, raw)
        about = None if listed else described(media_type, raw)
        if about is not None:
            subject, entry = about
            with self._listing:  # a list is read, extended and written back
                old = by_fallback_tag(self.manifest, subject)
                if entry.digest not in {known.digest for known in old}:
                    self._uploader.manifest(fallback_tag(subject), oci.OCI_INDEX, listed_with(old, entry))

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[oci.Descriptor]:
        """Return the manifests whose subject is `digest`, from the API or the fall-back tag; see Repository."""
        digests.parse(digest, "digest")
        limit = self._exchange.timeouts.deadline(deadline)
        found = self._referrers.ask(digest, limit)
        return by_fallback_tag(lambda tag: self.manifest(tag, deadline=limit), digest) if found is None else found

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """Mount a blob of another repository of the same registry; see Repository."""
        digests.parse(digest, "blob digest")
        if source.host != self.host or source.name == self.name:
            return False
        self._exchange.may_also_pull(source.name)
        return self._uploader.mount(digest, source.name)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _has_blob(self, digest: str, *, pushes: bool) -> bool:
        digests.parse(digest, "blob digest")
        limit = self._exchange.timeouts.deadline(None)

        def attempt() -> bool:
            answer = self._exchange.ask(
                "HEAD",
                f"{self._root}/blobs/{digest}",
                kind="head",
                what=f"blob {digest} of {self.name}",
                deadline=limit,
                pushes=pushes,
            )
            if answer.status not in (200, 404):
                raise error_for(answer)
            answer.discard()
            return answer.status == 200

        return self._retry.run(attempt, limit)

    def _blob_answer(
        self,
        digest: str,
        *,
        kind: HopKind,
        what: str,
        deadline: float,
        headers: dict[str, str],
        pace: Pace | None = None,
    ) -> Answer:
        """GET a blob, by the signed URL that the last redirect led to where there is one."""
        signed = self._signed.get(digest)
        if signed is not None:
            try:
                answer = self._exchange.ask(
                    "GET", signed, kind=kind, what=what, deadline=deadline, headers=headers, pace=pace
                )
            except RegistryError:
                self._signed.forget(digest, signed)
                raise
            if not 400 <= answer.status < 500 or answer.status in (408, 416, 429):
                return answer
            # Expired: the storages say so with 400, 401, 403, 404 or 410. Ask the registry anew, once.
            self._signed.forget(digest, signed)
            answer.discard()
        address = f"{self._root}/blobs/{digest}"
        answer = self._exchange.ask("GET", address, kind=kind, what=what, deadline=deadline, headers=headers, pace=pace)
        if answer.status in (200, 206) and answer.redirected:
            self._signed.keep(digest, answer.url)
        return answer
