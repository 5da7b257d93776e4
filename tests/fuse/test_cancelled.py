"""What is on its way when nobody wants it any more: abandoned, with nothing left of it; who begins again is served."""

from __future__ import annotations

import json
import signal
import socket
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault, Request, Rule
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

FILES = {f"f{number:02}": pattern(200_000, number) for number in range(20)}
HELD = 60.0  # seconds that an answer is held unless it is released: longer than any test
PATIENT = {"BACKGROUND": "1", "ANSWER_TIMEOUT": f"{HELD:.0f}", "READ_TIMEOUT": f"{HELD:.0f}"}


@pytest.fixture(scope="module")
def blob() -> LayerBlob:
    tar = tar_of(*(file(name, data) for name, data in FILES.items()))
    return zstd_chunked_layer(tar, chunk_size=1 << 16, frame_size=1 << 16)


@pytest.fixture
def image(node: Node, registry: FakeRegistry, blob: LayerBlob) -> AddedImage:
    """An image that nobody has mounted yet, beside another one that is complete and keeps the daemon alive."""
    node.settings |= PATIENT
    node.mount(add(registry, "keeper", zstd_chunked_layer(tar_of(file("f", b"content")))))
    node.until_verified()
    return add(registry, "one", blob)


def hold(registry: FakeRegistry, image: AddedImage, after: int) -> Rule:
    """Hold the answers for the image's layer behind the first `after` of them, until they are released."""
    return registry.fault(Fault.DELAY, path=f"/blobs/{image.layers[0]}", seconds=HELD, after=after)


def asked(registry: FakeRegistry, image: AddedImage) -> list[Request]:
    return registry.matching("GET", f"/blobs/{image.layers[0]}")


def span(request: Request) -> tuple[int, int]:
    first, _, last = request.range.removeprefix("bytes=").partition("-")
    return int(first), int(last)


def until_idle(node: Node) -> None:
    """Wait until nothing waits for a registry, or for its turn there."""
    until(lambda: not any(host["running"] or host["waiting"] for host in node.status()["hosts"].values()), "all rests")


def on_disk(node: Node, image: AddedImage) -> dict[str, tuple[int, int]]:
    """Return (size, blocks) of all files that the store has of the image's layer."""
    found = {}
    for path in node.root.rglob("*"):
        if image.layers[0].removeprefix("sha256:") in str(path) and path.is_file():
            found[str(path)] = path.stat().st_size, path.stat().st_blocks
    assert found
    return found


def served(node: Node, tree: Path) -> None:
    assert node.tool("cat", "--", *(tree / name for name in FILES)).stdout == b"".join(FILES.values())
    node.until_verified()


@pytest.mark.parametrize("answers", ["come late", "never come"])
def test_umount_in_the_middle_of_a_fetch(node: Node, registry: FakeRegistry, image: AddedImage, answers: str) -> None:
    held = hold(registry, image, after=1)  # the TOC comes
    tree = node.mount(image)
    until(lambda: held.hits > 0, "its content is being fetched")
    node.umount(tree)
    until_idle(node)
    first, before = asked(registry, image), on_disk(node, image)
    if answers == "come late":
        registry.clear_faults()
        until(lambda: all(request.sent for request in first), "they are sent all the same")
        until_idle(node)
        assert on_disk(node, image) == before and len(asked(registry, image)) == len(first)
    else:
        registry.faults.clear()  # those that are held stay so
    served(node, node.mount(image))
    second = sorted(span(request) for request in asked(registry, image)[len(first) :])
    assert all(last < begin for (_, last), (begin, _) in pairwise(second)), "nothing comes twice"
    until_idle(node)


def test_a_reader_of_what_is_unmounted_meanwhile(node: Node, registry: FakeRegistry, image: AddedImage) -> None:
    held = hold(registry, image, after=1)
    tree = node.mount(image)
    reader = node.spawn(["cat", str(tree / "f19")])
    until(lambda: node.fuse_calls().get("read"), "the reader waits for the registry")
    node.umount(tree, "--lazy")
    done = node.finish(reader, 20)  # no answer has come so far
    assert done.returncode and done.stdout == b"" and held.hits, done
    until_idle(node)
    registry.faults.clear()
    served(node, node.mount(image))


def until_it_waits(node: Node, held: Rule) -> None:
    """Wait until all that a mount still waits for is the TOC: the config is asked for beside it."""
    until(lambda: held.hits > 0, "the TOC is being fetched")
    assert len(node.status()["mounts"]) == 1


@pytest.mark.parametrize("command", ["mount", "run"])
def test_a_start_that_is_cancelled_and_begun_again_at_once(
    node: Node, registry: FakeRegistry, image: AddedImage, blob: LayerBlob, command: str
) -> None:
    held = hold(registry, image, after=0)  # the TOC does not come
    if command == "mount":
        process = node.spawn(node.words("mount", image.reference, node.new_dir()))
        until_it_waits(node, held)
        process.send_signal(signal.SIGINT)
        assert node.finish(process, 20).returncode == 130
    else:  # as `lazyfs run` asks for it, and goes
        with node.raw() as sock:
            args = {"image": image.reference, "lease": True, "command": ["f00"]}
            sock.sendall(json.dumps({"id": 1, "call": "mount_image", "args": args}).encode() + b"\n")
            until_it_waits(node, held)
            sock.shutdown(socket.SHUT_RDWR)
    tree = node.new_dir()
    manifests = registry.count(path="/v2/one/manifests/")
    process = node.spawn(node.words("mount", image.reference, tree))
    registry.wait_for(manifests + 1, path="/v2/one/manifests/")
    shown, hits = len(node.status()["mounts"]), held.hits
    registry.clear_faults()
    done = node.finish(process, 20)
    assert (shown, hits, done.returncode) == (1, 1, 0), done.stderr
    served(node, tree)
    assert len(node.status()["mounts"]) == 2
    tail = len(blob.blob) - blob.payload_end  # the check may want it once more: nobody keeps it
    assert registry.bytes_sent(f"/blobs/{image.layers[0]}") <= len(blob.blob) + tail
    until_idle(node)
