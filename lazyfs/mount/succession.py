"""Taking over from a daemon that died: all that it showed is planted again, before requests are answered.

Readers wait meanwhile, so it asks no registry and waits for none. What can't be had again is left out: its readers get
errors, all others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.chunks.catalog import Catalog
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, StoreBroken
from lazyfs.mount import chains, claims, mounted
from lazyfs.mount.chains import Chains
from lazyfs.mount.claims import Claim
from lazyfs.mount.forest import Planted
from lazyfs.mount.images import Images, LayerFacts, MountedImage
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.mounted import Mounted
from lazyfs.mount.resolving import Pull
from lazyfs.registry.config import access as accesses

log = logging.getLogger(__name__)

Regain = Callable[[str, dict[str, Any]], Awaitable[None]]

_PATIENCE = 10.0  # seconds for the local disk, for one mount


class Succession:
    """What is taken over. Belongs to the trio loop, before the session serves."""

    def __init__(
        self,
        settings: Settings,
        inheritance: Inheritance,
        images: Images,
        catalog: Catalog,
        mounts: Mounted,
        shown: Chains,
    ) -> None:
        self._settings = settings
        self._inheritance = inheritance
        self._images = images
        self._catalog = catalog
        self._mounts = mounts
        self._chains = shown

    async def run(self) -> None:
        """Take all over, side by side. A checkpoint, 10 s at most."""
        for value in self._inheritance.values(mounted.LOGINS).values():
            self._images.node_logins.update(value.get("logins"))
        async with trio.open_nursery() as nursery:
            for name, value in self._inheritance.values(mounted.PREFIX).items():
                nursery.start_soon(self._one, name, value, self._mount)
            for name, value in self._inheritance.values(chains.PREFIX).items():
                nursery.start_soon(self._one, name, value, self._chain)

    async def _one(self, name: str, value: dict[str, Any], regain: Regain) -> None:
        try:
            with trio.fail_after(_PATIENCE):
                await regain(name, value)
            return
        except (LazyfsError, trio.TooSlowError) as error:
            log.error("%s can't be shown any more: %s", name, error or "its files do not come")
        except Exception:
            log.exception("%s can't be shown any more", name)
        self._inheritance.remove(name)

    async def _mount(self, name: str, value: dict[str, Any]) -> None:
        claim = claims.from_json(value)
        documents = partial(self._documents, claim.manifest_digest)
        manifest, config = await trio.to_thread.run_sync(documents, abandon_on_cancel=True)
        planted, facts = await self._plant(claim)
        reference = references.parse(claim.reference)
        image = MountedImage(reference, value["platform"], manifest, config, planted, facts, (), None)
        self._mounts.regain(name.removeprefix(mounted.PREFIX), value, image)

    async def _chain(self, name: str, value: dict[str, Any]) -> None:
        claim = claims.from_json(value)
        planted, facts = await self._plant(claim)
        self._chains.regain(claim, planted, facts)

    async def _plant(self, claim: Claim) -> tuple[Planted, tuple[LayerFacts, ...]]:
        reference = references.parse(claim.reference)
        access = None if claim.access is None else accesses.from_json(claim.access)
        pull = Pull.NEVER if self._settings.offline else Pull.NEWER
        repository = await trio.to_thread.run_sync(
            partial(self._images.open, reference, claim.plain_http, pull, access, self._images.on_hop),
            abandon_on_cancel=True,
        )
        return await self._images.regain(repository, reference.origin, claim.layers)

    def _documents(self, digest: str) -> tuple[oci.Manifest, oci.ImageConfig]:
        raw = self._catalog.document(digest)
        manifest = None if raw is None else oci.parse_manifest(raw)
        raw = None if manifest is None else self._catalog.document(manifest.config.digest)
        if manifest is None or raw is None:
            raise StoreBroken(f"the documents of {digest} are not in the store any more")
        return manifest, oci.parse_config(raw)
