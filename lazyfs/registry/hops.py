"""What one HTTP request cost, as a value for `inspect --timing`, metrics and `status`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

HopKind = Literal["challenge", "token", "index", "manifest", "config", "blob", "redirect", "upload", "head"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One HTTP request, failed ones too. Reported when its body has been read or given up.

    `status` is 0 when no answer came. `started` is a time.monotonic() value, `seconds` runs until the end of the body,
    and `size` are the bytes of the body received (for uploads: sent). `retry_after`: seconds that a 429 or 503 asks to
    wait, 0 when it doesn't say. `remaining`: requests left before the host's rate limit, None where it doesn't say.
    """

    kind: HopKind
    host: str
    what: str
    status: int
    started: float
    seconds: float
    size: int
    retry_after: float = 0.0
    remaining: int | None = None


OnHop = Callable[[Hop], None]  # called in the thread that made the request; must be quick and thread-safe
