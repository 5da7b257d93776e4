"""Proxies from the environment: which requests they get, and that the environment is looked at once."""

from __future__ import annotations

import pytest

from lazyfs import reference
from lazyfs.digest import of
from lazyfs.registry.http.environment import Proxies
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.open import OpenOptions, open_repository
from tests.helpers.fake_registry import FakeRegistry

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("https://registry.example/v2/", {}, {}),
        ("https://registry.example/v2/", {"https": PROXY}, {"https": PROXY}),
        ("http://registry.example/v2/", {"https": PROXY}, {}),
        ("http://registry.example/v2/", {"all": PROXY}, {"http": PROXY}),
        ("https://registry.example/v2/", {"https": PROXY, "no": "registry.example"}, {}),
        ("https://registry.example/v2/", {"https": PROXY, "no": ".example"}, {}),
        ("https://registry.example/v2/", {"https": PROXY, "no": "other.example"}, {"https": PROXY}),
        ("https://registry.example:5000/v2/", {"https": PROXY, "no": "registry.example:5000"}, {}),
        ("https://registry.example/v2/", {"https": PROXY, "no": "*"}, {}),
        ("https://10.1.2.3/v2/", {"https": PROXY, "no": "a.example, 10.0.0.0/8"}, {}),
        ("https://11.1.2.3/v2/", {"https": PROXY, "no": "10.0.0.0/8"}, {"https": PROXY}),
        ("https://[fd00::1]:5000/v2/", {"https": PROXY, "no": "fd00::/16"}, {}),
        ("http://127.0.0.1:5000/v2/", {"http": PROXY}, {}),
        ("http://localhost:5000/v2/", {"http": PROXY}, {}),
        ("http://[::1]:5000/v2/", {"http": PROXY}, {}),
    ],
)
def test_which_proxy_serves_a_url(url: str, environment: dict[str, str], expected: dict[str, str]) -> None:
    assert Proxies(environment).for_url(url) == expected


def test_requests_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that is asked with absolute URLs is a proxy, as far as the client can tell."""
    with FakeRegistry() as proxy:
        for name in ("HTTP_PROXY", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://user:word@{proxy.host}")
        repository = open_repository(
            reference.parse("registry.example/team/app:v1"),
            OpenOptions(plain_http=True, retry=RetryPolicy(attempts=1)),
        )
        monkeypatch.delenv("http_proxy")
        assert not repository.has_blob(of(b"x"))
        assert proxy.requests[0].path == f"http://registry.example/v2/team/app/blobs/{of(b'x')}"
        assert proxy.requests[0].headers["proxy-authorization"].startswith("Basic ")
        assert proxy.requests[0].authorization == ""
        repository.close()


def test_docker_hub_is_asked_at_its_own_address() -> None:
    with FakeRegistry() as proxy:
        transport = Transport(Proxies({"http": f"http://{proxy.host}"}))
        repository = open_repository(reference.parse("debian"), OpenOptions(plain_http=True, transport=transport))
        assert not repository.has_blob(of(b"x"))
        assert proxy.requests[0].path.startswith("http://registry-1.docker.io/v2/library/debian/blobs/")
        assert repository.host == "docker.io"
        transport.close()
