"""The one interface through which images are read and written, whether they lie in a registry or in a directory."""

from __future__ import annotations

from types import TracebackType
from typing import BinaryIO, Protocol, Self

from lazyfs.oci import Descriptor
from lazyfs.registry.hops import Hop

__all__ = ["ByteStream", "Hop", "Repository"]


class ByteStream(Protocol):
    """A range of a blob as it arrives. Owned by one thread at a time; close it, or use it in a `with`.

    The bytes are not verified: the caller hashes them. Implementations inherit from it.
    """

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" once the whole range was read.

        Blocks until some came; raises RegistryTimeout when the server stalls or the deadline passes, BadAnswer when the
        body ends early or breaks off. What was read before stays good: resume with another fetch.
        """
        ...

    def close(self) -> None:
        """Give the connection back, or break it when there is more to come. Never raises."""
        ...

    def reject(self, reason: str) -> None:
        """Tell that what was read last is not what its digest promised, and why. Never raises, asks nothing.

        Where the blob has several sources, the one that sent it is passed by for this blob from now on; a stream that
        says nothing else has no other source to turn to.
        """
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Repository(Protocol):
    """One repository of a registry, or one OCI layout directory. Thread-safe; every call blocks.

    `deadline` is a time.monotonic() value; without one the options' `total_timeout` holds. All calls raise
    RegistryError subclasses: RegistryUnreachable, RegistryTimeout, Unauthorized, TooManyRequests, RegistryFault,
    BadAnswer, and what the call itself names. Errors with `temporary` set have been retried already, as far as the
    deadline let them.
    """

    name: str
    host: str

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Return (media type, raw bytes) of the manifest or index named by tag or digest.

        Checked against `target` when that is a digest, else against the digest that the registry declares, if any.
        Raise ManifestMissing, DigestMismatch, DocumentInvalid (larger than MAX_DOCUMENT).
        """
        ...

    def blob(self, descriptor: Descriptor, *, deadline: float | None = None) -> bytes:
        """Return a small document whole, verified. Raise BlobMissing, DigestMismatch, DocumentInvalid (too large)."""
        ...

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Start reading `size` bytes at `blob_offset` in blob space. Raise BlobMissing, BadAnswer.

        The stream gives exactly `size` bytes or raises.
        """
        ...

    def has_blob(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        ...

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Upload `size` bytes from `source`, which is read from where it stands. False: it was there already.

        A source that can seek is rewound for another try; with one that can't, a failed upload fails at once. Raise
        PushRejected.
        """
        ...

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Store a manifest or index under a tag or its digest. Raise PushRejected.

        One with a `subject` is among its referrers afterwards, whether or not the registry has an API for them.
        """
        ...

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[Descriptor]:
        """Return the manifests whose `subject` is `digest`, with their artifact types; [] when there are none.

        Claims of the registry, like any index: what they name is verified when it is read.
        """
        ...

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """Have the blob of `source` here without sending its bytes. False: that can't be done, so push it."""
        ...

    def close(self) -> None:
        """Close the idle connections that belong to this repository alone. It may be used again."""
        ...
