"""How lively an answer must be. A value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """How lively an answer must be where somebody else could give it.

    `begin_by` (time.monotonic()): when its header must be here, connection, login and redirects included. Then no pause
    may be longer than `stall` seconds, and `floor` bytes a second must come, measured over `window` seconds of waiting
    for the network: the time that the reader takes is not the host's.
    """

    begin_by: float
    stall: float
    floor: float = 0.0
    window: float = 1.0
