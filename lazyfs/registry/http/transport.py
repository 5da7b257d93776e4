"""HTTP requests and their answers, with every failure of the libraries below translated into ours."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, NameResolutionError, ReadTimeoutError

from lazyfs import __version__
from lazyfs.errors import BadAnswer, DocumentInvalid, RegistryError, RegistryTimeout, RegistryUnreachable, UsageError
from lazyfs.limits import MAX_CAUSES, MAX_DISCARD, POOL_SIZE
from lazyfs.registry.config.credential_programs import CredentialPrograms
from lazyfs.registry.config.node_logins import NodeLogins
from lazyfs.registry.endpoints import NO_TLS, Tls
from lazyfs.registry.health import Health
from lazyfs.registry.hops import Hop, HopKind, OnHop
from lazyfs.registry.http.addresses import name_refusal
from lazyfs.registry.http.connections import AddressRefused, CurrentLimits, Guard, Limits, TimedAdapter
from lazyfs.registry.http.environment import Authorities, Proxies
from lazyfs.registry.http.tls import TlsContexts, explain
from lazyfs.registry.http.waits import retry_after

_MAX_DIGITS = 18  # of a length that is looked at; int() raises for thousands


class Answer:
    """An HTTP answer whose body has not been read. Owned by one thread at a time; close it.

    `kind` may be corrected before close(), when the hop is reported.
    """

    def __init__(
        self,
        response: requests.Response,
        url: str,
        what: str,
        report: Callable[[HopKind, int, int], None],
        *,
        kind: HopKind,
        sent: int,
        peer: str = "",
        told: Told,
    ) -> None:
        self.peer = peer  # the address that answered; "" through a proxy
        self.told = told
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers  # case-insensitive
        self.url = url
        self.host = host_of(url)
        self.what = what
        self.kind = kind
        self.received = 0  # bytes of the body so far
        self.redirected = False  # another address answered than was asked
        self._raw = response.raw
        self._report = report
        self._sent = sent
        self._closed = False

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of the body as it came over the wire, b"" at its end.

        Blocks within the request's limits. Raise RegistryTimeout, or BadAnswer when the body breaks off.
        """
        try:
            data: bytes = self._raw.read(size, decode_content=False)
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            self.close()
            if _caused_by(error, (ReadTimeoutError, TimeoutError)):
                raise RegistryTimeout(
                    self.host, f"{self.host} stopped sending {self.what} after {self.received} bytes"
                ) from None
            raise BadAnswer(
                self.host, f"{self.host} broke off {self.what} after {self.received} bytes: {_reason(error)}"
            ) from None
        self.received += len(data)
        return data

    def read_all(self, limit: int) -> bytes:
        """Return the whole body and close. Raise DocumentInvalid when it has more than `limit` bytes."""
        try:
            declared = self.headers.get("Content-Length", "")
            pieces: list[bytes] = []
            too_much = declared.isdecimal() and (len(declared) > _MAX_DIGITS or int(declared) > limit)
            while self.received <= limit and not too_much:
                piece = self.read(min(limit + 1 - self.received, 1 << 20))
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
            raise DocumentInvalid(f"{self.what} from {self.host} has more than the {limit} bytes allowed")
        finally:
            self.close()

    def discard(self) -> bytes:
        """Read and return a small body, at most MAX_DISCARD bytes, and close. Failures of the body are ignored."""
        data = b""
        try:
            while len(data) < MAX_DISCARD and (piece := self.read(MAX_DISCARD - len(data))):
                data += piece
        except RegistryError:
            pass  # nobody asked for this body; the connection is closed by read()
        self.close()
        return data

    def finish(self) -> None:
        """Check that the body ends here, and keep the connection. Raise BadAnswer when there is more."""
        if self.read(1):
            self.close()
            raise BadAnswer(self.host, f"{self.host} sent more bytes of {self.what} than it promised")
        self.close()

    def close(self) -> None:
        """Report the hop. The connection is kept when the body was read to its end, else it is closed."""
        if self._closed:
            return
        self._closed = True
        # After the end urllib3 has given the connection back already and close() no longer reaches it.
        self._raw.close()
        self._report(self.kind, self.status, self._sent or self.received)


