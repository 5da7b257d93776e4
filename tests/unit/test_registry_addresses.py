"""Where a registry must not send us: looked at as a name, and again as the address that is connected to."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import BadAnswer, RegistryUnreachable
from lazyfs.reference import parse
from lazyfs.registry.config.access import Access
from lazyfs.registry.http import addresses
from lazyfs.registry.http.environment import Proxies
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault

BLOB = bytes(range(200)) * 20
FORBIDDEN = [
    "169.254.169.254", "169.254.0.1", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518",
    "[fe80::1]", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::a9fe:a9fe]",
    "[2002:a9fe:a9fe::]",
    "0.0.0.0", "0", "[::]", "224.0.0.1", "[ff02::1]", "100.100.100.200", "[fd00:ec2::254]", "192.0.0.192",
    "metadata.google.internal", "METADATA.google.internal.", "instance-data",
]  # fmt: skip
LOOPBACK = ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::1]", "localhost", "a.localhost."]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def opened(host: str, **options: Any) -> Repository:
    return open_repository(
        parse(f"{host}/app:v1"),
        OpenOptions(retry=RetryPolicy(attempts=1), access=Access(), plain_http=True, connect_timeout=2.0, **options),
    )


def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]]) -> list[str]:
    """Make names resolve to what `table` says, one after another for each look-up; return the look-ups."""
    real, asked = socket.getaddrinfo, []

    def look_up(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        if host in table:
            asked.append(host)
            known = table[host]
            return real(known.pop(0) if len(known) > 1 else known[0], port, *args, **more)
        return real(host, port, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


# -- as written


@pytest.mark.parametrize("host", FORBIDDEN)
@pytest.mark.parametrize("near", [True, False])
def test_forbidden_whoever_says_so(host: str, near: bool) -> None:
    assert addresses.name_refusal(host.strip("[]"), loopback=near)


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_for_registries_on_loopback_only(host: str) -> None:
    assert addresses.name_refusal(host.strip("[]"), loopback=False)
    assert not addresses.name_refusal(host.strip("[]"), loopback=True)
    assert addresses.is_loopback(host.strip("[]"))


@pytest.mark.parametrize("host", ["registry.example", "10.1.2.3", "192.168.0.9", "8.8.8.8", "2001:db8::1", "fd12::1"])
def test_others_are_fine(host: str) -> None:
    assert not addresses.name_refusal(host, loopback=False)
    assert not addresses.is_loopback(host)


@given(st.text(max_size=60))
def test_any_text_is_judged(host: str) -> None:
    assert isinstance(addresses.name_refusal(host, loopback=False), str)
    assert addresses.refusal(host, loopback=True) == "is no address" or addresses.numeric(host)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_every_form(address: Any) -> None:
    plain = addresses.refusal(str(address), loopback=False)
    number = int(address)
    assert addresses.refusal(f"::ffff:{address}", loopback=False) == plain
    assert addresses.name_refusal(str(number), loopback=False) == plain
    assert addresses.name_refusal(hex(number), loopback=False) == plain


# -- redirects


@pytest.mark.parametrize("host", FORBIDDEN)
def test_a_redirect_there_is_refused(registry: FakeRegistry, host: str) -> None:
    digest = registry.add_blob(BLOB)
    registry.fault(Fault.REDIRECT, location=f"http://{host}:{registry.host.split(':')[1]}/latest/meta-data")
    repository = opened(registry.host)
    with pytest.raises(BadAnswer, match="must not send us there") as caught:
        repository.fetch(digest, 0, 10)
    assert not caught.value.temporary
    assert registry.count() == 1
    repository.close()


def test_a_redirect_to_a_name_that_leads_there_is_refused(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, {"storage.example": ["169.254.169.254"]})
    digest = registry.add_blob(BLOB)
    registry.fault(Fault.REDIRECT, location="http://storage.example/blob")
    repository = opened(registry.host)
    with pytest.raises(BadAnswer, match=r"storage\.example.*169\.254\.169\.254"):
        repository.fetch(digest, 0, 10)
    repository.close()


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads elsewhere at its second look-up gains nothing by it."""
    port = registry.host.split(":")[1]
    asked = names(monkeypatch, {"storage.example": ["127.0.0.1", "169.254.169.254"]})
    digest = registry.add_blob(BLOB)
    registry.fault(Fault.REDIRECT, location=f"http://storage.example:{port}/v2/app/blobs/{digest}", times=1)
    repository = opened(registry.host)
    with repository.fetch(digest, 0, 10) as stream:
        assert stream.read(10) == BLOB[:10]
    assert asked == ["storage.example"]
    repository.close()


