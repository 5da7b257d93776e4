"""What fuzzing found, each input by itself: none of them is anything but the error that is documented."""

from __future__ import annotations

import pytest

from tests.fuzz.engines import TARGETS
from tests.fuzz.target import run_one

FOUND = [
    # A size without end, and one beyond all numbers of a processor, were bugs of the daemon in its own answer.
    ("control", b'{"id":1,"call":"cache_prune","args":{"size":1e999}}'),
    ("control", b'{"id":1,"call":"cache_prune","args":{"age":1e999}}'),
    ("control", b'{"id":1,"call":"cache_prune","args":{"age":1' + b"0" * 400 + b"}}"),
    # A deep answer broke the client with a RecursionError.
    ("answers", b'{"id":1,"ok":' + b"[" * 5000 + b"\n"),
    # A label of 4096 odd bytes became a reason of 24,000 characters.
    ("labels", b"P\nQ" + b"\xff" * 4096),
]


@pytest.mark.parametrize("name, data", FOUND, ids=lambda value: value if isinstance(value, str) else str(len(value)))
def test_what_was_found_stays_mended(name: str, data: bytes) -> None:
    run_one(TARGETS[name], data)


def test_a_request_is_called_by_something_short() -> None:
    """Each answer repeats it; a deep one would have been written with as many calls within calls."""
    for number in (b"[" * 900 + b"]" * 900, b'"' + b"x" * 10_000 + b'"', b"{}"):
        TARGETS["control"].parse(b'{"id":%s,"call":"status"}' % number)
