"""From a reference to the endpoints that serve it: what containerd's and podman's files say, and the flags.

containerd's hosts.toml for the very registry comes first, since nodes run containerd; then podman's registries.conf,
then containerd's _default. A registry that podman's file blocks is refused in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lazyfs.errors import UsageError
from lazyfs.reference import Reference
from lazyfs.registry.config import hosts_toml
from lazyfs.registry.config.access import Access
from lazyfs.registry.config.hosts_toml import HostRules
from lazyfs.registry.config.registries_conf import Location, PullBy, RegistryRule, read_registries_conf
from lazyfs.registry.endpoints import Endpoint, Tls

# The host in Docker Hub's references is not the one that serves its API.
HUB, HUB_API = "docker.io", "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the user asked for: the reference, how, and whether TLS was forced (True: none, False: always)."""

    reference: Reference
    access: Access
    plain_http: bool | None


def find_endpoints(reference: Reference, access: Access, plain_http: bool | None = None) -> tuple[Endpoint, ...]:
    """Return where a docker:// reference may be reached: mirrors in order of preference, the origin last.

    Without any configuration that is the origin alone. `plain_http`: True forces HTTP for the origin, False HTTPS, None
    means HTTP on loopback without certificates only. Blocking: reads some small files, makes no request. Raise
    UsageError for a file that is malformed and for a registry that is blocked.
    """
    wanted = _Wanted(reference, access, plain_http)
    name = f"{reference.host}/{reference.repository}"
    rule = read_registries_conf(access.registries_conf).match(name)
    if rule is not None and rule.blocked:
        raise UsageError(f"{name} is blocked by {rule.source}", hint=f"the rule is [[registry]] {rule.prefix}")
    for directory in access.certs_dirs:
        own = hosts_toml.find_host_rules(directory, reference.host)
        if own is not None:
            return _of_hosts_toml(own, wanted)
    if rule is not None:
        return _of_registries_conf(rule, name, wanted)
    for directory in access.certs_dirs:
        common = hosts_toml.find_default_rules(directory)
        if common is not None:
            return _of_hosts_toml(common, wanted)
    return (_origin(wanted, _bare(reference.host, reference.repository)),)


def _of_hosts_toml(found: HostRules, wanted: _Wanted) -> tuple[Endpoint, ...]:
    reference = wanted.reference
    endpoints = []
    for rule in found.rules:
        origin = rule is found.rules[-1]
        base = _bare(reference.host, reference.repository)
        if rule.api:
            ours = rule.host == reference.host or (rule.host == HUB_API and reference.host == HUB)
            base = replace(
                base,
                api=rule.api,
                host=base.host if ours else rule.host,
                credentials_host=base.host if ours else rule.host,
                namespace="" if ours else reference.host,
            )
        base = replace(
            base,
            can_pull="pull" in rule.capabilities,
            can_resolve="resolve" in rule.capabilities,
            can_push="push" in rule.capabilities,
            headers=rule.headers,
            tls=rule.tls,
            connect_timeout=rule.connect_timeout,
            source=str(found.source),
        )
        named = bool(rule.api)
        endpoints.append(_origin(wanted, base, scheme_given=named) if origin else _mirror(wanted, base, True))
    return _distinct(endpoints)


def _of_registries_conf(rule: RegistryRule, name: str, wanted: _Wanted) -> tuple[Endpoint, ...]:
    endpoints = []
    for location in rule.mirrors:
        if location.pull_by is PullBy.TAG and wanted.reference.digest:
            continue
        base = _at(rule, name, location)
        # Its tags may be stale, says whoever restricts a mirror to digests; verified bytes may come from there anyway.
        base = replace(base, can_resolve=location.pull_by is not PullBy.DIGEST)
        endpoints.append(_mirror(wanted, base, False))
    base = replace(_at(rule, name, rule.location), can_push=True)
    endpoints.append(_origin(wanted, base))
    return _distinct(endpoints)


def _at(rule: RegistryRule, name: str, location: Location) -> Endpoint:
    host, _, repository = rule.rewrite(name, location).partition("/")
    if not repository:
        raise UsageError(f"{rule.source}: [[registry]] {rule.prefix} leaves nothing of {name} but a host")
    base = _bare(host, repository)
    return replace(
        base, may_be_plain=location.insecure, tls=Tls(skip_verify=location.insecure), source=str(rule.source)
    )


def _bare(host: str, repository: str) -> Endpoint:
    """A registry of which nothing is known but its name."""
    return Endpoint(f"https://{HUB_API if host == HUB else host}/v2", host, repository, host, can_push=True)


def _mirror(wanted: _Wanted, endpoint: Endpoint, scheme_given: bool) -> Endpoint:
    found = _with_certificates(endpoint, wanted.access)
    tls = replace(found.tls, ca=(*found.tls.ca, *wanted.access.ca))
    can_push = scheme_given and endpoint.can_push  # podman pushes to the origin only
    return _settled(replace(found, tls=tls, can_push=can_push), None, scheme_given)


def _origin(wanted: _Wanted, endpoint: Endpoint, *, scheme_given: bool = False) -> Endpoint:
    access = wanted.access
    found = _with_certificates(endpoint, access)
    tls = Tls(
        (*found.tls.ca, *access.ca),
        (access.client,) if access.client else found.tls.client,
        found.tls.skip_verify or access.skip_verify,
    )
    return _settled(replace(found, tls=tls, origin=True), wanted.plain_http, scheme_given)


def _with_certificates(endpoint: Endpoint, access: Access) -> Endpoint:
    """Add what Docker's and podman's directories hold for a host of which nothing else is said."""
    if endpoint.tls.ca or endpoint.tls.client:
        return endpoint
    found = hosts_toml.find_certificates(access.cert_dirs, endpoint.host)
    if found is None:
        return endpoint
    tls, place = found
    source = f"{endpoint.source}, {place}" if endpoint.source else str(place)
    return replace(endpoint, tls=replace(tls, skip_verify=endpoint.tls.skip_verify), source=source)


def _settled(endpoint: Endpoint, plain_http: bool | None, scheme_given: bool) -> Endpoint:
    """Decide between http and https."""
    if plain_http is None:
        if scheme_given or endpoint.may_be_plain or endpoint.tls != Tls() or not _is_loopback(endpoint.host):
            return endpoint
        plain_http = True
    rest = endpoint.api.partition("://")[2]
    return replace(endpoint, api=f"{'http' if plain_http else 'https'}://{rest}", may_be_plain=False)


def _is_loopback(host: str) -> bool:
    return Reference("docker", host).is_loopback


def _distinct(endpoints: list[Endpoint]) -> tuple[Endpoint, ...]:
    """Leave out mirrors that are the origin itself, or another mirror again."""
    origin = endpoints[-1]
    seen = {(origin.api, origin.repository)}
    kept = []
    for endpoint in endpoints[:-1]:
        if (endpoint.api, endpoint.repository) not in seen:
            seen.add((endpoint.api, endpoint.repository))
            kept.append(endpoint)
    return (*kept, origin)
