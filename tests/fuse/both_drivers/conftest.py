"""A daemon that the tests of a module share, once with each driver: for what readers see, whoever else reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemon import Node
from tests.helpers.fake_registry import FakeRegistry


@pytest.fixture(scope="module", params=["fuse", "erofs"])
def node(request: pytest.FixtureRequest, module_scratch: Path) -> Iterator[Node]:
    """Yield a store and its daemon; the mounts of a test stay until the last one is over."""
    place = module_scratch / request.param
    place.mkdir()
    with Node(place, DRIVER=request.param) as one:
        yield one


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    """Yield a registry in this process; each test has images of its own there."""
    with FakeRegistry() as one:
        yield one


@pytest.fixture(scope="module")
def driver(node: Node) -> str:
    """Return the driver that shows the images."""
    return node.settings["DRIVER"]
