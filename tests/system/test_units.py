"""The units that `lazyfs install` writes, under a real systemd: nothing that is killed takes a mount along."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Area, Case, shows
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.systemd import Systemd, booted
from tests.helpers.takeover import contents, image_of

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

_UNIT = "lazyfsd.service"
# Reads files that are open of all directories again and again until its input ends; prints reads, and what was wrong.
_READER = """
import json, os, random, select, sys
sys.path.insert(0, sys.argv[1])
from tests.helpers.takeover import contents
want = contents()
held = {(top, name): os.open(os.path.join(top, name), os.O_RDONLY) for top in sys.argv[2:] for name in want}
count, wrong = 0, []
print("reading", flush=True)
while not select.select([0], [], [], 0.005)[0]:
    top, name = random.choice(list(held))
    fd = held[top, name]
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if os.pread(fd, 1 << 20, 0) != want[name]:
            wrong.append(f"{top}/{name}: bytes that are not its")
    except OSError as error:
        wrong.append(f"{top}/{name}: {error}")
    count += 1
print(json.dumps([count, wrong]))
"""


def assert_right(systemd: Systemd, top: Path) -> None:
    """Compare all files of a mount of `image_of`."""
    want = {name: hashlib.sha256(data).hexdigest() for name, data in contents().items()}
    told = systemd.call("sha256sum", *(top / name for name in want))
    assert [line.split()[0] for line in told.splitlines()] == list(want.values())


@pytest.fixture
def systemd(scratch: Path) -> Iterator[Systemd]:
    place = scratch / "box"
    place.mkdir()
    with booted(place) as one:
        one.call("lazyfs", "install", "--yes", "--no-default")
        until(lambda: one.property(_UNIT, "ActiveState") == "active", "lazyfsd is started", 60)
        yield one


@shows(
    Case(
        "processes-real-systemd",
        Area.PROCESSES,
        "under systemd itself: lazyfsd, holder, or all of the unit killed (-9); `systemctl reload`, `lazyfs upgrade`",
        "right bytes, after some milliseconds; without a holder after `RestartSec`",
        "the unit stays active, `systemctl show` counts the holder's restarts",
    ),
)
def test_nothing_that_is_killed_takes_a_mount_along(systemd: Systemd, registry: FakeRegistry) -> None:
    image, tops = image_of(registry).reference, [Path("/tmp/fuse"), Path("/tmp/erofs")]
    for top in tops:
        systemd.call("mkdir", top)
        systemd.call("lazyfs", "mount", "--driver", top.name, image, top)

    def serving() -> tuple[int, int]:
        def told() -> dict[str, int] | None:  # None: between two holders nobody listens
            found: dict[str, int] | None = json.loads(systemd.call("lazyfs", "status", "--json"))["daemon"]
            return found

        daemon = until(told, "one serves", 60)
        return daemon["pid"], daemon["holder"]

    def another(before: tuple[int, int], place: int) -> None:
        until(lambda: serving()[place] not in (0, before[place]), "another one serves", 60)
        assert systemd.property(_UNIT, "ActiveState") == "active"

    here = str(Path(__file__).parents[2])
    words = systemd.words(sys.executable, "-c", _READER, here, *tops)
    with (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader,
        contextlib.ExitStack() as undo,
    ):
        undo.callback(reader.kill)  # a test that fails must not wait for a read that hangs
        assert reader.stdout is not None and reader.stdout.readline() == b"reading\n"
        daemon, holder = before = serving()
        assert systemd.property(_UNIT, "MainPID") == str(holder)
        group = systemd.call("cat", f"/proc/{daemon}/cgroup").strip().splitlines()[-1]
        assert group.endswith(f"{_UNIT}/daemon"), "it has a group of its own, in which the kernel ends it alone"
        systemd.call("kill", "-9", str(daemon))
        another(before, 0)
        before = serving()
        systemd.call("systemctl", "kill", "-s", "KILL", "--kill-whom=main", _UNIT)  # which ends the rest of the unit
        another(before, 1)
        before = serving()
        systemd.call("systemctl", "kill", "-s", "KILL", "--kill-whom=all", _UNIT)
        another(before, 1)
        assert systemd.property(_UNIT, "NRestarts") == "2"
        assert systemd.property(_UNIT, "NFileDescriptorStore") == "2"
        before = serving()
        systemd.call("systemctl", "reload", _UNIT)
        another(before, 0)
        before = serving()
        systemd.call("lazyfs", "upgrade", timeout=90)
        assert serving()[0] != before[0]
        out, _ = reader.communicate(b"\n", timeout=60)
    count, wrong = json.loads(out)
    assert count > 20 and not wrong, wrong[:5]
    for top in tops:
        assert_right(systemd, top)
        systemd.call("lazyfs", "umount", top)
    systemd.call("systemctl", "stop", _UNIT)
    assert systemd.property(_UNIT, "Result") == "success"
    assert systemd.property(_UNIT, "NFileDescriptorStore") == "0", "nothing is kept after an orderly end"
    assert "/run/lazyfs" not in systemd.call("cat", "/proc/mounts")


def test_the_snapshotter_and_its_data_plane_are_apart(systemd: Systemd, registry: FakeRegistry) -> None:
    until(lambda: systemd.property("lazyfs-snapshotter.service", "ActiveState") == "active", "it is started", 60)
    systemd.call("mkdir", "/tmp/fuse")
    systemd.call("lazyfs", "mount", "--driver", "fuse", image_of(registry).reference, "/tmp/fuse")
    systemd.call("systemctl", "kill", "-s", "KILL", "--kill-whom=all", "lazyfs-snapshotter.service")
    until(lambda: systemd.property("lazyfs-snapshotter.service", "NRestarts") == "1", "it is started again", 60)
    assert_right(systemd, Path("/tmp/fuse"))
    systemd.call("systemctl", "stop", "lazyfs-snapshotter.service")
    assert systemd.property(_UNIT, "ActiveState") == "active"
    assert_right(systemd, Path("/tmp/fuse"))
    systemd.call("lazyfs", "umount", "/tmp/fuse")
    systemd.call("lazyfs", "uninstall", "--yes")
    assert systemd.property(_UNIT, "LoadState") == "not-found"
