"""From a reference to its repository: the one place where registries, layouts and their options are put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.reference import Reference
from lazyfs.registry.credentials import config_path
from lazyfs.registry.hops import OnHop
from lazyfs.registry.layout import LayoutRepository
from lazyfs.registry.repository import Repository
from lazyfs.registry.retry import RetryPolicy

if TYPE_CHECKING:
    from lazyfs.registry.transport import Transport

# The host in Docker Hub's references is not the one that serves its API.
_HUB, _HUB_API = "docker.io", "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to talk to registries.

    `plain_http`: True forces HTTP, False HTTPS, None means HTTP on loopback only. `on_hop` is told of each request.
    `connect_timeout`, `answer_timeout` and `total_timeout` are seconds (see Timeouts). `transport`, where given, is
    shared: its pools then serve all repositories opened with it, and closing it is up to its owner. `docker_config`:
    the credentials file, when it is not the user's own.
    """

    plain_http: bool | None = None
    on_hop: OnHop | None = None
    connect_timeout: float = 5.0
    answer_timeout: float = 30.0
    total_timeout: float = 300.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    transport: Transport | None = None
    docker_config: Path | None = None


def open_repository(reference: Reference, options: OpenOptions | None = None) -> Repository:
    """Return the repository or OCI layout that `reference` lies in. Makes no request and reads no file."""
    options = options or OpenOptions()
    if reference.transport == "oci":
        return LayoutRepository(Path(reference.path))
    # Only here: an OCI layout needs no HTTP library, and importing one takes a fifth of a second.
    from lazyfs.registry.client import RemoteRepository
    from lazyfs.registry.exchange import Exchange, Timeouts
    from lazyfs.registry.transport import Transport

    plain = reference.is_loopback if options.plain_http is None else options.plain_http
    host = _HUB_API if reference.host == _HUB else reference.host
    transport = options.transport or Transport()
    exchange = Exchange(
        f"{'http' if plain else 'https'}://{host}",
        reference.repository,
        transport,
        Timeouts(options.connect_timeout, options.answer_timeout, options.total_timeout),
        options.docker_config or config_path(),
        credentials_host=reference.host,
        on_hop=options.on_hop,
    )
    close = transport.close if options.transport is None else None
    return RemoteRepository(reference.host, reference.repository, exchange, options.retry, close)
