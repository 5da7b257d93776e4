"""Registries that fail at the mount, and those that come back. In mid-read: test_network_matrix."""

from __future__ import annotations

import time

import pytest

from tests.faults.cases import ERROR, NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

SMALL = pattern(3000, 1)
DATA = pattern(3_500_000, 2)
EIO = "Input/output error"
BOUND = 10.0  # seconds for a read that can't be; read_timeout is 3


def layer() -> LayerBlob:
    return zstd_chunked_layer(tar_of(file("small", SMALL), file("data", DATA)))


def image_of(registry: FakeRegistry) -> AddedImage:
    return add(registry, "image", layer())


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


@shows(
    Case(
        "network-mount-refused",
        Area.NETWORK,
        "at the mount: connection reset before an answer",
        NOTHING_SHOWN,
        "exit 5, one sentence with the host",
        param="refused",
    ),
    Case(
        "network-mount-401",
        Area.NETWORK,
        "at the mount: 401",
        NOTHING_SHOWN,
        "exit 4, one sentence with the host",
        param="401",
    ),
    Case(
        "network-mount-403",
        Area.NETWORK,
        "at the mount: 403",
        NOTHING_SHOWN,
        "exit 4, one sentence with the host",
        param="403",
    ),
    Case(
        "network-mount-404",
        Area.NETWORK,
        "at the mount: 404",
        NOTHING_SHOWN,
        "exit 3, one sentence with the host",
        param="404",
    ),
    Case(
        "network-mount-429",
        Area.NETWORK,
        "at the mount: 429",
        NOTHING_SHOWN,
        "exit 5: “try again in …”",
        param="429",
    ),
    Case("network-mount-500", Area.NETWORK, "at the mount: 500", NOTHING_SHOWN, "exit 5, with the status", param="500"),
    Case(
        "network-mount-truncated",
        Area.NETWORK,
        "at the mount: documents and TOCs cut short",
        NOTHING_SHOWN,
        "exit 5, one sentence with the host",
        param="truncated",
    ),
    Case(
        "network-mount-black-hole",
        Area.NETWORK,
        "at the mount: no answer",
        NOTHING_SHOWN,
        "exit 5 in bounded time, one sentence with the host",
        param="black hole",
    ),
)
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


@shows(
    Case(
        "network-manifest-wrong",
        Area.NETWORK,
        "the manifest is another one than its digest says",
        NOTHING_SHOWN,
        "exit 6: “damaged or tampered with”",
    ),
)
def test_wrong_bytes_of_a_manifest(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    registry.fault(Fault.FLIP, path="/manifests/")
    by_digest = f"{registry.host}/image@{image.digest}"
    assert "tampered" in node.refused(6, "mount", by_digest, node.new_dir())


@shows(
    Case("network-mount-nobody", Area.NETWORK, "at the mount: nobody listens", NOTHING_SHOWN, "exit 5, names the host"),
)
def test_nobody_listens(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    registry.stop_listening()
    sentence = node.refused(5, "mount", image.reference, node.new_dir())
    assert registry.host in sentence


@shows(
    Case("network-no-tag", Area.NETWORK, "the tag does not exist", NOTHING_SHOWN, "exit 3, names it"),
)
def test_no_such_tag(node: Node, registry: FakeRegistry) -> None:
    image_of(registry)
    sentence = node.refused(3, "mount", f"{registry.host}/image:absent", node.new_dir())
    assert "absent" in sentence


@shows(
    Case(
        "network-no-platform",
        Area.NETWORK,
        "the image has no such platform",
        NOTHING_SHOWN,
        "exit 3, lists those that it has",
    ),
)
def test_other_platform(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    sentence = node.refused(3, "mount", "--platform", "linux/s390x", image.reference, node.new_dir())
    assert "linux/s390x" in sentence and "linux/amd64" in sentence
    node.mount(image)
    node.refused(3, "mount", "--platform", "linux/s390x", image.reference, node.new_dir())  # though it is known now


def test_malformed_reference(node: Node) -> None:
    sentence = node.refused(2, "mount", "docker://Upper/CASE:::x", node.new_dir())
    assert "malformed" in sentence


@shows(
    Case(
        "network-comes-back",
        Area.NETWORK,
        "the registry goes down under a mount, and comes back",
        ERROR,
        "`status`: errors RegistryUnreachable",
        '`errors_total{class="RegistryUnreachable"}`',
    ),
)
def test_registry_goes_down_under_a_mount_and_comes_back(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    tree = node.mount(image)
    registry.stop_listening()
    assert EIO in node.read_fails(tree / "small", BOUND)
    assert node.status()["errors"]["RegistryUnreachable"] > 0
    registry.listen_again()
    assert node.read(tree / "small") == SMALL


@shows(
    Case(
        "network-renewed-url",
        Area.NETWORK,
        "signed URLs expire under a mount",
        RIGHT,
        "nothing: a new one is asked for",
    ),
)
def test_expired_signatures_are_renewed(node: Node) -> None:
    with FakeRegistry(redirect=True) as registry:
        image = image_of(registry)
        tree = node.mount(image)
        assert node.read(tree / "small") == SMALL
        registry.expire_signatures()
        assert node.read(tree / "data") == DATA


@shows(
    Case(
        "network-renewed-token",
        Area.NETWORK,
        "tokens are revoked under a mount",
        RIGHT,
        "nothing: a new one is asked for",
    ),
)
def test_revoked_tokens_are_renewed(node: Node) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        image = image_of(registry)
        tree = node.mount(image)
        assert node.read(tree / "small") == SMALL
        registry.revoke_tokens()
        assert node.read(tree / "data") == DATA


@shows(
    Case("network-many-readers", Area.NETWORK, "40 readers wait for a black hole", ERROR, "log: host and blob"),
)
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


@shows(
    Case(
        "network-limit-told",
        Area.NETWORK,
        "at the mount: 429 once",
        RIGHT,
        "the command says that the host limits, and waits",
    ),
)
def test_a_rate_limit_is_told_while_the_mount_waits(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    registry.fault(Fault.STATUS, path="/manifests/", status=429, retry_after="1", times=1)
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    assert done.returncode == 0, done.stderr
    assert f"{registry.host} limits how often it may be asked" in done.stderr
    assert "login" in done.stderr and "mirror" in done.stderr
    assert node.read(directory / "small") == SMALL
