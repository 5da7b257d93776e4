"""Where a repository may be reached: mirrors first, its own registry last, each with its way of being talked to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tls:
    """What TLS to an endpoint needs beyond the system's authorities. Equal values share connections."""

    ca: tuple[Path, ...] = ()  # PEM files, or directories of them, trusted besides the system's
    client: tuple[tuple[Path, Path | None], ...] = ()  # (certificate, key; None: the key is in the same file)
    skip_verify: bool = False


NO_TLS = Tls()  # nothing beyond the system's authorities


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One host that serves a repository. A value; nothing is connected yet.

    `api` is the root that "/REPOSITORY/blobs/…" is put behind: "https://HOST/v2", or a path of its own where a
    hosts.toml says override_path. No slash at the end. `host` ("host[:port]") names it in messages, and its
    credentials are looked up by `credentials_host`.
    """

    api: str
    host: str
    repository: str
    credentials_host: str
    can_pull: bool = True  # manifests by digest, and blobs
    can_resolve: bool = True  # manifests by tag: a mirror's tags may be stale
    can_push: bool = False
    origin: bool = False  # the registry that the reference names, not a mirror of it
    namespace: str = ""  # the registry that a mirror stands for, sent as "?ns=": "" for the origin
    # Sent with each request to this endpoint, and never to another host; may hold secrets.
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: Tls = NO_TLS
    may_be_plain: bool = (
        False  # "insecure" in registries.conf: plain HTTP where no TLS is spoken; found out at first use
    )
    connect_timeout: float = 0.0  # seconds; 0: the settings'
    source: str = ""  # the file that names this endpoint; "" when nothing but the reference does

    @property
    def plain_http(self) -> bool:
        """Whether requests go without TLS."""
        return self.api.startswith("http:")
