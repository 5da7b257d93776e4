"""Where logins come from: files in podman's order, credential programs that work and that misbehave, and renewals."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import reference
from lazyfs.errors import Unauthorized, UsageError
from lazyfs.registry.config.access import Access, Login
from lazyfs.registry.config.credential_programs import CredentialPrograms
from lazyfs.registry.config.credentials import AuthFile, Credentials, read_auth_file
from lazyfs.registry.config.logins import Logins
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry, Fault

SECRET = "hunter2-correct-horse"
BLOB = b"0123456789" * 100
HOST = "a.example"


def soon() -> float:
    return time.monotonic() + 20


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def auth_file(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document))
    return path


def program(place: Path, name: str, script: str) -> tuple[tuple[str, str], ...]:
    """Install docker-credential-NAME, a shell script that gets the server as $server; return the environment."""
    place.mkdir(exist_ok=True)
    path = place / f"docker-credential-{name}"
    path.write_text(f'#!/bin/sh\nread -r server\necho "$1 $server" >> {place}/log\n{script}\n')
    path.chmod(0o755)
    return (("HOME", str(place)), ("PATH", f"{place}:/usr/bin:/bin"))


def answer(user: str, secret: str) -> str:
    return f"""printf '{{"ServerURL": "%s", "Username": "{user}", "Secret": "{secret}"}}' "$server\""""


def calls(place: Path) -> list[str]:
    return (place / "log").read_text().splitlines() if (place / "log").exists() else []


def logins(access: Access, host: str = HOST, repository: str = "team/app", **more: Any) -> Logins:
    endpoint = Endpoint(f"https://{host}/v2", host, repository, host, **more)
    return Logins(access, endpoint, CredentialPrograms())


def found(access: Access, host: str = HOST, repository: str = "team/app", **more: Any) -> Credentials | None:
    return logins(access, host, repository, **more).find(soon()).credentials


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "user"),
    [("team/app", "app"), ("team/app2", "team"), ("team/other/deep", "team"), ("teams/x", "host"), ("x", "host")],
)
def test_the_longest_part_of_the_name_wins(tmp_path: Path, repository: str, user: str) -> None:
    auths = {
        HOST: {"auth": encoded("host", "p")},
        f"{HOST}/team": {"auth": encoded("team", "p")},
        f"{HOST}/team/app": {"auth": encoded("app", "p")},
        "b.example/x": {"auth": encoded("other", "p")},
    }
    got = found(Access(auth_files=(auth_file(tmp_path / "a.json", {"auths": auths}),)), repository=repository)
    assert got is not None and got.username == user


def test_docker_hubs_namespaces(tmp_path: Path) -> None:
    auths = {
        "docker.io/team": {"auth": encoded("team", "p")},
        "https://index.docker.io/v1/": {"auth": encoded("h", "p")},
    }
    access = Access(auth_files=(auth_file(tmp_path / "a.json", {"auths": auths}),))
    one, other = found(access, "docker.io", "team/app"), found(access, "docker.io", "library/debian")
    assert one is not None and other is not None and (one.username, other.username) == ("team", "h")


def test_files_are_looked_at_in_order_and_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    access = Access(auth_files=(first, second))
    auth_file(second, {"auths": {HOST: {"auth": encoded("second", "p")}}})
    looking = logins(access)
    assert looking.find(soon()).credentials.username == "second"  # type: ignore[union-attr]
    auth_file(first, {"auths": {HOST: {"auth": encoded("first", "p")}}})
    assert looking.find(soon()).credentials.username == "first"  # type: ignore[union-attr]


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json is not there"):
        found(Access(auth_files=(tmp_path / "none.json",), auth_file_given=True))
    assert found(Access(auth_files=(tmp_path / "none.json",))) is None


