"""A lazyfsd with a holder at the limits that its machine sets: another one takes over, and readers do not notice."""

from __future__ import annotations

import pytest

from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.memory_group import memory_group
from tests.helpers.pattern import pattern
from tests.helpers.takeover import held
from tests.helpers.tars import file, tar_of

pytestmark = [pytest.mark.fuse, pytest.mark.faults]

DATA = pattern(3_000_000, 7)
LIMIT = 1 << 20  # bytes; less than a daemon takes for the chunks of one read


@shows(
    Case(
        "processes-held-memory-limit",
        Area.PROCESSES,
        "the kernel kills lazyfsd at its cgroup's memory limit, with a holder",
        RIGHT,
        "nothing: another one takes over",
    )
)
@both_drivers
def test_a_daemon_that_the_kernel_kills_for_its_memory_is_replaced(
    node: Node, registry: FakeRegistry, driver: str
) -> None:
    image = add(registry, "image", zstd_chunked_layer(tar_of(file("data", DATA))))
    beside = add(registry, "beside", zstd_chunked_layer(tar_of(file("f", b"beside"))))
    with held(node) as daemon:
        tree, other = node.mount(image, "--driver", driver), node.mount(beside, "--driver", driver)
        before = daemon.pid()
        with memory_group(LIMIT) as group:
            group.take(before)
            assert node.read(tree / "data", timeout=90) == DATA
            until(lambda: group.kills() >= 1, "the kernel has killed it")
        assert daemon.pid() != before
        assert node.read(other / "f") == b"beside"
        assert {mount["dir"] for mount in node.status()["mounts"]} == {str(tree), str(other)}
        assert not [layer for mount in node.status()["mounts"] for layer in mount["layers"] if layer["quarantine"]]
        node.umount(tree)
        node.umount(other)
