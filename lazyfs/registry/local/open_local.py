"""Repositories that are no registry: a directory, an archive, containerd on this machine."""

from __future__ import annotations

from pathlib import Path

from lazyfs.errors import UsageError
from lazyfs.limits import REQUEST_TIMEOUT
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository


def open_local(
    reference: Reference, *, address: str = "", namespace: str = "", timeout: float = REQUEST_TIMEOUT
) -> Repository:
    """Return what a reference of any transport but "docker" lies in. Reads nothing yet.

    `address` and `namespace` are containerd's where the reference names none; `timeout` (seconds) bounds each of its
    calls that has no deadline. Raise ToolMissing without grpcio, UsageError for an address that is no socket's path.
    """
    path = Path(reference.path)
    match reference.transport:
        case "oci":
            from lazyfs.registry.local.layout import LayoutRepository

            return LayoutRepository(path)
        case "oci-archive":
            from lazyfs.registry.local.oci_archive import OciArchiveRepository

            return OciArchiveRepository(path)
        case "docker-archive":
            from lazyfs.registry.local.docker_archive import DockerArchiveRepository

            return DockerArchiveRepository(path)
        case "containerd":
            from lazyfs.containerd.address import namespace_name, socket_path
            from lazyfs.containerd.client import connect

            where = socket_path(reference.path or address), namespace_name(reference.host or namespace)
            client = connect(*where, timeout=timeout)
            from lazyfs.registry.local.containerd_store import (
                ContainerdRepository,  # now that gRPC is known to be there
            )

            return ContainerdRepository(client, reference.tag)
    raise UsageError(f"there is no transport {reference.transport}")


def check_destination(reference: Reference) -> None:
    """Raise UsageError for a destination that can't be written, before any work is done for it."""
    if reference.transport == "docker-archive":
        from lazyfs.registry.local.docker_archive import not_writable

        raise not_writable()
    if reference.transport == "containerd" and reference.digest:
        raise UsageError("an image in containerd is named, not numbered by its digest", hint="containerd:NAME")
