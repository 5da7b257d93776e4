"""From a reference to its repository: the one place where registries, layouts and their options are put together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lazyfs.limits import REQUEST_TIMEOUT
from lazyfs.reference import Reference
from lazyfs.registry.config import access as accesses
from lazyfs.registry.config.access import Access
from lazyfs.registry.hops import OnHop
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.local.open_local import open_local
from lazyfs.registry.repository import Repository

if TYPE_CHECKING:
    from lazyfs.registry.endpoints import Endpoint
    from lazyfs.registry.health import Health
    from lazyfs.registry.http.transport import Transport


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to talk to registries.

    `plain_http`: True forces HTTP, False HTTPS, None means HTTP on loopback only. `on_hop` is told of each request.
    `connect_timeout`, `answer_timeout` and `total_timeout` are seconds (see Timeouts). `transport`, where given, is
    shared: its pools then serve all repositories opened with it, and closing it is up to its owner. `access`: logins,
    certificates and configuration files; None: what this process's environment says. `health`: what is known of
    hosts, when it is not the transport's. `containerd_address` and `containerd_namespace`: for references that name
    none; "": what the environment says, or the usual ones.
    """

    plain_http: bool | None = None
    on_hop: OnHop | None = None
    connect_timeout: float = 5.0
    answer_timeout: float = 30.0
    total_timeout: float = REQUEST_TIMEOUT
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    transport: Transport | None = None
    access: Access | None = None
    health: Health | None = None
    containerd_address: str = ""
    containerd_namespace: str = ""


def open_repository(reference: Reference, options: OpenOptions | None = None) -> Repository:
    """Return the repository, layout, archive or containerd that `reference` lies in. Makes no request.

    Blocking for a registry: reads the configuration files that may name its mirrors. Raise UsageError for those, and
    ToolMissing where containerd's client lacks a package.
    """
    options = options or OpenOptions()
    if reference.transport != "docker":
        return open_local(
            reference,
            address=options.containerd_address,
            namespace=options.containerd_namespace,
            timeout=options.total_timeout,
        )
    return _open_registry(reference, options)


def _open_registry(reference: Reference, options: OpenOptions) -> Repository:
    # Only here: an OCI layout needs no HTTP library, and importing one takes a fifth of a second.
    from lazyfs.registry.config.routing import find_endpoints
    from lazyfs.registry.http.client import RemoteRepository
    from lazyfs.registry.http.exchange import Exchange, Timeouts
    from lazyfs.registry.http.transport import Transport

    access = options.access or accesses.from_environment()
    endpoints = find_endpoints(reference, access, options.plain_http)
    transport = options.transport or Transport()

    def member(endpoint: Endpoint, retry: RetryPolicy) -> RemoteRepository:
        connect = endpoint.connect_timeout or options.connect_timeout
        timeouts = Timeouts(connect, options.answer_timeout, options.total_timeout)
        exchange = Exchange(endpoint, transport, timeouts, access, on_hop=options.on_hop)
        close = transport.close if options.transport is None else None
        return RemoteRepository(endpoint, exchange, retry, close)

    if len(endpoints) == 1:
        return member(endpoints[0], options.retry)
    from lazyfs.registry.mirrored import MirroredRepository

    once = replace(options.retry, attempts=1)  # another source may answer meanwhile
    members = [member(endpoint, once) for endpoint in endpoints]
    health = options.health or transport.health
    return MirroredRepository(
        reference.host, reference.repository, members, health, options.retry, total=options.total_timeout
    )
