"""What the environment says about proxies and certificate authorities, looked up once and not for every request."""

from __future__ import annotations

import ipaddress
import os
import ssl
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from requests.utils import DEFAULT_CA_BUNDLE_PATH

from lazyfs.errors import UsageError

# Where distributions keep the bundle, for interpreters whose own OpenSSL was built for another place.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Proxies:
    """The proxies of the environment (http_proxy, https_proxy, all_proxy, no_proxy), as they were at construction.

    Loopback is never proxied. `no_proxy` holds names, suffixes, addresses and CIDR networks.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._proxies = getproxies_environment() if environment is None else dict(environment)
        self._networks = []
        for word in self._proxies.get("no", "").split(","):
            try:
                self._networks.append(ipaddress.ip_network(word.strip(), strict=False))
            except ValueError:
                continue  # a name; proxy_bypass_environment looks at those

    def for_url(self, url: str) -> dict[str, str]:
        """Return requests' `proxies` argument for a URL: empty, or the one proxy of its scheme."""
        if not self._proxies:
            return {}
        parts = urlsplit(url)
        host = parts.hostname or ""
        if self._bypassed(host, parts.port):
            return {}
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        return {parts.scheme: proxy} if proxy else {}

    def _bypassed(self, host: str, port: int | None) -> bool:
        if host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            if address.is_loopback or any(address in network for network in self._networks):
                return True
        named = f"{host}:{port}" if port else host
        return bool(proxy_bypass_environment(named, self._proxies))


class Authorities:
    """The system's certificate authorities as one TLS context, loaded at the first HTTPS request (about 20 ms)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Return the context that all connections share. Raise UsageError for a bundle that can't be read."""
        with self._lock:
            if self._context is None:
                self._context = load_authorities()
            return self._context


def load_authorities() -> ssl.SSLContext:
    """Build a verifying client context from REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, OpenSSL's paths, or certifi.

    OpenSSL's own default paths honour SSL_CERT_FILE and SSL_CERT_DIR. Raise UsageError for a bundle that can't be read.
    """
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        bundle = os.environ.get(name)
        if bundle:
            return _context_of(bundle, name)
    paths = ssl.get_default_verify_paths()
    if paths.cafile or (paths.capath and os.listdir(paths.capath)):
        return ssl.create_default_context()
    for bundle in (*_BUNDLES, DEFAULT_CA_BUNDLE_PATH):
        if os.path.exists(bundle):
            return _context_of(bundle, "the CA bundle")
    return ssl.create_default_context()


def _context_of(bundle: str, origin: str) -> ssl.SSLContext:
    try:
        if os.path.isdir(bundle):
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{origin}: certificates in {bundle} can't be loaded: {error}") from None
