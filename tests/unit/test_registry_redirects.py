"""Blobs behind signed URLs on another host: followed by hand, remembered, renewed, never shown our Authorization."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import reference
from lazyfs.errors import BadAnswer, RegistryUnreachable, Unauthorized
from lazyfs.limits import MAX_SIGNED
from lazyfs.registry.config.access import Access
from lazyfs.registry.hops import Hop
from lazyfs.registry.http.ranges import SignedUrls
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault

BLOB = bytes(range(250)) * 400
CERTIFICATE = Path(__file__).parent.parent / "data" / "tls" / "server.pem"  # self-signed, for 127.0.0.1


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry(auth="basic", users={"alice": "word"}, redirect=True) as running:
        yield running


def opened(registry: FakeRegistry, tmp_path: Path, **options: object) -> Repository:
    config = tmp_path / "config.json"
    login = base64.b64encode(b"alice:word").decode()
    config.write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
    options = {"retry": RetryPolicy(attempts=3, first=0.001), "access": Access(auth_files=(config,)), **options}
    return open_repository(
        reference.parse(f"{registry.host}/team/app:v1"),
        OpenOptions(**options),  # type: ignore[arg-type]
    )


def fetched(repository: Repository, digest: str, blob_offset: int = 0, size: int = len(BLOB)) -> bytes:
    with repository.fetch(digest, blob_offset, size) as stream:
        return b"".join(iter(lambda: stream.read(1 << 16), b""))


def test_authorization_stays_with_the_registry(registry: FakeRegistry, tmp_path: Path) -> None:
    digest = registry.add_blob(BLOB)
    repository = opened(registry, tmp_path)
    assert fetched(repository, digest) == BLOB
    assert repository.has_blob(digest)
    storage = registry.matching(server="storage")
    assert len(storage) == 2
    assert all(not r.authorization and "alice" not in str(r.headers) for r in storage)
    assert registry.matching(server="registry")[-1].authorization.startswith("Basic ")
    repository.close()


def test_a_signed_url_is_kept_until_it_expires(registry: FakeRegistry, tmp_path: Path) -> None:
    digest = registry.add_blob(BLOB)
    hops: list[Hop] = []
    repository = opened(registry, tmp_path, on_hop=hops.append)
    for offset in range(0, 50_000, 10_000):
        assert fetched(repository, digest, offset, 10_000) == BLOB[offset : offset + 10_000]
    assert [hop.kind for hop in hops] == ["challenge", "redirect", "blob", "blob", "blob", "blob", "blob"]
    hops.clear()
    registry.expire_signatures()
    assert fetched(repository, digest, 7, 90) == BLOB[7:97]
    assert [(hop.kind, hop.status) for hop in hops] == [("blob", 403), ("redirect", 307), ("blob", 206)]
    assert fetched(repository, digest, 7, 90) == BLOB[7:97]
    assert len(hops) == 4
    repository.close()


def test_a_fresh_signature_that_is_refused_is_final(registry: FakeRegistry, tmp_path: Path) -> None:
    digest = registry.add_blob(BLOB)
    registry.fault(Fault.STATUS, status=403, path="/signed/")
    repository = opened(registry, tmp_path)
    with pytest.raises(Unauthorized, match=registry.storage_host):
        fetched(repository, digest)
    assert registry.count(server="storage") == 1
    repository.close()


def test_a_storage_that_is_gone_is_resolved_anew(registry: FakeRegistry, tmp_path: Path) -> None:
    digest = registry.add_blob(BLOB)
    repository = opened(registry, tmp_path)
    fetched(repository, digest)
    registry.fault(Fault.REFUSE, path="/signed/", times=1)
    assert fetched(repository, digest) == BLOB
    assert registry.count("GET", "/v2/", server="registry") == 3  # challenge, redirect, redirect
    repository.close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_storage_keeps_its_url(registry: FakeRegistry, tmp_path: Path, status: int) -> None:
    digest = registry.add_blob(BLOB)
    repository = opened(registry, tmp_path)
    fetched(repository, digest)
    registry.fault(Fault.STATUS, status=status, path="/signed/", times=1)
    assert fetched(repository, digest) == BLOB
    assert registry.count("GET", "/v2/", server="registry") == 2  # challenge, redirect
    repository.close()


def test_signed_urls_are_bounded() -> None:
    urls = SignedUrls()
    for number in range(MAX_SIGNED + 10):
        urls.keep(str(number), f"http://host/{number}")
    assert urls.get("9") is None
    assert urls.get("10") == "http://host/10"
    urls.forget("10", "http://host/another")
    assert urls.get("10") is not None


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure() -> Iterator[FakeRegistry]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with FakeRegistry(auth="bearer", users={"alice": "word"}, tls=context) as running:
        yield running


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))


@pytest.mark.usefixtures("trusted")
def test_a_private_authority_is_found_through_the_environment(secure: FakeRegistry, tmp_path: Path) -> None:
    digest = secure.add_blob(BLOB)
    repository = opened(secure, tmp_path, plain_http=False)
    threads = [threading.Thread(target=fetched, args=(repository, digest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched(repository, digest) == BLOB
    repository.close()


def test_an_unknown_authority_is_refused_at_once_with_a_hint(
    secure: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    repository = opened(secure, tmp_path, plain_http=False)
    with pytest.raises(RegistryUnreachable, match="is self-signed") as caught:
        repository.manifest("v1")
    assert not caught.value.temporary
    assert "--tls-ca" in caught.value.hint
    assert secure.count() == 0
    repository.close()


def test_a_bundle_that_is_not_there_is_named(
    secure: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    repository = opened(secure, tmp_path, plain_http=False)
    with pytest.raises(RegistryUnreachable, match=r"none\.pem"):
        repository.manifest("v1")
    repository.close()


@pytest.mark.usefixtures("trusted")
def test_a_redirect_never_leaves_tls(secure: FakeRegistry, tmp_path: Path) -> None:
    secure.redirect = True  # the storage speaks plain HTTP
    digest = secure.add_blob(BLOB)
    repository = opened(secure, tmp_path, plain_http=False)
    with pytest.raises(BadAnswer, match="without TLS"):
        fetched(repository, digest)
    assert secure.count(server="storage") == 0
    repository.close()


@pytest.mark.usefixtures("trusted")
def test_a_token_is_never_fetched_without_tls(secure: FakeRegistry, tmp_path: Path) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as plain:
        secure.challenge = f'Bearer realm="http://{plain.host}/token",service="s"'
        repository = opened(secure, tmp_path, plain_http=False)
        with pytest.raises(BadAnswer, match="token endpoint"):
            repository.manifest("v1")
        assert plain.count() == 0
        repository.close()
