"""What this machine may lack or hold at the mount point: one sentence, the documented exit code, nothing left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazyfs.container import mounts
from tests.faults.cases import NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.tars import file, tar_of


def image_of(registry: FakeRegistry) -> str:
    return add(registry, "image", zstd_chunked_layer(tar_of(file("f", b"content")))).reference


@shows(
    Case("users-no-fuse", Area.USERS, "no /dev/fuse", NOTHING_SHOWN, "exit 8, and what to load"),
)
@pytest.mark.parametrize("how", ["absent", "a file"])
def test_no_dev_fuse(node: Node, registry: FakeRegistry, how: str) -> None:
    image = image_of(registry)
    empty = node.place / "empty"
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    if how == "a file":
        empty.touch()
        hide = f"mount --bind {empty} /dev/fuse"
    node.prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-c", f'{hide} && exec "$@"', "sh")
    sentence = node.refused(8, "mount", image, node.new_dir())
    assert "/dev/fuse" in sentence and "modprobe fuse" in sentence
    until(lambda: not node.processes(), "no daemon stays")


@shows(
    Case("users-no-mount-point", Area.USERS, "the mount point is missing", NOTHING_SHOWN, "exit 8, names it"),
)
def test_mount_point_is_missing(node: Node, registry: FakeRegistry) -> None:
    sentence = node.refused(8, "mount", image_of(registry), node.place / "missing")
    assert str(node.place / "missing") in sentence and "does not exist" in sentence
    assert node.processes() == []


def test_mount_point_is_a_file(node: Node, registry: FakeRegistry) -> None:
    plain = node.place / "plain"
    plain.touch()
    assert "not a directory" in node.refused(8, "mount", image_of(registry), plain)


def test_mount_point_shows_an_image_already(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(image_of(registry))
    sentence = node.refused(8, "mount", image_of(registry), tree)
    assert str(tree) in sentence
    assert node.read(tree / "f") == b"content"
    assert len(node.status()["mounts"]) == 1


@shows(
    Case(
        "users-store-as-mount-point",
        Area.USERS,
        "the mount point holds the store, or lies in it",
        NOTHING_SHOWN,
        "exit 8, names it",
    ),
)
def test_mount_point_that_holds_the_store_or_lies_in_it(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    for place in (node.root, node.root / "layers", node.run_dir, node.place):  # the last one holds the store
        assert f"mount point {place} holds" in node.refused(8, "mount", image, place)
    assert node.read(tree / "f") == b"content"


@shows(
    Case(
        "users-mount-point-removed",
        Area.USERS,
        "the mount point is removed while the image is being mounted",
        NOTHING_SHOWN,
        "exit 8; other mounts go on",
    ),
)
def test_mount_point_removed_while_mounting_leaves_nothing(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(image_of(registry))
    rules = registry.faults
    directory = node.new_dir()
    other = add(registry, "other", zstd_chunked_layer(tar_of(file("g", b"g"))))

    def remove(request: object) -> None:
        if directory.exists():
            directory.rmdir()

    rules.append(remove)
    node.refused(8, "mount", other.reference, directory)
    until(lambda: len(node.status()["mounts"]) == 1, "the failed mount is released")
    assert node.read(tree / "f") == b"content"


@shows(
    Case(
        "users-foreign-run",
        Area.USERS,
        "the directory of sockets belongs to somebody else",
        NOTHING_SHOWN,
        "exit 8: “somebody else”",
    ),
)
def test_run_directory_of_somebody_else(node: Node, registry: FakeRegistry) -> None:
    node.run_dir.mkdir()
    os.chown(node.run_dir, 1000, 1000)
    assert "somebody else" in node.refused(8, "mount", image_of(registry), node.new_dir())


def test_umount_of_what_is_no_mount(node: Node) -> None:
    directory = node.new_dir()
    assert "is no mount of lazyfs" in node.refused(8, "umount", directory)


@shows(
    Case(
        "users-session-unmounted",
        Area.USERS,
        "the daemon's own mount is taken away by hand",
        RIGHT,
        "nothing: the next mount begins anew",
    ),
)
@both_drivers
def test_session_unmounted_by_hand(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    mounts.umount(os.fsencode(node.run_dir / "mnt"), lazy=True)
    assert node.read(tree / "f") == b"content"  # the bind holds the session
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends")
    assert node.read(node.mount(image) / "f") == b"content"


@shows(
    Case(
        "users-odd-mount-point",
        Area.USERS,
        "a mount point with newline, quotes and backslash in its name",
        RIGHT,
        "nothing",
    ),
)
def test_mount_point_with_odd_name(node: Node, registry: FakeRegistry) -> None:
    odd = Path(os.fsdecode(os.fsencode(node.place) + b"/a b\tc\\d\"'\n\xc3\xa9"))
    odd.mkdir()
    node.mount(image_of(registry), at=odd)
    assert node.read(odd / "f") == b"content"
    node.umount(odd)
    assert node.shown() == []