def test_explicit_logins_come_first_and_for_the_origin_only(tmp_path: Path) -> None:
    path = auth_file(tmp_path / "a.json", {"auths": {HOST: {"auth": encoded("file", "p")}}})
    access = Access(login=Login("flag", "p"), auth_files=(path,))
    assert found(access, origin=True).username == "flag"  # type: ignore[union-attr]
    assert found(access).username == "file"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    ["[]", '{"auths": []}', '{"credHelpers": 5}', '{"credHelpers": {"a": 5}}', '{"credsStore": 5}', "{" * 5000, "\xff"],
)
def test_a_broken_file_is_named_without_its_secrets(tmp_path: Path, text: str) -> None:
    path = tmp_path / "auth.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"auth\.json") as caught:
        found(Access(auth_files=(path,)))
    assert "\n" not in caught.value.message
    path.write_text('{"auths": {"a.example": {"auth": "' + SECRET)
    with pytest.raises(UsageError) as caught:
        found(Access(auth_files=(path,)))
    assert SECRET not in str(caught.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="no regular file"):
        found(Access(auth_files=(path,)))


_JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@given(_JSON, st.sampled_from([HOST, f"https://{HOST}/v1/", f"{HOST}/team", "docker.io"]))
def test_any_document_is_taken_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, value: Any, key: str
) -> None:
    place = tmp_path_factory.mktemp("auth")
    for document in (
        value,
        {"auths": value},
        {"auths": {key: value}},
        {"credHelpers": value},
        {"auths": {key: {"auth": value}}},
    ):
        path = place / "auth.json"
        path.write_text(json.dumps(document))
        try:
            file = read_auth_file(path)
            assert file is not None
            file.find(HOST, "team/app")
            file.program(HOST)
        except UsageError as error:
            assert str(path) in error.message


@given(st.text(min_size=1, max_size=20).filter(lambda text: ":" not in text), st.text(max_size=30))
def test_what_docker_writes_is_read(username: str, password: str) -> None:
    file = AuthFile(Path("/x"), {HOST: {"auth": encoded(username, password)}}, {}, "")
    got = file.find(HOST)
    assert got is not None and (got.username, got.password) == (username, password.rstrip("\0"))


# -- credential programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [{"credHelpers": {HOST: "test"}}, {"credHelpers": {f"https://{HOST}": "test"}}, {"credsStore": "test"}],
)
def test_a_program_is_asked(tmp_path: Path, document: dict[str, Any]) -> None:
    environment = program(tmp_path / "bin", "test", answer("alice", SECRET))
    auths = {HOST: {"auth": encoded("old", "p")}}
    access = Access(auth_files=(auth_file(tmp_path / "c.json", {**document, "auths": auths}),), environment=environment)
    got = found(access)
    assert got is not None and (got.username, got.password, got.source) == ("alice", SECRET, "docker-credential-test")
    assert calls(tmp_path / "bin") == [f"get {HOST}"]
    assert SECRET not in repr(got)


def test_a_program_of_another_host_is_left_alone(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "test", answer("alice", SECRET))
    path = auth_file(tmp_path / "c.json", {"credHelpers": {"b.example": "test"}})
    assert found(Access(auth_files=(path,), environment=environment)) is None
    assert not calls(tmp_path / "bin")


def test_docker_hub_is_asked_for_under_both_names(tmp_path: Path) -> None:
    none = 'echo "credentials not found in native keychain"; exit 1'
    environment = program(
        tmp_path / "bin", "test", f'if [ "$server" = docker.io ]; then {answer("a", "b")}; else {none}; fi'
    )
    path = auth_file(tmp_path / "c.json", {"credsStore": "test"})
    got = found(Access(auth_files=(path,), environment=environment), "docker.io", "library/debian")
    assert got is not None and calls(tmp_path / "bin") == ["get https://index.docker.io/v1/", "get docker.io"]


def test_an_identity_token(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "test", answer("<token>", SECRET))
    path = auth_file(tmp_path / "c.json", {"credsStore": "test"})
    got = found(Access(auth_files=(path,), environment=environment))
    assert got is not None and got.identity_token == SECRET and not got.username


def test_the_programs_of_registries_conf(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "first", 'echo "credentials not found"; exit 1')
    program(tmp_path / "bin", "last", answer("last", "p"))
    conf = tmp_path / "registries.conf"
    conf.write_text('credential-helpers = ["first", "containers-auth.json", "last"]')
    path = tmp_path / "c.json"
    access = Access(auth_files=(path,), registries_conf=(conf,), environment=environment)
    assert found(access).username == "last"  # type: ignore[union-attr]
    auth_file(path, {"auths": {HOST: {"auth": encoded("file", "p")}}})
    assert found(access).username == "file"  # type: ignore[union-attr]
    conf.write_text('credential-helpers = ["last"]')
    assert found(access).username == "last"  # type: ignore[union-attr]


