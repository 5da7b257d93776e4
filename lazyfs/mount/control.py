"""The control socket's server: one JSON object a line, calls of one connection one after another.

A client that hangs up cancels its call and loses its leases. Only our own user and root are answered.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Protocol

import trio

import lazyfs
from lazyfs.answer import encode_error
from lazyfs.errors import DaemonFault, LazyfsError, UsageError, first_of
from lazyfs.limits import MAX_CLIENTS, MAX_LINE, MAX_REQUEST_ID, SEND_TIMEOUT

log = logging.getLogger(__name__)

PROTOCOL = 1
_UCRED = struct.Struct("3i")  # pid, uid, gid


class Say(Protocol):
    """Tells the client something before the answer, from any thread: a remark, or with `total` how far its call is."""

    def __call__(self, text: str, *, done: int = 0, total: int = 0) -> None: ...


class Calls(Protocol):
    """What the server calls: a handler a name. `connection` identifies the caller for leases."""

    async def handle(self, name: str, args: dict[str, Any], connection: object, say: Say) -> dict[str, Any]: ...

    async def hung_up(self, connection: object) -> None: ...


def caller_of(connection: object) -> int:
    """Return the process at the other end of a connection, in our pid namespace; 0: none that is known."""
    if not isinstance(connection, trio.SocketStream):
        return 0
    credentials = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])


class ControlServer:
    """A listening control socket. Put together by the daemon; `clients` tells how many are connected."""

    def __init__(self, path: Path, calls: Calls) -> None:
        self._path = path
        self._calls = calls
        self._listener: trio.SocketListener | None = None
        self.clients = 0

    async def listen(self) -> None:
        """Bind the socket (mode 0600). The caller holds the store's lock, so a socket in the way is a dead one's."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                await sock.bind(os.fspath(self._path))
            finally:
                os.umask(before)
        except OSError as error:
            sock.close()
            raise DaemonFault(f"the control socket {self._path} can't be made: {error.strerror or error}") from None
        sock.listen(64)
        self._listener = trio.SocketListener(sock)

    async def serve(self) -> None:
        """Answer until cancelled. A checkpoint."""
        assert self._listener is not None
        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(self._client, [self._listener], handler_nursery=nursery)

    def unlink(self) -> None:
        """Take the socket's name away, so that new clients start another daemon."""
        self._path.unlink(missing_ok=True)

    async def _client(self, stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        uid = _UCRED.unpack(credentials)[1]
        if uid not in (0, os.geteuid()) or self.clients >= MAX_CLIENTS:
            await stream.aclose()
            return
        self.clients += 1
        try:
            await self._converse(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # it hung up, or reads nothing; what it leased goes below
        finally:
            with trio.CancelScope(shield=True):
                await self._calls.hung_up(stream)
                await trio.aclose_forcefully(stream)
            self.clients -= 1  # last: while there is something to tidy up the daemon is not idle

    async def _converse(self, stream: trio.SocketStream) -> None:
        await _send(stream, {"lazyfsd": lazyfs.__version__, "protocol": PROTOCOL, "pid": os.getpid()})
        send, receive = trio.open_memory_channel[bytes](16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_lines, stream, send, nursery.cancel_scope)
            async for line in receive:
                await self._one_call(stream, line)

    async def _one_call(self, stream: trio.SocketStream, line: bytes) -> None:
        number: object = None
        token = trio.lowlevel.current_trio_token()
        events, incoming = trio.open_memory_channel[dict[str, Any]](64)

        def say(text: str, *, done: int = 0, total: int = 0) -> None:
            def put() -> None:
                try:
                    events.send_nowait({"done": done, "total": total} if total else {"text": text})
                except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # a remark too many for a slow client, or one after the answer

            token.run_sync_soon(put)

        try:
            request = _parse(line)
            number = request.get("id")
            result: list[dict[str, Any]] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pass_events, stream, number, incoming)
                result.append(await _unwrapped(self._calls.handle(request["call"], request["args"], stream, say)))
                events.close()
            await _send(stream, {"id": number, "ok": result[0]})
        except* LazyfsError as group:
            await _send(stream, {"id": number, "error": encode_error(first_of(group))})


async def _unwrapped(call: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Await a handler; a bug in it fails this call alone."""
    try:
        return await call
    except LazyfsError:
        raise
    except Exception as bug:
        log.exception("a call broke")
        raise DaemonFault(f"lazyfsd failed: {type(bug).__name__}: {bug}", hint="this is a bug in lazyfs") from None


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if (
        not isinstance(request, dict)
        or not isinstance(request.get("call"), str)
        or not isinstance(request.get("args", {}), dict)
        or not _is_id(request.get("id"))
    ):
        raise UsageError("a control request is an object with id (a number), call and args")
    request.setdefault("args", {})
    return request


def _is_id(value: object) -> bool:
    """Tell whether a request may be called that: it is repeated in each answer, so it is nothing large or deep."""
    return value is None or (isinstance(value, int | float | str) and len(str(value)) <= MAX_REQUEST_ID)


async def _read_lines(
    stream: trio.SocketStream, lines: trio.MemorySendChannel[bytes], on_end: trio.CancelScope
) -> None:
    """Cut the stream into lines; cancel everything of this client when it hangs up or sends a line without end."""
    buffer = bytearray()
    try:
        while data := await stream.receive_some(1 << 16):
            buffer += data
            while (at := buffer.find(b"\n")) >= 0:
                await lines.send(bytes(buffer[:at]))
                del buffer[: at + 1]
            if len(buffer) > MAX_LINE:
                break
    except trio.BrokenResourceError:
        pass
    on_end.cancel()


async def _pass_events(
    stream: trio.SocketStream, number: object, events: trio.MemoryReceiveChannel[dict[str, Any]]
) -> None:
    async for event in events:
        await _send(stream, {"id": number, "event": event})


async def _send(stream: trio.SocketStream, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    if len(data) > MAX_LINE:
        data = json.dumps(
            {"id": message.get("id"), "error": encode_error(DaemonFault("the answer is too long"))}
        ).encode()
        data += b"\n"
    try:
        with trio.fail_after(SEND_TIMEOUT):
            await stream.send_all(data)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise trio.BrokenResourceError from None
        raise
