"""Real images, file for file: the trees of both drivers are a full unpack of the images they were made of, by umoci.

Debian's packages in one layer to three, with their base and without, lazy and fetched in full, with whiteouts and
without.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.daemon import Node, tmpfs
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.service_images import OTHERS, ServiceImages
from tests.helpers.trees import TOC_FILES, compare, snapshot, umoci_unpack

NAMES = (*OTHERS, "small")


@pytest.fixture(scope="module")
def filled(services: ServiceImages) -> Iterator[FakeRegistry]:
    with FakeRegistry() as one:
        services.fill(one)
        services.fill_others(one)
        yield one


@pytest.fixture(scope="module")
def shared(module_scratch: Path) -> Iterator[Node]:
    """Yield a daemon for all images."""
    with Node(module_scratch) as one:
        yield one


@pytest.mark.parametrize("name", NAMES)
def test_both_drivers_show_what_umoci_unpacks(
    name: str, shared: Node, scratch: Path, services: ServiceImages, filled: FakeRegistry, small_layout: str
) -> None:
    if name == "small":
        image, layout = small_layout, small_layout.split(":")[1]
    else:
        image, layout = f"{filled.host}/{name}:lazy", str(services.layout)
    began = time.time_ns()
    with tmpfs(scratch / "memory", 2 << 30):  # hundreds of MB, for which other tests' disk has no time
        full = snapshot(umoci_unpack(Path(layout), name, scratch / "memory/full"))
    undated = {b"", *(at for at, node in full.items() if node.mtime_ns > began and stat.S_ISDIR(node.mode))}
    assert len(full) > 100 and len(undated) < 50  # those are dated by umoci's own writes
    trees = [shared.mount(image, "--driver", driver) for driver in ("fuse", "erofs")]
    fuse, erofs = (snapshot(tree) for tree in trees)
    assert compare(fuse, full, ignore=TOC_FILES, undated=undated) == []
    assert compare(erofs, fuse, undated=()) == []
    for tree in trees:
        shared.umount(tree)
