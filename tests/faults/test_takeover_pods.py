"""Pods on a node whose lazyfsd has a holder: it is killed and upgraded under them, and none notices."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.cases import Area, Case, shows
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.little import Little
from tests.helpers.pods import PodNode

pytestmark = [pytest.mark.fuse, pytest.mark.faults]

KILLS = 5
# Reads its image's files over and over, past the page cache of what it read before, and counts what it could not.
WATCH = (
    "sh",
    "-c",
    'want=$(cat /data/number); while :; do [ "$(cat /data/number)" = "$want" ] && cat /data/bytes >/dev/null '
    "&& cat /etc/plain >/dev/null && echo well || echo BROKEN; sleep 0.05; done",
)


def serving(node: PodNode) -> int:
    return int(node.status()["daemon"]["pid"])


def forget(node: PodNode) -> None:
    """Have the kernel drop the pages of what containers read, and of nothing else: other tests run beside this one."""
    for path in node.place.glob("state/io.containerd.runtime.v2.task/k8s.io/*/rootfs/data/bytes"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@shows(
    Case(
        "processes-held-pods",
        Area.PROCESSES,
        "lazyfsd is killed (-9) and upgraded under pods, with a holder",
        "containers: right bytes, after some milliseconds",
        "pulls and starts go on with the next one",
    ),
)
def test_pods_do_not_notice_that_the_daemon_is_killed(scratch: Path, registry: FakeRegistry) -> None:
    images = Little(registry, scratch)
    steady, other = images.numbered(1), images.numbered(2)
    with PodNode(scratch, images.pause, HOLD="1") as node:
        node.cri.pull(steady)
        watcher = node.cri.start(node.cri.run_pod("steady"), "watcher", steady, WATCH)
        until(lambda: node.cri.log("watcher").count("well") >= 2, "the watcher reads", 60)
        for _ in range(KILLS):
            before = serving(node)
            os.kill(before, signal.SIGKILL)
            forget(node)
            assert serving(node) != before
            forget(node)
            seen = node.cri.log("watcher").count("well")
            until(lambda seen=seen: node.cri.log("watcher").count("well") > seen + 2, "it reads on", 60)
        before = serving(node)
        done = node.lazyfs("upgrade")
        assert done.returncode == 0, done.stderr
        assert serving(node) != before
        node.cri.pull(other)  # by the snapshotter, whose connection ended with each of them
        late = node.cri.start(node.cri.run_pod("late"), "late", other, WATCH)
        until(lambda: node.cri.log("late").count("well") >= 2, "another one reads", 60)
        for container, name in ((watcher, "watcher"), (late, "late")):
            assert "BROKEN" not in node.cri.log(name)
            assert node.cri.run(container, "cat", "/data/number").out.strip().isdigit()
