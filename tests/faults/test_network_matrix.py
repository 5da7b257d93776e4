"""The network fails in every way at once, on one daemon: an image's own readers see an error, and nobody else does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lazyfs.registry.config.access import Access
from tests.faults.cases import ERROR, RIGHT, Area, Case, shows
from tests.helpers import sabotage
from tests.helpers.certs import TestAuthority, server_context
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.fault_bench import DRIVERS, Bench, Tried, Victim

BOUND = (
    25.0  # seconds for all readers of a network that is gone; read_timeout is 2, and a page is tried again by itself
)


@contextlib.contextmanager
def silent_socket(registry: FakeRegistry, *, accepts: bool) -> Iterator[None]:
    """Put a socket that never says a word in a registry's place; unless it `accepts`, connections hang before that."""
    registry.stop_listening()
    host, _, port = registry.host.rpartition(":")
    with socket.socket() as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(128 if accepts else 0)
        for _ in range(0 if accepts else 2):  # the queue is full: the kernel drops further SYNs
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, int(port)))
        yield
    registry.listen_again()


@contextlib.contextmanager
def refusing(registry: FakeRegistry) -> Iterator[None]:
    registry.stop_listening()
    yield
    registry.listen_again()


@contextlib.contextmanager
def ruled(victim: Victim, **rule: Any) -> Iterator[None]:
    path = "/signed/" if victim.registry.redirect else f"/blobs/{victim.image.layers[0]}"
    victim.registry.fault(path=path, **rule)
    yield
    victim.registry.clear_faults()


@contextlib.contextmanager
def expired_certificate(victim: Victim, authority: TestAuthority) -> Iterator[None]:
    good = victim.registry.tls
    victim.registry.tls = server_context(authority.expired())
    victim.registry.hang_up()
    yield
    victim.registry.tls = good


@contextlib.contextmanager
def silent_tls(victim: Victim) -> Iterator[None]:
    with silent_socket(victim.registry, accepts=True):
        yield


@contextlib.contextmanager
def expired_addresses(victim: Victim) -> Iterator[None]:
    victim.registry.signature_lifetime = -1
    victim.registry.expire_signatures()
    yield
    victim.registry.signature_lifetime = 3600


@contextlib.contextmanager
def no_tokens(victim: Victim) -> Iterator[None]:
    victim.registry.fault(Fault.STATUS, path="/token", status=500)
    victim.registry.revoke_tokens()
    yield
    victim.registry.clear_faults()


@dataclass(frozen=True, slots=True)
class Trouble:
    """A way of failing in mid-read. `error`: the class that is counted; `says`: words of the log's sentence."""

    id: str
    fault: str
    error: str
    says: str
    rule: dict[str, Any] = field(default_factory=dict)
    special: str = ""  # what is no rule of the fake registry
    registry: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        user = f"`status`: errors {self.error}; log: host, blob, “{self.says}”"
        metrics = f'`errors_total{{class="{self.error}"}}`'
        return Case(f"network-{self.id}", Area.NETWORK, self.fault, ERROR, user, metrics, self.id)


def status(code: int, retry_after: str = "") -> dict[str, Any]:
    return {"kind": Fault.STATUS, "status": code, "retry_after": retry_after}


