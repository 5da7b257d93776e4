"""One containerd, one namespace: its services put together. Needs no gRPC until `connect` is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.errors import ToolMissing
from lazyfs.limits import REQUEST_TIMEOUT

if TYPE_CHECKING:
    from lazyfs.containerd.calls import Calls
    from lazyfs.containerd.content import ContentStore
    from lazyfs.containerd.diff import Diff
    from lazyfs.containerd.images import Images
    from lazyfs.containerd.leases import Leases
    from lazyfs.containerd.snapshots import Snapshots


@dataclass(frozen=True, slots=True)
class Client:
    """The services of a containerd that lazyfs uses. Thread-safe."""

    calls: Calls
    content: ContentStore
    images: Images
    leases: Leases
    diff: Diff

    def snapshots(self, snapshotter: str) -> Snapshots:
        """Return the snapshots of one of containerd's snapshotters."""
        from lazyfs.containerd.snapshots import Snapshots

        return Snapshots(self.calls, snapshotter)

    def in_namespace(self, namespace: str) -> Client:
        """Return a client of the same containerd for another namespace, with a connection of its own."""
        return connect(self.calls.address, namespace, timeout=self.calls.timeout)

    def close(self) -> None:
        """Close the connection; a later call makes a new one."""
        self.calls.close()


def connect(address: str, namespace: str, *, timeout: float = REQUEST_TIMEOUT) -> Client:
    """Return a client of the containerd whose socket is `address`. It connects with its first call.

    `timeout` (seconds) bounds each call without a deadline of its own. Raise ToolMissing without the gRPC packages.
    """
    check_packages()
    from lazyfs.containerd.calls import Calls
    from lazyfs.containerd.content import ContentStore
    from lazyfs.containerd.diff import Diff
    from lazyfs.containerd.images import Images
    from lazyfs.containerd.leases import Leases

    calls = Calls(address, namespace, timeout)
    return Client(calls, ContentStore(calls), Images(calls), Leases(calls), Diff(calls))


def check_packages() -> None:
    """Raise ToolMissing without the gRPC packages, which the other modules here import."""
    try:
        import lazyfs.containerd.diff  # noqa: F401 - what it imports is all that any of them needs
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("grpc", "google"):
            raise
        raise ToolMissing(
            "the Python package " + ("grpcio" if package == "grpc" else "protobuf"),
            hint="talking to containerd needs it: pip install 'lazyfs[containerd]'",
        ) from None
