"""Ctrl-C in commands that wait for somebody: they end with status 130, and nothing is half done."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import pytest

from lazyfs.format.trace import Read, Trace, encode
from lazyfs.registry.referrers import fallback_tag
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

LAYER = zstd_chunked_layer(tar_of(file("a", pattern(300_000)), file("b", pattern(300_000, 1))))


def interrupted(node: Node, process: subprocess.Popen[bytes]) -> str:
    """Interrupt a command; return what it said on stderr."""
    process.send_signal(signal.SIGINT)
    done = node.finish(process, 30)
    assert done.returncode == 130, done.stderr
    said: str = done.stderr.decode()
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("referrers", [True, False])
def test_optimize_leaves_the_list_of_traces_as_it_was(node: Node, registry: FakeRegistry, referrers: bool) -> None:
    """While the request that would change the list is on its way: with the referrers API the artifact's manifest."""
    registry.referrers = referrers
    image = add(registry, "one", LAYER)
    for name in ("a", "b"):
        told = Trace(image.digest, image.layers, (Read(name.encode(), 0, 0, 100_000),))
        (node.place / name).write_bytes(encode(told))
    assert node.lazyfs("optimize", image.reference, node.place / "a").returncode == 0
    before = dict(registry.manifests_of("one"))
    listing = "/manifests/" if referrers else fallback_tag(image.digest)
    stuck = registry.fault(Fault.BLACK_HOLE, method="PUT", path=listing)
    process = node.spawn(node.words("optimize", image.reference, node.place / "b"))
    until(lambda: stuck.hits > 0 or process.poll() is not None, "the change is on its way", 30)
    interrupted(node, process)
    registry.clear_faults()
    after = registry.manifests_of("one")
    assert before.items() <= after.items()
    tag = fallback_tag(image.digest)
    assert after.get(tag) == before.get(tag) and (tag in after) is not referrers
    if referrers:
        assert after == before
    assert node.lazyfs("optimize", image.reference, node.place / "b").returncode == 0  # nothing is in its way
    assert registry.manifests_of("one") != before


def test_wait_ends_and_what_it_waited_for_goes_on(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"BACKGROUND": "1", "READ_TIMEOUT": "60", "ANSWER_TIMEOUT": "30"}
    image = add(registry, "one", LAYER)
    registry.fault(Fault.BLACK_HOLE, path="/blobs/", after=2)  # behind config and TOC
    node.mount(image)
    process = node.spawn(node.words("wait", image.reference))
    until(lambda: connected(process.pid), "it has asked the daemon", 30)
    interrupted(node, process)
    registry.clear_faults()
    assert node.lazyfs("wait", image.reference).returncode == 0


def connected(pid: int) -> bool:
    """Tell whether a process has a socket open."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                return True
    return False
