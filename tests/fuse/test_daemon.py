"""The daemon's life: started once, shared, ended with its last mount, killed, stopped; nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from lazyfs.container import mounts
from tests.faults.cases import NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(2_500_000)


def layer() -> LayerBlob:
    return zstd_chunked_layer(tar_of(file("f", DATA), file("g", b"g")))


def test_ends_with_the_last_mount(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", layer())
    first, second = node.mount(image), node.mount(image)
    pid = node.pid()
    node.umount(first)
    assert node.read(second / "f") == DATA
    assert node.pid() == pid
    node.umount(second)
    until(lambda: not node.processes(), "the daemon ends by itself")
    node.check_nothing_left()


def test_no_core_dump_takes_logins_to_the_disk(node: Node, registry: FakeRegistry) -> None:
    node.mount(add(registry, "one", layer()))
    limits = [Path(f"/proc/{pid}/limits").read_text() for pid in node.processes()]
    cores = [line.split()[4] for text in limits for line in text.splitlines() if line.startswith("Max core file size")]
    assert cores and set(cores) <= {"0", "1"}  # bytes: as lazyfs.process.harden says


@shows(
    Case(
        "processes-eight-starts",
        Area.PROCESSES,
        "eight commands start a daemon at once",
        RIGHT,
        "nothing: there is one daemon",
    ),
)
def test_eight_commands_at_once_start_one_daemon(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", layer())
    directories = [node.new_dir() for _ in range(8)]
    started = [node.spawn(node.words("mount", image.reference, each)) for each in directories]
    done = [node.finish(process, 60) for process in started]
    assert [each.returncode for each in done] == [0] * 8, [each.stderr for each in done]
    node.pid()
    assert len(node.status()["mounts"]) == 8
    assert {node.read(each / "g") for each in directories} == {b"g"}
    assert registry.count("GET", "/blobs/" + image.config) == 1


@shows(
    Case(
        "users-umount-outside", Area.USERS, "umount(8) in place of `lazyfs umount`", "–", "nothing: the daemon sees it"
    ),
)
def test_plain_umount_is_noticed(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "one", layer()))
    mounts.umount(os.fsencode(tree))
    until(lambda: not node.processes(), "the daemon ends by itself")
    assert node.lazyfs("umount", tree).returncode == 0  # forgets its own record


@both_drivers
def test_sigterm_unmounts_all(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", layer())
    trees = [node.mount(image), node.mount(image, "--rw")]
    os.kill(node.pid(), signal.SIGTERM)
    until(lambda: not node.processes(), "the daemon ends")
    assert mounts.below(os.fsencode(node.place)) == []
    for tree in trees:
        node.lazyfs("umount", tree)


@shows(
    Case(
        "processes-terminated",
        Area.PROCESSES,
        "lazyfsd is asked to end (SIGTERM) while readers wait for bytes",
        "an error at once",
        "nothing stays mounted",
    ),
)
@both_drivers
def test_sigterm_while_readers_wait(node: Node, registry: FakeRegistry) -> None:
    node.settings["READ_TIMEOUT"] = "0"
    image = add(registry, "one", layer())
    tree = node.mount(image)
    registry.fault(Fault.BLACK_HOLE, path="/blobs/")
    reader = node.spawn(["cat", str(tree / "f")])
    registry.wait_for(1, path=f"/blobs/{image.layers[0]}")
    os.kill(node.pid(), signal.SIGTERM)
    until(lambda: not node.processes(), "the daemon ends")
    assert node.finish(reader, 10).returncode != 0
    assert mounts.below(os.fsencode(node.place)) == []
    node.lazyfs("umount", tree)


@shows(
    Case(
        "processes-daemon-killed",
        Area.PROCESSES,
        "lazyfsd without a holder is killed (-9)",
        "an error, at once; right bytes once it is mounted again",
        "`umount` and `mount` work: the next daemon cleans up",
    ),
)
@both_drivers
def test_killed_daemon(node: Node, registry: FakeRegistry, driver: str) -> None:
    image = add(registry, "one", layer())
    dead, again = node.mount(image), node.mount(image)
    node.kill()
    words = node.read_fails(dead / "f")
    # The kernel's words: of FUSE, also for a request under way, and of EROFS, for which the page can't be had.
    expected = ("not connected", "connection abort") if driver == "fuse" else ("Input/output error",)
    assert any(each in words for each in expected), words
    node.umount(dead)
    fresh = node.mount(image)  # cleans up what the killed one left
    assert node.read(fresh / "f") == DATA
    assert again not in node.shown()
    node.lazyfs("umount", again)


@shows(
    Case(
        "processes-daemon-killed-waiting",
        Area.PROCESSES,
        "lazyfsd without a holder is killed (-9) while readers wait for bytes",
        "an error, at once",
        "`umount` works",
    ),
)
@both_drivers
def test_killed_daemon_fails_waiting_readers_at_once(node: Node, registry: FakeRegistry) -> None:
    node.settings["READ_TIMEOUT"] = "0"
    image = add(registry, "one", layer())
    tree = node.mount(image)
    registry.fault(Fault.BLACK_HOLE, path="/blobs/")
    reader = node.spawn(["cat", str(tree / "f")])
    registry.wait_for(1, path=f"/blobs/{image.layers[0]}")
    node.kill()
    assert node.finish(reader, 10).returncode != 0
    node.umount(tree)


def complete(node: Node, registry: FakeRegistry) -> str:
    """Mount an image until it is complete in the store, and take it and the daemon away again."""
    node.settings["BACKGROUND"] = "1"
    image = add(registry, "one", layer())
    tree = node.mount(image)
    node.until_verified()
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends by itself")
    return image.reference


def test_complete_image_needs_no_registry_by_tag(node: Node, registry: FakeRegistry) -> None:
    reference = complete(node, registry)
    registry.stop_listening()
    directory = node.new_dir()
    done = node.lazyfs("mount", reference, directory)
    assert done.returncode == 0, done.stderr
    assert "the registry does not answer" in done.stderr
    assert node.read(directory / "f") == DATA


@both_drivers
def test_complete_image_needs_no_request_by_digest(node: Node, registry: FakeRegistry) -> None:
    node.settings["BACKGROUND"] = "1"
    image = add(registry, "one", layer())
    reference = f"{registry.host}/one@{image.digest}"
    tree = node.mount(reference)
    node.until_verified()
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends by itself")
    registry.clear_log()
    tree = node.mount(reference)
    assert node.read(tree / "f") == DATA
    assert registry.requests == []
    assert node.status()["requests"]["count"] == 0


@shows(
    Case(
        "processes-two-daemons",
        Area.PROCESSES,
        "a second daemon on one store",
        "the first one's readers: right bytes",
        "exit 9, names the store and the other daemon",
    ),
)
def test_store_of_another_daemon(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", layer())
    node.mount(image)
    other = Node(node.place)
    other.run_dir = node.place / "other"
    sentence = other.refused(9, "mount", image.reference, node.new_dir())
    assert str(node.root) in sentence and "another" in sentence


@shows(
    Case(
        "processes-client-killed",
        Area.PROCESSES,
        "`lazyfs mount` is killed (-9) while its registry does not answer",
        NOTHING_SHOWN,
        "the mount can be made again",
    ),
)
def test_client_killed_during_a_mount(node: Node, registry: FakeRegistry) -> None:
    node.mount(add(registry, "other", zstd_chunked_layer(tar_of(file("x", b"x")))))
    image = add(registry, "one", layer())
    registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[0]}", times=1)
    directory = node.new_dir()
    client = node.spawn(node.words("mount", image.reference, directory))
    registry.wait_for(1, path=f"/blobs/{image.layers[0]}")
    client.kill()
    client.communicate(timeout=10)
    assert len(node.status()["mounts"]) == 1
    registry.clear_faults()
    assert node.read(node.mount(image, at=directory) / "f") == DATA
    node.umount(directory)
    until(lambda: len(node.status()["mounts"]) == 1, "only the first mount is left")


@shows(
    Case("processes-dead-socket", Area.PROCESSES, "a killed daemon's socket is in the way", RIGHT, "nothing"),
)
def test_socket_of_a_dead_daemon_is_in_the_way(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", layer())
    tree = node.mount(image)
    node.kill()
    assert node.sockets()
    node.umount(tree)
    assert node.read(node.mount(image, at=tree) / "g") == b"g"


@both_drivers
def test_open_files_survive_umount_of_another_mount(node: Node, registry: FakeRegistry) -> None:
    one = node.mount(add(registry, "one", layer()))
    two = node.mount(add(registry, "two", zstd_chunked_layer(tar_of(file("t", b"t")))))
    os.mkfifo(node.place / "go")
    reader = node.spawn(["sh", "-c", f"exec < {one / 'f'}; echo; read line < {node.place / 'go'}; cat"])
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"\n"
    node.umount(two)
    (node.place / "go").write_text("\n")
    assert node.finish(reader, 20).stdout == DATA


@shows(
    Case("users-busy", Area.USERS, "`umount` of a mount that is in use", RIGHT, "exit 8: “in use”, and `--lazy`"),
)
def test_busy_mount(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(add(registry, "one", layer()))
    os.mkfifo(node.place / "go")
    holder = node.spawn(["sh", "-c", f"cd {tree} && echo && read line < {node.place / 'go'}"])
    assert holder.stdout is not None and holder.stdout.readline() == b"\n"
    sentence = node.refused(8, "umount", tree)
    assert "in use" in sentence and "--lazy" in sentence
    node.umount(tree, "--lazy")
    Path(node.place / "go").write_text("\n")
    node.finish(holder, 10)


@pytest.mark.parametrize("delay", [-0.05, 0.0, 0.02, 0.05, 0.1])
def test_signals_at_any_moment_leave_no_mount(node: Node, registry: FakeRegistry, delay: float) -> None:
    """A daemon that is just ending by itself is not killed by a signal between two of its last steps."""
    image = add(registry, "image", layer())
    node.umount(node.mount(image))
    time.sleep(float(node.settings["DAEMON_LINGER"]) + delay)
    for _ in range(5):
        for pid in node.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    until(lambda: not node.processes(), "the daemon ends")
    node.check_nothing_left()
