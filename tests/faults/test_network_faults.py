"""Registries that fail, at the mount and in mid-read: right bytes or EIO in bounded time, no wrong byte, no hang."""

from __future__ import annotations

import time

import pytest

from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add, pattern
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.tars import file, tar_of

SMALL = pattern(3000, 1)
DATA = pattern(3_500_000, 2)
EIO = "Input/output error"
BOUND = 10.0  # seconds for a read that can't be; read_timeout is 3


def layer() -> LayerBlob:
    return zstd_chunked_layer(tar_of(file("small", SMALL), file("data", DATA)))


def image_of(registry: FakeRegistry) -> AddedImage:
    return add(registry, "image", layer())


# name -> (faults to set on the layer's blob, seconds)
BROKEN: dict[str, dict[str, object]] = {
    "refused": {"kind": Fault.REFUSE},
    "black hole": {"kind": Fault.BLACK_HOLE},
    "401": {"kind": Fault.STATUS, "status": 401},
    "403": {"kind": Fault.STATUS, "status": 403},
    "404": {"kind": Fault.STATUS, "status": 404},
    "429": {"kind": Fault.STATUS, "status": 429, "retry_after": "1"},
    "429 for a year": {"kind": Fault.STATUS, "status": 429, "retry_after": "31536000"},
    "500": {"kind": Fault.STATUS, "status": 500},
    "503": {"kind": Fault.STATUS, "status": 503},
    "truncated": {"kind": Fault.TRUNCATE},
    "reset": {"kind": Fault.RESET},
    "stalled": {"kind": Fault.STALL},
    "wrong bytes": {"kind": Fault.FLIP},
    "200 for a range": {"kind": Fault.IGNORE_RANGE},
    "wrong range": {"kind": Fault.WRONG_RANGE},
    "short range": {"kind": Fault.SHORT_RANGE},
    "redirects in a circle": {"kind": Fault.REDIRECT_LOOP},
    "dripping": {"kind": Fault.DRIP, "rate": 2000},
    "header that drips": {"kind": Fault.DRIP_HEADERS, "rate": 10},
}


@pytest.mark.parametrize("name", BROKEN)
def test_mid_read(node: Node, registry: FakeRegistry, name: str) -> None:
    node.settings["READ_TIMEOUT"] = "2"
    image = image_of(registry)
    other = add(registry, "other", zstd_chunked_layer(tar_of(file("f", b"other"))))
    trees = [node.mount(image, "--driver", driver) for driver in ("fuse", "erofs")]
    beside = node.mount(other)
    registry.fault(path=f"/blobs/{image.layers[0]}", **BROKEN[name])  # type: ignore[arg-type]
    began = time.monotonic()
    readers = [node.spawn(["cat", str(tree / "data")]) for tree in trees]
    assert node.read(beside / "f") == b"other"  # while the first ones wait
    found = [node.finish(reader, BOUND + 5) for reader in readers]
    assert time.monotonic() - began < BOUND
    for done in found:
        if done.returncode == 0:
            assert name == "200 for a range" and done.stdout == DATA
        else:
            assert EIO in done.stderr.decode()
            assert DATA.startswith(done.stdout)  # what came before the error is right
    registry.clear_faults()
    for tree in trees:
        assert node.read(tree / "data") == DATA  # an error is not remembered
        assert node.read(tree / "small") == SMALL


LASTING = {"401", "403", "404", "429 for a year", "dripping", "header that drips"}


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in LASTING])
def test_mid_read_that_heals(node: Node, registry: FakeRegistry, name: str) -> None:
    node.settings["READ_TIMEOUT"] = "15"
    image = image_of(registry)
    tree = node.mount(image)
    registry.fault(path=f"/blobs/{image.layers[0]}", times=1, **BROKEN[name])  # type: ignore[arg-type]
    assert node.read(tree / "data") == DATA
    assert node.read(tree / "small") == SMALL


# name -> (fault, exit code, words of the sentence)
AT_MOUNT: dict[str, tuple[dict[str, object], int, str]] = {
    "refused": ({"kind": Fault.REFUSE}, 5, ""),
    "401": ({"kind": Fault.STATUS, "status": 401}, 4, ""),
    "403": ({"kind": Fault.STATUS, "status": 403}, 4, ""),
    "404": ({"kind": Fault.STATUS, "status": 404}, 3, ""),
    "429": ({"kind": Fault.STATUS, "status": 429, "retry_after": "2000"}, 5, "try again"),
    "500": ({"kind": Fault.STATUS, "status": 500}, 5, "500"),
    "truncated": ({"kind": Fault.TRUNCATE}, 5, ""),
    "black hole": ({"kind": Fault.BLACK_HOLE}, 5, ""),
}


