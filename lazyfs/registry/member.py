"""What a repository with several sources asks of each of them."""

from __future__ import annotations

from typing import BinaryIO, Protocol

from lazyfs.oci import Descriptor
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.http.pace import Pace
from lazyfs.registry.repository import ByteStream, Repository


class Member(Protocol):
    """One source: a RemoteRepository that tries each request once."""

    endpoint: Endpoint

    def manifest(
        self, target: str, *, deadline: float | None = None, pace: Pace | None = None
    ) -> tuple[str, bytes]: ...

    def blob(self, descriptor: Descriptor, *, deadline: float | None = None, pace: Pace | None = None) -> bytes: ...

    def fetch(
        self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None, pace: Pace | None = None
    ) -> ByteStream: ...

    def has_blob(self, digest: str) -> bool: ...

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool: ...

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None: ...

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[Descriptor]: ...

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool: ...

    def close(self) -> None: ...
