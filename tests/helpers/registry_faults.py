"""What can be made to go wrong in the fake registry, and what its log keeps of a request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What can be made to go wrong. The comment names the parameters of `FakeRegistry.fault` that it looks at."""

    REFUSE = "reset the connection without an answer"
    BLACK_HOLE = "read the request and never answer"  # ends with release() or at close
    STATUS = "answer `status` with an error document; `retry_after` becomes a header"
    TRUNCATE = "promise the whole body, send `at` bytes (default: half) and close"
    RESET = "like TRUNCATE, but the connection is reset"
    STALL = "send `at` bytes (default: half) and then nothing"  # ends like BLACK_HOLE
    FLIP = "invert the bits of the body's byte `at` (default: the middle)"
    IGNORE_RANGE = "answer a range request with 200 and the whole blob"
    WRONG_RANGE = "answer 206 with a Content-Range that is one byte off"
    SHORT_RANGE = "answer 206 with a range that ends before the one asked for"
    DRIP = "send the body at `rate` bytes a second"
    DRIP_HEADERS = "send the header at `rate` bytes a second"
    DELAY = "wait `seconds` before the answer"
    REDIRECT_LOOP = "redirect to the same address"
    REDIRECT = "redirect to `location`"


@dataclass(slots=True)
class Rule:
    """One fault: when it applies and how. `times` None means always; the first `after` matches are let through."""

    kind: Fault
    path: str = ""  # a substring of the path and query
    method: str = ""  # empty: any
    times: int | None = None
    after: int = 0
    status: int = 503
    retry_after: str = ""
    rate: int = 1000  # bytes a second
    seconds: float = 0.0
    at: int | None = None  # a byte of the body
    location: str = ""
    hits: int = 0  # how often it has been applied

    def matches(self, request: Request) -> bool:
        if self.path not in request.path or (self.method and self.method != request.method):
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.hits += 1
        return True


@dataclass(slots=True)
class Request:
    """One request as the log keeps it. `sent` are body bytes written; `status` 0 means no answer (yet)."""

    method: str
    path: str  # with the query
    range: str  # the Range header, or ""
    authorization: str
    server: str  # "registry" or "storage"
    headers: dict[str, str]  # names in lower case
    started: float  # time.monotonic()
    status: int = 0
    sent: int = 0
    received: int = 0
