"""A node's logins: what of kubelet's pulls is kept, how long, and where it goes: to its own registry, and to no log."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import reference
from lazyfs.errors import DaemonUnreachable, Unauthorized, UsageError
from lazyfs.limits import MAX_LINE, MAX_LOGIN_PLACES, MAX_SEEN_LOGINS
from lazyfs.registry.config.access import Access, from_json, of_node
from lazyfs.registry.config.credential_programs import CredentialPrograms
from lazyfs.registry.config.credentials import Credentials
from lazyfs.registry.config.logins import Logins
from lazyfs.registry.config.node_logins import NodeLogins as Held
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from snapshotter.node_logins import Login, NodeLogins, decode
from tests.helpers.fake_registry import FakeRegistry, Fault

SECRET = "hunter2-correct-horse"
BLOB = b"0123456789" * 100


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def login(host: str, repository: str = "", **more: str) -> dict[str, str]:
    return {"host": host, "repository": repository, **more}


# -- what a pull says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"password": "p"}, None),
        ({"username": "u", "password": "p", "identity_token": "i"}, Login("u", "p")),
        ({"identity_token": "i", "auth": encoded("u:p")}, Login(identity_token="i")),
        ({"auth": encoded("u:p:q\0\0")}, Login("u", "p:q")),
        ({"auth": encoded("u:p")[:4] + "\n" + encoded("u:p")[4:]}, Login("u", "p")),
        ({"auth": encoded("no colon")}, None),
        ({"auth": "%%%"}, None),
        ({"registry_token": "t.t"}, Login(registry_token="t.t")),
        ({"registry_token": "two\r\nlines"}, None),
        ({"username": "u", "password": "p" * 100_000}, None),
    ],
)
def test_a_login_is_chosen_as_containerd_chooses_it(fields: dict[str, str], expected: Login | None) -> None:
    assert decode(**fields) == expected


@given(
    st.text(max_size=60),
    st.dictionaries(
        st.sampled_from(["username", "password", "auth", "server_address", "identity_token", "registry_token"]),
        st.text(max_size=40).map(lambda text: text and f"{text}{SECRET}") | st.just(encoded(f"u:{SECRET}")[:-3]),
    ),
)
def test_nothing_that_kubelet_sends_raises_or_is_logged(image: str, fields: dict[str, str]) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("snapshotter")
    logger.addHandler(handler)
    try:
        logins = NodeLogins(patience=0)
        noted = logins.note(image, **fields)
    finally:
        logger.removeHandler(handler)
    Held().update(json.loads(json.dumps(logins.document())))
    assert SECRET not in repr(noted) + "".join(heard)


@pytest.mark.parametrize(
    ("image", "server", "kept"),
    [
        ("a.example/x", "", True),
        ("a.example/x", "a.example", True),
        ("a.example/x", "https://A.example/v2/", True),
        ("a.example:5000/x", "http://a.example:5000", True),
        ("a.example:5000/x", "a.example", False),
        ("a.example/x", "https://a.example.evil/", False),
        ("a.example/x", "https://evil/a.example", False),
        ("debian", "https://index.docker.io/v1/", True),
        ("docker.io/team/x", "registry-1.docker.io", True),
        ("a.example/x", "https://index.docker.io/v1/", False),
        ("oci:/some/dir", "", False),
        ("Not A Name", "", False),
    ],
)
def test_a_login_for_another_server_is_not_kept(image: str, server: str, kept: bool) -> None:
    logins = NodeLogins(patience=0)
    noted = logins.note(image, username="u", password="p", server_address=server)
    assert (noted is not None, len(logins)) == (kept, int(kept))


def test_what_was_pulled_from_longest_ago_goes_and_the_document_fits_a_message() -> None:
    logins = NodeLogins(patience=0)
    for number in range(MAX_SEEN_LOGINS + 5):
        logins.note(f"a.example/r{number}", username="u", password="p")
        logins.note("a.example/r0", username="u", password="p")
    places = [entry["repository"] for entry in logins.document()]
    assert len(places) == MAX_SEEN_LOGINS and places[-1] == "r0" and places[0] == "r6"
    for number in range(60):
        logins.note(f"a.example/big{number}", identity_token="\u00e9" * 10_000)
    size = len(json.dumps({"id": 1, "call": "set_logins", "args": {"logins": logins.document()}}))
    assert size < MAX_LINE and logins.document()[-1]["repository"] == "big59"


def test_the_daemon_is_told_of_changes_alone_and_everything_when_it_is_new() -> None:
    class Daemon:
        def __init__(self) -> None:
            self.heard: list[list[str]] = []
            self.failing = False

        def set_logins(self, logins: list[dict[str, str]]) -> None:
            self.heard.append([entry["password"] for entry in logins])
            if self.failing:
                raise DaemonUnreachable("it is gone")

    logins, first, second = NodeLogins(patience=5), Daemon(), Daemon()
    with ThreadPoolExecutor(1) as pool:  # a pull that comes before the daemon waits for it
        early = pool.submit(logins.note, "a.example/x", username="u", password="1")
        while not len(logins):
            time.sleep(0.001)
        assert not early.done()
        logins.greet(first)
        assert early.result() is not None and first.heard[-1] == ["1"]
    logins.note("a.example/y", username="u", password="2")
    logins.note("a.example/x", username="u", password="1")
    assert first.heard[-1] == ["1", "2"] and ["1", "2"] not in first.heard[:-1]
    first.failing = True
    logins.note("a.example/z", username="u", password="3")  # it doesn't fail the pull
    logins.greet(second)
    assert sorted(second.heard[-1]) == ["1", "2", "3"]


def test_a_daemon_that_hangs_holds_no_pull_up_for_long() -> None:
    class Daemon:
        def set_logins(self, logins: list[dict[str, str]]) -> None:
            if logins:
                release.wait(20)

    release = threading.Event()
    logins = NodeLogins(patience=0.1)
    logins.greet(Daemon())
    assert logins.note("a.example/x", username="u", password="p") is not None
    assert not release.is_set()
    release.set()


# -- what the daemon does with them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        ["x"],
        [login("")],
        [login("a.example")],
        [login("a.example", username=1)],  # type: ignore[arg-type]
        [login("a.example", registry_token=f"{SECRET}\r\nX: y")],
    ],
)
def test_a_bad_document_changes_nothing_and_is_not_repeated(document: object) -> None:
    held = Held()
    held.update([login("a.example", username="u")])
    with pytest.raises(UsageError) as caught:
        held.update(document)
    assert SECRET not in str(caught.value) and len(held) == 1


def test_what_is_not_told_again_stays_within_bounds() -> None:
    """A snapshotter that was restarted tells of its first pull, and pods go on reading with the logins of before."""
    held = Held()
    held.update([login("a.example", f"r{number}", username="u") for number in range(MAX_LOGIN_PLACES)])
    held.update([])
    held.update([login("a.example", "r0", username="v"), login("b.example", username="w")])
    assert len(held) == MAX_LOGIN_PLACES
    names = [one and one.username for one in (held.find("a.example", f"r{number}") for number in range(3))]
    assert names == ["v", None, "u"] and held.find("b.example", "any") is not None


def found(held: Held, endpoint: Endpoint, access: Access) -> Credentials | None:
    return Logins(access, endpoint, CredentialPrograms(), held).find(time.monotonic() + 5).credentials


def test_whose_login_goes_where(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"a.example": {"auth": encoded("file:p")}}}))
    held = Held()
    held.update(
        [
            login("a.example", "team/app", username="app"),
            login("a.example", "", username="host"),
            login("index.docker.io", "library/debian", username="hub"),
        ]
    )

    def user(host: str, repository: str, *, node: bool = True, **more: str) -> str:
        endpoint = Endpoint(f"https://{host}/v2", host, repository, host, **more)  # type: ignore[arg-type]
        credentials = found(held, endpoint, Access(auth_files=(path,), node=node))
        return credentials.username if credentials is not None else ""

    assert user("a.example", "team/app") == "app" and user("a.example", "team/other") == "host"
    assert user("docker.io", "library/debian") == "hub" and user("docker.io", "library/nginx") == ""
    assert user("b.example", "team/app") == ""
    assert user("a.example", "team/app", node=False) == "file", "a command's own files are not the node's"
    assert user("a.example", "team/app", namespace="b.example") == "file", "as a mirror it is not what was logged in to"


def test_the_mark_of_the_node_does_not_travel() -> None:
    assert of_node().node and not from_json({**of_node().to_json(), "node": True}).node


def opened(registry: FakeRegistry, transport: Transport, path: Path) -> Repository:
    options = OpenOptions(
        transport=transport,
        access=Access(auth_files=(path,), node=True),
        retry=RetryPolicy(attempts=2, first=0.001),
    )
    return open_repository(reference.parse(f"{registry.host}/a/app:1"), options)


def read(repository: Repository, digest: str) -> bytes:
    with repository.fetch(digest, 0, len(BLOB)) as stream:
        parts = bytearray()
        while piece := stream.read(1 << 16):
            parts += piece
        return bytes(parts)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_logins_that_change_are_taken_up_and_those_that_are_refused_passed_over(tmp_path: Path, auth: str) -> None:
    path = tmp_path / "config.json"
    with FakeRegistry(auth=auth, users={"alice": "1"}) as registry:
        digest = registry.add_blob(BLOB)
        transport = Transport()
        repository = opened(registry, transport, path)
        with pytest.raises(Unauthorized) as caught:
            read(repository, digest)
        assert "the node's image service was told none" in caught.value.message and "kubelet" in caught.value.hint
        mine = {"host": registry.host, "repository": "a/app", "username": "alice"}
        transport.node_logins.update([{**mine, "password": "1"}])
        assert read(repository, digest) == BLOB
        # A new login that is not good yet stands beside the one that is: nobody reading notices.
        registry.revoke_tokens()
        transport.node_logins.update([{**mine, "password": "wrong"}, {**mine, "password": "1"}])
        assert read(repository, digest) == BLOB
        # Rotated: the old one is worthless, and so is what was obtained with it.
        registry.users = {"alice": "2"}
        registry.revoke_tokens()
        with pytest.raises(Unauthorized, match=r"the login for .* from the node's image service"):
            read(repository, digest)
        transport.node_logins.update([{**mine, "password": "2"}])
        assert read(repository, digest) == BLOB
        # The node's is refused for good: a file has another.
        registry.users = {"alice": "3"}
        registry.revoke_tokens()
        path.write_text(json.dumps({"auths": {registry.host: {"auth": encoded("alice:3")}}}))
        assert read(repository, digest) == BLOB
        transport.close()


def test_identity_and_registry_tokens(tmp_path: Path) -> None:
    with FakeRegistry(auth="bearer", users={"alice": "1"}, identity_token="identity") as registry:
        digest = registry.add_blob(BLOB)
        transport = Transport()
        place = {"host": registry.host, "repository": "a/app"}
        transport.node_logins.update([{**place, "identity_token": "identity"}])
        assert read(opened(registry, transport, tmp_path / "none"), digest) == BLOB
        token = next(iter(registry.tokens))
        asked = registry.count(path="token")
        transport.node_logins.update([{**place, "registry_token": token}])
        repository = opened(registry, transport, tmp_path / "none")
        assert read(repository, digest) == BLOB and registry.count(path="token") == asked
        registry.revoke_tokens()
        with pytest.raises(Unauthorized) as caught:
            read(repository, digest)
        assert token not in str(caught.value) + caught.value.hint
        transport.node_logins.update([{**place, "identity_token": "identity"}])
        assert read(repository, digest) == BLOB
        transport.close()


def test_a_registry_that_hands_tokens_to_anybody_and_refuses_them_is_tried_with_the_next_login(tmp_path: Path) -> None:
    with FakeRegistry(auth="bearer", users={"bad": "1", "good": "2"}) as registry:
        digest = registry.add_blob(BLOB)
        transport = Transport()
        place = {"host": registry.host, "repository": "a/app"}
        transport.node_logins.update(
            [{**place, "username": name, "password": registry.users[name]} for name in registry.users]
        )
        registry.fault(Fault.STATUS, path="/blobs/", status=403, after=1, times=1)
        assert read(opened(registry, transport, tmp_path / "none"), digest) == BLOB
        asked = [request.authorization for request in registry.matching(path="/token")]
        assert asked == [f"Basic {encoded('bad:1')}", f"Basic {encoded('good:2')}"]
        transport.close()
