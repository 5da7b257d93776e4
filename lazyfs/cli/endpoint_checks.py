"""What `lazyfs doctor IMAGE` tells of the endpoints that an image would be fetched from, and why those."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lazyfs.cli.host_checks import Check, State
from lazyfs.errors import LazyfsError
from lazyfs.limits import LOGIN_PATIENCE
from lazyfs.registry.config.credential_programs import CredentialPrograms
from lazyfs.registry.config.logins import Logins
from lazyfs.registry.config.routing import find_endpoints

if TYPE_CHECKING:
    from lazyfs.reference import Reference
    from lazyfs.registry.config.access import Access
    from lazyfs.registry.endpoints import Endpoint


def endpoint_checks(reference: Reference, access: Access, plain_http: bool | None) -> list[Check]:
    """Return one finding for each endpoint of a docker:// reference, in the order in which they are asked.

    Blocking: reads configuration files and may run credential programs; asks no registry. Never raises a LazyfsError.
    """
    try:
        endpoints = find_endpoints(reference, access, plain_http)
    except LazyfsError as error:
        return [Check("endpoints", State.FAIL, error.message, error.hint or "mend that file")]
    return [_check(endpoint, access) for endpoint in endpoints]


def _check(endpoint: Endpoint, access: Access) -> Check:
    name = "endpoint" if endpoint.origin else "mirror"
    words = [f"{endpoint.api}/{endpoint.repository}"]
    if endpoint.source:
        words.append(f"from {endpoint.source}")
    words += [_transport(endpoint), *_limits(endpoint)]
    if endpoint.headers:
        words.append(f"headers {', '.join(header for header, _ in endpoint.headers)}")
    try:
        login = Logins(access, endpoint, CredentialPrograms()).find(time.monotonic() + LOGIN_PATIENCE)
    except LazyfsError as error:
        return Check(name, State.FAIL, f"{'; '.join(words)}; {error.message}", error.hint or "mend that file")
    words.append(login.tried)
    state, mend = State.OK, ""
    if endpoint.tls.skip_verify:
        state, mend = State.WARN, "name its authority (--tls-ca, or ca in its hosts.toml) instead of trusting everybody"
    return Check(name, state, "; ".join(words), mend)


def _transport(endpoint: Endpoint) -> str:
    if endpoint.plain_http:
        return "plain HTTP"
    tls = endpoint.tls
    words = ["TLS without verification" if tls.skip_verify else "TLS"]
    if endpoint.may_be_plain:
        words.append("or plain HTTP")
    if tls.ca:
        words.append(f"also trusting {', '.join(map(str, tls.ca))}")
    if tls.client:
        words.append(f"showing {', '.join(str(certificate) for certificate, _ in tls.client)}")
    return " ".join(words)


def _limits(endpoint: Endpoint) -> list[str]:
    """What an endpoint is not asked for, as far as reading goes."""
    if endpoint.can_pull and endpoint.can_resolve:
        return []
    wanted = [name for name, can in (("blobs", endpoint.can_pull), ("tags", endpoint.can_resolve)) if can]
    return [f"asked for {wanted[0]} only" if wanted else "not asked for reading"]
