"""Certificates for tests, made with openssl: an authority of our own, and good, expired and otherwise wrong ones."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import real

_CONFIG = """\
[ca]
default_ca = ours
[ours]
dir = {place}
database = {place}/index.txt
new_certs_dir = {place}
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
[req]
distinguished_name = name
prompt = no
[name]
CN = unused
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, PEM files. `both` holds the two."""

    certificate: Path
    key: Path
    both: Path


class TestAuthority:
    """A certificate authority in a directory; `certificate` is what a client trusts."""

    __test__ = False

    def __init__(self, place: Path, name: str = "Test Authority") -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._place = place
        self._config = place / "openssl.cnf"
        self._config.write_text(_CONFIG.format(place=place))
        (place / "index.txt").touch()
        self.certificate = place / "authority.pem"
        self._key = place / "authority.key"
        self._made = 0
        real.call(
            "openssl", "req", "-x509", "-config", self._config, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", self._key, "-out", self.certificate, "-days", "30", "-subj", f"/CN={name}",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def issue(
        self, name: str = "IP:127.0.0.1,DNS:localhost", *, start: str = "20200101000000Z", end: str = "20490101000000Z"
    ) -> Pair:
        """Return a certificate for a subjectAltName; `start` and `end` are its validity."""
        self._made += 1
        key, request = self._place / f"{self._made}.key", self._place / f"{self._made}.csr"
        certificate, both = self._place / f"{self._made}.pem", self._place / f"{self._made}.both.pem"
        real.call(
            "openssl", "req", "-config", self._config, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", key, "-out", request, "-subj", "/CN=test", "-addext", f"subjectAltName={name}",
        )  # fmt: skip
        real.call(
            "openssl", "ca", "-batch", "-notext", "-config", self._config, "-cert", self.certificate,
            "-keyfile", self._key, "-in", request, "-out", certificate, "-startdate", start, "-enddate", end,
        )  # fmt: skip
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        return Pair(certificate, key, both)

    def expired(self) -> Pair:
        return self.issue(end="20200102000000Z")

    def not_yet_valid(self) -> Pair:
        return self.issue(start="20480101000000Z")


def server_context(pair: Pair, *, clients: Path | None = None) -> ssl.SSLContext:
    """Return a server's context; `clients`: the authority whose client certificates are demanded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients)
    return context
