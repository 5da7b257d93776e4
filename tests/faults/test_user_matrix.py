"""What users and clocks do to a mount: whoever is killed in a read is gone soon, whatever is removed harms nobody."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest

from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers import sabotage, small_image
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.fault_bench import Bench
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(3_000_000, 9)
SOON = 10.0  # seconds; read_timeout is 60 in these tests


def image_of(registry: FakeRegistry) -> AddedImage:
    return add(registry, "image", zstd_chunked_layer(tar_of(file("data", DATA), file("small", b"small"))))


@shows(
    Case(
        "users-kill-reader",
        Area.USERS,
        "a reader of a registry that does not answer is killed (-9), in a buffered read",
        "is gone at once, not after `read_timeout`",
        "nothing",
    )
)
@both_drivers
def test_reader_killed_in_a_read(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"READ_TIMEOUT": "60", "ANSWER_TIMEOUT": "60"}
    image = image_of(registry)
    tree = node.mount(image)
    registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[0]}")
    reader = node.spawn(["cat", str(tree / "data")])
    registry.wait_for(1, path=f"/blobs/{image.layers[0]}")
    time.sleep(0.2)  # it waits for the answer by now
    reader.kill()
    assert node.finish(reader, SOON).returncode == -signal.SIGKILL
    registry.clear_faults()
    assert node.read(tree / "data", timeout=70) == DATA


@shows(
    Case(
        "users-kill-direct-reader",
        Area.USERS,
        "a reader of a registry that does not answer is killed (-9), in an O_DIRECT read of the driver fuse",
        "is gone when its read ends, within `read_timeout`",
        "nothing",
    )
)
@pytest.mark.parametrize("driver", ["fuse"])  # EROFS has no O_DIRECT reads
def test_direct_reader_killed_in_a_read(node: Node, registry: FakeRegistry, driver: str) -> None:
    node.settings |= {"READ_TIMEOUT": "5", "ANSWER_TIMEOUT": "120"}
    image = image_of(registry)
    tree = node.mount(image)
    registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[0]}")
    reader = node.spawn(["dd", f"if={tree / 'data'}", "iflag=direct", "bs=64k", "of=/dev/null"])
    registry.wait_for(1, path=f"/blobs/{image.layers[0]}")
    time.sleep(0.2)  # it waits for the answer by now
    reader.kill()
    # Some time for a busy machine, and still less than the registry is waited for.
    assert node.finish(reader, 60).returncode == -signal.SIGKILL
    registry.clear_faults()
    assert node.read(tree / "data", timeout=70) == DATA


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the tar of a root file system with some programs."""
    tree = tmp_path_factory.mktemp("programs") / "root"
    small_image.make_tree(tree)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tree, ".")
    return packed.getvalue()


@shows(
    Case(
        "users-kill-container",
        Area.USERS,
        "a container whose process reads from a registry that does not answer is killed",
        "is gone at once, not after `read_timeout`",
        "`run` ends with 137 and leaves nothing",
    )
)
@both_drivers
def test_container_killed_in_a_read(node: Node, registry: FakeRegistry, programs: bytes) -> None:
    node.settings |= {"READ_TIMEOUT": "60", "ANSWER_TIMEOUT": "60"}
    image = add(registry, "run", zstd_chunked_layer(programs), zstd_chunked_layer(tar_of(file("srv/data", DATA))))
    beside = node.mount(add(registry, "beside", zstd_chunked_layer(tar_of(file("f", b"beside")))))
    registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[1]}", after=1)  # but for its TOC
    command = node.spawn(node.words("run", image.reference, "cat", "/srv/data"))
    registry.wait_for(2, path=f"/blobs/{image.layers[1]}", timeout=30)
    time.sleep(0.2)
    inside = until(lambda: running(b"cat\0/srv/data\0"), "the program in the container")
    os.kill(inside, signal.SIGKILL)
    assert node.finish(command, SOON).returncode == 128 + signal.SIGKILL
    assert node.read(beside / "f") == b"beside"
    node.umount(beside)  # while the registry is still silent: nothing in the kernel waits for it any more
    until(lambda: not node.processes(), "the daemon ends by itself")


def running(words: bytes) -> int:
    """Return the process with this command line, 0 where there is none."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if Path("/proc", entry, "cmdline").read_bytes() == words:
                    return int(entry)
            except OSError:
                pass
    return 0


@shows(
    Case(
        "users-store-removed",
        Area.USERS,
        "`rm -rf` of the whole store while an image is mounted",
        RIGHT,
        "other mounts: exit 9, “somebody has removed the store”; once its daemon has ended it is made anew",
    )
)
@both_drivers
def test_store_removed_while_mounted(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    assert node.read(tree / "small") == b"small"
    shutil.rmtree(node.root)
    assert node.read(tree / "data") == DATA
    other = add(registry, "other", zstd_chunked_layer(tar_of(file("f", b"other"))))
    assert "somebody has removed the store" in node.refused(9, "mount", other.reference, node.new_dir())
    assert node.read(tree / "small") == b"small"
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends by itself")
    assert node.read(node.mount(image) / "data") == DATA


JUMPS = {"ahead": 10 * 365 * 86400, "back": -10 * 365 * 86400}


@shows(
    *(
        Case(
            f"users-clock-{way}" if way == "back" else "users-clock",
            Area.USERS,
            f"the clock jumps by ten years: {way}",
            RIGHT,
            "nothing",
            param=way,
        )
        for way in JUMPS
    )
)
@pytest.mark.parametrize("way", JUMPS)
def test_the_clock_jumps(scratch: Path, way: str) -> None:
    place = scratch / "sabotage"
    with Bench(scratch, sabotage.prefix(place, scratch / "store"), DRIVER="fuse") as bench:
        plain = bench.victim("plain")
        signed = bench.victim("signed", redirect=True)
        token = bench.victim("token", auth="bearer", anonymous=True)
        limited = bench.victim("limited")
        for victim in (plain, signed, token, limited):
            bench.show(victim, ("fuse",))
        limited.registry.fault(Fault.STATUS, path="/blobs/", status=429, retry_after="1", times=1)
        with sabotage.on(place, "clock", str(JUMPS[way])):
            tried = bench.read_all([plain, signed, token, limited], 20)
            for victim in (plain, signed, token, limited):
                for each in tried[victim.name]:
                    assert (each.data, each.words) == (victim.content, ""), victim.name
            later = bench.victim("later")
            bench.show(later, ("fuse",))
            bench.until_right([later])
            assert bench.node.lazyfs("status").returncode == 0
            listed = bench.node.lazyfs("cache", "ls")
            assert listed.returncode == 0 and later.reference.partition("/")[0] in listed.stdout, listed
            pruned = bench.node.lazyfs("cache", "prune", "--older", "1d")
            assert pruned.returncode == 0, pruned.stderr
        bench.until_right([plain, later])
