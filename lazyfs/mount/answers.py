"""What registries say of traces: asked once for many mounts, and remembered for a moment.

Many containers of one image may start, each with a mount of its own. What is remembered has a bound in bytes and in
time: it is somebody else's, and may be large.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import trio

from lazyfs.errors import LazyfsError
from lazyfs.format.trace import Trace
from lazyfs.limits import MAX_ANSWER_BYTES, MAX_ANSWERS, TRACE_ANSWER
from lazyfs.mount.filling import guard
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)

_AGAIN = 30.0  # seconds for which its answer is remembered
_READ = 300  # bytes of memory that a read takes without its path, about

# (repository, manifest's digest, deadline, blob digests of its layers where they are known) → what it has
Find = Callable[[Repository, str, float, Sequence[str] | None], Trace | None]
_Key = tuple[str, str, str]  # host, repository, manifest's digest: what one says of an image says nothing of another


class Answers:
    """Belongs to one trio loop; the network is left to threads.

    `find` asks a registry, see `registry.traces`. `note_error` counts what went wrong.
    """

    def __init__(self, find: Find, nursery: trio.Nursery, note_error: Callable[[LazyfsError], None]) -> None:
        self._find = find
        self._nursery = nursery
        self._note_error = note_error
        self._known: OrderedDict[_Key, tuple[float, Trace | None, int]] = OrderedDict()  # until when, what, bytes
        self._asking: dict[_Key, trio.Event] = {}
        self._network = trio.CapacityLimiter(4)
        self._forgetting = False

    def __len__(self) -> int:
        """How many answers are remembered."""
        return len(self._known)

    @property
    def size(self) -> int:
        """Bytes of memory that they take, about."""
        return sum(size for _, _, size in self._known.values())

    async def ask(self, repository: Repository, manifest: str, layers: Sequence[str] | None) -> Trace | None:
        """Ask a registry, within a deadline, once for many. A checkpoint. A failure is no more than a line in the log.

        `layers`: blob digests of all of the image's layers, base first, where they are known.
        """
        if isinstance(repository, OfflineRepository):
            return None
        key = repository.host, repository.name, manifest
        while (asked := self._asking.get(key)) is not None:
            await asked.wait()
        until, answer, _ = self._known.get(key, (float("-inf"), None, 0))
        if trio.current_time() < until:
            return answer
        over = self._asking[key] = trio.Event()
        try:
            answer = await self._answer(repository, manifest, layers)
        finally:
            del self._asking[key]
            over.set()
        self._remember(key, answer)
        return answer

    async def _answer(self, repository: Repository, manifest: str, layers: Sequence[str] | None) -> Trace | None:
        job = partial(self._find, repository, manifest, time.monotonic() + TRACE_ANSWER, layers)
        try:
            with trio.move_on_after(TRACE_ANSWER):
                return await trio.to_thread.run_sync(job, limiter=self._network, abandon_on_cancel=True)
            log.info("no trace from the registry in time: image=%s", manifest)
        except LazyfsError as error:
            log.info("no trace from the registry: image=%s error=%s", manifest, error)
            self._note_error(error)
        return None

    # -- what is remembered

    def _remember(self, key: _Key, answer: Trace | None) -> None:
        size = _READ if answer is None else _size(answer)
        self._known.pop(key, None)
        if size > MAX_ANSWER_BYTES:
            return
        self._known[key] = trio.current_time() + _AGAIN, answer, size
        while len(self._known) > MAX_ANSWERS or self.size > MAX_ANSWER_BYTES:
            self._known.popitem(last=False)
        if not self._forgetting:
            self._forgetting = True
            self._nursery.start_soon(guard, "trace", self._forget)

    async def _forget(self) -> None:
        """Forget each answer when its time is over. Runs while there are any."""
        try:
            while self._known:
                key = next(iter(self._known))  # the oldest
                until = self._known[key][0]
                if trio.current_time() < until:
                    await trio.sleep_until(until)
                else:
                    del self._known[key]
        finally:
            self._forgetting = False


def _size(trace: Trace) -> int:
    """Return how much memory a trace takes, about. Some milliseconds for a large one."""
    paths = {read.path for read in trace.reads}
    return _READ * (1 + len(trace.reads) + len(trace.layers)) + sum(map(len, paths))
