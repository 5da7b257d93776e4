"""From what the user typed to manifest and config, with the node's memory for when the registry is down. Blocking."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lazyfs import oci
from lazyfs.chunks.catalog import Catalog
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, ManifestMissing, RegistryError, StoreError
from lazyfs.oci import ImageConfig, Manifest
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import check_config, fetch_config, resolve_image

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds for the documents of an image that this node never saw
_PATIENCE_KNOWN = 10.0  # seconds where the last digest would do


@dataclass(frozen=True, slots=True)
class Resolved:
    """An image's documents. `config` is on its way beside the layers' tails; `stale` says why memory had to do."""

    manifest: Manifest
    config: Future[ImageConfig]
    stale: str = ""


class Resolver:
    """Resolve references; remember what they led to. Thread-safe."""

    def __init__(self, catalog: Catalog, settings: Settings, pool: ThreadPoolExecutor) -> None:
        self._catalog = catalog
        self._settings = settings
        self._pool = pool

    def resolve(self, repository: Repository, reference: Reference, platform: str) -> Resolved:
        """Return the documents of `reference` for `platform`. Blocking, for the manifest only.

        A digest that this node knows needs no request. A tag is asked for, and where the registry can't answer the
        last digest it led to is used. Raise what the registry raised when there is none.
        """
        name = str(reference)
        known = self._known(name, platform)
        if known is not None and reference.digest:
            return self._with_config(repository, known, platform)
        patience = _PATIENCE if known is None else _PATIENCE_KNOWN
        try:
            image = resolve_image(repository, reference, platform, deadline=time.monotonic() + patience)
        except RegistryError as error:
            if known is None or isinstance(error, ManifestMissing) or not error.temporary:
                raise
            log.warning("using the last digest of %s: %s", name, error)
            return self._with_config(repository, known, platform, error.message)
        self._remember(name, platform, image.manifest)
        return self._with_config(repository, image.manifest, platform)

    def _known(self, name: str, platform: str) -> Manifest | None:
        try:
            last = self._catalog.last_digest(name, platform)
            raw = self._catalog.document(last.digest) if last is not None else None
            return oci.parse_manifest(raw) if raw is not None else None
        except LazyfsError as error:
            log.warning("what is known of %s can't be read: %s", name, error)
            return None

    def _remember(self, name: str, platform: str, manifest: Manifest) -> None:
        try:
            self._catalog.put_document(manifest.raw)
            self._catalog.remember_reference(name, platform, manifest.digest)
        except StoreError as error:  # a full disk must not keep an image from starting
            log.warning("%s is not remembered: %s", name, error)

    def _with_config(self, repository: Repository, manifest: Manifest, platform: str, stale: str = "") -> Resolved:
        return Resolved(manifest, self._pool.submit(self._config, repository, manifest, platform), stale)

    def _config(self, repository: Repository, manifest: Manifest, platform: str) -> ImageConfig:
        raw = self._catalog.document(manifest.config.digest)
        if raw is not None:
            return check_config(oci.parse_config(raw), manifest, platform)
        config = fetch_config(repository, manifest, platform=platform, deadline=time.monotonic() + _PATIENCE)
        try:
            self._catalog.put_document(config.raw)
        except StoreError as error:
            log.warning("an image config is not remembered: %s", error)
        return config
