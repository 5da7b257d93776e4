"""The shaped link of the demo and the measurements: its clock exactly, the proxy with room for a busy machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import pytest

from perf.shaper import PIECE, Link, Shaper, Traffic


def test_a_link_takes_size_by_rate() -> None:
    link = Link(1_000_000)
    assert link.occupy(10.0, 0) == 10.0
    ends = [link.occupy(100.0, 50_000) for _ in range(20)]
    assert ends[-1] == pytest.approx(100.0 + 1.0, abs=0.0021)
    assert [round(b - a, 6) for a, b in pairwise(ends)] == [0.05] * 19
    assert link.size == 1_000_000


def test_a_late_sender_does_not_lose_rate_and_an_idle_link_saves_none_up() -> None:
    link = Link(1_000_000)
    now = 5.0
    start = now
    for _ in range(1000):
        now = link.occupy(now, 10_000) + 0.0015  # each wake-up 1.5 ms late
    assert now - start == pytest.approx(10.0, rel=0.01)
    after_pause = link.occupy(now + 60, 1_000_000)
    assert after_pause - (now + 60) == pytest.approx(1.0, abs=0.0021)


def test_an_unlimited_link_only_counts() -> None:
    link = Link(0)
    assert link.occupy(3.0, 1 << 30) == 3.0
    assert link.size == 1 << 30


class _Server:
    """Answers each line "SIZE\\n" with that many bytes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.threads: list[threading.Thread] = []
        self.accepter = threading.Thread(target=self._accept)
        self.accepter.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._answer, args=(connection,))
            thread.start()
            self.threads.append(thread)

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                connection.sendall(b"x" * int(line))

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.accepter.join()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def server() -> Iterator[_Server]:
    with closing(_Server()) as one:
        yield one


def _take(connection: socket.socket, size: int) -> int:
    connection.sendall(b"%d\n" % size)
    left = size
    while left:
        got = len(connection.recv(min(left, 1 << 20)))
        assert got, "the connection ended early"
        left -= got
    return size


def test_the_proxy_takes_the_round_trip_and_the_bandwidth(server: _Server) -> None:
    with Shaper(("127.0.0.1", server.port), rtt=0.04, mbit=80) as shaper:
        start = time.monotonic()
        with socket.create_connection(("127.0.0.1", shaper.port)) as connection:
            _take(connection, 1)
            first = time.monotonic() - start
            rounds = []
            for _ in range(5):
                start = time.monotonic()
                _take(connection, 1)
                rounds.append(time.monotonic() - start)
            start = time.monotonic()
            _take(connection, 5_000_000)
            bulk = time.monotonic() - start
        assert first >= 0.08  # the handshake, then the request
        assert 0.04 <= min(rounds) < 0.08
        assert 0.04 + 0.5 - 0.03 <= bulk < 2.0  # the upper bounds leave room for a busy machine
        traffic = shaper.traffic()
    assert (traffic.down, traffic.connections) == (5_000_006, 1)
    assert traffic.up == 6 * len("1\n") + len("5000000\n")


def test_connections_share_one_link_fairly(server: _Server) -> None:
    done: list[float] = []

    def pull(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            _take(connection, 20 * PIECE)
            done.append(time.monotonic())

    with Shaper(("127.0.0.1", server.port), rtt=0, mbit=80) as shaper:
        start = time.monotonic()
        pulls = [threading.Thread(target=pull, args=(shaper.port,)) for _ in range(2)]
        for thread in pulls:
            thread.start()
        for thread in pulls:
            thread.join()
    both = 2 * 20 * PIECE / 10_000_000
    assert both - 0.03 <= max(done) - start < 2.0
    assert min(done) - start > both * 0.6  # alone, or served before the other, it would take half of both


def test_a_server_that_is_not_there_is_a_closed_connection_and_a_taken_port_an_error() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError), Shaper(("127.0.0.1", 1), rtt=0, mbit=0, listen=port):
            pass
    with (
        Shaper(("127.0.0.1", port), rtt=0, mbit=0) as shaper,
        socket.create_connection(("127.0.0.1", shaper.port)) as connection,
    ):
        connection.settimeout(10)
        assert connection.recv(1) == b""


def test_traffic_between_two_looks() -> None:
    assert Traffic(5, 10, 2).since(Traffic(1, 3, 1)) == Traffic(4, 7, 1)
