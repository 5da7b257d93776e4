"""TLS by endpoint: private authorities, client certificates, and one clear sentence for every bad certificate."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import reference
from lazyfs.errors import LazyfsError, RegistryUnreachable, UsageError
from lazyfs.registry.config.access import Access
from lazyfs.registry.endpoints import Tls
from lazyfs.registry.http import tls as tls_module
from lazyfs.registry.http.environment import Authorities
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.tls import TlsContexts, explain, speaks_tls
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.certs import Pair, TestAuthority, server_context
from tests.helpers.fake_registry import FakeRegistry

BLOB = b"0123456789" * 1000


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> TestAuthority:
    return TestAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: TestAuthority) -> Pair:
    return authority.issue()


@pytest.fixture
def secure(pair: Pair) -> Iterator[FakeRegistry]:
    with FakeRegistry(tls=server_context(pair)) as running:
        yield running


def opened(registry: FakeRegistry, access: Access, plain_http: bool | None = None) -> Repository:
    options = OpenOptions(plain_http=plain_http, retry=RetryPolicy(attempts=3, first=0.001), access=access)
    return open_repository(reference.parse(f"{registry.host}/team/app:v1"), options)


def fetched(repository: Repository, digest: str) -> bytes:
    with repository.fetch(digest, 0, len(BLOB)) as stream:
        return b"".join(iter(lambda: stream.read(1 << 16), b""))


def failure(registry: FakeRegistry, access: Access) -> LazyfsError:
    repository = opened(registry, access, plain_http=False)
    with pytest.raises(LazyfsError) as caught:
        repository.manifest("v1")
    repository.close()
    assert registry.count() == 0
    return caught.value


def test_a_private_authority_is_enough_and_makes_loopback_https(secure: FakeRegistry, authority: TestAuthority) -> None:
    digest = secure.add_blob(BLOB)
    repository = opened(secure, Access(ca=(authority.certificate,)))
    assert fetched(repository, digest) == BLOB
    repository.close()


def test_a_directory_of_authorities(secure: FakeRegistry, authority: TestAuthority, tmp_path: Path) -> None:
    shutil.copy(authority.certificate, tmp_path / "ours.crt")
    (tmp_path / "README").write_text("no certificate")
    digest = secure.add_blob(BLOB)
    repository = opened(secure, Access(ca=(tmp_path,)))
    assert fetched(repository, digest) == BLOB
    repository.close()


def test_dockers_directory_of_certificates(secure: FakeRegistry, authority: TestAuthority, tmp_path: Path) -> None:
    (tmp_path / secure.host).mkdir()
    shutil.copy(authority.certificate, tmp_path / secure.host / "ca.crt")
    digest = secure.add_blob(BLOB)
    repository = opened(secure, Access(cert_dirs=(tmp_path / "none", tmp_path)))
    assert fetched(repository, digest) == BLOB
    repository.close()


def test_an_authority_of_one_registry_is_not_trusted_for_another(
    secure: FakeRegistry, authority: TestAuthority, pair: Pair
) -> None:
    """Endpoints share a transport, and connections only with those that talk alike."""
    from lazyfs.registry.http.transport import Transport

    transport = Transport()
    digest = secure.add_blob(BLOB)
    where = reference.parse(f"{secure.host}/team/app:v1")
    trusting = OpenOptions(access=Access(ca=(authority.certificate,)), transport=transport)
    assert fetched(open_repository(where, trusting), digest) == BLOB
    bare = OpenOptions(access=Access(), transport=transport, plain_http=False)
    with pytest.raises(RegistryUnreachable, match="not trusted here"):
        fetched(open_repository(where, bare), digest)
    transport.close()


def test_an_unknown_authority(secure: FakeRegistry) -> None:
    error = failure(secure, Access())
    assert "comes from an authority that is not trusted here" in error.message
    assert "--tls-ca" in error.hint
    assert not error.temporary


@pytest.mark.parametrize(
    ("kind", "words", "hint"),
    [("expired", "has expired", "clock"), ("not_yet_valid", "is not valid yet", "clock")],
)
def test_a_certificate_at_the_wrong_time(authority: TestAuthority, kind: str, words: str, hint: str) -> None:
    with FakeRegistry(tls=server_context(getattr(authority, kind)())) as registry:
        error = failure(registry, Access(ca=(authority.certificate,)))
        assert error.message == f"the certificate of {registry.host} {words}"
        assert hint in error.hint


@pytest.mark.parametrize("name", ["DNS:other.example", "IP:10.0.0.1"])
def test_a_certificate_for_another_host(authority: TestAuthority, name: str) -> None:
    with FakeRegistry(tls=server_context(authority.issue(name))) as registry:
        error = failure(registry, Access(ca=(authority.certificate,)))
        assert f"the certificate of {registry.host} is for another" in error.message
        assert "in the certificate" in error.hint


def test_verification_can_be_switched_off_without_a_warning(secure: FakeRegistry) -> None:
    digest = secure.add_blob(BLOB)
    repository = opened(secure, Access(skip_verify=True))
    assert fetched(repository, digest) == BLOB
    repository.close()


def test_a_server_without_tls() -> None:
    with FakeRegistry() as registry:
        # A server of Python's waits for the end of a line that never comes; ours must say what a real one shows.
        error = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
        error.reason = "WRONG_VERSION_NUMBER"
        sentence, hint = explain(error, registry.host, False)
        assert sentence == f"{registry.host} does not speak TLS" and "--plain-http" in hint


def test_client_certificates(authority: TestAuthority, pair: Pair, tmp_path: Path) -> None:
    ours = authority.issue("DNS:client.example")
    context = server_context(pair, clients=authority.certificate)
    with FakeRegistry(tls=context) as registry:
        digest = registry.add_blob(BLOB)
        ca = (authority.certificate,)
        for client in ((ours.certificate, ours.key), (ours.both, None)):
            repository = opened(registry, Access(ca=ca, client=client))
            assert fetched(repository, digest) == BLOB
            repository.close()
        count = registry.count()
        repository = opened(registry, Access(ca=ca))
        with pytest.raises(RegistryUnreachable, match="wants a client certificate") as caught:
            repository.manifest("v1")
        assert "--tls-cert" in caught.value.hint
        repository.close()
        foreign = TestAuthority(tmp_path / "other", "Other").issue()
        repository = opened(registry, Access(ca=ca, client=(foreign.certificate, foreign.key)))
        with pytest.raises(RegistryUnreachable, match="does not accept our client certificate"):
            repository.manifest("v1")
        repository.close()
        assert registry.count() == count


def test_our_certificate_is_shown_to_the_registry_alone(authority: TestAuthority, pair: Pair) -> None:
    """A storage host that asks for certificates gets none along a redirect, though it is trusted like the registry."""
    ours = authority.issue("DNS:client.example")
    optional = server_context(pair)
    optional.verify_mode = ssl.CERT_OPTIONAL
    optional.load_verify_locations(authority.certificate)
    with FakeRegistry(tls=server_context(pair, clients=authority.certificate)) as registry:
        with FakeRegistry(tls=server_context(pair, clients=authority.certificate)) as storage:
            digest = registry.add_blob(BLOB)
            storage.add_blob(BLOB)
            from tests.helpers.fake_registry import Fault

            location = f"https://{storage.host}/v2/team/app/blobs/{digest}"
            registry.fault(Fault.REDIRECT, path="/blobs/", location=location)
            access = Access(ca=(authority.certificate,), client=(ours.certificate, ours.key))
            repository = opened(registry, access)
            with pytest.raises(RegistryUnreachable, match="wants a client certificate"):
                fetched(repository, digest)
            repository.close()
        with FakeRegistry(tls=optional) as storage:
            storage.add_blob(BLOB)
            registry.clear_faults()
            location = f"https://{storage.host}/v2/team/app/blobs/{digest}"
            registry.fault(Fault.REDIRECT, path="/blobs/", location=location)
            repository = opened(registry, access)
            assert fetched(repository, digest) == BLOB
            repository.close()


# -- files that are wrong, and files that change -----------------------------------------------------------------------


def test_files_that_hold_no_certificates_are_named(pair: Pair, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_bytes(b"\xff no certificate")
    empty = tmp_path / "empty"
    empty.mkdir()
    contexts = TlsContexts(Authorities())
    locked = tmp_path / "locked.key"
    from tests.helpers import real

    real.call("openssl", "ec", "-in", pair.key, "-aes128", "-passout", "pass:word", "-out", locked)
    wrong: list[tuple[Tls, str]] = [
        (Tls(ca=(tmp_path / "none.pem",)), "none.pem is not there for us to read"),
        (Tls(ca=(rubbish,)), "holds no CA certificate"),
        (Tls(ca=(empty,)), "holds no certificates"),
        (Tls(client=((tmp_path / "none.pem", None),)), "none.pem is not there for us to read"),
        (Tls(client=((rubbish, None),)), "can't be loaded"),
        (Tls(client=((pair.certificate, rubbish),)), "can't be loaded"),
        (Tls(client=((pair.certificate, locked),)), "can't be loaded"),
    ]
    for tls, words in wrong:
        with pytest.raises(UsageError, match=words):
            contexts.context(tls)


def test_a_key_of_another_certificate(authority: TestAuthority, pair: Pair) -> None:
    other = authority.issue()
    with pytest.raises(UsageError, match="is not the key of the certificate"):
        TlsContexts(Authorities()).context(Tls(client=((pair.certificate, other.key),)))


def test_certificates_that_change_are_loaded_anew(
    authority: TestAuthority, secure: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "LOOK_AGAIN", 0.0)
    digest = secure.add_blob(BLOB)
    ca = tmp_path / "ca.pem"
    shutil.copy(TestAuthority(tmp_path / "other", "Other").certificate, ca)
    repository = opened(secure, Access(ca=(ca,)))
    with pytest.raises(RegistryUnreachable, match="not trusted"):
        fetched(repository, digest)
    shutil.copy(authority.certificate, tmp_path / "new.pem")
    os.replace(tmp_path / "new.pem", ca)
    assert fetched(repository, digest) == BLOB
    ca.write_bytes(b"half a fi")  # being written: what was loaded goes on
    assert fetched(repository, digest) == BLOB
    repository.close()


def test_equal_settings_share_a_context(authority: TestAuthority) -> None:
    contexts = TlsContexts(Authorities())
    assert contexts.context(Tls(ca=(authority.certificate,))) is contexts.context(Tls(ca=(authority.certificate,)))
    assert contexts.context() is contexts.context(Tls())
    assert contexts.context() is not contexts.context(Tls(ca=(authority.certificate,)))


# -- insecure registries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secured", [True, False])
def test_an_insecure_registry_is_asked_as_it_speaks(pair: Pair, secured: bool, tmp_path: Path) -> None:
    conf = tmp_path / "registries.conf"
    with FakeRegistry(tls=server_context(pair) if secured else None, auth="basic", users={"u": "p"}) as registry:
        conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
        login = tmp_path / "auth.json"
        login.write_text(f'{{"auths": {{"{registry.host}": {{"username": "u", "password": "p"}}}}}}')
        digest = registry.add_blob(BLOB)
        repository = opened(registry, Access(registries_conf=(conf,), auth_files=(login,)))
        assert fetched(repository, digest) == BLOB
        assert fetched(repository, digest) == BLOB
        repository.close()


def test_nobody_there_says_nothing_of_tls() -> None:
    from tests.helpers import real

    assert speaks_tls(f"127.0.0.1:{real.free_port()}", 1.0) is None