TROUBLES = [
    Trouble(
        "refused", "connection refused (nobody listens)", "RegistryUnreachable", "Connection refused", special="refused"
    ),
    Trouble(
        "lost-syn",
        "black hole before the connection",
        "RegistryUnreachable",
        "did not answer in time",
        special="lost-syn",
    ),
    Trouble(
        "reset-first",
        "connection reset before an answer",
        "RegistryUnreachable",
        "Connection reset by peer",
        {"kind": Fault.REFUSE},
    ),
    Trouble(
        "black-hole",
        "black hole after the connection: no answer",
        "RegistryTimeout",
        "did not answer in time",
        {"kind": Fault.BLACK_HOLE},
    ),
    Trouble("stalled", "the body stops in the middle", "RegistryTimeout", "stopped sending", {"kind": Fault.STALL}),
    Trouble("drip", "the body drips: 2 kB/s", "ReadDeadline", "stopped sending", {"kind": Fault.DRIP, "rate": 2000}),
    Trouble(
        "drip-header",
        "the answer's header drips: 10 bytes/s",
        "ReadDeadline",
        "did not answer in time",
        {"kind": Fault.DRIP_HEADERS, "rate": 10},
    ),
    Trouble("reset", "reset in mid-body", "BadAnswer", "broke off", {"kind": Fault.RESET}),
    Trouble("truncated", "body shorter than promised", "BadAnswer", "broke off", {"kind": Fault.TRUNCATE}),
    Trouble(
        "wrong-bytes",
        "one bit of each answer flipped",
        "DigestMismatch",
        "was damaged or tampered with",
        {"kind": Fault.FLIP},
    ),
    Trouble(
        "wrong-range",
        "another range than the one asked for",
        "BadAnswer",
        "with another range",
        {"kind": Fault.WRONG_RANGE},
    ),
    Trouble(
        "short-range", "less than the range asked for", "BadAnswer", "with another range", {"kind": Fault.SHORT_RANGE}
    ),
    Trouble(
        "no-ranges",
        "200 and the whole blob for a range",
        "BadAnswer",
        "does not serve ranges",
        {"kind": Fault.IGNORE_RANGE},
    ),
    Trouble("redirect-loop", "redirects in a circle", "BadAnswer", "more than 5 times", {"kind": Fault.REDIRECT_LOOP}),
    Trouble(
        "redirect-metadata",
        "redirect to a cloud's metadata address",
        "BadAnswer",
        "a registry must not send us there",
        {"kind": Fault.REDIRECT, "location": "http://169.254.169.254/latest/"},
    ),
    Trouble(
        "redirect-file",
        "redirect to `file:///etc/passwd`",
        "BadAnswer",
        "to a malformed address",
        {"kind": Fault.REDIRECT, "location": "file:///etc/passwd"},
    ),
    Trouble(
        "expired-url",
        "each signed URL has expired before it is used",
        "Unauthorized",
        "(403): signature expired",
        special="expired-url",
        registry={"redirect": True},
    ),
    Trouble(
        "storage-500",
        "the storage behind the redirect fails with 500",
        "RegistryFault",
        "failed with status 500",
        status(500),
        registry={"redirect": True},
    ),
    Trouble(
        "no-tokens",
        "tokens are revoked, and the token endpoint fails",
        "RegistryFault",
        "when asked for a token",
        special="no-tokens",
        registry={"auth": "bearer", "anonymous": True},
    ),
    Trouble("401", "401", "Unauthorized", "(401)", status(401)),
    Trouble("403", "403", "Unauthorized", "(403)", status(403)),
    Trouble("404", "404: the blob is gone", "BlobMissing", "has no blob", status(404)),
    Trouble("416", "416", "BadAnswer", "it is shorter", status(416)),
    Trouble(
        "429", "429, `Retry-After: 1`", "TooManyRequests", "a login or a mirror may be allowed more", status(429, "1")
    ),
    Trouble(
        "429-year",
        "429, `Retry-After` of a year",
        "TooManyRequests",
        "a login or a mirror may be allowed more",
        status(429, "31536000"),
    ),
    Trouble("500", "500", "RegistryFault", "failed with status 500", status(500)),
    Trouble("503", "503", "RegistryFault", "failed with status 503", status(503)),
    Trouble(
        "tls-expired",
        "the certificate expires between two reads",
        "RegistryUnreachable",
        "has expired",
        special="tls-expired",
        registry={"tls": None},
    ),
    Trouble(
        "tls-silent",
        "the TLS handshake never ends",
        "RegistryUnreachable",
        "did not answer in time",
        special="tls-silent",
        registry={"tls": None},
    ),
    Trouble(
        "no-dns",
        "the host's name is not resolved any more",
        "RegistryUnreachable",
        "can't be resolved",
        special="no-dns",
    ),
]


@dataclass(frozen=True, slots=True)
class Seen:
    """All that came of the one time when everything failed."""

    victims: dict[str, Victim]
    tried: dict[str, list[Tried]]
    counted: dict[str, float]  # errors by class
    log: str