def test_a_far_registry_must_not_lead_to_this_machine(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own address says how far it is, not its name; here it is made to look as if on another machine."""
    monkeypatch.setattr("lazyfs.registry.http.exchange.is_loopback", lambda host: False)
    digest = registry.add_blob(BLOB)
    with FakeRegistry() as victim:
        victim.add_blob(BLOB)
        # A connection that the user's own word has opened must not serve a redirect.
        transport = Transport()
        ours = opened(victim.host, transport=transport)
        assert ours.has_blob(digest)
        before = victim.count()
        registry.fault(Fault.REDIRECT, location=f"http://{victim.host}/v2/app/blobs/{digest}")
        names(monkeypatch, {"inside.example": ["127.0.0.1"]})
        repository = opened(registry.host, transport=transport)
        with pytest.raises(BadAnswer, match="this machine"):
            repository.fetch(digest, 0, 10)
        registry.clear_faults()
        registry.fault(Fault.REDIRECT, location=f"http://inside.example:{victim.host.split(':')[1]}/x")
        with pytest.raises(BadAnswer, match=r"inside\.example.*127\.0\.0\.1, which is this machine"):
            repository.fetch(digest, 0, 10)
        assert victim.count() == before
        transport.close()


def test_a_name_of_several_addresses_is_tried_one_after_another(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(registry.host.split(":")[1])
    real = socket.getaddrinfo

    def look_up(host: Any, *args: Any, **more: Any) -> Any:
        if host != "two.example":
            return real(host, *args, **more)
        found = [real(each, port, type=socket.SOCK_STREAM)[0] for each in ("127.0.0.2", "127.0.0.1")]
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    digest = registry.add_blob(BLOB)
    registry.fault(Fault.REDIRECT, location=f"http://two.example:{port}/v2/app/blobs/{digest}", times=1)
    repository = opened(registry.host)
    with repository.fetch(digest, 0, 10) as stream:
        assert stream.read(10) == BLOB[:10]
    repository.close()


def test_a_name_that_leads_nowhere(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    digest = registry.add_blob(BLOB)
    registry.fault(Fault.REDIRECT, location="http://nowhere.example/x")
    repository = opened(registry.host)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises((RegistryUnreachable, BadAnswer)):
        repository.fetch(digest, 0, 10)
    repository.close()


def test_through_a_proxy_the_name_alone_is_looked_at(registry: FakeRegistry) -> None:
    """The proxy resolves names, so only what is written can be refused here."""
    transport = Transport(Proxies({"http": f"http://{registry.host}", "no": "127.0.0.1"}))
    digest = registry.add_blob(BLOB)
    registry.fault(Fault.REDIRECT, location="http://169.254.169.254/x", times=1)
    repository = opened(registry.host, transport=transport)
    with pytest.raises(BadAnswer, match="must not send us there"):
        repository.fetch(digest, 0, 10)
    transport.close()


# -- token servers


@pytest.mark.parametrize("host", ["169.254.169.254", "0xa9fea9fe", "metadata.google.internal"])
def test_a_token_server_there_is_refused(host: str) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        registry.challenge = f'Bearer realm="http://{host}/token",service="s"'
        repository = opened(registry.host)
        with pytest.raises(BadAnswer, match="must not send us there"):
            repository.manifest("v1")
        repository.close()
