"""One request for neighbouring frames, and one frame of it: how urgent it is, what has come, who waits for what."""

from __future__ import annotations

import trio

from lazyfs.chunks.host import Priority, Ticket
from lazyfs.chunks.layer import ServedLayer
from lazyfs.errors import LazyfsError
from lazyfs.registry.repository import Repository


class Fetch:
    """One request for neighbouring frames, tried until all have landed: how urgent, and since when."""

    __slots__ = (
        "began",
        "flights",
        "head",
        "hurry",
        "in_pieces",
        "is_guess",
        "landed",
        "moves",
        "over",
        "patience",
        "piece",
        "priority",
        "repository",
        "scope",
        "spared",
        "ticket",
    )

    def __init__(
        self, layer: ServedLayer, first: int, stop: int, priority: Priority, ticket: Ticket, is_guess: bool
    ) -> None:
        self.priority = priority
        self.is_guess = is_guess  # most of it was not asked for, whatever the priority
        self.ticket = ticket  # of the try that waits or runs
        self.repository: Repository = layer.repository
        self.began = 0.0  # when the last try left (time.monotonic)
        self.hurry = trio.Event()  # somebody more urgent has turned up: no time for a pause
        self.over = trio.Event()
        self.scope = trio.CancelScope()  # of all tries
        self.spared = False  # some of it came before anybody wanted it: the store may not have kept it
        self.head: list[bytes] = []  # the pieces of its only frame that are here
        self.in_pieces = True  # False: the frame was wrong, and its pieces may have come from several sources
        self.piece: trio.CancelScope | None = None  # of the piece that waits or is under way
        self.patience = 0.0  # seconds that such a piece has once somebody wants the frame now
        self.moves = 0  # times that it was slow and asked for anew
        self.landed: list[int] = []  # frames that arrived last: the store is still writing them
        # By frame; those that are in the store drop out, for they hold decoded bytes.
        self.flights = {frame: Flight(self) for frame in range(first, stop)}

    def missing(self) -> tuple[int, int] | None:
        """The first frame that has not landed, and the one behind the last."""
        left = [frame for frame, flight in self.flights.items() if not flight.done.is_set()]
        return (left[0], left[-1] + 1) if left else None

    def promote(self, priority: Priority) -> None:
        if priority < self.priority:
            self.priority = priority
            self.hurry.set()
            if self.piece is not None and not self.ticket.entered:
                self.piece.cancel()  # it has not left yet: all is asked for at once
                return
            if self.piece is not None:
                self.piece.deadline = min(self.piece.deadline, trio.current_time() + self.patience)
            self.ticket.promote(priority)


class Flight:
    """One frame on its way. It stays findable until its chunks are in the store, so that nobody fetches it twice."""

    __slots__ = ("chunks", "done", "error", "fetch", "tries")

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.done = trio.Event()
        self.chunks: dict[int, bytes] = {}
        self.error: LazyfsError | None = None
        self.tries = 0  # that brought wrong bytes