MISBEHAVIOUR = {
    "status": ("echo secret-on-stdout; echo it is locked >&2; exit 3", "failed with status 3: it is locked"),
    "rubbish": ("echo secret-on-stdout", "did not answer with a login"),
    "nothing": ("true", "did not answer with a login"),
    "other": ("""echo '{"Username": 5, "Secret": "secret-on-stdout"}'""", "did not answer with a login"),
    "deep": ("head -c 60000 /dev/zero | tr '\\0' '['", "did not answer with a login"),
    "flood": ("cat /dev/zero", "printed more than"),
    "hangs": ("sleep 300", "did not answer in time"),
    "stops": ("exec 1>&- 2>&-; sleep 300", "did not answer in time"),
    "noise": ("cat /dev/zero >&2", "did not answer in time"),
    "killed": ("kill -9 $$", "failed with status -9"),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_a_program_that_misbehaves_costs_a_sentence(tmp_path: Path, kind: str) -> None:
    script, words = MISBEHAVIOUR[kind]
    environment = program(tmp_path / "bin", "bad", script)
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        CredentialPrograms(patience=0.7 if "in time" in words else 15).ask("bad", HOST, environment, soon())
    assert time.monotonic() - started < 10
    assert f"docker-credential-bad {words}" in caught.value.message
    assert "secret-on-stdout" not in str(caught.value) and "\n" not in caught.value.message
    # Its process group is gone.
    until(
        lambda: not any(_environment_of(pid, str(tmp_path)) for pid in os.listdir("/proc") if pid.isdigit()),
        "no process is left",
    )


def _environment_of(pid: str, marker: str) -> bool:
    try:
        return f"HOME={marker}/bin".encode() in Path("/proc", pid, "environ").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".x", "-x", "a b", "a\0b", "x" * 100])
def test_the_name_of_a_program_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a credential helper"):
        CredentialPrograms().ask(name, HOST, (("PATH", str(tmp_path)),), soon())


def test_a_program_that_is_missing_or_can_not_be_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="docker-credential-none is not installed"):
        CredentialPrograms().ask("none", HOST, (("PATH", str(tmp_path)),), soon())
    path = tmp_path / "docker-credential-odd"
    path.write_text("#!/does/not/exist\n")
    path.chmod(0o755)
    with pytest.raises(UsageError, match="docker-credential-odd can't be started"):
        CredentialPrograms().ask("odd", HOST, (("PATH", str(tmp_path)),), soon())


def test_what_a_program_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "test", f"sleep 300 & {answer('a', 'b')}")
    started = time.monotonic()
    assert CredentialPrograms().ask("test", HOST, environment, soon()) is not None
    assert time.monotonic() - started < 10


def test_a_program_sees_no_environment_but_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    environment = program(tmp_path / "bin", "test", f"env > {tmp_path}/env; {answer('a', 'b')}")
    CredentialPrograms().ask("test", HOST, environment, soon())
    assert "SECRET_OF_OURS" not in (tmp_path / "env").read_text()


def test_answers_are_kept_and_asked_for_anew_when_they_must_be(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "test", answer("alice", SECRET))
    programs = CredentialPrograms()
    for _ in range(3):
        assert programs.ask("test", HOST, environment, soon()) is not None
    assert len(calls(tmp_path / "bin")) == 1
    programs.ask("test", HOST, environment, soon(), time.monotonic())
    assert len(calls(tmp_path / "bin")) == 2
    programs.ask("test", "b.example", environment, soon())
    assert len(calls(tmp_path / "bin")) == 3


def test_many_threads_run_a_program_once(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "test", f"sleep 0.2; {answer('alice', SECRET)}")
    programs = CredentialPrograms()
    barrier = threading.Barrier(8)

    def ask(_: int) -> Credentials | None:
        barrier.wait()
        return programs.ask("test", HOST, environment, soon())

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert len(calls(tmp_path / "bin")) == 1


