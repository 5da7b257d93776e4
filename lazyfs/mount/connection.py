"""The loop over a FUSE connection: requests are read as they come, answered at once or when their bytes are here.

pyfuse3's loop polls and then reads a fd that blocks: when the caller of a request is killed in between, the whole trio
loop sleeps until another request comes. It makes two turns of the event loop and two tasks' changes for a request.
Here the fd doesn't block, and an answer that is at hand needs no task. (Measured, per request: docs/architecture.md.)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import trio

from lazyfs.limits import MAX_WAITING_REQUESTS
from lazyfs.mount import greeting as greetings
from lazyfs.mount import wire
from lazyfs.mount.forest import SHIFT
from lazyfs.mount.greeting import Greeting
from lazyfs.mount.wire import Op
from lazyfs.units import KiB

log = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview
Answer = tuple[int, Data]

_ALONE = 8  # one request in so many looks for a second one before it waits, while they come one at a time
_TURN = 16  # requests after which others in the loop have their turn
_SOON = 0.0002  # seconds for which the loop waits for a request alone, where one comes after the other
_BY_ITSELF = 4  # such waits in a row, then others have their turn
_SHORT = 256 * KiB  # bytes of an answer: who has more is busy with them for longer than that
_MOST_FD = 1024  # of those that select(2) knows
_PROOF = 3  # deaths at one request, in a row
_TRIALS = 10.0  # seconds for which reads are taken one by one after several deaths
_LONGEST_TURN, _ALL_TURNS = 0.25, 5.0  # seconds that one of them has at most, and all that wait have together
_LOOK_AT_CALLER = 0.2  # seconds between looks whether the caller of an interrupted request is to die
_SILENT = frozenset({Op.FORGET, Op.BATCH_FORGET})  # nothing is counted: any id resolves at any time
_SIGKILL = 1 << 8  # in the masks of proc(5)


class Handler(Protocol):
    """Who answers: (errno, body), or what will have that. Never raises."""

    def handle(self, opcode: int, node: int, body: memoryview) -> Answer | Coroutine[Any, Any, Answer]: ...


class Board(Protocol):
    """Remembers, beyond the end of this process, at which request it was: node, offset, earlier deaths at it."""

    def set_trial(self, node: int, offset: int = 0, deaths: int = 0) -> None: ...

    def trial(self) -> tuple[int, int, int]: ...


@dataclass(slots=True)
class Trials:
    """Requests taken one by one, until a time. `suspect`: (node, offset) that daemons died at, `deaths` in a row."""

    board: Board
    suspect: tuple[int, int]
    deaths: int
    until: float
    turn: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(1))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that waits for its bytes. `thread`: its caller, as the kernel tells it."""

    thread: int
    scope: trio.CancelScope
    layer: int


