"""Images on their way into the forest and out of it: layers shared, trees built, background work started and ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.chunks.census import Census
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.memory import MemoryCache
from lazyfs.chunks.schedule import Priority, Scheduler
from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.config import Settings
from lazyfs.errors import (
    BlobMissing,
    ImageIncomplete,
    LayerQuarantined,
    LazyfsError,
    ManifestMissing,
    RegistryError,
)
from lazyfs.mount import missing
from lazyfs.mount.ahead import Ahead, command_of
from lazyfs.mount.donors import Donors
from lazyfs.mount.filling import Fillings, guard
from lazyfs.mount.forest import Forest, Planted
from lazyfs.mount.planting import Planting
from lazyfs.mount.preparing import Prepared, Preparer, Wanted
from lazyfs.mount.resolving import Pull, Resolver
from lazyfs.mount.whole_layers import WholeLayers
from lazyfs.oci import ImageConfig, Manifest
from lazyfs.reference import Reference
from lazyfs.registry.config.access import Access, from_environment
from lazyfs.registry.health import Health
from lazyfs.registry.hops import OnHop
from lazyfs.registry.http.rate_limits import LimitTeller
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import doubt_tag
from lazyfs.units import format_size

log = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS = 16  # documents and tails fetched at once


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a mount tells of one of its layers."""

    layer: ServedLayer
    lazy: bool
    reason: str  # why it is not lazy


