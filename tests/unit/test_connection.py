"""The loop over a FUSE connection, with a socket in the kernel's place: who asks, and what else the loop has to do."""

from __future__ import annotations

import socket
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import trio

from lazyfs.mount.connection import Answer, Connection
from lazyfs.mount.greeting import HEADER, OUT
from lazyfs.mount.wire import Op

_READ = b"\0" * 40  # what a READ says: not looked at here
_REQUESTS = 400
_LATER = 7  # a node whose requests wait


class _Handler:
    """Answers with the node's number; requests of _LATER when `release` is set."""

    def __init__(self) -> None:
        self.release = trio.Event()

    def handle(self, opcode: int, node: int, body: memoryview) -> Answer | Coroutine[Any, Any, Answer]:
        return self._wait() if node == _LATER else (0, b"%d" % node)

    async def _wait(self) -> Answer:
        await self.release.wait()
        return 0, b"later"


class _Kernel:
    """The other end of the connection, for threads."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.settimeout(10)

    def send(self, unique: int, node: int) -> None:
        self._end.send(HEADER.pack(HEADER.size + len(_READ), Op.READ, unique, node, 0, 0, 0, 0, 0) + _READ)

    def receive(self) -> tuple[int, int, bytes]:
        """Return (request, errno, body) of the next answer."""
        answer = self._end.recv(1 << 16)
        size, error, unique = OUT.unpack_from(answer)
        assert size == len(answer)
        return unique, -error, answer[OUT.size :]

    def one_after_another(self, first: int) -> None:
        """Ask again and again, as soon as there is an answer."""
        for unique in range(first, first + _REQUESTS):
            self.send(unique, unique + 10)
            assert self.receive() == (unique, 0, b"%d" % (unique + 10))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection whose messages keep their edges."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


async def test_who_asks_again_at_once_leaves_the_others_their_turn(ends: tuple[socket.socket, socket.socket]) -> None:
    connection, kernel = Connection(ends[0].fileno(), _Handler()), _Kernel(ends[1])
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            nursery.start_soon(other)
            await trio.to_thread.run_sync(kernel.one_after_another, 1)
            nursery.cancel_scope.cancel()
    assert turns > _REQUESTS // 8


async def test_an_answer_that_waits_comes_while_another_asks_again_and_again(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    handler = _Handler()
    connection, kernel = Connection(ends[0].fileno(), handler), _Kernel(ends[1])
    token = trio.lowlevel.current_trio_token()

    def ask() -> int:
        """Return how many requests were answered after the one that waits could have been, and before it was."""
        kernel.send(1, _LATER)
        kernel.one_after_another(100)
        token.run_sync_soon(handler.release.set)
        for unique in range(1000, 1000 + _REQUESTS):
            kernel.send(unique, unique)
            answered = kernel.receive()
            if answered == (1, 0, b"later"):
                return unique - 1000
        raise AssertionError("it never was")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            assert await trio.to_thread.run_sync(ask) <= 16
            nursery.cancel_scope.cancel()


async def test_who_asks_from_many_threads_is_answered_once_each(ends: tuple[socket.socket, socket.socket]) -> None:
    connection, kernel = Connection(ends[0].fileno(), _Handler()), _Kernel(ends[1])

    def ask() -> list[int]:
        for unique in range(50):
            kernel.send(unique, 20 + unique)
        return sorted(kernel.receive()[0] for _ in range(50))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            assert await trio.to_thread.run_sync(ask) == list(range(50))
            connection.stop()
