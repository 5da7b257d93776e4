"""TLS contexts for endpoints with certificates of their own, and what a failed handshake means, in a sentence."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lazyfs.errors import UsageError
from lazyfs.limits import HANDSHAKE_TIMEOUT, MAX_CERTIFICATES, MAX_PEM, MAX_TLS_CONTEXTS
from lazyfs.registry.config.config_files import read_bounded
from lazyfs.registry.endpoints import NO_TLS, Tls
from lazyfs.registry.http.environment import Authorities, load_authorities

LOOK_AGAIN = 5.0  # seconds after which a changed certificate file is noticed

# OpenSSL's X509_V_ERR_* (x509_vfy.h): what is wrong with the certificate, and what to do.
_PRIVATE = "if you trust it, name its authority with --tls-ca FILE, or as ca in its hosts.toml"
_VERIFY: dict[int, tuple[str, str]] = {
    9: ("is not valid yet", "check this machine's clock"),
    10: ("has expired", "have it renewed; check this machine's clock"),
    18: ("is self-signed", _PRIVATE),
    19: ("comes from an authority that is not trusted here", _PRIVATE),
    20: ("comes from an authority that is not trusted here", _PRIVATE),
    21: ("can't be traced to an authority that is trusted here", _PRIVATE),
    23: ("has been revoked", "ask whoever runs the registry"),
    62: ("is for another host name", "use the name that is in the certificate"),
    64: ("is for another address", "use the name or address that is in the certificate"),
    66: ("has a key that is too weak", "have it replaced"),
    67: ("comes from an authority whose key is too weak", "have it replaced"),
    68: ("is signed with an algorithm that is too weak", "have it replaced"),
}
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"})
# Alerts by which servers refuse a client for its certificate, or for having none.
_NO_CLIENT = frozenset({"TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_HANDSHAKE_FAILURE"})
_BAD_CLIENT = frozenset(
    {
        *("SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_REVOKED"),
        *("SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE", "TLSV1_ALERT_UNKNOWN_CA"),
        *("TLSV1_ALERT_ACCESS_DENIED", "TLSV1_ALERT_DECRYPT_ERROR"),
    }
)


@dataclass(frozen=True, slots=True)
class _Loaded:
    context: ssl.SSLContext
    files: tuple[tuple[str, int, int, int], ...]
    looked: float  # time.monotonic()


class TlsContexts:
    """One context for each way of talking TLS. Thread-safe. Files that change are loaded anew some seconds later."""

    def __init__(self, authorities: Authorities) -> None:
        self._authorities = authorities
        self._lock = threading.Lock()
        self._loaded: dict[Tls, _Loaded] = {}

    def context(self, tls: Tls = NO_TLS) -> ssl.SSLContext:
        """Return the context that all connections of this kind share. Blocking: may read files.

        Raise UsageError for certificates that can't be loaded.
        """
        if tls == NO_TLS:
            return self._authorities.context()
        with self._lock:
            now = time.monotonic()
            known = self._loaded.get(tls)
            if known is not None and now - known.looked < LOOK_AGAIN:
                return known.context
            files = _signature(tls)
            if known is None or known.files != files:
                context = known.context if known is not None else None
                try:
                    context = _load(tls)
                except UsageError:
                    # A file that is being replaced is half there for a moment; what was loaded goes on.
                    if context is None:
                        raise
                    files = known.files if known is not None else files
            else:
                context = known.context
            self._loaded.pop(tls, None)
            while len(self._loaded) >= MAX_TLS_CONTEXTS:
                del self._loaded[next(iter(self._loaded))]  # the one that was looked at longest ago
            self._loaded[tls] = _Loaded(context, files, now)
            return context


def explain(error: ssl.SSLError, host: str, has_client: bool) -> tuple[str, str]:
    """Return (sentence, hint) for a failed handshake with `host`; `has_client`: we offered a certificate."""
    if isinstance(error, ssl.SSLCertVerificationError):
        what, hint = _VERIFY.get(error.verify_code, (f"is not accepted: {error.verify_message}", ""))
        return f"the certificate of {host} {what}", hint
    reason = error.reason or ""
    if reason in _NOT_TLS:
        return f"{host} does not speak TLS", "for a registry without TLS use --plain-http"
    if reason in _BAD_CLIENT or reason in _NO_CLIENT:
        if has_client:
            return f"{host} does not accept our client certificate", "check --tls-cert, or client in its hosts.toml"
        if reason != "SSLV3_ALERT_HANDSHAKE_FAILURE":
            return wants_certificate(host)
    if isinstance(error, ssl.SSLEOFError) and not has_client:
        return (
            f"{host} ended the TLS connection before it answered",
            "registries that want a client certificate do so: --tls-cert FILE and --tls-key FILE",
        )
    said = reason.replace("_", " ").lower() or "it ended before an answer"
    return f"no TLS connection to {host}: {said}", ""


def wants_certificate(host: str) -> tuple[str, str]:
    """Return (sentence, hint) for a server that answers nobody without a client certificate that it trusts."""
    return (
        f"{host} wants a client certificate that it trusts",
        "give --tls-cert FILE and --tls-key FILE, or client in its hosts.toml",
    )


def speaks_tls(host: str, timeout: float) -> bool | None:
    """Tell whether "host[:port]" speaks TLS, for a registry that is configured as insecure. Blocking, one connection.

    None: nobody answers now, which says nothing of later; the error of a real request says more. Raise nothing.
    """
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        connection = socket.create_connection((name.strip("[]"), int(port or 443)), timeout)
    except ConnectionRefusedError:
        return None if port else False
    except (OSError, ValueError):
        return None
    with connection:
        connection.settimeout(min(timeout, HANDSHAKE_TIMEOUT))
        try:
            with context.wrap_socket(connection):
                return True
        except ssl.SSLError as error:
            # An alert is TLS, too; what isn't TLS at all is plain HTTP or nothing of ours.
            return error.reason is not None and "ALERT" in error.reason
        except OSError:  # reset, or no answer to what is no HTTP request
            return False


def _load(tls: Tls) -> ssl.SSLContext:
    context = load_authorities()
    for path in tls.ca:
        for file in _pem_files(path):
            _trust(context, file)
    for certificate, key in tls.client:
        _present(context, certificate, key)
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _pem_files(path: Path) -> list[Path]:
    if not os.path.isdir(path):
        return [path]
    try:
        found = sorted(one for one in path.iterdir() if one.suffix in (".pem", ".crt", ".0") and one.is_file())
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    if not found or len(found) > MAX_CERTIFICATES:
        raise UsageError(f"{path} holds {'no' if not found else 'too many'} certificates")
    return found


def _trust(context: ssl.SSLContext, path: Path) -> None:
    raw = read_bounded(path, MAX_PEM)
    if raw is None:
        raise UsageError(f"the CA certificate {path} is not there for us to read")
    try:
        context.load_verify_locations(cadata=raw.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise UsageError(f"{path} holds no CA certificate in PEM format") from None


def _present(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    for path in (certificate, key):
        if path is not None and not os.path.isfile(path):
            raise UsageError(f"the client certificate's file {path} is not there for us to read")
    try:
        # Without a password of our own OpenSSL would ask the terminal for one.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key or certificate} is not the key of the certificate in {certificate}") from None
        named = f"{certificate} with the key {key}" if key else f"{certificate}"
        raise UsageError(
            f"the client certificate {named} can't be loaded", hint="PEM format, the key without a password"
        ) from None


def _signature(tls: Tls) -> tuple[tuple[str, int, int, int], ...]:
    """What tells that a file was replaced."""
    paths = [*tls.ca, *(path for pair in tls.client for path in pair if path is not None)]
    found = []
    for path in paths:
        try:
            facts = os.stat(path)
        except OSError:
            found.append((str(path), 0, 0, 0))
        else:
            found.append((str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return tuple(found)
