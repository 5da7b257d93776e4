"""Every fault of a registry on every transport: plain, TLS, behind a redirect, behind mirrors.

Right bytes, or one sentence in bounded time that names the host; and right bytes again once the fault is gone.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazyfs.cli import exit_codes
from lazyfs.errors import (
    BadAnswer,
    LazyfsError,
    RegistryError,
    RegistryTimeout,
    RegistryUnreachable,
    TooManyRequests,
    Unauthorized,
)
from lazyfs.reference import parse
from lazyfs.registry.config.access import Access
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.mirrored import PATIENCE
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.certs import Pair, TestAuthority, server_context
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.mirrors import Mirrors

CERTIFICATE = Path(__file__).parent.parent / "data" / "tls" / "server.pem"  # self-signed, for 127.0.0.1
BLOB = noise("transport faults", 300_000)
DEADLINE = 3.0  # seconds for a fetch that can't be
TRANSPORTS = ["plain", "tls", "redirect", "mirrors"]
QUICK = RetryPolicy(attempts=3, first=0.01, longest=0.05)

FAULTS: dict[str, dict[str, object]] = {
    "refused": {"kind": Fault.REFUSE},
    "black hole": {"kind": Fault.BLACK_HOLE},
    "400": {"kind": Fault.STATUS, "status": 400},
    "401": {"kind": Fault.STATUS, "status": 401},
    "403": {"kind": Fault.STATUS, "status": 403},
    "404": {"kind": Fault.STATUS, "status": 404},
    "429": {"kind": Fault.STATUS, "status": 429, "retry_after": "1"},
    "429 until a date": {"kind": Fault.STATUS, "status": 429, "retry_after": "Fri, 31 Dec 2100 23:59:59 GMT"},
    "429 for a year": {"kind": Fault.STATUS, "status": 429, "retry_after": "31536000"},
    "500": {"kind": Fault.STATUS, "status": 500},
    "503": {"kind": Fault.STATUS, "status": 503, "retry_after": "1"},
    "truncated": {"kind": Fault.TRUNCATE},
    "reset": {"kind": Fault.RESET},
    "stalled": {"kind": Fault.STALL},
    "200 for a range": {"kind": Fault.IGNORE_RANGE},
    "wrong range": {"kind": Fault.WRONG_RANGE},
    "short range": {"kind": Fault.SHORT_RANGE},
    "redirects in a circle": {"kind": Fault.REDIRECT_LOOP},
    "redirect to a link-local address": {"kind": Fault.REDIRECT, "location": "http://169.254.169.254/latest/"},
    "redirect to nothing": {"kind": Fault.REDIRECT, "location": ""},
    "redirect to a file": {"kind": Fault.REDIRECT, "location": "file:///etc/passwd"},
    "dripping": {"kind": Fault.DRIP, "rate": 2000},
    "header that drips": {"kind": Fault.DRIP_HEADERS, "rate": 10},
}


class Served:
    """A blob behind one of the transports, and where its faults are set."""

    def __init__(self, transport: str, place: Path, stack: ExitStack) -> None:
        self.mirrors: Mirrors | None = None
        options = OpenOptions(
            connect_timeout=1.0, answer_timeout=1.0, retry=QUICK, access=Access(ca=(CERTIFICATE,)), plain_http=None
        )
        if transport == "mirrors":
            self.mirrors = stack.enter_context(Mirrors(place))
            self.digest = self.mirrors.add_blob(BLOB)
            self.faulty = self.mirrors.all
            self.repository: Repository = self.mirrors.open(retry=QUICK, answer_timeout=1.0)
            return
        tls = None
        if transport == "tls":
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(CERTIFICATE)
        registry = stack.enter_context(FakeRegistry(tls=tls, redirect=transport == "redirect"))
        self.digest = registry.add_blob(BLOB)
        self.faulty = [registry]
        if tls is None:
            options = OpenOptions(
                connect_timeout=1.0, answer_timeout=1.0, retry=QUICK, access=Access(), plain_http=True
            )
        self.repository = open_repository(parse(f"{registry.host}/image"), options)
        stack.callback(self.repository.close)

    def fault(self, registries: list[FakeRegistry], redirected: bool, **words: object) -> None:
        for registry in registries:
            registry.fault(path="/signed/" if redirected else "/blobs/", **words)  # type: ignore[arg-type]

    def read(self, blob_offset: int, size: int) -> bytes:
        parts = []
        with self.repository.fetch(self.digest, blob_offset, size, deadline=time.monotonic() + DEADLINE) as stream:
            while data := stream.read(1 << 16):
                parts.append(data)
        return b"".join(parts)


@pytest.fixture(params=TRANSPORTS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(request.param, tmp_path, stack)


@pytest.mark.parametrize("name", FAULTS)
def test_all_sources_fail(served: Served, name: str) -> None:
    redirected = served.faulty[0].redirect
    served.fault(served.faulty, redirected, **FAULTS[name])
    began = time.monotonic()
    try:
        assert served.read(1000, 100_000) == BLOB[1000:101_000]
    except LazyfsError as error:
        assert isinstance(error, RegistryError)
        hosts = [each.host for each in served.faulty] + [each.storage_host for each in served.faulty]
        assert any(host in error.message for host in hosts)
        assert "\n" not in str(error) and len(str(error)) < 1500
        assert exit_codes.code_of(error)
        if name.startswith("429 ") and not redirected:
            assert isinstance(error, TooManyRequests) and "login" in error.hint
        if name in ("401", "403") and not redirected:
            assert isinstance(error, Unauthorized)
        if "redirect" in name and not redirected:
            assert isinstance(error, BadAnswer) and not error.temporary
    assert time.monotonic() - began < DEADLINE + 2 * PATIENCE + 1
    for registry in served.faulty:
        registry.clear_faults()
    if not name.startswith("429 "):
        deadline = time.monotonic() + 5
        while True:  # sources that were left alone, or asked for time, are not given up
            try:
                assert served.read(0, 5000) == BLOB[:5000]
                break
            except (RegistryTimeout, TooManyRequests):
                assert time.monotonic() < deadline


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("dripping", "header that drips")])
def test_mirrors_that_fail_cost_nothing_but_time(tmp_path: Path, name: str) -> None:
    with ExitStack() as stack:
        served = Served("mirrors", tmp_path, stack)
        assert served.mirrors is not None
        served.fault(served.mirrors.mirrors, False, **FAULTS[name])
        parts = []
        with served.repository.fetch(served.digest, 1000, 200_000, deadline=time.monotonic() + 12) as stream:
            while data := stream.read(1 << 16):
                parts.append(data)
        assert b"".join(parts) == BLOB[1000:201_000]


# -- logins


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.BLACK_HOLE, Fault.STATUS, Fault.REDIRECT_LOOP, Fault.TRUNCATE])
def test_a_token_endpoint_that_is_down(tmp_path: Path, fault: Fault) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        registry.add_blob(BLOB)
        registry.fault(fault, path="/token", status=500)
        options = OpenOptions(connect_timeout=1.0, answer_timeout=1.0, total_timeout=4.0, retry=QUICK, access=Access())
        repository = open_repository(parse(f"{registry.host}/image"), options)
        began = time.monotonic()
        with pytest.raises(RegistryError) as caught:
            repository.manifest("v1")
        assert registry.host in caught.value.message
        assert time.monotonic() - began < 6
        repository.close()


def test_a_mirrors_token_endpoint_that_hangs_is_passed_by(tmp_path: Path) -> None:
    with Mirrors(tmp_path, auth="bearer", anonymous=True) as mirrors:
        digest = mirrors.add_blob(BLOB)
        for mirror in mirrors.mirrors:
            mirror.fault(Fault.BLACK_HOLE, path="/token")
        began = time.monotonic()
        with mirrors.open().fetch(digest, 0, 100) as stream:
            assert stream.read(100) == BLOB[:100]
        assert time.monotonic() - began < 2 * PATIENCE + 1


def test_a_mirror_whose_certificate_nobody_knows_is_passed_by(tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)
    with Mirrors(tmp_path, 0) as mirrors, FakeRegistry(tls=tls) as mirror:
        digest = mirrors.add_blob(BLOB)
        mirror.add_blob(BLOB)
        mirrors.mirrors.append(mirror)
        mirrors.configure()
        with mirrors.open().fetch(digest, 0, 100) as stream:
            assert stream.read(100) == BLOB[:100]
        assert mirror.count() == 0


# -- certificates

WRONG = {
    "expired": "has expired",
    "not yet valid": "is not valid yet",
    "another host": "is for another",
    "another authority": "comes from an authority that is not trusted here",
}


@dataclass(frozen=True, slots=True)
class Certificates:
    authority: Path
    good: Pair
    wrong: dict[str, Pair]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    place = tmp_path_factory.mktemp("certificates")
    ours, other = TestAuthority(place / "ours"), TestAuthority(place / "other", "Other")
    wrong = (ours.expired(), ours.not_yet_valid(), ours.issue("DNS:other.example"), other.issue())
    return Certificates(ours.certificate, ours.issue(), dict(zip(WRONG, wrong, strict=True)))


def trusting(registry: FakeRegistry, certificates: Certificates, place: Path) -> Repository:
    options = OpenOptions(
        connect_timeout=1.0, answer_timeout=1.0, retry=QUICK, plain_http=False,
        access=Access(ca=(certificates.authority,), certs_dirs=(place,)),
    )  # fmt: skip
    return open_repository(parse(f"{registry.host}/image"), options)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("where", ["registry", "storage", "token endpoint", "mirror"])
def test_a_wrong_certificate(where: str, kind: str, certificates: Certificates, tmp_path: Path) -> None:
    """One sentence at once that names the host, which hears nothing of us; and a mirror is passed by."""
    wrong = server_context(certificates.wrong[kind])
    ours = wrong if where == "registry" else server_context(certificates.good)
    with ExitStack() as stack:
        registry = stack.enter_context(FakeRegistry(tls=ours, auth="bearer" if where == "token endpoint" else ""))
        other = registry if where == "registry" else stack.enter_context(FakeRegistry(tls=wrong))
        digest = registry.add_blob(BLOB)
        other.add_blob(BLOB)
        if where == "storage":
            location = f"https://{other.host}/v2/image/blobs/{digest}"
            registry.fault(Fault.REDIRECT, path="/blobs/", location=location)
        if where == "token endpoint":
            registry.challenge = f'Bearer realm="https://{other.host}/token",service="s"'
        if where == "mirror":
            (tmp_path / registry.host).mkdir()
            (tmp_path / registry.host / "hosts.toml").write_text(
                f'server = "https://{registry.host}"\n[host."https://{other.host}"]\ncapabilities = ["pull"]\n'
            )
        repository = trusting(registry, certificates, tmp_path)
        stack.callback(repository.close)
        began = time.monotonic()
        if where == "mirror":
            with repository.fetch(digest, 7, 100) as stream:
                assert stream.read(100) == BLOB[7:107]
        else:
            with pytest.raises(RegistryUnreachable) as caught, repository.fetch(digest, 7, 100) as stream:
                stream.read(100)
            assert f"the certificate of {other.host} {WRONG[kind]}" in caught.value.message
            assert not caught.value.temporary and "\n" not in str(caught.value)
        assert other.count() == 0
        assert time.monotonic() - began < 3


def test_a_certificate_that_runs_out_between_two_reads(certificates: Certificates, tmp_path: Path) -> None:
    with FakeRegistry(tls=server_context(certificates.good)) as registry:
        digest = registry.add_blob(BLOB)
        repository = trusting(registry, certificates, tmp_path)
        for pair in (certificates.good, certificates.wrong["expired"], certificates.good):
            registry.tls = server_context(pair)
            registry.hang_up()
            if pair is certificates.good:
                with repository.fetch(digest, 0, 100) as stream:
                    assert stream.read(100) == BLOB[:100]
            else:
                with (
                    pytest.raises(RegistryUnreachable, match="has expired"),
                    repository.fetch(digest, 0, 100) as stream,
                ):
                    stream.read(100)
        repository.close()
