"""Looking ahead of readers who read in order: what they want next is read from the store and verified meanwhile.

The kernel keeps two requests under way. With their chunks read and hashed only then, it waits for both, then the reader
takes both, and each core waits for the other in turn. One thread a reader that goes on ahead of it keeps both at work,
and a request finds its chunk in memory: no thread is begun for it. (Measured on two cores: 640 to 890 MB/s. With two
threads a reader they take the cores from the reader and the loop, and most of it is lost.)

Only the local disk is asked. A chunk that is not there, or not right, is left to the reader's own request.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

import trio

from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.layer_store import SMALL
from lazyfs.chunks.memory import Key, MemoryCache
from lazyfs.limits import MAX_AHEAD_STREAMS, READERS
from lazyfs.units import MiB

log = logging.getLogger(__name__)

WINDOW = 4 * MiB  # bytes in front of a reader, at most
_SHARE = 2 * READERS  # all of them together take half of the memory: what was verified must be there when it is wanted
_IN_ORDER = 2  # chunks that a reader has gone on before it counts as one who reads in order
_CHUNKS = 64  # looked at for one request: a layer may have chunks of one byte
_UNREAD = 256  # chunks remembered as verified and not yet read, for the counters alone
_IDLE = 1.0  # seconds after which a reader makes room for another


class _Stream:
    """A reader, known by the chunk that it will want next if it goes on in order."""

    __slots__ = ("next", "passed", "running", "todo", "upto", "used")

    def __init__(self, after: int) -> None:
        self.next = after
        self.passed = 0  # chunks, in order
        self.upto = 0  # chunk behind the last that was looked at for it
        self.used = trio.current_time()
        self.todo: deque[int] = deque()  # chunks for its thread
        self.running = False


class VerifyAhead:
    """Verified chunks for the memory cache, before they are asked for. Belongs to one trio loop.

    `under_way(key)` tells whether a reader is getting a chunk by itself.
    """

    def __init__(self, memory: MemoryCache, nursery: trio.Nursery, under_way: Callable[[Key], bool]) -> None:
        self._memory = memory
        self._nursery = nursery
        self._under_way = under_way
        self._streams: OrderedDict[Key, _Stream] = OrderedDict()  # by (layer serial, next chunk)
        self._promised: dict[Key, trio.Event] = {}
        self._unread: OrderedDict[Key, None] = OrderedDict()
        self._limiter = trio.CapacityLimiter(READERS)
        self._threads = 0  # that are at work, or wait for their turn

    def __contains__(self, key: Key) -> bool:
        """Tell whether a chunk is being looked at: `wait` will say when."""
        return key in self._promised

    async def wait(self, key: Key) -> bool:
        """Wait until a chunk has been looked at; if all was well it is in memory. False, at once: nobody looks at it.

        Waits for the local disk at most.
        """
        promise = self._promised.get(key)
        if promise is None:
            return False
        await promise.wait()
        return True

    def take(self, key: Key) -> bool:
        """Tell whether a chunk in memory was verified ahead, and this is the first time that it is read."""
        if key not in self._unread:
            return False
        del self._unread[key]
        return True

    def note(self, layer: ServedLayer, first: int, last: int) -> None:
        """Tell that somebody is about to read chunks `first` to `last`, before they are asked for. Doesn't wait."""
        if first == last and is_small_end(layer, last):
            return  # most files of an image are one such chunk, and nothing follows it
        stream = self._stream(layer.serial, first, last)
        if stream.passed < _IN_ORDER or (stream.upto <= stream.next and self._is_crowded(stream)):
            return
        chunks = self._wanted(layer, stream, first, last)
        # What the request itself wants goes the same way: its order is kept, and it needs no thread of its own.
        if chunks and (stream.running or chunks[-1] > last):
            for chunk in chunks:
                self._promised[layer.serial, chunk] = trio.Event()
            stream.todo.extend(chunks)
            if not stream.running:
                stream.running = True
                self._nursery.start_soon(self._run, layer, stream)

    def _stream(self, serial: int, first: int, last: int) -> _Stream:
        """Return the stream that chunks `first` to `last` continue, or a new one."""
        stream = self._streams.pop((serial, first), None) or self._streams.pop((serial, first + 1), None)
        if stream is None:
            stream = _Stream(last + 1)
            if len(self._streams) >= MAX_AHEAD_STREAMS:
                self._streams.popitem(last=False)
        elif last + 1 > stream.next:  # else it is in the same chunk still
            stream.passed += last + 1 - stream.next
            stream.next = last + 1
        stream.used = trio.current_time()
        self._streams[serial, stream.next] = stream
        return stream

    def _is_crowded(self, stream: _Stream) -> bool:
        since = stream.used - _IDLE
        others = (other for other in self._streams.values() if other.upto > other.next and other.used > since)
        return sum(other is not stream for other in others) >= READERS

    def _wanted(self, layer: ServedLayer, stream: _Stream, first: int, last: int) -> list[int]:
        """Return the chunks from `first` on to look at now, up to the window's end, or that of the file."""
        starts, sizes = layer.table.chunk_data_offset, layer.table.chunk_size
        window = min(WINDOW, self._memory.bound // _SHARE)
        end = starts[last] + sizes[last] + window
        at = begin = max(stream.upto, first)
        out = []
        while at < min(layer.table.chunk_count, begin + _CHUNKS):
            follows = at <= last or starts[at - 1] + sizes[at - 1] == starts[at]
            if not follows or sizes[at] > window or starts[at] + sizes[at] > end or not layer.store.has(at):
                break
            key = layer.serial, at
            if key not in self._promised and not self._under_way(key) and key not in self._memory:
                out.append(at)
            at += 1
        stream.upto = at
        return out

    async def _run(self, layer: ServedLayer, stream: _Stream) -> None:
        taken: set[int] = set()
        token = trio.lowlevel.current_trio_token()

        def work() -> None:
            for chunk, data in layer.store.read_in_order(self._drain(stream.todo, taken)):
                token.run_sync_soon(self._done, layer, chunk, data)

        self._threads += 1
        try:
            while stream.todo:
                await trio.to_thread.run_sync(work, limiter=self._limiter)
        except Exception:
            log.exception("reading ahead of layer %s broke", layer.digest)  # readers go on by themselves
        finally:
            self._threads -= 1
            stream.running = False
            for chunk in (*taken, *stream.todo):
                self._keep(layer.serial, chunk)
            stream.todo.clear()

    def _drain(self, todo: deque[int], taken: set[int]) -> Iterator[int]:
        left = len(todo)
        while todo and (left > 0 or self._threads <= READERS):  # else what came meanwhile waits for its turn
            left -= 1
            chunk = todo.popleft()
            taken.add(chunk)
            yield chunk

    def _done(self, layer: ServedLayer, chunk: int, data: bytes | None) -> None:
        key = layer.serial, chunk
        if data is not None and not (layer.quarantine or layer.dropped) and self._memory.put(key, data):
            self._unread[key] = None
            if len(self._unread) > _UNREAD:
                self._unread.popitem(last=False)
        self._keep(*key)

    def _keep(self, serial: int, chunk: int) -> None:
        """Keep the promise that a chunk is looked at."""
        promise = self._promised.pop((serial, chunk), None)
        if promise is not None:
            promise.set()


def is_small_end(layer: ServedLayer, chunk: int) -> bool:
    """Tell whether a chunk is read without a thread, and another file begins behind it."""
    starts, size = layer.table.chunk_data_offset, layer.table.chunk_size[chunk]
    after = chunk + 1
    return size <= SMALL and (after >= layer.table.chunk_count or starts[chunk] + size != starts[after])
