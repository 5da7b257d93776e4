"""The manifest and the config of a chain's image: by digest, from the node's memory or with one request each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import ManifestMissing, ReferenceInvalid, RegistryError, StoreError
from lazyfs.mount.apart import Links
from lazyfs.mount.resolving import Resolver
from lazyfs.oci import ImageConfig, Manifest
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import ResolvedImage, check_config, fetch_config, resolve_image

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChainImage:
    """An image's manifest. `fresh`: as the registry just sent it; None: it was remembered."""

    name: str  # the reference, with the digest that was asked for
    platform: str
    manifest: Manifest
    fresh: ResolvedImage | None
    by_digest: bool


class ChainDocuments:
    """Fetches and remembers. Belongs to one trio loop."""

    def __init__(self, catalog: Catalog, resolver: Resolver, links: Links) -> None:
        self._catalog = catalog
        self._resolver = resolver
        self._links = links
        self._limiter = trio.CapacityLimiter(8)
        self._manifests: SingleFlight[object, ResolvedImage] = SingleFlight()
        self._configs: SingleFlight[object, ImageConfig] = SingleFlight()

    async def image(self, repository: Repository, reference: Reference, deadline: float) -> ChainImage:
        """Return the manifest that a reference leads to. A checkpoint: one request, two through an index, none where
        the reference has a digest that is known.

        A tag whose registry does not answer leads to what it was last. Raise RegistryError, DocumentInvalid,
        DigestMismatch or PlatformMissing.
        """
        platform = oci.host_platform()
        name, by_digest = str(reference), bool(reference.digest)
        known = await self._in_thread(partial(self._resolver.known, reference, platform))
        if known is not None and by_digest:
            return ChainImage(name, platform, known, None, by_digest)
        key = repository.host, repository.name, reference.target
        request = partial(resolve_image, repository, reference, platform, deadline=deadline)
        try:
            fresh = await self._links.share(self._manifests, key, repository.host, request)
        except RegistryError as error:
            if known is None or isinstance(error, ManifestMissing) or not error.temporary:
                raise
            log.warning("using the last digest of %s: %s", name, error)
            return ChainImage(name, platform, known, None, by_digest)
        return ChainImage(name, platform, fresh.manifest, fresh, by_digest)

    async def config(self, repository: Repository, image: ChainImage, deadline: float) -> ImageConfig:
        """Return an image's config, whose diff IDs fit its layers. A checkpoint: one request at most.

        Raise as `image`.
        """
        manifest = image.manifest
        # A client may pull for another platform than ours by naming the manifest.
        platform = None if image.by_digest else image.platform
        raw = await self._in_thread(partial(self._catalog.document, manifest.config.digest))
        if raw is not None:
            return check_config(oci.parse_config(raw), manifest, platform)
        key = repository.host, repository.name, manifest.digest, platform
        request = partial(fetch_config, repository, manifest, platform=platform, deadline=deadline)
        return await self._links.share(self._configs, key, repository.host, request)

    async def remember(self, image: ChainImage, config: ImageConfig) -> None:
        """Keep the documents, so that the next call needs no registry. A checkpoint; a full disk is no error."""
        await self._in_thread(partial(self._remember, image, config))

    def _remember(self, image: ChainImage, config: ImageConfig) -> None:
        if image.fresh is not None:
            self._resolver.remember(image.name, image.platform, image.fresh)
        else:
            self._resolver.note_use(image.name, image.platform, image.manifest)
        try:
            if self._catalog.document(config.digest) is None:
                self._catalog.put_document(config.raw)
        except StoreError as error:
            log.warning("an image config is not remembered: %s", error)

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(job, limiter=self._limiter)


def parse_reference(image: str, manifest_digest: str) -> Reference:
    """Return an image's reference with the digest of its manifest, where one is given. Raise ReferenceInvalid.

    Only images of registries: a name that a pull carries must not have the daemon open files of this machine.
    """
    reference = references.parse(image)
    if reference.transport != "docker":
        raise ReferenceInvalid(image, "a chain's image is one of a registry")
    return replace(reference, digest=manifest_digest) if manifest_digest else reference
