"""Layers of chains made ready: side by side, each within its call's deadline, and in no other registry's way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import DaemonFault, ImageIncomplete
from lazyfs.mount.apart import Apart, Links
from lazyfs.mount.filling import Fillings
from lazyfs.mount.layers import Layers
from lazyfs.mount.preparing import Parts, Prepared, Preparer, TooLarge, Wanted
from lazyfs.oci import Descriptor
from lazyfs.reference import Reference
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository

T = TypeVar("T")

_LOCAL_THREADS = 16  # jobs that need the disk alone, or the table builder


@dataclass(frozen=True, slots=True)
class ChainSource:
    """Where the layers of a chain come from, and what a call may take."""

    reference: Reference
    repository: Repository
    deadline: float
    largest: int | None = None  # bytes of a layer without TOC that may be fetched in full; None: any

    def wanted(self, descriptor: Descriptor, diff_id: str) -> Wanted:
        """Return one of the layers, as the preparer wants to have it told."""
        return Wanted(
            descriptor, diff_id, self.reference.origin, largest=self.largest, deadline=self.deadline
        )  # fmt: skip


class ChainLayers:
    """Hold layers for chains. Belongs to one trio loop."""

    def __init__(self, layers: Layers, fillings: Fillings, preparer: Preparer, apart: Apart, links: Links) -> None:
        self._layers = layers
        self._fillings = fillings
        self._preparer = preparer
        self._apart = apart
        self._links = links
        self._local = trio.CapacityLimiter(_LOCAL_THREADS)
        self._tails: SingleFlight[object, Parts | str] = SingleFlight()

    async def hold(
        self, source: ChainSource, descriptor: Descriptor, diff_id: Callable[[], Awaitable[str]]
    ) -> Prepared:
        """Return a layer with one more user. A checkpoint; whoever is cancelled in here holds nothing.

        `diff_id` is awaited beside the request for the layer's TOC. Raise as `Layers.hold`.
        """
        parts: Parts | str | None = None
        if not await self._seems_here(descriptor):
            parts = await self._fetch_parts(source, descriptor)
        wanted = source.wanted(descriptor, await diff_id())
        if parts is None and not self._layers.is_held(descriptor.digest) and not await self._knows(wanted):
            parts = await self._fetch_parts(source, descriptor)
        if isinstance(parts, str) and source.largest is not None and descriptor.size > source.largest:
            raise TooLarge(parts)
        return await self._apart.run(partial(self._hold, source, wanted, parts), self.drop)

    async def _hold(self, source: ChainSource, wanted: Wanted, parts: Parts | str | None) -> Prepared:
        repository = source.repository
        if parts is None:
            return await self._layers.hold(repository, wanted, limiter=self._local)
        if parts and not isinstance(parts, str):
            return await self._layers.hold(repository, replace(wanted, parts=parts), limiter=self._local)
        limiter = self._links.limiter(repository.host)
        if self._preparer.is_lazy(wanted.descriptor):
            return await self._layers.hold(repository, wanted, limiter=limiter)
        async with limiter:
            return await self._layers.hold(repository, wanted)

    async def drop(self, prepared: Prepared) -> None:
        """Give a layer back. A checkpoint where it goes."""
        await self._layers.drop([prepared.layer])

    def trusts(self, source: ChainSource) -> bool:
        """Tell whether layers of this repository are used before they were checked whole."""
        return self._fillings.trusts(source.reference.origin)

    async def await_trust(self, source: ChainSource, prepared: Prepared) -> None:
        """Return once a layer may be used, where `lazy_from` doesn't list its repository after its whole check.

        Raise LayerQuarantined, ReadDeadline, or ImageIncomplete where it can't be checked.
        """
        layer = prepared.layer
        if not (layer.verified or layer.quarantine or self.trusts(source)):
            if isinstance(layer.repository, OfflineRepository):
                raise ImageIncomplete(
                    source.reference.host,
                    f"layer {layer.digest} was not checked in full yet, and no registry may be asked",
                    hint="fetch it while its registry may be asked",
                )
            self._fillings.start(layer)
            await self._fillings.until_checked(layer)
            if not (layer.verified or layer.quarantine):
                raise DaemonFault(f"nothing checks layer {layer.digest} any more", hint="see lazyfsd.log; try again")
        layer.ensure_readable()

    async def in_thread(self, job: Callable[[], T]) -> T:
        """Run what needs the local disk alone."""
        return await trio.to_thread.run_sync(job, limiter=self._local)

    async def _seems_here(self, descriptor: Descriptor) -> bool:
        """Tell whether it makes no sense to ask for a layer's TOC ahead of all else."""
        digest = descriptor.digest
        return self._layers.is_held(digest) or await self.in_thread(partial(self._preparer.has_table, digest))

    async def _knows(self, wanted: Wanted) -> bool:
        return await self.in_thread(partial(self._preparer.knows, wanted))

    async def _fetch_parts(self, source: ChainSource, descriptor: Descriptor) -> Parts | str:
        repository = source.repository
        claims = tuple(sorted(descriptor.annotations.items()))
        key = repository.host, descriptor.digest, descriptor.size, descriptor.media_type, claims
        if not self._preparer.is_lazy(descriptor):
            return self._preparer.why_not_lazy(descriptor)
        request = partial(self._preparer.fetch_parts, repository, descriptor, source.deadline)
        return await self._links.share(self._tails, key, repository.host, request)
