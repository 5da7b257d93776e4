"""`lazyfs fetch`: every byte here and checked, pins, lists, what does not fit, what fails and what is interrupted."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time

import pytest

from tests.fuse.test_solo import as_user
from tests.helpers.blobs import flipped_chunk, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

SIZE = 1_200_000


def image_of(registry: FakeRegistry, name: str, *, plain: bool = False, size: int = SIZE) -> AddedImage:
    tar = tar_of(file("data", pattern(size, len(name) + sum(name.encode()))))
    return add(registry, name, gzip.compress(tar, mtime=0) if plain else zstd_chunked_layer(tar))


def fetch(node: Node, *words: str) -> dict[str, object]:
    done = node.lazyfs("fetch", "--json", *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def held(node: Node) -> dict[str, dict[str, object]]:
    """Return what `cache ls` says, by the last part of the repository's name."""
    done = node.lazyfs("cache", "ls", "--json")
    assert done.returncode == 0, done.stderr
    return {
        image["references"][0].rpartition("/")[2].partition(":")[0]: image
        for image in json.loads(done.stdout)["images"]
        if image["references"]
    }


@pytest.mark.parametrize("plain", [False, True])
def test_all_bytes_are_here_and_checked_and_only_once(node: Node, registry: FakeRegistry, plain: bool) -> None:
    node.settings["DAEMON_LINGER"] = "4"
    image = image_of(registry, "app", plain=plain)
    first = fetch(node, image.reference)["images"][0]  # type: ignore[index]
    assert SIZE <= first["fetched"] <= registry.bytes_sent("/blobs/")
    moved = node.status()["bytes"]  # of the daemon, whose layers have gone
    assert moved["demand"] + moved["prefetch"] + moved["background"] == first["fetched"]
    state = held(node)["app"]
    assert (state["complete"], state["verified"], state["pinned"]) == (True, True, False)
    sent = registry.bytes_sent("/blobs/")
    again = fetch(node, image.reference)
    assert registry.bytes_sent("/blobs/") == sent
    assert again["images"][0]["fetched"] == 0  # type: ignore[index]
    assert sent <= SIZE * 1.1 + 100_000


def test_what_a_mount_has_not_read_is_fetched(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry, "app")
    tree = node.mount(image)
    fetch(node, image.reference)
    assert node.layer()["complete"] and node.layer()["verified"]
    registry.stop_listening()
    assert len(node.read(tree / "data")) == SIZE


def test_pins_survive_restarts_and_keep_images_from_eviction(node: Node, registry: FakeRegistry) -> None:
    node.settings["STORE_SIZE"] = "3200000"
    kept, other, third = (image_of(registry, name) for name in ("kept", "other", "third"))
    fetch(node, "--pin", kept.reference)
    until(lambda: not node.processes(), "the daemon ends")
    for image in (other, third):  # the one pushes out the other, whose bytes are older
        fetch(node, image.reference)
        time.sleep(1.1)  # the eviction clock has seconds
    found = held(node)
    assert (found["kept"]["complete"], found["kept"]["pinned"]) == (True, True)
    assert fetch(node, kept.reference)["images"][0]["pinned"]  # type: ignore[index]
    tree = node.mount(kept)
    assert node.status()["mounts"][0]["pinned"] and len(node.status()["pins"]) == 1
    node.umount(tree)
    assert node.lazyfs("cache", "unpin", kept.reference).returncode == 0
    assert not held(node)["kept"]["pinned"]


@pytest.mark.parametrize("pin", [(), ("--pin",)])
def test_what_does_not_fit_is_refused_before_it_starts(
    node: Node, registry: FakeRegistry, pin: tuple[str, ...]
) -> None:
    node.settings["STORE_SIZE"] = "2000000"
    big, first, second = (
        image_of(registry, "big", size=3_000_000), image_of(registry, "first"), image_of(registry, "second")
    )  # fmt: skip
    sentence = node.refused(9, "fetch", *pin, big.reference)
    assert "takes 3.0 MB at least" in sentence and "may hold 2.0 MB" in sentence and "store_size" in sentence
    fetch(node, "--pin", first.reference)
    sent = registry.bytes_sent(second.layers[0])
    sentence = node.refused(9, "fetch", *pin, second.reference)
    assert "are pinned or being fetched" in sentence and "unpin" in sentence
    assert registry.bytes_sent(second.layers[0]) - sent < 10_000
    assert registry.bytes_sent(big.layers[0]) < 10_000
    assert node.lazyfs("cache", "unpin", first.reference).returncode == 0
    fetch(node, *pin, second.reference)


def test_a_list_goes_on_where_one_image_fails(node: Node, registry: FakeRegistry) -> None:
    images = [image_of(registry, name, plain=name == "b") for name in ("a", "b")]
    missing = images[0].reference.replace("/a:", "/nowhere:")
    path = node.place / "list"
    path.write_text(f"# what a node needs\n{images[0].reference}\n\n{missing}  # not there\n {images[1].reference}\n")
    done = node.lazyfs("fetch", "--file", path, "--json")
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert [each["ok"] for each in told["images"]] == [True, False, True] and told["failed"] == 1
    assert told["images"][1]["error"]["class"] == "ManifestMissing"
    assert {name: image["complete"] for name, image in held(node).items()} == {"a": True, "b": True}
    done = node.lazyfs("fetch", "--file", path, "--jobs", "1")
    assert done.returncode == 3 and "2 of 3 images whole" in done.stdout and "nowhere" in done.stderr