class Transport:
    """Connection pools, proxies, certificates. Thread-safe; may be shared by all repositories of a process.

    `health` is what is known of the hosts that were asked with it. `programs` remembers what credential programs said,
    and `node_logins` what the node's image service was told, for as long as the transport lives.
    """

    def __init__(self, proxies: Proxies | None = None, authorities: Authorities | None = None) -> None:
        self._proxies = proxies or Proxies()
        self._current = CurrentLimits()
        self._contexts = TlsContexts(authorities or Authorities())
        self.programs = CredentialPrograms()
        self.node_logins = NodeLogins()
        self.health = Health()
        # Pools of their own: a connection that the user's word opened must not serve a registry's.
        self._adapters = {guard: TimedAdapter(self._current, self._contexts, POOL_SIZE, guard) for guard in Guard}

    def close(self) -> None:
        """Close idle connections. Blocks not at all; the transport may be used again."""
        for adapter in self._adapters.values():
            adapter.close()

    def send(
        self,
        method: str,
        url: str,
        *,
        kind: HopKind,
        what: str,
        limits: Limits,
        connect_timeout: float,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None = None,
        body_size: int = 0,
        on_hop: OnHop | None = None,
        guard: Guard = Guard.USER,
        named_by: str = "",
        tls: Tls = NO_TLS,
    ) -> Answer:
        """Send one request and return its answer, of whatever status, once its header has come. Follows no redirect.

        `body_size` is the length of `body` in bytes. Blocks until `limits` at most (name resolution apart, which the
        system's resolver bounds). `guard` and `named_by`: who named the host; what a registry named is not asked at
        addresses that are none of its business, as far as we resolve them: through a proxy only the name can be looked
        at. Raise RegistryUnreachable (also for certificates that can't be loaded), RegistryTimeout, BadAnswer.
        """
        host = host_of(url)
        started = time.monotonic()
        proxies = self._proxies.for_url(url)
        if guard is not Guard.USER:
            why = name_refusal(urlsplit(url).hostname or "", loopback=guard is Guard.NEAR)
            if why:
                raise _forbidden(named_by, host, what, why)
            if proxies:
                guard = Guard.USER

        def report(kind: HopKind, status: int, size: int) -> None:
            if on_hop is not None:
                on_hop(Hop(kind, host, what, status, started, time.monotonic() - started, size, told.wait, told.left))

        told = Told()
        left = limits.pause(started, begun=False)
        if left <= 0:
            raise RegistryTimeout(host, f"no time was left to ask {host} for {what}")
        context = self._context(host, tls) if url.startswith("https:") else True
        sending = {"User-Agent": f"lazyfs/{__version__}", "Accept-Encoding": "identity", **headers}
        self._current.limits = limits
        self._current.reader, self._current.peer = None, ""
        try:
            request = requests.Request(method, url, headers=sending, data=body).prepare()
            response = self._adapters[guard].send(
                request,
                stream=True,
                timeout=(min(connect_timeout, left), left),
                proxies=proxies,
                verify=context,  # type: ignore[arg-type]
            )
            if self._current.reader is not None:
                self._current.reader.begun = True
        except AddressRefused as error:
            report(kind, 0, 0)
            raise _forbidden(named_by, host, what, f"leads to {error}") from None
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as error:
            report(kind, 0, 0)
            raise _translate(error, host, what, bool(tls.client)) from None
        except BaseException:
            report(kind, 0, 0)  # an error of the body's source
            raise
        finally:
            self._current.limits = None
        told.note(response)
        peer = "" if proxies else self._current.peer
        return Answer(response, url, what, report, kind=kind, sent=body_size, peer=peer, told=told)

    def _context(self, host: str, tls: Tls) -> ssl.SSLContext:
        try:
            return self._contexts.context(tls)
        except UsageError as error:  # a mirror's certificates are no reason not to ask the next one
            failed = RegistryUnreachable(host, f"no TLS to {host}: {error.message}", hint=error.hint)
            failed.temporary = False
            raise failed from None

    def is_proxied(self, url: str) -> bool:
        """Tell whether requests to `url` go through a proxy."""
        return bool(self._proxies.for_url(url))


class Told:
    """What an answer's header says of how often we may ask."""

    wait = 0.0
    left: int | None = None

    def note(self, response: requests.Response) -> None:
        if response.status_code in (429, 503):
            self.wait = retry_after(response.headers.get("Retry-After", ""))
        remaining = response.headers.get("RateLimit-Remaining", "").partition(";")[0].strip()
        if remaining.isdecimal() and len(remaining) < 10:
            self.left = int(remaining)


def _forbidden(named_by: str, host: str, what: str, why: str) -> BadAnswer:
    error = BadAnswer(named_by, f"{named_by} sends {what} to {host}, which {why}: a registry must not send us there")
    error.temporary = False
    return error


def host_of(url: str) -> str:
    """Return "host[:port]" of a URL, without user information."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _translate(error: Exception, host: str, what: str, has_client: bool) -> RegistryError:
    if _caused_by(error, (requests.Timeout, TimeoutError)):
        return RegistryTimeout(host, f"{host} did not answer in time when asked for {what}")
    refused = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), None)
    if refused is not None:
        sentence, hint = explain(refused, host, has_client)
        failed = RegistryUnreachable(host, sentence, hint=hint)
        failed.temporary = False
        return failed
    if isinstance(error, requests.exceptions.ProxyError):
        return RegistryUnreachable(host, f"the proxy for {host} can't be used: {_reason(error)}")
    if isinstance(error, (requests.ConnectionError, HTTPError, HTTPException, OSError)):
        if _caused_by(error, (NameResolutionError, socket.gaierror)):
            return RegistryUnreachable(host, f"the name of registry {host} can't be resolved")
        return RegistryUnreachable(host, f"no answer from {host} when asked for {what}: {_reason(error)}")
    return BadAnswer(host, f"{host} can't be asked for {what}: {_reason(error)}")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from or wraps, outermost first."""
    found: list[BaseException] = []
    queue: list[object] = [error]
    while queue and len(found) < MAX_CAUSES:
        this = queue.pop(0)
        if isinstance(this, BaseException) and this not in found:
            found.append(this)
            queue += [getattr(this, "reason", None), this.__cause__, this.__context__, *this.args]
    return found


def _caused_by(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _reason(error: BaseException) -> str:
    """The innermost sentence that says something, short and on one line."""
    words = "unknown"
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            words = cause.strerror
        elif cause.args and isinstance(cause.args[-1], str):
            words = cause.args[-1]
    return " ".join(words.split())[:200]
