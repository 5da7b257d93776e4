"""Processes of ours that are killed, stopped and starved at their worst moments: readers end, and all begins anew."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.faults.cases import ERROR, NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.blobs import crowded, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Request
from tests.helpers.memory_group import memory_group
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(3_000_000, 7)


def image_of(registry: FakeRegistry, name: str = "image", seed: int = 7) -> AddedImage:
    return add(registry, name, zstd_chunked_layer(tar_of(file("data", pattern(3_000_000, seed)))))


def one_sentence(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if not line.startswith("lazyfs: hint: ")]
    assert len(lines) == 1 and lines[0].startswith("lazyfs: ") and "Traceback" not in said, said
    return lines[0]


# -- the daemon, killed at each step of a mount

STEPS = {
    "manifest": "when it asks for the manifest",
    "config": "when it asks for the config",
    "toc": "when it asks for the TOC",
    "data": "when the first reader's bytes are asked for",
}


def step_of(request: Request, image: AddedImage) -> str:
    if "/manifests/" in request.path:
        return "manifest"
    return "config" if image.config in request.path else "toc"


@shows(
    *(
        Case(
            f"processes-{'daemon' if step == 'data' else 'mount'}-killed-{step}",
            Area.PROCESSES,
            f"lazyfsd without a holder is killed (-9) {words}",
            "an error, or right bytes, in bounded time; right bytes once it is mounted again"
            if step == "data"
            else NOTHING_SHOWN + "; right bytes when it is mounted again",
            "nothing: the next command starts another one" if step == "data" else "exit 8, one sentence",
            param=step,
        )
        for step, words in STEPS.items()
    )
)
@pytest.mark.parametrize("step", STEPS)
def test_daemon_killed_at_each_step(node: Node, registry: FakeRegistry, step: str) -> None:
    image = image_of(registry)
    tree = node.mount(image) if step == "data" else node.new_dir()
    pids: list[int] = []

    def kill(request: Request) -> None:
        if not pids and (step == "data" or step_of(request, image) == step):
            pids.extend(node.processes())
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    registry.faults.append(kill)
    if step == "data":
        done = node.tool("cat", tree / "data")
        assert done.returncode != 0 or done.stdout == DATA
        assert DATA.startswith(done.stdout)
    else:
        said = node.lazyfs("mount", image.reference, tree)
        assert said.returncode == 8 and "lazyfsd" in one_sentence(said.stderr), said
    assert pids
    registry.faults.clear()
    node.lazyfs("umount", tree)
    again = node.mount(image)
    assert node.read(again / "data") == DATA


# -- the daemon's children


def children(node: Node, module: str) -> list[int]:
    """Return the processes that the daemons have begun to run a module's `main`."""
    parents = set(node.processes())
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words = Path("/proc", entry, "cmdline").read_bytes()
                if f"from {module} import main".encode() in words and _parent(entry) in parents:
                    found.append(int(entry))
    return found


def _parent(pid: str) -> int:
    return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])


def kill_child(node: Node, module: str, number: int = signal.SIGKILL) -> list[int]:
    """Send a signal to the children of a kind, once there are any; return them."""
    found: list[int] = until(lambda: children(node, module), f"a process of {module}")
    for pid in found:
        os.kill(pid, number)
    return found


@shows(
    Case(
        "processes-builder-killed",
        Area.PROCESSES,
        "the process that turns TOCs into tables is killed (-9)",
        RIGHT,
        "the layer is fetched in full: “somebody killed it, most likely the kernel for want of memory”",
    )
)
def test_builder_killed(node: Node, registry: FakeRegistry) -> None:
    beside = node.mount(image_of(registry, "beside", 8))
    image = add(registry, "crowded", crowded(300_000))
    directory = node.new_dir()
    command = node.spawn(node.words("mount", image.reference, directory))
    toc = node.root / "layers" / "sha256" / image.layers[0][7:] / "toc"
    until(toc.exists, "the TOC is here")
    kill_child(node, "lazyfs.child")
    done = node.finish(command, 60)
    assert done.returncode == 0, done.stderr
    assert "somebody killed it, most likely the kernel for want of memory" in done.stderr.decode()
    assert node.read(directory / "data") == b"crowded"
    assert node.read(beside / "data") == pattern(3_000_000, 8)


@shows(
    Case(
        "processes-unpacker-killed",
        Area.PROCESSES,
        "the process that unpacks a plain layer is killed (-9)",
        NOTHING_SHOWN + "; right bytes when it is mounted again",
        "exit 7: “somebody killed it, most likely the kernel for want of memory”",
    )
)
def test_unpacker_killed(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "plain", tar_of(file("data", DATA)))
    beside = node.mount(image_of(registry, "beside", 8))
    directory = node.new_dir()
    registry.rate = 2_000_000
    command = node.spawn(node.words("--quiet", "mount", image.reference, directory))
    kill_child(node, "lazyfs.chunks.unpack")
    registry.rate = 0
    done = node.finish(command, 60)
    assert done.returncode == 7 and "somebody killed it" in one_sentence(done.stderr.decode()), done
    assert node.read(beside / "data") == pattern(3_000_000, 8)
    assert node.read(node.mount(image, at=directory) / "data") == DATA


# -- the daemon, stopped and starved


@shows(
    Case(
        "processes-stopped",
        Area.PROCESSES,
        "lazyfsd is stopped (SIGSTOP) for 30 s, and goes on",
        "waits as long, then right bytes",
        "`status`: “lazyfsd does not answer (see its log, or kill it)”, exit 0, after 5 s",
    )
)
def test_daemon_stopped(node: Node, registry: FakeRegistry) -> None:
    node.settings["READ_TIMEOUT"] = "60"
    trees = [node.mount(image_of(registry, driver), "--driver", driver) for driver in ("fuse", "erofs")]
    pids = node.processes()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 30
    try:
        readers = [node.spawn(["cat", str(tree / "data")]) for tree in trees]
        said = node.lazyfs("status", timeout=15)
        time.sleep(max(0.0, end - time.monotonic()))
        assert [reader.poll() for reader in readers] == [None, None]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert said.returncode == 0 and "lazyfsd does not answer" in said.stderr, said
    for reader in readers:
        done = node.finish(reader, 30)
        assert (done.stdout, done.stderr) == (DATA, b"")


@shows(
    Case(
        "processes-memory-limit",
        Area.PROCESSES,
        "the kernel kills lazyfsd, without a holder, at its cgroup's memory limit",
        "an error, or right bytes, in bounded time; right bytes once it is mounted again",
        "nothing: the next command starts another one",
    )
)
def test_daemon_at_its_memory_limit(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    with memory_group(1 << 20) as group:
        for pid in node.processes():
            group.take(pid)
        done = node.tool("cat", tree / "data")
        assert group.kills() >= 1
        assert done.returncode != 0 or done.stdout == DATA
        assert DATA.startswith(done.stdout)
    node.lazyfs("umount", tree)
    assert node.read(node.mount(image) / "data") == DATA


@shows(
    Case(
        "processes-open-files",
        Area.PROCESSES,
        "lazyfsd may open no further file",
        ERROR,
        "log: “Too many open files”",
        '`errors_total{class="RegistryUnreachable"}`',
    )
)
def test_daemon_without_file_descriptors(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(image_of(registry))
    registry.hang_up()
    pid = node.pid()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        assert "Input/output error" in node.read_fails(tree / "data")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert node.read(tree / "data") == DATA
    assert node.pid() == pid and node.status()["errors"]["RegistryUnreachable"] > 0
    assert "Too many open files" in node.log()
