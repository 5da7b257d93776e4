"""Archives of images as docker, podman and skopeo write them, small and odd at will."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lazyfs import oci
from lazyfs.digest import of
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