def test_lists_that_are_none(node: Node) -> None:
    path = node.place / "list"
    path.write_text("docker://host.example/a:1\nhost.example/UPPER:1\n")
    assert f"line 2 of {path}" in node.refused(2, "fetch", "--file", path)
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in node.refused(2, "fetch", "--file", path)
    assert "can't be read" in node.refused(2, "fetch", "--file", node.place / "absent")
    path.write_text("# nothing\n")
    assert "no image is named" in node.refused(2, "fetch", "--file", path)
    assert node.processes() == []


def test_an_interrupted_fetch_keeps_what_came(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry, "app", size=6_000_000)
    registry.rate = 3_000_000
    process = node.spawn(node.words("fetch", image.reference))
    until(lambda: registry.bytes_sent(image.layers[0]) > 2_500_000, "some bytes came")
    process.send_signal(signal.SIGINT)
    assert node.finish(process, 20).returncode == 130
    until(lambda: not node.processes(), "the daemon ends")
    registry.rate = 0
    fetch(node, image.reference)
    assert held(node)["app"]["complete"]


def test_a_registry_that_goes_away_in_the_middle(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry, "app", size=4_000_000)
    registry.rate = 2_000_000
    process = node.spawn(node.words("fetch", image.reference))
    until(lambda: registry.bytes_sent(image.layers[0]) > 1_000_000, "some bytes came")
    began = time.monotonic()
    registry.stop_listening()
    registry.hang_up()
    done = node.finish(process, 60)
    assert done.returncode == 5 and time.monotonic() - began < 30, done.stderr
    assert done.stderr.decode().splitlines()[-1].startswith("lazyfs: ")
    registry.listen_again()
    registry.rate = 0
    fetch(node, image.reference)


def test_a_false_layer_is_not_fetched(node: Node, registry: FakeRegistry) -> None:
    layer = flipped_chunk(zstd_chunked_layer(tar_of(file("data", pattern(300_000)))), b"data")
    image = add(registry, "app", layer)
    node.refused(6, "fetch", "-q", "--pin", image.reference, timeout=90)
    assert not held(node).get("app", {}).get("pinned")


def test_four_at_once_fetch_each_byte_once(node: Node, registry: FakeRegistry) -> None:
    node.settings["ANSWER_TIMEOUT"] = "20"  # a second is short on a busy machine, and what is asked again comes twice
    image, other = image_of(registry, "app"), image_of(registry, "other", plain=True)
    started = [node.spawn(node.words("fetch", each.reference)) for each in (image, other, image, other)]
    started.append(node.spawn(node.words("cache", "ls")))
    done = [node.finish(process, 90) for process in started]
    assert [each.returncode for each in done] == [0] * 5, [each.stderr for each in done]
    assert registry.bytes_sent("/blobs/") < 2 * SIZE * 1.2
    assert all(state["complete"] for state in held(node).values())


def test_an_ordinary_user_without_fuse(scratch_of_user: Node, registry: FakeRegistry) -> None:
    user = scratch_of_user
    image = image_of(registry, "app")
    fetch(user, "--pin", image.reference)
    assert held(user)["app"]["complete"]
    assert user.lazyfs("cache", "verify").returncode == 0
    assert user.lazyfs("cache", "rm", image.reference).returncode == 0
    assert held(user) == {}


@pytest.fixture
def scratch_of_user(node: Node) -> Node:
    """Make the node an ordinary user's, who may not open /dev/fuse."""
    os.chown(node.place, 1000, 1000)
    node.prefix = as_user()
    return node


def test_root_without_fuse(node: Node, registry: FakeRegistry) -> None:
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    node.prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-c", f'{hide} && exec "$@"', "sh")
    fetch(node, image_of(registry, "app").reference)
    assert held(node)["app"]["complete"]


def test_a_black_hole_is_told(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry, "app")
    registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[0]}")
    began = time.monotonic()
    node.refused(5, "fetch", "-q", image.reference)
    assert time.monotonic() - began < 40


def test_wait_returns_when_an_image_is_whole(node: Node, registry: FakeRegistry) -> None:
    node.settings["BACKGROUND"] = "1"
    image = image_of(registry, "app")
    unknown = node.lazyfs("wait", image.reference)
    assert unknown.returncode == 3 and "is not on this node" in unknown.stderr
    registry.fault(Fault.BLACK_HOLE, path="/blobs/", after=2)  # behind config and TOC
    tree = node.mount(image)
    late = node.lazyfs("wait", "--timeout", "1", image.reference)
    assert late.returncode == 5 and "1 layer of 1 not done, 1.2 MB to come" in late.stderr
    registry.clear_faults()
    done = node.lazyfs("wait", "--json", image.reference)
    (told,) = json.loads(done.stdout)["images"]
    assert done.returncode == 0 and told["whole"] and told["missing"] == [] and told["present"] == told["full"]
    sent = len(registry.requests)
    assert node.read(tree / "data") == pattern(SIZE, 3 + sum(b"app"))
    assert node.lazyfs("wait", image.reference).returncode == 0
    assert len(registry.requests) == sent, "it was whole, and nobody asked"


def test_wait_for_what_nobody_fetches_is_refused_at_once(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry, "app")
    node.mount(image)  # the tests' daemons have no background work
    done = node.lazyfs("wait", image.reference)
    assert done.returncode == 5 and "nobody fetches it" in done.stderr and "lazyfs fetch it" in done.stderr
