"""One request with everything that HTTP makes of it: the challenge met, redirects followed by hand, limits applied.

Authorization goes to the registry's own origin (scheme, host and port) and nowhere else, however a redirect puts it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import quote, urljoin, urlsplit

from lazyfs.errors import BadAnswer
from lazyfs.limits import MAX_LOCATION, MAX_LOGIN_TRIES, MAX_REDIRECTS, REQUEST_TIMEOUT, SLOWEST_TRANSFER
from lazyfs.registry.config.access import Access
from lazyfs.registry.config.logins import Logins
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.health import UNTOLD
from lazyfs.registry.hops import HopKind, OnHop
from lazyfs.registry.http.addresses import is_loopback, split_named
from lazyfs.registry.http.auth import Authorizer
from lazyfs.registry.http.connections import Guard, Limits
from lazyfs.registry.http.pace import Pace
from lazyfs.registry.http.tls import speaks_tls
from lazyfs.registry.http.transport import Answer, Transport, host_of

REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect; from a request to its first byte and between two reads; in total where no deadline is given.

    `slowest` (bytes a second) is added to the total for large bodies: a deadline fits any size.
    """

    connect: float = 5.0
    answer: float = 30.0
    total: float = REQUEST_TIMEOUT
    slowest: int = SLOWEST_TRANSFER

    def deadline(self, given: float | None, size: int = 0) -> float:
        """Return `given`, or the default for a transfer of `size` bytes that starts now (time.monotonic())."""
        return given if given is not None else time.monotonic() + self.total + size / self.slowest


@dataclass(frozen=True, slots=True)
class Body:
    """What to send: `size` bytes, from a new iterator at each `open` (redirects and challenges repeat it)."""

    size: int
    open: Callable[[], bytes | Iterable[bytes]]


class Exchange:
    """Requests to one repository at one endpoint. Thread-safe; holds no state but the Authorizer's."""

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Transport,
        timeouts: Timeouts,
        access: Access,
        *,
        on_hop: OnHop | None = None,
    ) -> None:
        self.root = f"{endpoint.api}/{quote(endpoint.repository)}"  # what requests to the repository are put behind
        self.timeouts = timeouts
        self.health = transport.health
        self._endpoint = endpoint
        self._origin = _origin(endpoint.api)
        self._transport = transport
        self._on_hop = on_hop
        self._near = False  # the registry was last seen on this machine, and may lead there
        # Others than the endpoint itself (storage, token servers) never see our certificate.
        self._tls_elsewhere = replace(endpoint.tls, client=())
        self._scheme_known = threading.Event()
        if not endpoint.may_be_plain:
            self._scheme_known.set()
        logins = Logins(access, endpoint, transport.programs, transport.node_logins)
        self._auth = Authorizer(endpoint.credentials_host, endpoint.repository, logins, self._ask_token)
        self._auth.secure = not endpoint.plain_http

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
        logins = 0
        url = self._address(url, deadline)
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
            if home:
                self._note(answer)
            if answer.status == 401 and home:
                answer.kind = "challenge"
                answer.discard()
                if not logins:
                    self._auth.renew(answer, authorization, _soon(deadline, pace))
                elif logins >= MAX_LOGIN_TRIES or not self._auth.another(authorization, _soon(deadline, pace)):
                    raise self._auth.refused(what, 401)
                logins += 1
            elif answer.status == 403 and home:
                answer.discard()
                again = self._auth.another if logins else self._auth.changed
                if logins >= MAX_LOGIN_TRIES or not again(authorization, _soon(deadline, pace)):
                    raise self._auth.refused(what, 403)
                logins += 1
            elif answer.status in REDIRECTS:
                answer.kind = "redirect"
                answer.discard()
                redirects += 1
                url = self._follow(answer, redirects)
                if answer.status == 303 and method not in ("GET", "HEAD"):
                    method, body = "GET", None
            else:
                answer.redirected = redirects > 0
                return answer

    def _note(self, answer: Answer) -> None:
        if answer.peer:
            self._near = is_loopback(answer.peer)
        if answer.status == 429 or answer.told.left is not None:
            limited = answer.status == 429
            self.health.note_limit(
                self._endpoint.host, answer.told.left, answer.told.wait or UNTOLD if limited else 0.0
            )

    def may_also_pull(self, repository: str) -> None:
        """Have logins cover pulls from another repository of this registry, too: what a mount across them needs."""
        self._auth.widen(repository)

    def _address(self, url: str, deadline: float) -> str:
        """Return the URL to ask for `url`: with the scheme that an insecure registry speaks, and a mirror's `ns`."""
        api = self._endpoint.api
        if not url.startswith(f"{api}/"):
            return url
        if not self._scheme_known.is_set():
            self._find_scheme(deadline)
        url = f"{self._origin[0]}://{url.partition('://')[2]}"
        if self._endpoint.namespace:
            url += f"{'&' if '?' in url else '?'}ns={quote(self._endpoint.namespace, safe='')}"
        return url

    def _find_scheme(self, deadline: float) -> None:
        """Fall back to plain HTTP where an insecure registry speaks no TLS. Several threads may find out at once."""
        timeout = min(self.timeouts.connect, deadline - time.monotonic())
        host = urlsplit(self._endpoint.api).netloc
        tls = True if self._transport.is_proxied(self._endpoint.api) else None
        if tls is None and timeout > 0:
            tls = speaks_tls(host, timeout)
        if tls is False:
            self._origin = _origin(self._endpoint.api.replace("https:", "http:", 1))
            self._auth.secure = False
        if tls is not None:  # one that is down for a moment is looked at again
            self._scheme_known.set()

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
        home = _origin(url) == self._origin
        guard = Guard.USER if home else Guard.NEAR if self._near else Guard.FAR
        return self._transport.send(
            method,
            url,
            kind=kind,
            what=what,
            limits=Limits(deadline, self.timeouts.answer, pace),
            connect_timeout=self.timeouts.connect,
            headers={**dict(self._endpoint.headers), **headers} if home else headers,
            body=body.open() if body else None,
            body_size=body.size if body else 0,
            on_hop=self._on_hop,
            tls=self._endpoint.tls if home else self._tls_elsewhere,
            guard=guard,
            named_by=self._endpoint.host,
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
        parts = split_named(target)
    except ValueError:
        raise _refused(answer, f"{sends} a malformed address") from None
    if parts.scheme not in ("http", "https") or parts.username is not None:
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
