"""Logins: challenges, tokens, Docker's credentials file, and that no secret goes where it doesn't belong."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import reference
from lazyfs.errors import BadAnswer, Unauthorized, UsageError
from lazyfs.registry.config.access import Access, from_environment
from lazyfs.registry.config.credentials import Credentials, read_auth_file
from lazyfs.registry.hops import Hop
from lazyfs.registry.http.auth import Challenge, parse_challenges
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault

BLOB = b"0123456789" * 1000
SECRET = "hunter2-correct-horse"


def write_config(path: Path, auths: dict[str, object]) -> Path:
    path.write_text(json.dumps({"auths": auths}))
    return path


def find_credentials(host: str, path: Path, repository: str = "") -> Credentials | None:
    file = read_auth_file(path)
    return file.find(host, repository) if file is not None else None


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


@pytest.fixture
def bearer() -> Iterator[FakeRegistry]:
    with FakeRegistry(auth="bearer", users={"alice": SECRET}, identity_token="identity-" + SECRET) as running:
        yield running


def opened(registry: FakeRegistry, config: Path, hops: list[Hop] | None = None) -> Repository:
    options = OpenOptions(
        access=Access(auth_files=(config,)),
        retry=RetryPolicy(attempts=2, first=0.001),
        on_hop=hops.append if hops is not None else None,
    )
    return open_repository(reference.parse(f"{registry.host}/team/app:v1"), options)


def fetched(repository: Repository, digest: str) -> bytes:
    with repository.fetch(digest, 0, len(BLOB)) as stream:
        return b"".join(iter(lambda: stream.read(1 << 16), b""))


def test_basic_login_is_sent_only_after_the_challenge(config: Path) -> None:
    with FakeRegistry(auth="basic", users={"alice": SECRET}) as registry:
        write_config(config, {registry.host: {"auth": encoded("alice", SECRET)}})
        image = registry.add_image("team/app", "v1", [BLOB])
        repository = opened(registry, config)
        assert repository.manifest("v1")[1] == image.raw
        assert fetched(repository, image.layers[0]) == BLOB
        assert [r.authorization[:6] for r in registry.requests] == ["", "Basic ", "Basic "]
        repository.close()


def test_a_token_costs_three_requests_and_then_serves_all(bearer: FakeRegistry, config: Path) -> None:
    write_config(config, {bearer.host: {"username": "alice", "password": SECRET}})
    image = bearer.add_image("team/app", "v1", [BLOB])
    hops: list[Hop] = []
    repository = opened(bearer, config, hops)
    repository.manifest("v1")
    fetched(repository, image.layers[0])
    assert [(hop.kind, hop.status) for hop in hops] == [
        ("challenge", 401),
        ("token", 200),
        ("manifest", 200),
        ("blob", 206),
    ]
    assert "scope=repository%3Ateam%2Fapp%3Apull&" in bearer.matching(path="/token")[0].path + "&"
    repository.close()


def test_parallel_challenges_fetch_one_token(bearer: FakeRegistry, config: Path) -> None:
    write_config(config, {bearer.host: {"auth": encoded("alice", SECRET)}})
    image = bearer.add_image("team/app", "v1", [BLOB])
    bearer.fault(Fault.DELAY, path="/token", seconds=0.1)
    repository = opened(bearer, config)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: fetched(repository, image.layers[0]), range(8))) == [BLOB] * 8
    assert bearer.count(path="/token") == 1
    repository.close()


def test_an_anonymous_token(config: Path) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        image = registry.add_image("team/app", "v1", [BLOB])
        repository = opened(registry, config)
        assert fetched(repository, image.layers[0]) == BLOB
        assert registry.matching(path="/token")[0].authorization == ""
        repository.close()


def test_an_identity_token_is_exchanged(bearer: FakeRegistry, config: Path) -> None:
    write_config(config, {bearer.host: {"auth": encoded("alice", ""), "identitytoken": "identity-" + SECRET}})
    image = bearer.add_image("team/app", "v1", [BLOB])
    repository = opened(bearer, config)
    assert fetched(repository, image.layers[0]) == BLOB
    assert [r.method for r in bearer.matching(path="/token")] == ["POST"]
    repository.close()


def test_a_revoked_token_is_replaced_once(bearer: FakeRegistry, config: Path) -> None:
    write_config(config, {bearer.host: {"auth": encoded("alice", SECRET)}})
    image = bearer.add_image("team/app", "v1", [BLOB])
    repository = opened(bearer, config)
    fetched(repository, image.layers[0])
    bearer.revoke_tokens()
    assert fetched(repository, image.layers[0]) == BLOB
    assert bearer.count(path="/token") == 2
    bearer.fault(Fault.STATUS, status=401, path="/blobs/")
    with pytest.raises(Unauthorized):
        fetched(repository, image.layers[0])
    repository.close()


def test_a_token_is_renewed_before_it_expires(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeRegistry(auth="bearer", users={"alice": SECRET}, token_lifetime=100) as registry:
        write_config(config, {registry.host: {"auth": encoded("alice", SECRET)}})
        image = registry.add_image("team/app", "v1", [BLOB])
        repository = opened(registry, config)
        fetched(repository, image.layers[0])
        now = time.monotonic()
        monkeypatch.setattr("lazyfs.registry.http.auth.time.monotonic", lambda: now + 95)
        assert repository.has_blob(image.layers[0])
        assert registry.count(path="/token") == 2
        assert not [r for r in registry.matching("HEAD") if r.status == 401]
        repository.close()


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.parametrize("password", ["", "wrong-" + SECRET])
def test_a_refused_login_says_what_was_tried_and_not_the_secret(config: Path, auth: str, password: str) -> None:
    with FakeRegistry(auth=auth, users={"alice": SECRET}) as registry:
        registry.add_image("team/app", "v1", [BLOB])
        write_config(config, {registry.host: {"auth": encoded("alice", password)}} if password else {})
        repository = opened(registry, config)
        with pytest.raises(Unauthorized) as caught:
            repository.manifest("v1")
        words = str(caught.value)
        assert registry.host in words
        assert str(config) in words
        assert ("no credentials" in words) == (not password)
        assert SECRET not in words
        assert encoded("alice", password) not in words
        repository.close()


def test_a_challenge_that_nobody_can_meet(config: Path) -> None:
    with FakeRegistry() as registry:
        registry.fault(Fault.STATUS, status=401)  # without WWW-Authenticate
        repository = opened(registry, config)
        with pytest.raises(Unauthorized, match="asked for no login"):
            repository.manifest("v1")
        repository.close()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"token": 5}', b'{"token": "a\\r\\nX: y"}', b"{}", b"[" * 50_000])
def test_a_token_endpoint_that_talks_nonsense(config: Path, body: bytes) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry, FakeRegistry() as other:
        # A blob of another registry stands in for the token endpoint's answer.
        digest = other.add_blob(body)
        realm = f"http://{other.host}/v2/x/blobs/{digest}"
        repository = opened(registry, config)
        challenge = f'Bearer realm="{realm}",service="s"'
        registry.challenge = challenge
        with pytest.raises(BadAnswer, match="no token"):
            repository.manifest("v1")
        repository.close()


@pytest.mark.parametrize("realm", ["", "file:///etc/passwd", "ftp://host/x", "http://u:p@host/x", "//host/token"])
def test_a_realm_that_is_no_web_address_is_refused(config: Path, realm: str) -> None:
    with FakeRegistry(auth="bearer") as registry:
        registry.challenge = f'Bearer realm="{realm}",service="s"'
        repository = opened(registry, config)
        with pytest.raises(BadAnswer, match="token endpoint"):
            repository.manifest("v1")
        repository.close()


def test_pushing_after_pulling_widens_the_token(bearer: FakeRegistry, config: Path) -> None:
    write_config(config, {bearer.host: {"auth": encoded("alice", SECRET)}})
    image = bearer.add_image("team/app", "v1", [BLOB])
    repository = opened(bearer, config)
    repository.manifest("v1")
    repository.push_manifest("v2", "application/vnd.oci.image.manifest.v1+json", image.raw)
    assert repository.manifest("v2")[1] == image.raw
    assert [("push" in r.path) for r in bearer.matching(path="/token")] == [False, True]
    assert len([r for r in bearer.requests if r.status == 401]) == 1
    repository.close()


# -- challenges -------------------------------------------------------------------------------------------------------


def test_challenges_are_parsed() -> None:
    assert parse_challenges('Bearer realm="https://a/t",service="x y", scope="repository:a:pull,push"') == [
        Challenge("bearer", {"realm": "https://a/t", "service": "x y", "scope": "repository:a:pull,push"})
    ]
    assert parse_challenges('Basic realm="a \\"q\\"", Bearer realm=b') == [
        Challenge("basic", {"realm": 'a "q"'}),
        Challenge("bearer", {"realm": "b"}),
    ]
    assert parse_challenges("") == []


@given(st.text(max_size=300))
def test_no_header_breaks_the_parser(header: str) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme


# -- the credentials file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("registry.example", "registry.example"),
        ("registry.example:5000", "registry.example:5000"),
        ("https://registry.example", "registry.example"),
        ("https://registry.example/v1/", "registry.example"),
        ("http://registry.example/v2/", "registry.example"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
    ],
)
def test_hosts_are_found_under_all_their_names(config: Path, key: str, host: str) -> None:
    write_config(config, {"other.example": {"auth": encoded("eve", "x")}, key: {"auth": encoded("alice", "a:b")}})
    found = find_credentials(host, config)
    assert found is not None
    assert (found.username, found.password, found.source) == ("alice", "a:b", str(config))


def test_a_login_for_another_port_or_namespace_is_not_ours(config: Path) -> None:
    write_config(config, {"a.example:5000": {"auth": encoded("u", "p")}, "a.example/team": {"auth": encoded("u", "p")}})
    assert find_credentials("a.example", config) is None
    assert find_credentials("evil-a.example", config) is None


def test_no_file_is_no_login(config: Path) -> None:
    assert find_credentials("a.example", config) is None
    config.write_text("{}")
    assert find_credentials("a.example", config) is None
    write_config(config, {"a.example": {}})
    assert find_credentials("a.example", config) is None


@pytest.mark.parametrize(
    "text",
    ["{", "\x00", '{"auths": {"a.example": {"auth": "%%%"}}}', '{"auths": {"a.example": {"auth": "bm9jb2xvbg=="}}}',
     '{"auths": {"a.example": {"username": 5}}}'],
)  # fmt: skip
def test_a_broken_file_is_named(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        find_credentials("a.example", config)


def test_secrets_are_not_in_a_repr(config: Path) -> None:
    write_config(config, {"a.example": {"auth": encoded("alice", SECRET), "identitytoken": SECRET}})
    assert SECRET not in repr(find_credentials("a.example", config))


def test_docker_config_names_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert from_environment().auth_files[-1] == tmp_path / "config.json"
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert from_environment().auth_files[-1] == Path("/home/somebody/.docker/config.json")
