"""The cache repository: converted layers recorded by source and options, for pipelines whose machines come and go.

Each layer is a small manifest under a tag made from its key; the layer's blob lies in the same repository, from where a
registry takes it over into another. Believed as far as the repository is.
"""

from __future__ import annotations

import hashlib
import logging

from indexer.push import Upload, push_blobs
from indexer.work import Converted
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import FormatError, RegistryError, RegistryTimeout, RegistryUnreachable, TrustError
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)

ARTIFACT_TYPE = "application/vnd.lazyfs.converted-layer.v1"
CONFIG_TYPE = "application/vnd.lazyfs.converted-layer.config.v1+json"
_VERSION = 1


def tag_of(key: str) -> str:
    """Return the tag under which the layer of `key` is recorded."""
    return "lazyfs-" + hashlib.sha256(key.encode()).hexdigest()[:48]


class LayerCache:
    """The records in one repository. Thread-safe; blocks. A cache that fails is passed by, and logged."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._is_down = False  # asked for each layer, a registry that doesn't answer would cost its time-out each time

    def find(self, key: str) -> Converted | None:
        """Return the layer recorded under `key` whose blob is there, None for any other outcome. Two requests."""
        if self._is_down:
            return None
        try:
            media_type, raw = self.repository.manifest(tag_of(key))
            manifest = oci.parse_manifest(raw, media_type)
            if manifest.config.media_type != CONFIG_TYPE or len(manifest.layers) != 1:
                return None
            record = oci.load_json(self.repository.blob(manifest.config), "record of a converted layer")
            diff_id = record.get("diff_id")
            if record.get("version") != _VERSION or record.get("key") != key or not digests.is_digest(diff_id):
                return None
            layer = manifest.layers[0]
            if not self.repository.has_blob(layer.digest):
                return None
            return Converted(layer, str(diff_id))
        except (RegistryError, FormatError, TrustError) as error:
            self._is_down |= isinstance(error, RegistryTimeout | RegistryUnreachable)
            log.info("no record of %s in %s: %s", key, self.repository.name, error)
            return None

    def add(self, key: str, layer: Converted, upload: Upload) -> None:
        """Record a layer, its blob included. Raise RegistryError, StoreBroken."""
        config = oci.canonical_json({"version": _VERSION, "key": key, "diff_id": layer.diff_id})
        config_descriptor = oci.Descriptor(CONFIG_TYPE, digests.of(config), len(config))
        manifest = oci.canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": oci.OCI_MANIFEST,
                "artifactType": ARTIFACT_TYPE,
                "config": config_descriptor.to_json(),
                "layers": [layer.descriptor.to_json()],
            }
        )
        push_blobs(self.repository, [upload, Upload(config_descriptor.digest, len(config), config)])
        self.repository.push_manifest(tag_of(key), oci.OCI_MANIFEST, manifest)
