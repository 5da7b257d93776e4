"""An ordinary user: a daemon for each mount, by fusermount3, with nothing but /dev/fuse open to all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(1_200_000)
USER = 1000


def as_user() -> tuple[str, ...]:
    """Return the words that make a command an ordinary user's.

    A Python that lies below somebody's closed home directory is beyond such a user; then, and for that, the command may
    search directories that are closed to it.
    """
    words = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"]
    python = Path(sys.executable).resolve()
    if not all(directory.stat().st_mode & 0o001 for directory in python.parents):
        words += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    return (*words, "--")


@pytest.fixture
def user(scratch: Path) -> Iterator[Node]:
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)
    os.chown(scratch, USER, USER)
    try:
        with Node(scratch, as_user()) as node:
            yield node
    finally:
        os.chmod("/dev/fuse", mode)


def image_of(registry: FakeRegistry, name: str = "image") -> str:
    tar = tar_of(file("data", DATA, uid=5, gid=6), file("secret", b"secret", mode=0o600, uid=0))
    return add(registry, name, zstd_chunked_layer(tar)).reference


def test_mount_read_status_umount(user: Node, registry: FakeRegistry) -> None:
    tree = user.mount(image_of(registry))
    assert user.read(tree / "data") == DATA
    assert user.read(tree / "secret") == b"secret"  # the whole tree is the user's
    assert user.python("print(os.lstat(a[0]).st_uid)", tree / "data") == USER
    status = user.status()
    assert [mount["dir"] for mount in status["mounts"]] == [str(tree)]
    user.umount(tree)
    until(lambda: not user.processes(), "the daemon ends")
    user.check_nothing_left()


def test_two_mounts_have_two_daemons_and_share_the_store(user: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    one = user.mount(image)
    assert user.read(one / "data") == DATA
    sent = registry.bytes_sent("/blobs/")
    two = user.mount(image)
    assert user.read(two / "data") == DATA
    assert registry.bytes_sent("/blobs/") - sent < len(DATA) // 2
    assert len(user.processes()) == 2
    assert len(user.status()["mounts"]) == 2
    user.umount(one)
    assert user.read(two / "data") == DATA
    user.umount(two)


def test_plain_fusermount_ends_the_daemon(user: Node, registry: FakeRegistry) -> None:
    tree = user.mount(image_of(registry))
    assert user.tool("fusermount3", "-u", tree).returncode == 0
    until(lambda: not user.processes(), "the daemon ends")
    user.lazyfs("umount", tree)


def test_killed_daemon(user: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = user.mount(image)
    user.kill()
    words = user.read_fails(tree / "data")
    assert "not connected" in words or "connection abort" in words  # the kernel's words for a request under way
    user.umount(tree)
    assert user.read(user.mount(image) / "data") == DATA


def test_writable_mount_needs_root(user: Node, registry: FakeRegistry) -> None:
    assert "needs root" in user.refused(2, "mount", "--rw", image_of(registry), user.new_dir())


def test_dev_fuse_closed_to_users(user: Node, registry: FakeRegistry) -> None:
    os.chmod("/dev/fuse", 0o600)
    sentence = user.refused(8, "mount", image_of(registry), user.new_dir())
    assert "/dev/fuse" in sentence and "chmod 0666 /dev/fuse" in sentence
