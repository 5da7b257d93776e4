"""`lazyfs upgrade` puts today's code in place, or leaves what works where that code does not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.daemon import Node, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.takeover import IMPATIENT, held, image_of, readers, sabotaged

pytestmark = [pytest.mark.fuse, pytest.mark.faults]

_MEANS = """
import os, sys, time
if "lazyfs.mount.daemon" in sys.orig_argv and os.path.exists(os.path.join(os.path.dirname(__file__), "flag")):
    {}
"""
# Code of today that does not work, while there is a file "flag" beside it.
_CANNOT_BEGIN = _MEANS.format("print('the new code cannot begin', file=sys.stderr, flush=True); os._exit(1)")
_HANGS = _MEANS.format("time.sleep(600)") + IMPATIENT


def refused(node: Node, registry: FakeRegistry, place: Path, code: str, said: str, times: int) -> None:
    """Upgrade to `code`; the log has `said` so often. The old daemon goes on, and the code is taken once it works."""
    with sabotaged(node, place, code) as daemon:
        tree = node.mount(image_of(registry))
        before = daemon.pid()
        (place / "flag").touch()
        with readers(node, tree, ("held", "names")) as results:
            os.kill(daemon.process.pid, signal.SIGHUP)
            until(lambda: node.log().count(said) >= times, f"the log says: {said}", 60)
            assert daemon.pid() == before
            (place / "flag").unlink()
            done = node.lazyfs("upgrade", timeout=90)
            assert done.returncode == 0, (done.stderr, node.log())
        assert daemon.pid() != before
        assert not [reading.wrong for reading in results if reading.wrong]
        node.umount(tree)


@shows(
    Case(
        "processes-upgrade",
        Area.PROCESSES,
        "`lazyfs upgrade` puts another lazyfsd in place",
        "right bytes, after some milliseconds",
        "the command tells both processes",
    ),
)
def test_an_upgrade_changes_the_daemon_and_nothing_else(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree, ("held", "names")) as results:
            before = daemon.pid()
            done = node.lazyfs("upgrade", "--json")
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert told["before"]["pid"] == before and told["after"]["pid"] == daemon.pid() != before
            assert told["after"]["holder"] == told["before"]["holder"] != 0
        assert not [reading.wrong for reading in results if reading.wrong]
        node.umount(tree)


@shows(
    Case(
        "processes-broken-upgrade",
        Area.PROCESSES,
        "`lazyfs upgrade` to code that can't begin",
        "right bytes",
        "the old lazyfsd goes on; its log says why",
    ),
)
def test_code_that_cannot_begin_takes_nothing_over(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    refused(node, registry, tmp_path, _CANNOT_BEGIN, "the new code cannot begin", 2)  # it is tried again


@shows(
    Case(
        "processes-hanging-upgrade",
        Area.PROCESSES,
        "`lazyfs upgrade` to code that hangs while it is loaded",
        RIGHT,
        "the old lazyfsd goes on; its log says so",
    ),
)
def test_code_that_hangs_takes_nothing_over(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    refused(node, registry, tmp_path, _HANGS, "hangs, and is ended", 1)


def test_without_a_holder_there_is_no_upgrade(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(image_of(registry))
    assert "no holder" in node.refused(2, "upgrade")
    node.umount(tree)