def test_a_failure_is_kept_too(tmp_path: Path) -> None:
    environment = program(tmp_path / "bin", "bad", "exit 3")
    programs = CredentialPrograms()
    for _ in range(3):
        with pytest.raises(UsageError):
            programs.ask("bad", HOST, environment, soon())
    assert len(calls(tmp_path / "bin")) == 1


# -- over the wire -----------------------------------------------------------------------------------------------------


def opened(registry: FakeRegistry, access: Access) -> Repository:
    options = OpenOptions(retry=RetryPolicy(attempts=1), access=access)
    return open_repository(reference.parse(f"{registry.host}/team/app:v1"), options)


def fetched(repository: Repository, digest: str) -> bytes:
    with repository.fetch(digest, 0, len(BLOB)) as stream:
        return b"".join(iter(lambda: stream.read(1 << 16), b""))


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_the_error_says_how_the_program_failed(tmp_path: Path, auth: str) -> None:
    with FakeRegistry(auth=auth, users={"alice": SECRET}) as registry:
        path = auth_file(tmp_path / "c.json", {"credsStore": "none"})
        repository = opened(registry, Access(auth_files=(path,), environment=(("PATH", str(tmp_path)),)))
        with pytest.raises(Unauthorized, match="docker-credential-none is not installed"):
            repository.manifest("v1")
        repository.close()


def test_a_failing_program_does_not_keep_anonymous_pulls_away(tmp_path: Path) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        digest = registry.add_blob(BLOB)
        path = auth_file(tmp_path / "c.json", {"credsStore": "none"})
        repository = opened(registry, Access(auth_files=(path,), environment=(("PATH", str(tmp_path)),)))
        assert fetched(repository, digest) == BLOB
        repository.close()


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_login_that_expired_is_asked_for_anew(tmp_path: Path, auth: str, status: int) -> None:
    """As a cloud's program gives one for some hours, and its registry says 401 or 403 after that."""
    word = tmp_path / "word"
    word.write_text("old")
    script = f"""printf '{{"Username": "alice", "Secret": "%s"}}' "$(cat {word})\""""
    environment = program(tmp_path / "bin", "test", script)
    with FakeRegistry(auth=auth, users={"alice": "old"}) as registry:
        digest = registry.add_blob(BLOB)
        path = auth_file(tmp_path / "c.json", {"credHelpers": {registry.host: "test"}})
        repository = opened(registry, Access(auth_files=(path,), environment=environment))
        assert fetched(repository, digest) == BLOB
        registry.users["alice"] = "new"
        word.write_text("new")
        registry.revoke_tokens()
        if status == 403 and auth == "basic":
            registry.fault(Fault.STATUS, status=403, path="/blobs/", times=1)
        assert fetched(repository, digest) == BLOB
        assert len(calls(tmp_path / "bin")) == 2
        repository.close()


def test_a_login_made_after_the_refusal_is_found(tmp_path: Path) -> None:
    with FakeRegistry(auth="basic", users={"alice": SECRET}) as registry:
        digest = registry.add_blob(BLOB)
        path = auth_file(tmp_path / "c.json", {"auths": {registry.host: {"auth": encoded("alice", "old")}}})
        repository = opened(registry, Access(auth_files=(path,)))
        with pytest.raises(Unauthorized):
            fetched(repository, digest)
        auth_file(path, {"auths": {registry.host: {"auth": encoded("alice", SECRET)}}})
        assert fetched(repository, digest) == BLOB
        repository.close()


def test_a_broken_file_in_the_middle_of_a_read_is_a_refusal_of_that_registry(tmp_path: Path) -> None:
    """All that a repository raises is a RegistryError: readers and mirrors know what to do with those."""
    with FakeRegistry(auth="basic", users={"alice": SECRET}) as registry:
        path = tmp_path / "c.json"
        path.write_text("{")
        repository = opened(registry, Access(auth_files=(path,)))
        with pytest.raises(Unauthorized, match=r"c\.json is not JSON"):
            repository.manifest("v1")
        repository.close()
