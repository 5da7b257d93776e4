"""A TCP proxy that makes loopback look like a slow link: a round trip, and a bandwidth shared by all connections.

    python -m perf.shaper --listen 0 --to 127.0.0.1:5000 --rtt-ms 20 --mbit 200

Each direction is a link of its own. A piece of at most 64 KiB waits for its connection's turn (first come, first
served, so that connections share fairly), occupies the link for size / rate, and arrives half a round trip later. The
client's first bytes also wait for one round trip, the TCP handshake that loopback doesn't show. Slow start and losses
are not modelled. Pure Python: good for about 2 Gbit/s on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType

PIECE = 64 << 10  # bytes that occupy the link in one go
IN_FLIGHT = 1024  # pieces between the link and the receiver, for each connection and direction
_OVERSLEPT = 0.002  # seconds that the link makes up for when the event loop woke late


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went over the link so far: bytes to the server (`up`), to the clients (`down`), and connections opened."""

    up: int
    down: int
    connections: int

    def since(self, before: Traffic) -> Traffic:
        """The traffic between two looks."""
        return Traffic(self.up - before.up, self.down - before.down, self.connections - before.connections)


class Link:
    """One direction's clock: when is a piece through? Pure; times are seconds of any one clock."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second  # 0: not limited
        self.size = 0  # bytes that took the link so far
        self._free_at = 0.0

    def occupy(self, now: float, size: int) -> float:
        """Take the link for `size` bytes from `now` or when it is free, and return the time when they are through."""
        self.size += size
        if not self.bytes_per_second:
            return now
        self._free_at = max(self._free_at, now - _OVERSLEPT) + size / self.bytes_per_second
        return max(now, self._free_at)


class _Direction:
    """A link, the queue of connections for it, and the delay behind it."""

    def __init__(self, bytes_per_second: float, delay: float) -> None:
        self.link = Link(bytes_per_second)
        self.delay = delay
        self._turn = asyncio.Lock()  # wakes its waiters in order

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, first_delay: float) -> None:
        """Move bytes until the end of `source`, then close the writing half of `sink`."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._meter(source, pieces, first_delay))
            both.create_task(_deliver(pieces, sink))

    async def _meter(
        self, source: asyncio.StreamReader, pieces: asyncio.Queue[tuple[float, bytes]], first_delay: float
    ) -> None:
        piece = b"-"
        while piece:
            piece = await source.read(PIECE)
            async with self._turn:
                through = self.link.occupy(time.monotonic(), len(piece))
                await _sleep_until(through)
            await pieces.put((through + self.delay + first_delay, piece))
            first_delay = 0.0


async def _sleep_until(moment: float) -> None:
    left = moment - time.monotonic()
    if left > 0.0005:  # the event loop's timers are not finer
        await asyncio.sleep(left)


async def _deliver(pieces: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
    while True:
        due, piece = await pieces.get()
        await _sleep_until(due)
        if not piece:
            if sink.can_write_eof():
                sink.write_eof()
            return
        sink.write(piece)
        await sink.drain()


class Shaper:
    """The proxy in a thread of its own, as a context manager. `port` is where clients connect.

    `rtt` is seconds, `mbit` 10**6 bits a second each way (0: not limited). Entering raises OSError when the port
    `listen` is taken.
    """

    def __init__(
        self, to: tuple[str, int], *, rtt: float, mbit: float, listen: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self._to = to
        self._host = host
        self._rtt = rtt
        self._up = _Direction(mbit * 125_000, rtt / 2)
        self._down = _Direction(mbit * 125_000, rtt / 2)
        self._connections = 0
        self.port = listen
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._ready = threading.Event()
        self._failure: OSError | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._work, name="shaper", daemon=True)

    def traffic(self) -> Traffic:
        """Return the counters now. Any thread; does not block."""
        return Traffic(self._up.link.size, self._down.link.size, self._connections)

    def change(self, mbit: float) -> None:
        """Give the link another bandwidth, for what is not on it yet. Any thread; does not block."""
        for direction in (self._up, self._down):
            direction.link.bytes_per_second = mbit * 125_000

    def __enter__(self) -> Shaper:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
            self._ready.set()

    async def _serve(self) -> None:
        try:
            server = await asyncio.start_server(self._client, "127.0.0.1", self.port)
        except OSError as error:
            self._failure = error
            return
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not a coroutine, so that the tasks are ours: the stream server's own tasks complain when they are cancelled.
        task = self._loop.create_task(self._pair(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _pair(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        self._connections += 1
        writers = [client_out]
        try:
            try:
                server_in, server_out = await self._connect()
                writers.append(server_out)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._up.carry(client_in, server_out, self._rtt))
                    both.create_task(self._down.carry(server_in, client_out, 0.0))
            except* OSError:
                pass  # a reset on one side ends both
            for writer in writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        finally:
            for writer in writers:
                writer.transport.abort()  # what is closed already stays so; stopped midway, nothing may wait for a peer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # With a socket of our own: Python 3.11's open_connection leaves its socket open when it is refused.
        family, kind, proto, _, address = (await self._loop.getaddrinfo(*self._to, type=socket.SOCK_STREAM))[0]
        plain = socket.socket(family, kind, proto)
        try:
            plain.setblocking(False)
            await self._loop.sock_connect(plain, address)
            return await asyncio.open_connection(sock=plain)
        except BaseException:
            plain.close()
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description="Shape TCP connections like a slow link, until interrupted.")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="port on 127.0.0.1 (0: any, printed)")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--mbit", type=float, default=200.0, help="10**6 bits a second each way; 0: not limited")
    args = parser.parse_args()
    host, _, port = args.to.rpartition(":")
    with Shaper((host, int(port)), rtt=args.rtt_ms / 1000, mbit=args.mbit, listen=args.listen) as shaper:
        print(f"127.0.0.1:{shaper.port}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        print(shaper.traffic())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
