"""A daemon of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemon import Node


@pytest.fixture
def driver() -> str:
    """How trees reach the kernel: what is the default. `tests.helpers.daemon.both_drivers` runs a test with each."""
    return "auto"


@pytest.fixture
def node(scratch: Path, driver: str) -> Iterator[Node]:
    """Yield a store and its daemon, not yet started; whatever it leaves behind fails the test."""
    with Node(scratch, DRIVER=driver) as one:
        yield one
