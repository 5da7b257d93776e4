"""Where Prometheus finds the metrics of a process: GET /metrics on HOST:PORT, and nothing else.

One thread and one client at a time, each with a deadline. Whoever reaches the port reads host names and error counts,
so the documentation says loopback; nobody can do more there than wait.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from lazyfs.errors import LazyfsError, UsageError
from lazyfs.limits import MAX_SCRAPE_HEAD, SCRAPE_BACKLOG, SCRAPE_TIMEOUT

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PAUSE = 0.2  # seconds after an accept that failed: too many open files, most likely


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of "HOST:PORT" or "[V6]:PORT". Raise UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"metrics can't be served on {text!r}", hint="HOST:PORT, such as 127.0.0.1:9470")
    return host, int(port)


class Scrapes:
    """The listener. `render` makes the answer in the listener's thread, and may raise LazyfsError: then it is a 503."""

    def __init__(self, address: str, render: Callable[[], bytes]) -> None:
        """Listen. Blocking, for a look-up of the host's name. Raise UsageError when that can't be done."""
        host, port = parse_address(address)
        self._render = render
        self._closed = False
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(where[:2], family=family, backlog=SCRAPE_BACKLOG)
        except (OSError, ValueError) as error:  # ValueError: a name that no host can have
            reason = isinstance(error, OSError) and error.strerror
            raise UsageError(
                f"metrics can't be served on {address}: {reason or error}",
                hint="choose another address in the settings, or end what listens there",
            ) from None
        self.port: int = self._socket.getsockname()[1]

    def start(self) -> None:
        """Begin to answer, in a thread that keeps no process from ending."""
        threading.Thread(target=self._serve, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening. Doesn't wait for a client that is being answered."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread; closing alone would leave it in accept
        except OSError:
            pass
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed:
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("a client of the metrics could not be taken: %s", error)
                    time.sleep(_PAUSE)
                continue
            try:
                with client:
                    self._answer(client)
            except OSError:
                pass  # it was too slow, or went away
            except Exception:
                log.exception("the metrics broke")

    def _answer(self, client: socket.socket) -> None:
        deadline = time.monotonic() + SCRAPE_TIMEOUT
        head = bytearray()
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            client.settimeout(max(0.001, deadline - time.monotonic()))
            part = client.recv(4096)
            if not part:
                return
            head += part
            if len(head) > MAX_SCRAPE_HEAD:
                return self._send(client, "431 Request Header Fields Too Large", b"too long\n")
        words = bytes(head).split(b"\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/"):
            return self._send(client, "400 Bad Request", b"this is HTTP\n")
        if words[1].split(b"?", 1)[0] != b"/metrics":
            return self._send(client, "404 Not Found", b"only /metrics is here\n")
        if words[0] != b"GET":
            return self._send(client, "405 Method Not Allowed", b"only GET\n")
        try:
            body = self._render()
        except LazyfsError as error:
            return self._send(client, "503 Service Unavailable", f"{error}\n".encode())
        self._send(client, "200 OK", body)

    @staticmethod
    def _send(client: socket.socket, status: str, body: bytes) -> None:
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        client.settimeout(SCRAPE_TIMEOUT)  # sendall counts it for all of the answer
        client.sendall(head.encode() + body)
        client.shutdown(socket.SHUT_WR)
