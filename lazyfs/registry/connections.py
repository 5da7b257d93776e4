"""Connections that keep a deadline in total, not only between two packets.

A socket timeout starts anew with every byte, so a server that drips its header or body byte by byte could hold a thread
for hours. Here every single recv gets what is left of the request's deadline, in the header too, whatever size is read.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lazyfs.registry.environment import Authorities


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one request may take: `deadline` in time.monotonic(), `stall` seconds between two arrivals of bytes."""

    deadline: float
    stall: float


class CurrentLimits(threading.local):
    """The limits of the request that the calling thread is making: the way around two libraries to the response."""

    limits: Limits | None = None


class _TimedReader(io.RawIOBase):
    """The receiving side of a socket under limits. Owns `raw`."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, limits: Limits) -> None:
        self._raw = raw
        self._sock = sock
        self._limits = limits

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        left = self._limits.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        timeout = min(left, self._limits.stall)
        if timeout != self._sock.gettimeout():
            self._sock.settimeout(timeout)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def timed_pools(current: CurrentLimits) -> dict[str, type[HTTPConnectionPool]]:
    """Return pool classes by scheme whose responses obey the limits in `current` at the time of the request."""

    class TimedResponse(http.client.HTTPResponse):
        def __init__(
            self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
        ) -> None:
            super().__init__(sock, debuglevel, method, url)
            if current.limits is not None:
                reader = _TimedReader(self.fp.detach(), sock, current.limits)
                self.fp = io.BufferedReader(reader)

    class TimedConnection(HTTPConnection):
        response_class = TimedResponse

    class TimedTlsConnection(HTTPSConnection):
        response_class = TimedResponse

    class TimedPool(HTTPConnectionPool):
        ConnectionCls = TimedConnection

    class TimedTlsPool(HTTPSConnectionPool):
        ConnectionCls = TimedTlsConnection

    return {"http": TimedPool, "https": TimedTlsPool}


class TimedAdapter(HTTPAdapter):
    """requests' adapter over timed pools, one pool per host, with one TLS context for all connections.

    Used without a Session: a Session would read a redirect's body whole, whatever its size, and keep cookies.
    """

    def __init__(self, current: CurrentLimits, authorities: Authorities, pool_size: int) -> None:
        self._pools = timed_pools(current)
        self._authorities = authorities
        super().__init__(pool_connections=pool_size, pool_maxsize=pool_size, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if proxy not in self.proxy_manager and proxy.lower().startswith("https://"):
            kwargs["proxy_ssl_context"] = self._authorities.context()
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> tuple[Any, Any]:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if host.get("scheme") == "https":
            # One context: loading the bundle anew for each connection costs 20 ms and half a megabyte.
            pool = {"cert_reqs": "CERT_REQUIRED", "ssl_context": self._authorities.context()}
        return host, pool

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave the pool as it is: the inherited method would add certifi's authorities to the system's."""
