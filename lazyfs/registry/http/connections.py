"""Connections that keep a deadline in total, not only between two packets.

A socket timeout starts anew with every byte, so a server that drips its header or body byte by byte could hold a thread
for hours. Here every single recv gets what is left of the request's deadline, in the header too, whatever size is read.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NameResolutionError

from lazyfs.limits import ALERT_TIMEOUT, MAX_HEADER
from lazyfs.registry.http.addresses import refusal
from lazyfs.registry.http.pace import Pace
from lazyfs.registry.http.tls import TlsContexts


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one request may take: `deadline` in time.monotonic(), `stall` seconds between two arrivals of bytes."""

    deadline: float
    stall: float
    pace: Pace | None = None

    def pause(self, now: float, *, begun: bool) -> float:
        """Return how many seconds the next wait may last; 0 or less: none is left."""
        left = min(self.deadline - now, self.stall)
        if self.pace is None:
            return left
        return min(left, self.pace.stall if begun else self.pace.begin_by - now)


class CurrentLimits(threading.local):
    """The limits of the request that the calling thread is making: the way around two libraries to the response."""

    limits: Limits | None = None
    reader: _TimedReader | None = None  # of the answer that came
    peer: str = ""  # the address that it came from


class _TimedReader(io.RawIOBase):
    """The receiving side of a socket under limits. Owns `raw`."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, limits: Limits) -> None:
        self._raw = raw
        self._sock = sock
        self._limits = limits
        self._waited = 0.0  # seconds of this window
        self._got = 0  # bytes of this window
        self._header = 0  # bytes before the body, and of its beginning
        self.begun = False  # the header is here

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        now = time.monotonic()
        timeout = self._limits.pause(now, begun=self.begun)
        if timeout <= 0:
            raise TimeoutError("the deadline has passed")
        if timeout != self._sock.gettimeout():
            self._sock.settimeout(timeout)
        got = self._raw.readinto(buffer)
        if not self.begun:
            self._header += got or 0
            if self._header > MAX_HEADER:  # megabytes of cookies take seconds to parse, and everybody waits meanwhile
                raise http.client.HTTPException(f"a header of more than {MAX_HEADER} bytes")
        pace = self._limits.pace
        if self.begun and pace is not None and pace.floor and got:
            self._weigh(pace, got, time.monotonic() - now)
        return got

    def _weigh(self, pace: Pace, got: int, waited: float) -> None:
        self._waited += waited
        self._got += got
        if self._waited >= pace.window:
            if self._got < pace.floor * self._waited:
                raise TimeoutError(f"only {self._got / self._waited:.0f} bytes a second came")
            self._waited, self._got = 0.0, 0

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class Guard(Enum):
    """Who has named the host of a request, and so which addresses it may have; see `addresses`."""

    USER = "user"  # the registry itself: wherever it lies
    NEAR = "near"  # a registry on this machine: loopback is fine
    FAR = "far"


class AddressRefused(Exception):
    """A host's name leads to an address that must not be asked. Becomes a BadAnswer in the transport."""


class _Guarded(HTTPConnection):
    """A connection that looks at the addresses of a name before it connects, and connects to those it looked at.

    The check of a URL alone would not do: a name may lead somewhere else a moment later. All its addresses together
    get what is left of the deadline, with the TLS handshake: a name may have thousands that don't answer.
    """

    guard_level: ClassVar[Guard] = Guard.USER
    current: ClassVar[CurrentLimits]

    def send(self, data: Any) -> None:
        """Send unless the deadline has passed: a server may take a body as slowly as it likes."""
        limits = self.current.limits
        if limits is not None and time.monotonic() >= limits.deadline:
            raise TimeoutError("the deadline has passed")
        super().send(data)

    def _new_conn(self) -> socket.socket:
        name = self._dns_host
        try:
            answers = socket.getaddrinfo(name.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise NameResolutionError(name, self, socket.gaierror(str(error))) from error
        found = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
        for address in found if self.guard_level is not Guard.USER else ():
            why = refusal(address, loopback=self.guard_level is Guard.NEAR)
            if why:
                raise AddressRefused(f"{address}, which {why}" if address != name else why)
        patience = self.timeout
        try:
            for number, address in enumerate(found):
                self._dns_host, self.timeout = address, self._left(patience)
                try:
                    connected = super()._new_conn()
                except (HTTPError, OSError):
                    if number + 1 == len(found):
                        raise
                else:
                    try:
                        connected.settimeout(self._left(patience))  # for the handshake
                    except TimeoutError:
                        connected.close()
                        raise
                    return connected
        finally:
            self._dns_host, self.timeout = name, patience  # certificates are for the name
        raise NameResolutionError(name, self, socket.gaierror("no address"))

    def _left(self, patience: Any) -> Any:
        """Return how many seconds the next step may take: `patience` at most. Raise TimeoutError for none."""
        limits = self.current.limits
        if limits is None:
            return patience
        left = limits.pause(time.monotonic(), begun=False)
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return min(patience, left) if isinstance(patience, (int, float)) else left


def _peer(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0])
    except (OSError, IndexError):
        return ""


