"""A repository that is never asked: for images that are whole on this node, where no request may be made."""

from __future__ import annotations

from typing import BinaryIO, NoReturn

from lazyfs.errors import RegistryUnreachable
from lazyfs.oci import Descriptor
from lazyfs.registry.repository import ByteStream, Repository


class OfflineRepository:
    """Stands where a registry's repository would. Every request is RegistryUnreachable at once."""

    def __init__(self, host: str, name: str) -> None:
        self.host = host
        self.name = name

    def _refuse(self, what: str) -> NoReturn:
        error = RegistryUnreachable(
            self.host,
            f"{what} of {self.host}/{self.name} is not on this node, and its registry is not to be asked",
            hint="leave --offline away",
        )
        error.temporary = False  # nobody is asked later either: a reader need not wait
        raise error

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Raise RegistryUnreachable."""
        self._refuse(f"manifest {target}")

    def blob(self, descriptor: Descriptor, *, deadline: float | None = None) -> bytes:
        """Raise RegistryUnreachable."""
        self._refuse(f"blob {descriptor.digest}")

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Raise RegistryUnreachable."""
        self._refuse(f"blob {digest}")

    def has_blob(self, digest: str) -> bool:
        """Raise RegistryUnreachable."""
        self._refuse(f"blob {digest}")

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Raise RegistryUnreachable."""
        self._refuse(f"blob {digest}")

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Raise RegistryUnreachable."""
        self._refuse(f"manifest {target}")

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[Descriptor]:
        """Raise RegistryUnreachable."""
        self._refuse(f"the list of referrers to {digest}")

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """Raise RegistryUnreachable."""
        self._refuse(f"blob {digest}")

    def close(self) -> None:
        """Do nothing: there is no connection."""
