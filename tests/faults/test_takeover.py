"""The daemon dies, or the process that is to follow it: readers go on, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from lazyfs.container import mounts
from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.takeover import KINDS, contents, held, image_of, readers, sabotaged
from tests.helpers.tars import file, tar_of

pytestmark = [pytest.mark.fuse, pytest.mark.faults]


@shows(
    Case(
        "processes-held-daemon-killed",
        Area.PROCESSES,
        "lazyfsd is killed (-9) again and again, with a holder",
        "right bytes, after some milliseconds",
        "nothing: another one takes over",
    ),
)
@both_drivers
def test_readers_do_not_notice_that_the_daemon_is_killed(node: Node, registry: FakeRegistry, driver: str) -> None:
    kinds = KINDS if driver == "fuse" else tuple(kind for kind in KINDS if kind != "direct")  # EROFS has none
    rng = random.Random(7)
    with held(node) as daemon:
        tree = node.mount(image_of(registry), "--driver", driver)
        with readers(node, tree, kinds) as results:
            for _ in range(8):
                daemon.kill()
                time.sleep(rng.choice((0.0, 0.05, 0.2, 0.5)))  # some come while the one before is still taken over
        for reading in results:
            assert reading.count and not reading.wrong, reading
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        node.umount(tree)


@shows(
    Case(
        "processes-held-all-killed",
        Area.PROCESSES,
        "lazyfsd, the standby and what forks them are killed (-9) at once",
        "right bytes, within a second",
        "commands wait for the next one",
    ),
)
def test_a_node_without_any_standby_comes_back(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree) as results:
            for _ in range(2):
                daemon.kill_all_at_once()
                # A command that comes now waits for the next daemon, and doesn't say that none runs.
                assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        assert not [reading.wrong for reading in results if reading.wrong]
        node.umount(tree)


@shows(
    Case(
        "processes-held-mounting",
        Area.PROCESSES,
        "lazyfsd is killed (-9) while images are mounted and unmounted, with a holder",
        "other readers: right bytes",
        "the command that was hit says so, and works when it is done again",
    ),
)
@both_drivers
def test_mounts_that_a_kill_hits_leave_nothing(node: Node, registry: FakeRegistry, driver: str) -> None:
    rng = random.Random(11)
    with held(node) as daemon:
        steady, image = (
            node.mount(image_of(registry)),
            add(registry, "two", zstd_chunked_layer(tar_of(file("a", b"a")))),
        )
        with readers(node, steady, ("held", "names")) as results:
            for _ in range(8):
                where = node.new_dir()
                mounting = node.spawn(node.words("mount", "--driver", driver, image.reference, where))
                time.sleep(rng.uniform(0.1, 0.7))
                daemon.kill()
                if node.finish(mounting, 30).returncode != 0:
                    assert node.lazyfs("mount", "--driver", driver, image.reference, where).returncode == 0
                assert node.read(where / "a") == b"a"
                leaving = node.spawn(node.words("umount", where))
                time.sleep(rng.uniform(0.1, 0.5))
                daemon.kill()
                if node.finish(leaving, 30).returncode != 0 and os.path.ismount(where):
                    node.umount(where)
        assert not [reading.wrong for reading in results if reading.wrong]
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(steady)]
        node.umount(steady)
        until(lambda: node.shown() == [], "nothing is mounted")


@shows(
    Case(
        "processes-held-spares-killed",
        Area.PROCESSES,
        "the standby, or what forks it, is killed (-9), and then lazyfsd",
        "right bytes, after some milliseconds, or within a second",
        "nothing",
    ),
)
@pytest.mark.parametrize("spare", ["standby", "template"])
def test_a_spare_process_that_dies_is_replaced(node: Node, registry: FakeRegistry, spare: str) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree, ("held", "names")) as results:
            for wait in (0.0, 1.5):
                serving, standby = daemon.pid(), daemon.standby()
                template = next(pid for pid in node.processes() if pid not in (serving, standby))
                victim = standby if spare == "standby" else template
                os.kill(victim, signal.SIGKILL)
                time.sleep(wait)
                assert daemon.pid() == serving
                assert daemon.kill() != serving
        assert not [reading.wrong for reading in results if reading.wrong]
        assert len(node.processes()) <= 3
        node.umount(tree)


_NO_RESEND = """
import sys
if any("lazyfs.mount.holder" in word for word in sys.orig_argv):
    from lazyfs.mount.greeting import Greeting
    Greeting.can_resend = property(lambda self: False)
"""


def test_without_the_kernels_help_the_mount_is_a_plain_one(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    with sabotaged(node, tmp_path, _NO_RESEND) as daemon:
        tree = node.mount(image_of(registry))
        assert node.read(tree / "f1") == contents()["f1"]
        assert node.status()["daemon"]["holder"] == 0
        assert daemon.pid() == daemon.process.pid  # which would have been the holder
        assert "no holder" in node.refused(2, "upgrade")
        node.umount(tree)


@shows(
    Case(
        "processes-holder-killed",
        Area.PROCESSES,
        "the holder is killed (-9), and nobody started it that keeps its connection",
        RIGHT,
        "lazyfsd goes on; `status` names no holder, `upgrade`: exit 2",
    ),
)
def test_a_daemon_goes_on_without_its_holder(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        serving = daemon.pid()
        daemon.process.kill()
        daemon.process.wait(10)
        assert node.read(tree / "f3") == contents()["f3"]
        until(lambda: node.status()["daemon"]["holder"] == 0, "it is told that nobody takes over from it any more")
        assert "no holder" in node.refused(2, "upgrade")
        node.umount(tree)
        os.kill(serving, signal.SIGTERM)
    assert not mounts.below(os.fsencode(node.run_dir))