@pytest.fixture(scope="module")
def seen(module_scratch: Path) -> Iterator[Seen]:
    """Break everybody's network at once, read, mend it, and read again."""
    authority = TestAuthority(module_scratch / "authority")
    place = module_scratch / "sabotage"
    prefix = sabotage.prefix(place, module_scratch / "store")
    with Bench(module_scratch, prefix, DRIVER="fuse", READ_TIMEOUT="2") as bench:
        victims = {}
        for trouble in TROUBLES:
            options = dict(trouble.registry)
            if "tls" in options:
                options["tls"] = server_context(authority.issue())
            victim = victims[trouble.id] = bench.victim(trouble.id, **options)
            if "tls" in options:
                victim.access = Access(ca=(authority.certificate,))
            if trouble.id == "no-dns":
                victim.reference = victim.reference.replace("127.0.0.1", "localhost")
            bench.show(victim)
        with ExitStack() as stack:
            begin: dict[str, Callable[[Victim], contextlib.AbstractContextManager[None]]] = {
                "refused": lambda victim: refusing(victim.registry),
                "lost-syn": lambda victim: silent_socket(victim.registry, accepts=False),
                "tls-expired": lambda victim: expired_certificate(victim, authority),
                "tls-silent": silent_tls,
                "expired-url": expired_addresses,
                "no-tokens": no_tokens,
                "no-dns": lambda victim: sabotage.on(place, "no-names"),
            }
            for trouble in TROUBLES:
                victim = victims[trouble.id]
                stack.enter_context(
                    begin[trouble.special](victim) if trouble.special else ruled(victim, **trouble.rule)
                )
            victims["no-dns"].registry.hang_up()
            tried = bench.read_all(list(victims.values()), BOUND)
            counted = bench.errors()
            told = bench.node.lazyfs("status").stdout.splitlines()
            assert [line for line in told if line.startswith("errors ") and all(name in line for name in counted)], told
        log = bench.node.log()
        bench.until_right(list(victims.values()))
        yield Seen(victims, tried, counted, log)


@shows(*(trouble.case for trouble in TROUBLES))
@pytest.mark.parametrize("trouble", TROUBLES, ids=[trouble.id for trouble in TROUBLES])
def test_readers_get_errors_in_time_and_right_bytes_later(seen: Seen, trouble: Trouble) -> None:
    victim = seen.victims[trouble.id]
    assert len(seen.tried[trouble.id]) == len(DRIVERS)
    for each in seen.tried[trouble.id]:
        assert each.failed and "Input/output error" in each.words
        assert victim.content.startswith(each.data)  # what came before the error is right
    expecting = sum(other.error == trouble.error for other in TROUBLES)
    assert seen.counted[trouble.error] >= expecting
    port = victim.registry.host.partition(":")[2]
    names = (f":{port} ", victim.registry.storage_host, victim.image.layers[0])
    of_it = [line for line in seen.log.splitlines() if any(name in line for name in names)]
    assert any(trouble.says in line for line in of_it), of_it[-3:]


# What is an answer that another try won't change, or goes on, is left out.
LASTING = (
    "401",
    "403",
    "404",
    "416",
    "429-year",
    "drip",
    "drip-header",
    "redirect-loop",
    "redirect-metadata",
    "redirect-file",
)
ONCE = [each.id for each in TROUBLES if each.rule and each.id not in LASTING]


@shows(
    Case(
        "network-once",
        Area.NETWORK,
        f"any of these once: {', '.join(ONCE)}",
        RIGHT,
        "log: which attempt failed, and when the next one comes",
        "`registry_request_duration_seconds` counts each attempt",
    )
)
def test_what_fails_once_is_not_noticed(scratch: Path) -> None:
    with Bench(scratch, DRIVER="fuse", READ_TIMEOUT="15") as bench:
        victims = []
        for trouble in TROUBLES:
            if trouble.id in ONCE:
                victim = bench.victim(trouble.id, **trouble.registry)
                bench.show(victim)
                path = "/signed/" if victim.registry.redirect else f"/blobs/{victim.image.layers[0]}"
                victim.registry.fault(path=path, times=1, **trouble.rule)
                victims.append(victim)
        tried = bench.read_all(victims, 30)
        for victim in victims:
            for each in tried[victim.name]:
                assert (each.data, each.words) == (victim.content, ""), victim.name
        assert "next in" in bench.node.log()
