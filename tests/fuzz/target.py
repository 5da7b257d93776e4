"""What a fuzz target is: a function from bytes to nothing that may raise its parser's documented errors alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lazyfs.errors import LazyfsError

SLOWEST = 10.0  # seconds of processor time for one input: all are small, so more means that something is not linear
MEMORY = 4 << 30  # bytes of address space: what the parsers allow themselves (a TOC of 200 MiB, and its table) fits

SCRATCH = TemporaryDirectory(prefix="lazyfs-fuzz-")


def place() -> Path:
    """Return where targets may put files, for as long as the process lives."""
    return Path(SCRATCH.name)


@dataclass(frozen=True, slots=True)
class Target:
    """One parser under attack. `parse` gets any bytes; `seeds` makes valid documents; inputs have `most` bytes at most.

    `errors` are what the parser documents. `words`: what its documents are made of, for the mutator. `json`: the
    documents are JSON, or lines of it, so that they are changed as trees as well.
    """

    name: str
    parse: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    errors: tuple[type[LazyfsError], ...]
    words: tuple[bytes, ...] = ()
    json: bool = False
    most: int = 16 << 10


class TooSlow(Exception):
    """An input took longer than any may."""


def run_one(target: Target, data: bytes) -> None:
    """Parse one input. Raise what is a finding: anything but the documented errors, and TooSlow."""
    began = time.thread_time()
    try:
        target.parse(data)
    except target.errors as error:
        # What a user is shown is part of the promise: a sentence of bounded length, whatever the input holds.
        assert error.message and len(str(error)) < 100_000
    took = time.thread_time() - began
    if took > SLOWEST:
        raise TooSlow(f"{took:.1f} s of processor time for {len(data)} bytes")
