"""From a reference to the documents of one platform's image."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lazyfs import oci, reference
from lazyfs.digest import of
from lazyfs.errors import DigestMismatch, DocumentInvalid, PlatformMissing
from lazyfs.reference import Reference
from lazyfs.registry.open import open_repository
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import fetch_config, resolve_image
from tests.helpers.fake_registry import FakeRegistry, Fault


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture
def where(registry: FakeRegistry) -> Reference:
    return reference.parse(f"{registry.host}/team/app:v1")


@pytest.fixture
def repository(where: Reference) -> Iterator[Repository]:
    opened = open_repository(where)
    yield opened
    opened.close()


def test_a_plain_manifest(registry: FakeRegistry, repository: Repository, where: Reference) -> None:
    image = registry.add_image("team/app", "v1", [b"one", b"two"], {"config": {"Cmd": ["sh"]}})
    found = resolve_image(repository, where, "linux/amd64")
    assert (found.digest, found.index, found.reference) == (image.digest, None, where)
    assert [layer.digest for layer in found.manifest.layers] == list(image.layers)
    config = fetch_config(repository, found.manifest, platform="linux/amd64")
    assert config.diff_ids == (of(b"one"), of(b"two"))
    assert config.process == {"Cmd": ["sh"]}


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_leads_to_the_platform(
    registry: FakeRegistry, repository: Repository, where: Reference, docker: bool
) -> None:
    images = {
        f"linux/{arch}": registry.add_image("team/app", "", [arch.encode()], {"architecture": arch})
        for arch in ("amd64", "arm64")
    }
    index = registry.add_index("team/app", "v1", images, docker=docker)
    for platform, image in images.items():
        found = resolve_image(repository, where, platform)
        assert found.digest == image.digest
        assert found.index is not None
        assert found.index.digest == index
    with pytest.raises(PlatformMissing) as caught:
        resolve_image(repository, where, "linux/s390x")
    assert caught.value.available == ["linux/amd64", "linux/arm64"]


def test_a_digest_pins_the_image(registry: FakeRegistry, repository: Repository, where: Reference) -> None:
    old = registry.add_image("team/app", "v1", [b"old"])
    registry.add_image("team/app", "v1", [b"new"])
    assert resolve_image(repository, where.with_digest(old.digest)).digest == old.digest


def test_a_child_that_was_replaced_is_refused(registry: FakeRegistry, repository: Repository, where: Reference) -> None:
    image = registry.add_image("team/app", "", [b"x"])
    registry.add_index("team/app", "v1", {"linux/amd64": image})
    registry.fault(Fault.FLIP, path=image.digest)
    with pytest.raises(DigestMismatch):
        resolve_image(repository, where, "linux/amd64")


def test_a_document_with_two_readings_is_refused(
    registry: FakeRegistry, repository: Repository, where: Reference
) -> None:
    raw = oci.canonical_json({**oci.load_json(registry.add_image("team/app", "", [b"x"]).raw, ""), "manifests": []})
    registry.add_manifest("team/app", "v1", oci.OCI_MANIFEST, raw)
    with pytest.raises(DocumentInvalid, match="at once"):
        resolve_image(repository, where)


def test_an_index_within_itself_ends(registry: FakeRegistry, repository: Repository, where: Reference) -> None:
    raw = b'{"schemaVersion":2,"manifests":[]}'
    for _ in range(6):
        inner = oci.Descriptor(oci.OCI_INDEX, registry.add_manifest("team/app", "", oci.OCI_INDEX, raw), len(raw))
        raw = oci.canonical_json({"schemaVersion": 2, "manifests": [inner.to_json()]})
    registry.add_manifest("team/app", "v1", oci.OCI_INDEX, raw)
    with pytest.raises(DocumentInvalid, match="deeper"):
        resolve_image(repository, where)


def test_diff_ids_must_fit_the_layers(registry: FakeRegistry, repository: Repository, where: Reference) -> None:
    registry.add_image("team/app", "v1", [b"one", b"two"], {"rootfs": {"type": "layers", "diff_ids": [of(b"one")]}})
    with pytest.raises(DocumentInvalid, match="1 diff IDs for 2 layers"):
        fetch_config(repository, resolve_image(repository, where).manifest)


def test_an_image_for_another_machine_is_found_out(
    registry: FakeRegistry, repository: Repository, where: Reference
) -> None:
    registry.add_image("team/app", "v1", [b"one"], {"architecture": "s390x"})
    manifest = resolve_image(repository, where, "linux/amd64").manifest
    with pytest.raises(PlatformMissing, match="linux/amd64"):
        fetch_config(repository, manifest, platform="linux/amd64")


def test_config_and_tails_may_be_fetched_together(
    registry: FakeRegistry, repository: Repository, where: Reference
) -> None:
    layers = [bytes([n]) * 5000 for n in range(6)]
    registry.add_image("team/app", "v1", layers)
    manifest = resolve_image(repository, where).manifest

    def tail(layer: oci.Descriptor) -> bytes:
        with repository.fetch(layer.digest, layer.size - 100, 100) as stream:
            return stream.read(100)

    with ThreadPoolExecutor(8) as pool:
        config = pool.submit(fetch_config, repository, manifest)
        assert list(pool.map(tail, manifest.layers)) == [layer[-100:] for layer in layers]
        assert len(config.result().diff_ids) == 6
