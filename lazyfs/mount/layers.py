"""Layers in use: prepared by whoever comes first, shared, and given back by the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio

from lazyfs import oci
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.read import Reader
from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import LayerQuarantined, LazyfsError
from lazyfs.mount.filling import Fillings
from lazyfs.mount.prepared import Prepared, TooLarge, Wanted, toc_claims
from lazyfs.mount.preparing import Preparer
from lazyfs.mount.whole_layers import WholeLayers
from lazyfs.oci import Descriptor
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository

T = TypeVar("T")

_CLOSERS = 4  # threads that close layers: never those that wait for a registry, or one that hangs holds up who lets go


class Layers:
    """The layers that trees, calls and fetches hold. Belongs to one trio loop; network and disk are left to threads."""

    def __init__(
        self,
        preparer: Preparer,
        fillings: Fillings,
        reader: Reader,
        whole: WholeLayers,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._preparer = preparer
        self._fillings = fillings
        self._reader = reader
        self._whole = whole
        self._limiter = limiter
        self._closers = trio.CapacityLimiter(_CLOSERS)
        self._held: dict[str, Prepared] = {}
        self._preparing: SingleFlight[str, Prepared] = SingleFlight()
        # Layers that were found false and are still shown, while the same blob is there under its true diff ID.
        self._parted: dict[ServedLayer, int] = {}  # with the number that tells them apart
        # Of the layers being prepared: under which claims, from where, how long, how large.
        self._bounds: dict[str, tuple[object, ...]] = {}
        self.fetched = [0 for _ in Priority]  # compressed bytes of layers that have gone

    # -- what is held; from any thread

    def held(self) -> frozenset[str]:
        """Return the digests of the layers in use."""
        return frozenset(list(self._held))

    def fetched_of(self, digests: Iterable[str]) -> int:
        """Return the compressed bytes that were fetched of those of these layers that are in use."""
        held = [self._held.get(digest) for digest in set(digests)]
        return sum(sum(one.layer.bytes_by_priority) for one in held if one is not None)

    def offline(self) -> frozenset[str]:
        """Return the digests of the layers in use that can't be fetched again."""
        held = list(self._held.items())
        return frozenset(digest for digest, one in held if isinstance(one.layer.repository, OfflineRepository))

    def is_coming(self, digest: str) -> bool:
        """Tell whether a layer is in use, or is being prepared for somebody."""
        return digest in self._held or digest in self._preparing

    def is_preparing(self, digest: str) -> bool:
        """Tell whether a layer is being prepared for somebody: one without TOC is fetched whole meanwhile."""
        return digest in self._preparing

    # -- holding

    async def hold(
        self,
        repository: Repository,
        wanted: Wanted,
        say: Callable[[str], None] = lambda text: None,
        limiter: trio.CapacityLimiter | None = None,
    ) -> Prepared:
        """Return a layer with one more user, prepared by whoever comes first. A checkpoint.

        `limiter`: whose threads prepare a layer that has a TOC. Raise as `Preparer.prepare`. Each call is paired with
        one layer given to `drop`.
        """
        digest = wanted.descriptor.digest
        while True:
            prepared = self._held.get(digest)
            if prepared is None:
                prepared = await self._prepared(repository, wanted, say, limiter or self._limiter)
                if prepared is None or self._held.get(digest) is not prepared:
                    continue  # its last user went while we waited
            layer = prepared.layer
            layer.users += 1
            if _fits(layer, wanted):
                if not isinstance(repository, OfflineRepository):
                    layer.come_from(repository, wanted.origin)
                return prepared
            # Somebody mounts the same blob under another diff ID or TOC: one of both is false. The check tells which.
            try:
                if wanted.regained:  # nothing is checked before we serve, and readers wait for that
                    raise LayerQuarantined(digest, layer.quarantine or f"its diff ID is {layer.diff_id}")
                if layer.check is not None and not layer.quarantine:
                    self._fillings.start(layer)  # nothing checks a layer that no tree shows yet
                await self._fillings.until_checked(layer)
                if layer.quarantine and not self._part(layer, wanted):
                    raise LayerQuarantined(digest, layer.quarantine)
                if not layer.quarantine and not _fits(layer, wanted):
                    raise LayerQuarantined(digest, f"its diff ID is {layer.diff_id}, not {wanted.diff_id}")
            finally:
                with trio.CancelScope(shield=True):
                    await self.drop([layer])

    def _part(self, layer: ServedLayer, wanted: Wanted) -> bool:
        """Leave a false layer to those who show it, where the blob may be true under another diff ID or from elsewhere.

        Else whoever keeps a false claim shown would keep honest images from starting. The same TOC only: its table is
        the one that the store has open.
        """
        same_claims = layer.diff_id == wanted.diff_id and layer.origin == wanted.origin
        if same_claims or wanted.whole or _told(layer.descriptor) != _told(wanted.descriptor):
            return False
        held = self._held.get(layer.digest)
        if held is not None and held.layer is layer:
            del self._held[layer.digest]
            self._fillings.stop(layer)
            self._parted[layer] = held.beside
        return True

    async def _prepared(
        self, repository: Repository, wanted: Wanted, say: Callable[[str], None], limiter: trio.CapacityLimiter
    ) -> Prepared | None:
        """Prepare a layer, or wait for whoever does. None: that one failed of bounds or claims that are not ours."""
        digest = wanted.descriptor.digest
        ours = (repository.host, wanted.largest, wanted.deadline, wanted.diff_id, _told(wanted.descriptor))
        theirs = self._bounds.get(digest, ours)
        try:
            with self._whole.wanting(digest):
                return await self._preparing.run(digest, partial(self._prepare, repository, wanted, say, limiter, ours))
        except (TooLarge, LazyfsError):
            if theirs == ours:
                raise
            return None

    async def _prepare(
        self,
        repository: Repository,
        wanted: Wanted,
        say: Callable[[str], None],
        limiter: trio.CapacityLimiter,
        bounds: tuple[object, ...],
    ) -> Prepared:
        digest = wanted.descriptor.digest
        alive = partial(self._whole.keep_alive, digest)
        taken = {number for layer, number in self._parted.items() if layer.digest == digest}
        wanted = replace(wanted, beside=min(set(range(len(taken) + 1)) - taken))
        job = partial(self._preparer.prepare, repository, wanted, say, alive)
        self._bounds[digest] = bounds
        try:
            if self._preparer.is_lazy(wanted.descriptor) and not wanted.whole:
                prepared = await trio.to_thread.run_sync(job, limiter=limiter)
            else:
                prepared = await self._whole.run(repository.host, job)
        finally:
            del self._bounds[digest]
        self._held[digest] = prepared
        return prepared

    async def drop(self, layers: Iterable[ServedLayer]) -> None:
        """Give layers back, each as often as it stands in the list. A checkpoint where one goes."""
        for layer in layers:
            layer.users -= 1
            if layer.users == 0:
                layer.dropped = True
                held = self._held.get(layer.digest)
                if held is not None and held.layer is layer:
                    del self._held[layer.digest]
                    self._fillings.stop(layer)
                self._parted.pop(layer, None)
                self.fetched = [sum(pair) for pair in zip(self.fetched, layer.bytes_by_priority, strict=True)]
                self._reader.drop(layer)
                if layer.check is not None:
                    layer.check.spool.close()
                with trio.CancelScope(shield=True):  # or the layers behind this one would be held for good
                    await trio.to_thread.run_sync(layer.store.close, limiter=self._closers)


def _fits(layer: ServedLayer, wanted: Wanted) -> bool:
    """Tell whether a layer in use is what an image wants. One that was not checked yet must be of the same TOC."""
    if (layer.quarantine and not wanted.regained) or layer.diff_id != wanted.diff_id:
        return False
    return layer.verified or toc_claims(layer.descriptor) == toc_claims(wanted.descriptor)


def _told(descriptor: Descriptor) -> tuple[object, ...]:
    """Return all that an image says of a layer's TOC."""
    found = sorted((name, value) for name, value in descriptor.annotations.items() if name in oci.TOC_ANNOTATIONS)
    return descriptor.size, descriptor.media_type, tuple(found)