def timed_pools(current: CurrentLimits, guard: Guard = Guard.USER) -> dict[str, type[HTTPConnectionPool]]:
    """Return pool classes by scheme whose responses obey the limits in `current` at the time of the request."""

    class TimedResponse(http.client.HTTPResponse):
        def __init__(
            self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
        ) -> None:
            super().__init__(sock, debuglevel, method, url)
            if current.limits is not None:
                current.reader = _TimedReader(self.fp.detach(), sock, current.limits)
                current.peer = _peer(sock)
                self.fp = io.BufferedReader(current.reader)

        def _read_next_chunk_size(self) -> int:
            size: int = super()._read_next_chunk_size()  # type: ignore[misc]
            if size < 0:  # -1 would read on to the end of the connection, all into memory
                raise ValueError("a chunk of negative size")
            return size

    class TimedConnection(_Guarded, HTTPConnection):
        response_class = TimedResponse
        guard_level = guard

    class TimedTlsConnection(_Guarded, HTTPSConnection):
        response_class = TimedResponse
        guard_level = guard

        def send(self, data: Any) -> None:
            """Send; where the server has gone meanwhile, tell its last word.

            In TLS 1.3 a server refuses our certificate after we think the handshake done.
            """
            try:
                super().send(data)
            except OSError:
                _raise_alert(self.sock)
                raise

    TimedConnection.current = TimedTlsConnection.current = current

    class TimedPool(HTTPConnectionPool):
        ConnectionCls = TimedConnection

    class TimedTlsPool(HTTPSConnectionPool):
        ConnectionCls = TimedTlsConnection

        def _validate_conn(self, conn: Any) -> None:
            """Connect; the inherited method also warns where verification was switched off, at every connection."""
            if conn.is_closed:
                conn.connect()

    return {"http": TimedPool, "https": TimedTlsPool}


def _raise_alert(sock: Any) -> None:
    """Raise the ssl.SSLError of a TLS alert that has arrived on a broken connection, if there is one."""
    if not isinstance(sock, ssl.SSLSocket):
        return
    try:
        sock.settimeout(ALERT_TIMEOUT)
        sock.recv(1)
    except ssl.SSLEOFError:
        return
    except ssl.SSLError as error:
        if error.reason is not None:
            raise
    except (OSError, ValueError):
        return


class TimedAdapter(HTTPAdapter):
    """requests' adapter over timed pools, one pool per host, with one TLS context for all connections of a kind.

    `verify` of send() is the context of an https request.

    Used without a Session: a Session would read a redirect's body whole, whatever its size, and keep cookies.
    """

    def __init__(
        self, current: CurrentLimits, contexts: TlsContexts, pool_size: int, guard: Guard = Guard.USER
    ) -> None:
        self._pools = timed_pools(current, guard)
        self._contexts = contexts
        super().__init__(pool_connections=pool_size, pool_maxsize=pool_size, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if proxy not in self.proxy_manager and proxy.lower().startswith("https://"):
            kwargs["proxy_ssl_context"] = self._contexts.context()
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> tuple[Any, Any]:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if host.get("scheme") == "https":
            # One context: loading the bundle anew for each connection costs 20 ms and half a megabyte.
            context = verify if isinstance(verify, ssl.SSLContext) else self._contexts.context()
            # urllib3 sets the context's verify_mode to what the pool says.
            verified = context.verify_mode != ssl.CERT_NONE
            pool = {"cert_reqs": "CERT_REQUIRED" if verified else "CERT_NONE", "ssl_context": context}
        return host, pool

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave the pool as it is: the inherited method would add certifi's authorities to the system's."""
