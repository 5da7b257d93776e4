"""Images that are whole on the node start without their registry: by tag and digest, however it is gone."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(1_500_000)
PLAIN = pattern(700_000, 2)
START = 8.0  # seconds for a mount with a daemon's start on a busy machine; what is waited for comes on top
ANSWER = 60.0  # seconds for an answer: the wait is bounded by what is here, not by this


def image_of(registry: FakeRegistry, name: str = "app") -> AddedImage:
    return add(
        registry,
        name,
        zstd_chunked_layer(tar_of(file("data", DATA), file("small", b"small"))),
        gzip.compress(tar_of(file("plain", PLAIN)), mtime=0),
    )


def fetched(node: Node, image: AddedImage) -> None:
    done = node.lazyfs("fetch", image.reference)
    assert done.returncode == 0, done.stderr
    until(lambda: not node.processes(), "the daemon that fetched ends")


def check(node: Node, tree: Path) -> None:
    assert node.read(tree / "data") == DATA
    assert node.read(tree / "small") == b"small"
    assert node.read(tree / "plain") == PLAIN


def by_digest(image: AddedImage) -> str:
    return image.reference.rpartition(":")[0] + "@" + image.digest


def refuse(registry: FakeRegistry) -> None:
    registry.stop_listening()


def swallow(registry: FakeRegistry) -> None:
    registry.fault(Fault.BLACK_HOLE, path="/")


def overload(registry: FakeRegistry) -> None:
    registry.fault(Fault.STATUS, path="/", status=503)


@pytest.mark.parametrize("gone", [refuse, swallow, overload])
def test_whole_images_mount_by_tag_and_digest(
    node: Node, registry: FakeRegistry, gone: Callable[[FakeRegistry], None]
) -> None:
    node.settings["ANSWER_TIMEOUT"] = str(ANSWER)
    image = image_of(registry)
    fetched(node, image)
    gone(registry)
    for options, reference, patience in (
        ((), image.reference, 2.0), ((), by_digest(image), 0.0), (("--pull=missing",), image.reference, 0.0),
        (("--offline",), image.reference, 0.0),
    ):  # fmt: skip
        began = time.monotonic()
        tree = node.mount(reference, *options)
        assert time.monotonic() - began < ANSWER / 3 + patience, (options, reference)
        check(node, tree)
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends: the next mount is one after a restart")
    node.settings["ANSWER_TIMEOUT"] = "1"
    node.refused(5, "mount", "--pull=always", image.reference, node.new_dir())


@both_drivers
def test_no_request_is_made_where_none_may_be(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    fetched(node, image)
    registry.clear_log()
    node.settings["OFFLINE"] = "true"
    tree = node.mount(image)
    check(node, tree)
    assert registry.requests == []
    assert "is not on this node" in node.refused(3, "mount", image_of(registry, "other").reference, node.new_dir())
    assert registry.requests == []


def test_the_setting_offline_holds_for_a_daemon_that_runs_already(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    fetched(node, image)
    node.mount(image)
    registry.clear_log()
    node.settings["OFFLINE"] = "true"
    check(node, node.mount(image))
    assert node.lazyfs("fetch", image.reference).returncode == 0
    unknown = node.refused(3, "mount", image.reference.replace(":latest", ":other"), node.new_dir())
    assert "is not on this node" in unknown
    assert registry.requests == []


@both_drivers
def test_what_was_mounted_offline_is_not_evicted_for_others(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"STORE_SIZE": "5MB", "MEMORY_SIZE": "0", "READ_TIMEOUT": "60"}
    image = image_of(registry)
    fetched(node, image)
    tree = node.mount(image, "--offline")
    large = pattern(9_000_000, 7)
    other = node.mount(add(registry, "large", zstd_chunked_layer(tar_of(file("large", large)))))
    assert node.read(other / "large") == large
    assert node.status()["cache"]["store"]["evicted"] > 0
    check(node, tree)
    # Bytes that are gone all the same are an error at once: nobody will ever be asked for them.
    assert node.lazyfs("cache", "rm", "--force", image.reference).returncode == 0
    node.python("os.posix_fadvise(os.open(a[0], os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)", tree / "data")
    assert "Input/output error" in node.read_fails(tree / "data")


def test_a_tag_moves_on_when_the_registry_is_back(node: Node, registry: FakeRegistry) -> None:
    old = image_of(registry)
    fetched(node, old)
    registry.stop_listening()
    tree = node.new_dir()
    assert "using what" in node.lazyfs("mount", old.reference, tree).stderr
    check(node, tree)
    registry.listen_again()
    registry.add_image("app", "latest", [gzip.compress(tar_of(file("data", b"new")), mtime=0)])
    assert node.read(node.mount(old.reference) / "data") == b"new"
    assert node.read(node.mount(old.reference, "--pull=missing") / "data") == b"new"


@both_drivers
def test_an_incomplete_image_says_what_is_missing(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)  # background off: the lazy layer's bytes are not fetched
    assert node.read(tree / "small") == b"small"
    node.umount(tree)
    registry.stop_listening()
    began = time.monotonic()
    sentence = node.refused(5, "mount", "--offline", image.reference, node.new_dir())
    assert "its registry must not be asked" in sentence
    assert time.monotonic() - began < START
    assert "1 layer is not here" in sentence and image.layers[0][:19] in sentence and "of 1.5 MB" in sentence, sentence
    done = node.lazyfs("mount", image.reference, other := node.new_dir())
    assert done.returncode == 0 and "1 layer is not here" in done.stderr, done.stderr  # what is here can be read
    assert node.read(other / "plain") == PLAIN
    assert node.read(other / "small") == b"small"
    node.read_fails(other / "data")
    registry.listen_again()
    assert node.read(other / "data") == DATA


@pytest.mark.parametrize("gone", [refuse, swallow])
def test_an_image_whose_tables_are_gone_is_refused_in_bounded_time(
    node: Node, registry: FakeRegistry, gone: Callable[[FakeRegistry], None]
) -> None:
    image = image_of(registry)
    fetched(node, image)
    assert node.lazyfs("cache", "rm", "--force", image.layers[0]).returncode == 0
    gone(registry)
    for reference, patience in ((image.reference, 10.0), (by_digest(image), 15.0)):
        began = time.monotonic()
        sentence = node.refused(5, "mount", reference, node.new_dir())
        assert time.monotonic() - began < START + patience
        assert "is not whole on this node" in sentence and image.layers[0][:19] in sentence, sentence


def test_names_that_resolve_no_more(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    reference = f"registry.example:{registry.host.rpartition(':')[2]}/app:latest"
    hosts = node.place / "hosts"
    hosts.write_text("127.0.0.1 registry.example\n")
    bind = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    node.prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-c", bind, "sh")
    done = node.lazyfs("fetch", "--plain-http", reference)
    assert done.returncode == 0, done.stderr
    until(lambda: not node.processes(), "the daemon ends")
    hosts.write_text("127.0.0.1 localhost\n")
    registry.clear_log()
    began = time.monotonic()
    done = node.lazyfs("fetch", "--plain-http", "--json", reference)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < START + 2
    (told,) = json.loads(done.stdout)["images"]
    assert told["manifest_digest"] == image.digest and "using what" in told["notes"][0]
    assert registry.requests == []
