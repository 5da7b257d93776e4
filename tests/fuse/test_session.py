"""The session as the kernel sees it, and what the daemon costs: tuning, tables of trees, memory."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lazyfs.container import mounts
from lazyfs.limits import MAX_BACKGROUND
from lazyfs.mount.session import READ_AHEAD
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.registry_faults import Fault
from tests.helpers.tars import dir_, file, tar_of

MEMORY = 80_000_000  # bytes of anonymous memory that the daemon may take

DROP = "os.posix_fadvise(os.open(a[0], os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)"
WALK = """
count, pending = 0, [a[0]]
while pending:
    with os.scandir(pending.pop()) as entries:
        for entry in entries:
            os.lstat(entry.path)
            count += 1
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
print(count)
"""


@pytest.mark.parametrize("driver", ["fuse"])
def test_kernel_side_is_tuned(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "one", zstd_chunked_layer(tar_of(file("f", b"x")))))
    shown = mounts.top_at(os.fsencode(tree))
    assert shown is not None and shown.kind == "fuse.lazyfs"
    read_ahead = Path(f"/sys/class/bdi/{shown.device}/read_ahead_kb")
    assert int(read_ahead.read_text()) == READ_AHEAD // 1024
    connections = Path("/sys/fs/fuse/connections")
    if not any(connections.iterdir()):
        mounts.mount(b"fusectl", os.fsencode(connections), "fusectl")
    connection = connections / shown.device.partition(":")[2]
    assert int((connection / "max_background").read_text()) == MAX_BACKGROUND
    assert node.status()["daemon"]["reason"] == "the settings say so"


def test_session_lists_its_trees_and_nothing_else(node: Node, registry: FakeRegistry) -> None:
    node.mount(add(registry, "one", zstd_chunked_layer(tar_of(file("f", b"1")))))
    code = "print(json.dumps(os.listdir(a[0])))"
    session = node.run_dir / "mnt"
    first = node.python(code, session)
    assert len(first) == 1
    two = node.mount(add(registry, "two", zstd_chunked_layer(tar_of(file("f", b"2")))))
    assert len(node.python(code, session)) == 2
    node.umount(two)
    assert node.python(code, session) == first


def test_same_image_again_is_the_same_tree(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", zstd_chunked_layer(tar_of(file("f", pattern(200_000)))))
    one, two = node.mount(image), node.mount(image)
    assert node.read(one / "f") == pattern(200_000)
    reads = node.fuse_calls()["read"]
    assert node.read(two / "f") == pattern(200_000)
    assert node.fuse_calls()["read"] == reads


@pytest.mark.slow
def test_memory_of_a_hundred_thousand_files(node: Node, registry: FakeRegistry) -> None:
    entries = []
    for folder in range(1000):
        entries.append(dir_(f"share/package-{folder:05}", style="ustar"))
        entries += [
            file(f"share/package-{folder:05}/some-source-file-{i:06}.txt", b"%d" % i, style="ustar") for i in range(100)
        ]
    tree = node.mount(add(registry, "many", zstd_chunked_layer(tar_of(*entries))))
    assert node.python(WALK, tree, timeout=120) == 101_001
    assert node.status()["daemon"]["memory"] <= MEMORY


@pytest.mark.slow
def test_memory_after_a_gigabyte_of_reads(node: Node, registry: FakeRegistry) -> None:
    node.settings["BACKGROUND"] = "1"
    data = pattern(128 << 20)
    tree = node.mount(add(registry, "large", zstd_chunked_layer(tar_of(file("data", data)), level=1)))
    for _ in range(8):
        done = node.tool("dd", f"if={tree / 'data'}", "of=/dev/null", "bs=1M", "status=none", timeout=60)
        assert done.returncode == 0, done.stderr
        node.python(DROP, tree / "data")
    assert node.fuse_calls()["read"] * (1 << 20) >= 8 * len(data)
    node.until_verified(60)
    assert node.status()["daemon"]["memory"] <= MEMORY * 1.25

    def has_given_back() -> bool:
        time.sleep(2)  # asked more often the daemon is at work
        found: int = node.status()["daemon"]["memory"]
        return found <= MEMORY * 0.8

    until(has_given_back, "what the reads have freed is given back", 30)


FAULT = """
mapped = mmap.mmap(os.open(a[0], os.O_RDONLY), 0, prot=mmap.PROT_READ)
mapped.madvise(mmap.MADV_RANDOM)
print("reading", flush=True)
mapped[0]
"""


@pytest.mark.parametrize("driver", ["fuse"])
def test_a_reader_that_is_killed_ends_at_once(node: Node, registry: FakeRegistry, driver: str) -> None:
    """The kernel lets nobody go who waits for a request of his own that we have: it has to be answered."""
    node.settings["READ_TIMEOUT"] = "120"
    tree = node.mount(add(registry, "one", zstd_chunked_layer(tar_of(file("f", pattern(100_000))))))
    registry.fault(Fault.BLACK_HOLE, path="/blobs/")
    prelude = "import os, sys, mmap\na = sys.argv[1:]\n"
    reader = node.spawn([sys.executable, "-I", "-S", "-c", prelude + FAULT, str(tree / "f")])
    assert reader.stdout is not None and reader.stdout.readline() == b"reading\n"
    until(lambda: node.status()["fuse"].get("read"), "the read has come")
    reader.send_signal(signal.SIGWINCH)  # one that kills nobody must not fail the read either
    time.sleep(0.5)
    assert reader.poll() is None
    reader.kill()
    reader.communicate(timeout=10)
    assert reader.returncode == -signal.SIGKILL
    registry.release()
    registry.clear_faults()