@pytest.mark.parametrize("what", ["/manifests/", "/blobs/sha256:"])
@pytest.mark.parametrize("name", AT_MOUNT)
def test_at_the_mount(node: Node, registry: FakeRegistry, name: str, what: str) -> None:
    image = image_of(registry)
    fault, code, words = AT_MOUNT[name]
    registry.fault(path=what, **fault)  # type: ignore[arg-type]
    directory = node.new_dir()
    began = time.monotonic()
    sentence = node.refused(code, "mount", image.reference, directory, timeout=90)
    assert time.monotonic() - began < 75
    assert words in sentence
    assert registry.host in sentence or "image" in sentence
    assert node.shown() == []
    registry.clear_faults()
    assert node.read(node.mount(image, at=directory) / "small") == SMALL


def test_wrong_bytes_of_a_manifest(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    registry.fault(Fault.FLIP, path="/manifests/")
    by_digest = f"{registry.host}/image@{image.digest}"
    assert "tampered" in node.refused(6, "mount", by_digest, node.new_dir())


def test_nobody_listens(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    registry.stop_listening()
    sentence = node.refused(5, "mount", image.reference, node.new_dir())
    assert registry.host in sentence


def test_no_such_tag(node: Node, registry: FakeRegistry) -> None:
    image_of(registry)
    sentence = node.refused(3, "mount", f"{registry.host}/image:absent", node.new_dir())
    assert "absent" in sentence


def test_other_platform(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    sentence = node.refused(3, "mount", "--platform", "linux/s390x", image.reference, node.new_dir())
    assert "linux/s390x" in sentence and "linux/amd64" in sentence
    node.mount(image)
    node.refused(3, "mount", "--platform", "linux/s390x", image.reference, node.new_dir())  # though it is known now


def test_malformed_reference(node: Node) -> None:
    sentence = node.refused(2, "mount", "docker://Upper/CASE:::x", node.new_dir())
    assert "malformed" in sentence


def test_registry_goes_down_under_a_mount_and_comes_back(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    registry.stop_listening()
    assert EIO in node.read_fails(tree / "small", BOUND)
    assert node.status()["errors"]["RegistryUnreachable"] > 0
    registry.listen_again()
    assert node.read(tree / "small") == SMALL


def test_expired_signatures_are_renewed(node: Node) -> None:
    with FakeRegistry(redirect=True) as registry:
        image = image_of(registry)
        tree = node.mount(image)
        assert node.read(tree / "small") == SMALL
        registry.expire_signatures()
        assert node.read(tree / "data") == DATA


def test_revoked_tokens_are_renewed(node: Node) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        image = image_of(registry)
        tree = node.mount(image)
        assert node.read(tree / "small") == SMALL
        registry.revoke_tokens()
        assert node.read(tree / "data") == DATA


def test_many_readers_of_a_black_hole_do_not_stop_another_image(node: Node, registry: FakeRegistry) -> None:
    names = [f"f{i}" for i in range(40)]
    image = add(registry, "image", zstd_chunked_layer(tar_of(*(file(n, pattern(50_000)) for n in names)), frame_size=0))
    tree = node.mount(image)
    with FakeRegistry() as elsewhere:
        beside = node.mount(add(elsewhere, "other", zstd_chunked_layer(tar_of(file("f", b"other")))))
        registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[0]}")
        readers = [node.spawn(["cat", str(tree / name)]) for name in names]
        registry.wait_for(5, path=f"/blobs/{image.layers[0]}")
        began = time.monotonic()
        assert node.read(beside / "f") == b"other"
        assert time.monotonic() - began < 2.5
        assert all(EIO in node.finish(reader, BOUND + 5).stderr.decode() for reader in readers)


def test_a_rate_limit_is_told_while_the_mount_waits(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    registry.fault(Fault.STATUS, path="/manifests/", status=429, retry_after="1", times=1)
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    assert done.returncode == 0, done.stderr
    assert f"{registry.host} limits how often it may be asked" in done.stderr
    assert "login" in done.stderr and "mirror" in done.stderr
    assert node.read(directory / "small") == SMALL
