"""Archives of images as docker, podman and skopeo write them, small and odd at will."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.digest import of
from lazyfs.registry.open import open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.tars import dir_, file, tar_of


@dataclass(frozen=True)
class Image:
    """A one-platform image: its documents and its layers' stored bytes."""

    layers: tuple[bytes, ...]
    config: bytes
    manifest: bytes


def image(*layers: bytes, media_type: str = oci.OCI_LAYER, diff_ids: Sequence[str] = ()) -> Image:
    """Make an image; `diff_ids` where the layers are compressed."""
    config = oci.canonical_json(
        {
            "os": "linux",
            "architecture": "amd64",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids) or [of(layer) for layer in layers]},
        }
    )
    manifest = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": oci.Descriptor(oci.OCI_CONFIG, of(config), len(config)).to_json(),
            "layers": [oci.Descriptor(media_type, of(layer), len(layer)).to_json() for layer in layers],
        }
    )
    return Image(layers, config, manifest)


def oci_archive(**images: Image) -> bytes:
    """An archive of an OCI layout with images by name."""
    entries = [
        oci.Descriptor(
            oci.OCI_MANIFEST, of(one.manifest), len(one.manifest), {"org.opencontainers.image.ref.name": name}
        ).to_json()
        for name, one in images.items()
    ]
    blobs = {of(raw)[7:]: raw for one in images.values() for raw in (*one.layers, one.config, one.manifest)}
    return tar_of(
        dir_("blobs/"),
        dir_("blobs/sha256/"),
        *(file(f"blobs/sha256/{name}", raw) for name, raw in blobs.items()),
        file("index.json", json.dumps({"schemaVersion": 2, "manifests": entries}).encode()),
        file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
    )


def docker_archive(one: Image, *tags: str) -> bytes:
    """What skopeo writes: layers and config at the top."""
    names = [hashlib.sha256(layer).hexdigest() + ".tar" for layer in one.layers]
    config = of(one.config)[7:] + ".json"
    listed = [{"Config": config, "RepoTags": list(tags), "Layers": names}]
    members = dict(zip(names, one.layers, strict=True))
    return tar_of(
        *(file(name, layer) for name, layer in members.items()),
        file(config, one.config),
        file("manifest.json", json.dumps(listed).encode()),
    )


LAYER = tar_of(file("hello", b"world" * 1000))
UPPER = tar_of(file("other", b"more"))
IMAGE = image(LAYER, UPPER)


def read(repository: Repository, digest: str, offset: int, size: int) -> bytes:
    with repository.fetch(digest, offset, size) as stream:
        return b"".join(iter(lambda: stream.read(1000), b""))


def opened(path: Path, content: bytes | None = None, transport: str = "oci-archive") -> Repository:
    if content is not None:
        path.write_bytes(content)
    return open_repository(references.parse(f"{transport}:{path}"))


def check_image(repository: Repository, target: str, layers: tuple[bytes, ...] = IMAGE.layers) -> oci.Manifest:
    """The image is there with all its bytes, whole and in parts."""
    media_type, raw = repository.manifest(target)
    manifest = oci.parse_manifest(raw, media_type)
    oci.parse_config(repository.blob(manifest.config))
    assert len(manifest.layers) == len(layers)
    for descriptor, layer in zip(manifest.layers, layers, strict=True):
        assert (descriptor.digest, descriptor.size) == (of(layer), len(layer))
        assert repository.has_blob(descriptor.digest)
        assert read(repository, descriptor.digest, 0, len(layer)) == layer
        assert read(repository, descriptor.digest, 30, 50) == layer[30:80]
    assert repository.manifest(manifest.digest)[1] == raw
    return manifest