@dataclass(frozen=True, slots=True)
class MountedImage:
    """An image in the forest."""

    reference: Reference
    platform: str  # that was asked for
    manifest: Manifest
    config: ImageConfig
    planted: Planted
    layers: tuple[LayerFacts, ...]
    remarks: tuple[str, ...]  # on what the registry did not say

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the image: remarks, and why layers are not lazy."""
        plain = [
            f"layer {fact.layer.digest[:19]}… ({format_size(fact.layer.descriptor.size)}) can't be lazy, "
            f"{fact.reason}: fetched in full and checked"
            for fact in self.layers
            if fact.reason
        ]
        return (*self.remarks, *plain)

    def distinct_layers(self) -> list[ServedLayer]:
        """Return the layers, each once."""
        return list({fact.layer.digest: fact.layer for fact in self.layers}.values())

    @property
    def size(self) -> int:
        """Bytes of all layer blobs, each counted once."""
        return sum({layer.digest: layer.size for layer in self.manifest.layers}.values())


class Images:
    """Mount and release images. Belongs to one trio loop; network and disk are left to threads."""

    def __init__(
        self,
        settings: Settings,
        forest: Forest,
        scheduler: Scheduler,
        ahead: Ahead,
        fillings: Callable[[Callable[[ServedLayer, str], None]], Fillings],
        donors: Donors,
        memory: MemoryCache,
        preparer: Preparer,
        census: Census,
        resolver: Callable[[ThreadPoolExecutor], Resolver],
        nursery: trio.Nursery,
        on_hop: OnHop,
    ) -> None:
        self._settings = settings
        self._forest = forest
        self._scheduler = scheduler
        self._ahead = ahead
        self.fillings = fillings(self.quarantine)
        self._donors = donors
        self._memory = memory
        self._preparer = preparer
        self._census = census
        self._nursery = nursery
        self._on_hop = on_hop
        self._transport = Transport()
        self._pool = ThreadPoolExecutor(_THREADS, "documents")
        self._resolver = resolver(self._pool)
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._whole = WholeLayers(scheduler, preparer.unpacking.lines)
        self._layers: dict[str, Prepared] = {}
        self.fetched = [0 for _ in Priority]  # compressed bytes of layers that have gone
        self._preparing: SingleFlight[str, Prepared] = SingleFlight()
        self._planting = Planting(settings.root / "trees", forest, scheduler, self.fillings, preparer, self._drop)

    async def mount(
        self,
        image: str,
        platform: str | None,
        plain_http: bool | None,
        say: Callable[[str], None],
        *,
        pull: Pull = Pull.NEWER,
        check: Callable[[Manifest], None] | None = None,
        access: Access | None = None,
    ) -> MountedImage:
        """Resolve an image and put its tree into the forest. A checkpoint, as long as the network takes.

        `access` is the user's; None: what the daemon's own environment says.
        `check` is called with the manifest, in a thread, before any layer is fetched; what it raises is raised. Each
        call is paired with one `release`. Raise ReferenceInvalid, PlatformMissing, RegistryError, TrustError,
        FormatError or StoreError; then nothing is held.
        """
        reference = references.parse(image)
        wanted_platform = platform or oci.host_platform()
        if self._settings.offline:
            pull = Pull.NEVER
        if reference.transport != "docker":
            pull = Pull.NEWER  # it lies on this machine
        limits = LimitTeller(self._on_hop, say)
        repository = await self._in_thread(partial(self._open, reference, plain_http, pull, access, limits))
        resolved = await self._in_thread(partial(self._resolver.resolve, repository, reference, wanted_platform, pull))
        # The config comes beside the tails; only its diff IDs are needed before a layer is in use.
        manifest = resolved.manifest
        if check is not None:
            await self._in_thread(partial(check, manifest))
        remarks = await self._in_thread(partial(missing.check, self._census, reference, resolved, pull))
        try:
            tails = self._preparer.begin_tails(repository, manifest, self._pool)
            config = await self._in_thread(resolved.config.result)
            prepared = await self._prepare_all(repository, reference.origin, manifest, config, tails, say)
        except RegistryError as error:
            if isinstance(error, (BlobMissing, ManifestMissing)) and doubt_tag(repository, reference):
                return await self.mount(image, platform, plain_http, say, pull=pull, check=check, access=access)
            if not resolved.known or not (error.temporary or pull is Pull.NEVER):
                raise
            gone = await self._in_thread(partial(self._census.missing, manifest))
            raise missing.incomplete(reference, gone, "" if pull is Pull.NEVER else error.message) from None
        try:
            planted = await self._planting.plant(prepared)
        except BaseException:
            await self._drop([one.layer for one in prepared])
            raise
        try:
            await self._await_trust(reference, prepared, say)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._planting.release(planted)
            raise
        facts = tuple(LayerFacts(one.layer, not one.reason, one.reason) for one in prepared)
        return MountedImage(reference, wanted_platform, manifest, config, planted, facts, (*remarks, *limits.remarks))

    def _open(
        self,
        reference: Reference,
        plain_http: bool | None,
        pull: Pull,
        access: Access | None,
        on_hop: OnHop,
    ) -> Repository:
        if pull is Pull.NEVER:
            return OfflineRepository(reference.host, reference.repository)
        options = OpenOptions(
            plain_http=plain_http,
            on_hop=on_hop,
            connect_timeout=self._settings.connect_timeout,
            answer_timeout=self._settings.answer_timeout,
            transport=self._transport,
            access=access or from_environment(certs_dir=self._settings.certs_dir),
        )
        return open_repository(reference, options)

    @property
    def health(self) -> Health:
        """What is known of the hosts that images come from."""
        return self._transport.health

    def expect_exec(self, image: MountedImage, entrypoint: str | None, command: list[str]) -> None:
        """Begin to fetch what a container of the image will execute. Doesn't wait."""
        words = command_of(image.config.process, entrypoint, command)
        self._nursery.start_soon(guard, "ahead", partial(self._ahead.run, image.planted, words))

    async def release(self, image: MountedImage) -> None:
        """Give one mount of an image back; with the last one its tree and layers go. A checkpoint."""
        await self._planting.release(image.planted)

    async def close(self) -> None:
        """End all background work and close all layers and connections."""
        self.fillings.stop_all()
        for planted in self._forest.trees():
            await self._drop(self._forest.uproot(planted))
        await self._in_thread(self._donors.close)
        await self._in_thread(self._preparer.builder.close)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    def quarantine(self, layer: ServedLayer, reason: str) -> None:
        """Stop reading from a layer: every further read of it is EIO. Called from the loop."""
        if layer.quarantine:
            return
        log.error("quarantined: layer=%s reason=%s", layer.digest, reason)
        layer.quarantine = reason
        self._memory.forget_layer(layer.number)
        self._nursery.start_soon(
            guard, "quarantine", partial(self._in_thread, partial(self._preparer.set_quarantine, layer, reason))
        )
        self.fillings.finish_check(layer)

    def layers_held(self) -> frozenset[str]:
        """Return the digests of the layers in use. From any thread."""
        return frozenset(list(self._layers))

    def fetched_of(self, digests: Iterable[str]) -> int:
        """Return the compressed bytes that were fetched of those of these layers that are in use. From any thread."""
        held = [self._layers.get(digest) for digest in set(digests)]
        return sum(sum(one.layer.bytes_by_priority) for one in held if one is not None)

    def layers_offline(self) -> frozenset[str]:
        """Return the digests of the layers in use that can't be fetched again. From any thread."""
        held = list(self._layers.items())
        return frozenset(digest for digest, one in held if isinstance(one.layer.repository, OfflineRepository))

    def trees_held(self) -> frozenset[str]:
        """Return the keys of the trees in use. From any thread."""
        return frozenset(planted.name.decode() for planted in self._forest.trees())

    # -- layers

    async def _prepare_all(
        self,
        repository: Repository,
        origin: str,
        manifest: Manifest,
        config: ImageConfig,
        tails: dict[str, Future[bytes]],
        say: Callable[[str], None],
    ) -> list[Prepared]:
        found: dict[int, Prepared] = {}

        async def one(number: int) -> None:
            layer = manifest.layers[number]
            wanted = Wanted(layer, config.diff_ids[number], origin, tails.get(layer.digest))
            found[number] = await self._hold(repository, wanted, say)

        try:
            async with trio.open_nursery() as nursery:
                for number in range(len(manifest.layers)):
                    nursery.start_soon(one, number)
        except* LazyfsError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            with trio.CancelScope(shield=True):
                await self._drop([prepared.layer for prepared in found.values()])
            raise error from None
        except* trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._drop([prepared.layer for prepared in found.values()])
            raise
        return [found[number] for number in range(len(manifest.layers))]

    async def _hold(self, repository: Repository, wanted: Wanted, say: Callable[[str], None]) -> Prepared:
        """Return a layer with one more user, prepared by whoever comes first."""
        digest = wanted.descriptor.digest
        while True:
            prepared = self._layers.get(digest)
            if prepared is None:
                with self._whole.wanting(digest):
                    prepared = await self._preparing.run(digest, partial(self._prepare, repository, wanted, say))
                if self._layers.get(digest) is not prepared:
                    continue  # its last user went while we waited
            layer = prepared.layer
            layer.users += 1
            if layer.diff_id == wanted.diff_id and not layer.quarantine:
                if not isinstance(repository, OfflineRepository):
                    layer.repository, layer.origin = repository, wanted.origin
                return prepared
            # Somebody mounts the same blob under another diff ID: one of the two is false. The check tells which.
            try:
                await self.fillings.until_checked(layer)
                if layer.quarantine:
                    raise LayerQuarantined(digest, layer.quarantine)
                raise LayerQuarantined(digest, f"its diff ID is {layer.diff_id}, not {wanted.diff_id}")
            finally:
                with trio.CancelScope(shield=True):
                    await self._drop([layer])

    async def _prepare(self, repository: Repository, wanted: Wanted, say: Callable[[str], None]) -> Prepared:
        digest = wanted.descriptor.digest
        alive = partial(self._whole.keep_alive, digest)
        job = partial(self._preparer.prepare, repository, wanted, say, alive)
        if self._preparer.is_lazy(wanted.descriptor):
            prepared = await self._in_thread(job)
        else:
            prepared = await self._whole.run(repository.host, job)
        self._layers[digest] = prepared
        return prepared

    async def _drop(self, layers: list[ServedLayer]) -> None:
        """Give layers back, each as often as it stands in the list."""
        for layer in layers:
            layer.users -= 1
            if layer.users == 0:
                self._layers.pop(layer.digest, None)
                self.fetched = [sum(pair) for pair in zip(self.fetched, layer.bytes_by_priority, strict=True)]
                self.fillings.stop(layer)
                self._memory.forget_layer(layer.number)
                if layer.check is not None:
                    layer.check.spool.close()
                with trio.CancelScope(shield=True):  # or the layers behind this one would be held for good
                    await self._in_thread(layer.store.close)

    # -- trust

    async def _await_trust(self, reference: Reference, prepared: list[Prepared], say: Callable[[str], None]) -> None:
        """Wait for the whole check of layers from repositories that `lazy_from` does not list."""
        origin = reference.origin
        if self.fillings.trusts(origin):
            return
        for one in prepared:
            layer = one.layer
            if not layer.verified and not layer.quarantine:
                if isinstance(layer.repository, OfflineRepository):
                    raise ImageIncomplete(
                        reference.host,
                        f"layer {layer.digest} was not checked in full yet, and lazy_from does not list {origin}",
                        hint="mount it once with its registry, or lazyfs fetch it",
                    )
                say(f"layer {layer.digest[7:19]}: verified in full first, lazy_from does not list {origin}")
                await self.fillings.until_checked(layer)
            layer.ensure_readable()

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(job, limiter=self._limiter)
