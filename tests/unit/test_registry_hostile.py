"""Registries, mirrors and token servers of an attacker: one typed error, in bounded time and memory."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs import reference
from lazyfs.errors import BadAnswer, DocumentInvalid, LazyfsError, RegistryError, RegistryTimeout
from lazyfs.limits import MAX_HEADER
from lazyfs.registry.config.access import Access
from lazyfs.registry.config.hosts_toml import HostRule
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.http.addresses import split_named
from lazyfs.registry.http.connections import Limits
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.mirrors import Mirrors

D = "sha256:" + "a" * 64
BLOB = bytes(range(256)) * 64
HEAD = b"HTTP/1.1 200 OK\r\n"


class Wire:
    """A server that answers each request with the same bytes, and then those of `endless` until nobody listens."""

    def __init__(self, answer: bytes, endless: bytes = b"") -> None:
        self.answer = answer
        self.endless = endless
        self.sent = 0  # bytes that the client's side took
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
            self.requests.append(lines.readline())
            while lines.readline() not in (b"\r\n", b""):
                pass
            connection.sendall(self.answer)
            until = time.monotonic() + 20
            while self.endless and time.monotonic() < until:
                self.sent += connection.send(self.endless)


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    with contextlib.ExitStack() as stack:

        def make(answer: bytes, endless: bytes = b"") -> Wire:
            return stack.enter_context(contextlib.closing(Wire(answer, endless)))

        yield make


def opened(host: str, **options: Any) -> Repository:
    given = OpenOptions(retry=RetryPolicy(attempts=1), access=Access(), total_timeout=20.0, **options)
    return open_repository(reference.parse(f"{host}/team/app:v1"), given)


def test_a_length_of_thousands_of_digits(wire: Callable[..., Wire]) -> None:
    repository = opened(wire(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}").host)
    with pytest.raises(DocumentInvalid, match="more than"):
        repository.manifest("v1")
    repository.close()


def test_a_chunk_of_negative_size_is_not_read_to_the_end(wire: Callable[..., Wire]) -> None:
    server = wire(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * (1 << 20))
    repository = opened(server.host)
    with pytest.raises(BadAnswer):
        repository.manifest("v1")
    repository.close()
    server.close()
    assert server.sent < 32 << 20  # what fits the buffers of two sockets


@pytest.mark.parametrize("line", [b"Set-Cookie: " + b"a=b;" * 10_000 + b"\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_header_is_bounded(wire: Callable[..., Wire], line: bytes) -> None:
    first = b"" if line.startswith(b"HTTP") else HEAD
    repository = opened(wire(first, line * (MAX_HEADER // len(line))).host)
    began = time.monotonic()
    with pytest.raises(RegistryError, match=str(MAX_HEADER)):
        repository.manifest("v1")
    assert time.monotonic() - began < 5
    repository.close()


# -- addresses that are read in two ways


REALMS = ["https://[bad", "https://host:abc/t", "https://host:99999/t", "https://a b/", "https://a\\\\b/", "https://"]


@pytest.mark.parametrize("realm", REALMS)
def test_a_malformed_token_endpoint_is_a_bad_answer(wire: Callable[..., Wire], realm: str) -> None:
    challenge = f'HTTP/1.1 401 no\r\nWWW-Authenticate: Bearer realm="{realm}"\r\nContent-Length: 0\r\n\r\n'
    repository = opened(wire(challenge.encode()).host)
    with pytest.raises(BadAnswer, match="token endpoint"):
        repository.manifest("v1")
    repository.close()


def test_a_mirror_that_names_a_malformed_token_endpoint_is_passed_by(tmp_path: Path) -> None:
    with Mirrors(tmp_path, 1) as mirrors:
        digest = mirrors.add_blob(BLOB)
        mirrors.mirrors[0].auth = "bearer"
        mirrors.mirrors[0].challenge = 'Bearer realm="https://host:99999/"'
        with mirrors.open().fetch(digest, 0, len(BLOB)) as stream:
            assert b"".join(iter(lambda: stream.read(1 << 16), b"")) == BLOB


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254\\.example.com/",
        "http://[::1]example.com/",
        "http://example.com[::1]/",
        "http://ex ample.com/",
        "http://ex%61mple.com/",
        "http://host:99999/",
        "http://host:0/",
    ],
)
def test_an_address_that_others_may_read_differently_is_refused(wire: Callable[..., Wire], url: str) -> None:
    with pytest.raises(ValueError):
        split_named(url)
    repository = opened(wire(f"HTTP/1.1 307 there\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()).host)
    with pytest.raises(BadAnswer, match="malformed"):
        repository.manifest("v1")
    repository.close()


@pytest.mark.parametrize("url", ["http://ex\u212aample.com/", "http:///path", "http://", "", "http://user@/"])
def test_an_address_without_a_host_is_none(url: str) -> None:
    with pytest.raises(ValueError):
        split_named(url)


@pytest.mark.parametrize("host", ["host", "host:80", "host:", "10.0.0.1:5000", "[2001:db8::1]:5000", "xn--d1a.test"])
def test_plain_addresses_are_taken(host: str) -> None:
    assert split_named(f"https://{host}/path?query").netloc == host


# -- time


def test_all_addresses_of_a_name_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("", 0), backlog=0))
        port = full.getsockname()[1]
        for _ in range(3):  # nobody accepts: further connections are left without an answer
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        plain = socket.getaddrinfo

        def many(host: str, *args: Any, **options: Any) -> list[Any]:
            if host != "registry.test":
                return plain(host, *args, **options)
            return [entry for last in range(1, 40) for entry in plain(f"127.0.0.{last}", *args, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", many)
        repository = opened(f"registry.test:{port}", connect_timeout=0.5, plain_http=True)
        began = time.monotonic()
        with pytest.raises(RegistryTimeout):
            repository.manifest("v1", deadline=time.monotonic() + 1.2)
        assert time.monotonic() - began < 4  # not 39 times half a second
        repository.close()


def test_a_body_is_not_sent_beyond_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taking = threading.Event()

        def take_slowly() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                while not taking.wait(0.02) and connection.recv(64 << 10):
                    pass

        thread = threading.Thread(target=take_slowly)
        thread.start()
        transport = Transport()
        began = time.monotonic()
        with pytest.raises(RegistryTimeout):
            transport.send(
                "PUT",
                f"http://127.0.0.1:{server.getsockname()[1]}/",
                kind="upload",
                what="a blob",
                limits=Limits(time.monotonic() + 1.0, 30.0),
                connect_timeout=5.0,
                headers={"Content-Length": str(1 << 30)},
                body=(bytes(64 << 10) for _ in range(1 << 14)),
            )
        assert time.monotonic() - began < 4
        taking.set()
        thread.join()
        transport.close()


# -- what one host does to others


def test_nothing_is_deleted_where_a_registry_points(wire: Callable[..., Wire]) -> None:
    other = wire(b"HTTP/1.1 202 gone\r\nContent-Length: 0\r\n\r\n")
    answer = f"HTTP/1.1 202 begun\r\nLocation: http://{other.host}/precious\r\nContent-Length: 0\r\n\r\n"
    host = wire(answer.encode()).host
    here, there = (opened(f"{host}", plain_http=True), open_repository(reference.parse(f"{host}/other/base:1")))
    assert not here.mount_blob(D, 5, there)
    assert other.requests == []
    here.close()
    there.close()


def test_a_mirror_that_comes_back_and_refuses_is_no_longer_tried_at_each_read(tmp_path: Path) -> None:
    with Mirrors(tmp_path, 1) as mirrors:
        digest = mirrors.add_blob(BLOB)
        mirror = mirrors.mirrors[0]
        mirror.fault(Fault.BLACK_HOLE)
        repository = mirrors.open()
        repository.fetch(digest, 0, 1000).close()
        assert not repository.health.is_well(mirror.host)
        mirror.clear_faults()
        mirror.fault(Fault.STATUS, status=403)
        deadline = time.monotonic() + 10
        while not repository.health.is_well(mirror.host):  # it answers, if only with a refusal
            assert time.monotonic() < deadline
            repository.fetch(digest, 0, 1000).close()
            time.sleep(0.05)
        before = mirror.count()
        for _ in range(20):
            repository.fetch(digest, 0, 1000).close()
        assert mirror.count() == before  # that it may not give us this blob is remembered


def test_an_insecure_registry_that_is_down_at_first_is_found_out_later(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        (tmp_path / "conf").write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
        options = OpenOptions(
            retry=RetryPolicy(attempts=1), access=Access(registries_conf=(tmp_path / "conf",)), connect_timeout=2.0
        )
        digest = registry.add_blob(BLOB)
        repository = open_repository(reference.parse(f"{registry.host}/team/app:v1"), options)
        registry.stop_listening()
        with pytest.raises(LazyfsError):
            repository.has_blob(digest)
        registry.listen_again()
        assert repository.has_blob(digest)
        repository.close()


# -- secrets


def test_headers_of_a_hosts_toml_are_not_in_a_repr() -> None:
    headers = (("Authorization", "Bearer hush"),)
    endpoint = Endpoint("https://h/v2", "h", "r", "h", headers=headers)
    assert "hush" not in repr(endpoint) + repr(HostRule("https://h/v2", "h", headers=headers))
