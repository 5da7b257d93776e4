"""One request with everything that HTTP makes of it: the challenge met, redirects followed by hand, limits applied.

Authorization goes to the registry's own origin (scheme, host and port) and nowhere else, however a redirect puts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from lazyfs.errors import BadAnswer
from lazyfs.registry.addresses import is_loopback
from lazyfs.registry.auth import Authorizer
from lazyfs.registry.connections import Guard, Limits, Pace
from lazyfs.registry.hops import HopKind, OnHop
from lazyfs.registry.transport import Answer, Transport, host_of

MAX_REDIRECTS = 5
MAX_LOCATION = 16 << 10  # bytes of a Location header; signed URLs have one or two thousand
REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect; from a request to its first byte and between two reads; in total where no deadline is given.

    `slowest` (bytes a second) is added to the total for large bodies: a deadline fits any size.
    """

    connect: float = 5.0
    answer: float = 30.0
    total: float = 300.0
    slowest: int = 64 << 10

    def deadline(self, given: float | None, size: int = 0) -> float:
        """Return `given`, or the default for a transfer of `size` bytes that starts now (time.monotonic())."""
        return given if given is not None else time.monotonic() + self.total + size / self.slowest


@dataclass(frozen=True, slots=True)
class Body:
    """What to send: `size` bytes, from a new iterator at each `open` (redirects and challenges repeat it)."""

    size: int
    open: Callable[[], bytes | Iterable[bytes]]


class Exchange:
    """Requests to one repository of one registry. Thread-safe; holds no state but the Authorizer's."""

    def __init__(
        self,
        base_url: str,
        repository: str,
        transport: Transport,
        timeouts: Timeouts,
        config_path: Path,
        *,
        credentials_host: str,
        on_hop: OnHop | None = None,
    ) -> None:
        self.base_url = base_url  # "https://HOST", no slash at the end
        self.timeouts = timeouts
        self._origin = _origin(base_url)
        self._transport = transport
        self._on_hop = on_hop
        self._near = False  # the registry was last seen on this machine, and may lead there
        secure = base_url.startswith("https:")
        self._auth = Authorizer(credentials_host, repository, secure, config_path, self._ask_token)

    def ask(
        self,
        method: str,
        url: str,
        *,
        kind: HopKind,
        what: str,
        deadline: float,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        pushes: bool = False,
        pace: Pace | None = None,
    ) -> Answer:
        """Return the answer of whatever status that isn't a redirect or a challenge that could be met.

        `what` names the thing in errors; `pace` is for requests that somebody else could answer, too. Blocks until
        `deadline` at most. Raise RegistryUnreachable, RegistryTimeout, Unauthorized (401), BadAnswer (redirects that
        loop or lead where they must not).
        """
        redirects = 0
        renewed = False
        while True:
            home = _origin(url) == self._origin
            authorization = self._auth.header(_soon(deadline, pace), pushes=pushes) if home else ""
            answer = self._send(
                method,
                url,
                kind=kind,
                what=what,
                deadline=deadline,
                headers={**(headers or {}), **({"Authorization": authorization} if authorization else {})},
                body=body,
                pace=pace,
            )
            if home and answer.peer:
                self._near = is_loopback(answer.peer)
            if answer.status == 401 and home:
                answer.kind = "challenge"
                answer.discard()
                if renewed:
                    raise self._auth.refused(what, 401)
                self._auth.renew(answer, authorization, _soon(deadline, pace))
                renewed = True
            elif answer.status == 403 and home:
                answer.discard()
                raise self._auth.refused(what, 403)
            elif answer.status in REDIRECTS:
                answer.kind = "redirect"
                answer.discard()
                redirects += 1
                url = self._follow(answer, redirects)
                if answer.status == 303 and method not in ("GET", "HEAD"):
                    method, body = "GET", None
            else:
                return answer

    def may_also_pull(self, repository: str) -> None:
        """Have logins cover pulls from another repository of this registry, too: what a mount across them needs."""
        self._auth.widen(repository)

    def _send(
        self,
        method: str,
        url: str,
        *,
        kind: HopKind,
        what: str,
        deadline: float,
        headers: Mapping[str, str],
        body: Body | None,
        pace: Pace | None = None,
    ) -> Answer:
        # What a registry names is looked at before it is asked; the registry itself lies where the user says.
        guard = Guard.USER if _origin(url) == self._origin else Guard.NEAR if self._near else Guard.FAR
        return self._transport.send(
            method,
            url,
            kind=kind,
            what=what,
            limits=Limits(deadline, self.timeouts.answer, pace),
            connect_timeout=self.timeouts.connect,
            headers=headers,
            body=body.open() if body else None,
            body_size=body.size if body else 0,
            on_hop=self._on_hop,
            guard=guard,
        )

    def _ask_token(self, method: str, url: str, headers: dict[str, str], body: bytes | None, deadline: float) -> Answer:
        sent = None if body is None else Body(len(body), lambda: body)
        return self._send(method, url, kind="token", what="a token", deadline=deadline, headers=headers, body=sent)

    def _follow(self, answer: Answer, redirects: int) -> str:
        location = answer.headers.get("Location", "")
        if redirects > MAX_REDIRECTS:
            raise _refused(answer, f"{answer.host} redirects {answer.what} more than {MAX_REDIRECTS} times")
        return follow_location(answer, location)


def _soon(deadline: float, pace: Pace | None) -> float:
    return deadline if pace is None else min(deadline, pace.begin_by)


def follow_location(answer: Answer, location: str) -> str:
    """Return where a Location header leads, as an absolute URL. Raise BadAnswer for what must not be followed."""
    sends = f"{answer.host} sends {answer.what} to"
    if not location or len(location) > MAX_LOCATION:
        raise _refused(answer, f"{sends} no address, or one of absurd length")
    try:
        target = urljoin(answer.url, location)
        parts = urlsplit(target)
        origin = _origin(target)
    except ValueError:
        raise _refused(answer, f"{sends} a malformed address") from None
    if parts.scheme not in ("http", "https") or not origin[1] or parts.username is not None:
        raise _refused(answer, f"{sends} an address that is neither http nor https")
    if answer.url.startswith("https:") and parts.scheme != "https":
        raise _refused(answer, f"{sends} {host_of(target)} without TLS, which is refused")
    return target


def _refused(answer: Answer, message: str) -> BadAnswer:
    error = BadAnswer(answer.host, message)
    error.temporary = False  # how a registry redirects is its configuration
    return error


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