class Connection:
    """One open /dev/fuse, which the caller owns. `greeting`: the kernel's INIT where it was answered already."""

    def __init__(self, fd: int, handler: Handler, greeting: Greeting | None = None) -> None:
        self._fd = fd
        self._handler = handler
        self.greeting = greeting
        self._waiting: dict[int, _Waiting] = {}  # by the request's number
        self._at_work: Counter[int] = Counter()  # those that have a task, by layer
        # What will answer the others: by layer, by number. However many: each has a caller in the kernel.
        self._parked: dict[int, dict[int, Coroutine[Any, Any, Answer]]] = {}
        self._trials: Trials | None = None
        self._scope = trio.CancelScope()
        os.set_blocking(fd, False)

    async def run(self) -> None:
        """Serve until the mount goes away, or `stop`. Requests that wait then are left to the kernel, which fails them.

        A checkpoint. Raise OSError where the device behaves as nobody knows.
        """
        buffer = bytearray(wire.REQUEST_SIZE)
        request = memoryview(buffer)
        served = alone = 0  # requests since the last wait; waits since which one request came at a time
        by_itself, soon = 0, False  # waits in a row without the others; whether the last request came soon
        with self._scope:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        size = os.readv(self._fd, [buffer])
                    except BlockingIOError:
                        alone, served = (0 if served > 1 else alone + 1), 0
                        by_itself, soon = 0, await self._wait()
                        continue
                    except OSError as error:
                        if error.errno in (errno.ENOENT, errno.EINTR):  # its caller was killed meanwhile
                            continue
                        if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                            raise
                        break
                    answered = self._serve(request[:size], nursery)
                    served += 1
                    if alone % _ALONE:  # to look for another request would be a call in vain
                        alone, served = alone + 1, 0
                        if answered and soon and by_itself < _BY_ITSELF and self._comes_soon():
                            by_itself += 1
                        else:
                            by_itself, soon = 0, await self._wait()
                    elif served % _TURN == 0:
                        await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()

    async def _wait(self) -> bool:
        """Wait for a request, as long as it takes. A checkpoint. Return whether it came soon."""
        began = monotonic()
        await trio.lowlevel.wait_readable(self._fd)
        return monotonic() < began + _SOON

    def _comes_soon(self) -> bool:
        """Wait for a request for a moment, and the loop with us: a turn of it costs as much as a small answer.

        Blocks for _SOON at most; threads go on meanwhile.
        """
        return self._fd < _MOST_FD and bool(select.select([self._fd], (), (), _SOON)[0])

    def stop(self) -> None:
        """End `run`."""
        self._scope.cancel()

    def go_carefully(self, board: Board, on_guilty: Callable[[int], None]) -> None:
        """Take reads one by one for a while, and what a dead daemon leaves: one of them may have killed several.

        Reads that come for the first time, too: what a dead daemon had not taken yet looks like that.

        `board` remembers the request at work. One that several daemons died at gets EIO, and `on_guilty` is told its
        node. Once proves nothing: whoever kills daemons does so while something is at work.
        """
        node, offset, deaths = board.trial()
        deaths += node != 0
        if deaths >= _PROOF:
            log.error("node %#x at %d was at work when %d daemons died", node, offset, deaths)
            on_guilty(node)
        self._trials = Trials(board, (node, offset), deaths, trio.current_time() + _TRIALS)

    def take_over(self) -> None:
        """Have the kernel send again what a daemon before us took and did not answer. It has ended, all of it.

        Doesn't block. Raise OSError where the kernel can't (before Linux 6.9).
        """
        os.write(self._fd, wire.RESEND)

    def _serve(self, request: memoryview, nursery: trio.Nursery) -> bool:
        """Answer a request, or have that done. Return whether it is done, and the next one may come soon."""
        opcode, unique, node, thread = wire.decode_header(request)
        if opcode in _SILENT:
            return True
        if opcode == Op.INIT:
            self._greet(bytes(request))
            return True
        body = request[wire.HEADER_SIZE :]
        if opcode == Op.INTERRUPT:
            interrupted = wire.interrupted_in(body)
            if interrupted in self._waiting:
                nursery.start_soon(self._watch_caller, interrupted, nursery)
            return False
        if opcode == Op.DESTROY:
            self._answer(unique, 0, b"")
            return True
        if self._trials is not None and trio.current_time() > self._trials.until:
            self._trials.board.set_trial(0)  # who is at work still is to blame for nothing that comes now
            self._trials = None
        if self._trials is not None and (opcode == Op.READ or unique & wire.RESENT):
            request_id = node, wire.read_in(body)[1] if opcode == Op.READ else 0
            if request_id == self._trials.suspect and self._trials.deaths >= _PROOF:
                self._answer(unique, errno.EIO, b"")
            else:
                self._wait_for(unique, node, thread, self._try(self._trials, opcode, request_id, bytes(body)), nursery)
            return False
        answer = self._handler.handle(opcode, node, body)
        if isinstance(answer, tuple):
            self._answer(unique, *answer)
            return len(answer[1]) <= _SHORT
        self._wait_for(unique, node, thread, answer, nursery)
        return False

    def _wait_for(
        self, unique: int, node: int, thread: int, answer: Coroutine[Any, Any, Answer], nursery: trio.Nursery
    ) -> None:
        layer = node >> SHIFT
        # Noted before the task begins: an interrupt of it may be the next request.
        self._waiting[unique] = _Waiting(thread, trio.CancelScope(), layer)
        if self._at_work[layer] < MAX_WAITING_REQUESTS:
            self._begin(unique, layer, answer, nursery)
        else:  # readers of other layers are not to wait for those of one whose registry is silent
            self._parked.setdefault(layer, {})[unique] = answer

    def _begin(self, unique: int, layer: int, answer: Coroutine[Any, Any, Answer], nursery: trio.Nursery) -> None:
        self._at_work[layer] += 1
        nursery.start_soon(self._finish, unique, layer, answer, nursery)

    async def _finish(
        self, unique: int, layer: int, answer: Coroutine[Any, Any, Answer], nursery: trio.Nursery
    ) -> None:
        try:
            with self._waiting[unique].scope as scope:
                self._answer(unique, *await answer)
            if scope.cancelled_caught:
                self._answer(unique, errno.EINTR, b"")
        finally:
            del self._waiting[unique]
            self._at_work[layer] -= 1
            if parked := self._parked.get(layer):
                first = next(iter(parked))
                self._begin(first, layer, parked.pop(first), nursery)
            elif not self._at_work[layer]:
                self._parked.pop(layer, None)
                del self._at_work[layer]

    async def _try(self, trials: Trials, opcode: int, request_id: tuple[int, int], body: bytes) -> Answer:
        """Answer a request when it is its turn. What waits for a registry has had its turn soon, and lets others go."""
        node, offset = request_id
        await trials.turn.acquire()
        trials.board.set_trial(node, offset, trials.deaths if request_id == trials.suspect else 0)
        longest = min(_LONGEST_TURN, _ALL_TURNS / (1 + trials.turn.statistics().tasks_waiting))
        over = trio.Event()

        async def end() -> None:
            scope = trio.move_on_after(longest)
            try:
                with scope:
                    await over.wait()
            finally:
                if not scope.cancelled_caught:
                    trials.board.set_trial(0)
                trials.turn.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            try:
                answer = self._handler.handle(opcode, node, memoryview(body))
                if not isinstance(answer, tuple):
                    answer = await answer
            finally:
                over.set()
        return answer

    async def _watch_caller(self, unique: int, nursery: trio.Nursery) -> None:
        """End a request whose caller is to die: the kernel doesn't let it, as long as we have its request.

        Any signal is told to us, and most of them must not fail a read; a SIGKILL after another is not told any more.
        """
        while (waiting := self._waiting.get(unique)) is not None:
            if _is_dying(waiting.thread):
                waiting.scope.cancel()
                if (answer := self._parked.get(waiting.layer, {}).pop(unique, None)) is not None:
                    self._begin(unique, waiting.layer, answer, nursery)
                return
            await trio.sleep(_LOOK_AT_CALLER)

    def _answer(self, unique: int, error: int, body: Data) -> None:
        if error:
            body = b""
        try:
            os.writev(self._fd, [greetings.out_header(unique, len(body), error), body])
        except OSError as failure:
            # The caller was killed, or the mount went away: nobody wants the answer.
            if failure.errno in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                return
            log.error("the kernel refuses an answer of %d bytes: %s", len(body), failure)
            if not error:
                self._answer(unique, errno.EIO, b"")

    def _greet(self, request: bytes) -> None:
        self.greeting = greeting = greetings.decode(request)
        if not greeting.is_known:
            log.error("the kernel's FUSE protocol %d.%d is too old", greeting.major, greeting.minor)
            self._answer(greeting.unique, errno.EPROTO, b"")
            return
        with contextlib.suppress(OSError):  # unmounted meanwhile
            os.write(self._fd, greetings.answer(greeting))


def _is_dying(thread: int) -> bool:
    """Tell whether a thread has a SIGKILL waiting. Reads /proc, which doesn't block. Unknown ones are gone."""
    if thread <= 0:
        return False  # in a pid namespace that is not below ours
    try:
        with open(f"/proc/{thread}/status", "rb") as handle:
            lines = handle.read().splitlines()
    except OSError:
        return True
    masks = (line.split(b":")[1] for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:")))
    return any(int(mask, 16) & _SIGKILL for mask in masks)
