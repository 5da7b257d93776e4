"""Images on their way into the forest and out of it: layers shared, trees built, background work started and ended."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.chunks.census import Census
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.read import Reader
from lazyfs.chunks.schedule import Scheduler
from lazyfs.config import Settings
from lazyfs.errors import (
    BlobMissing,
    DaemonFault,
    ImageIncomplete,
    LazyfsError,
    ManifestMissing,
    RegistryError,
    first_of,
)
from lazyfs.limits import DOCUMENT_THREADS
from lazyfs.log import fields
from lazyfs.mount import missing
from lazyfs.mount.ahead import Ahead, command_of
from lazyfs.mount.donors import Donors
from lazyfs.mount.filling import Fillings, guard
from lazyfs.mount.forest import Forest, Planted
from lazyfs.mount.layers import Layers
from lazyfs.mount.mounted_image import LayerFacts, MountedImage
from lazyfs.mount.planting import Planting
from lazyfs.mount.prepared import Prepared, Wanted
from lazyfs.mount.preparing import Preparer
from lazyfs.mount.resolving import Pull, Resolver
from lazyfs.mount.starts import Start, Starts
from lazyfs.mount.tracing import Recorder
from lazyfs.mount.whole_layers import WholeLayers
from lazyfs.oci import Descriptor, ImageConfig, Manifest
from lazyfs.reference import Reference
from lazyfs.registry.config.access import Access, of_node
from lazyfs.registry.config.node_logins import NodeLogins
from lazyfs.registry.health import Health
from lazyfs.registry.hops import OnHop
from lazyfs.registry.http.rate_limits import LimitTeller
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import doubt_tag

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        reader: Reader,
        preparer: Preparer,
        census: Census,
        starts: Starts,
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
        self._reader = reader
        self._preparer = preparer
        self._census = census
        self.starts = starts
        self.fillings.before = starts.until_idle
        self._nursery = nursery
        self.on_hop = on_hop
        self._transport = Transport()
        self._pool = ThreadPoolExecutor(DOCUMENT_THREADS, "documents")
        self.resolver = resolver(self._pool)
        self._limiter = trio.CapacityLimiter(DOCUMENT_THREADS)
        self._verdicts = trio.CapacityLimiter(2)  # at once: whoever prepares the layer anew must find it
        whole = WholeLayers(scheduler, preparer.unpacking.lines)
        self.layers = Layers(preparer, self.fillings, reader, whole, self._limiter)
        self.planting = Planting(settings.root / "trees", forest, scheduler, self.fillings, preparer, self.layers.drop)

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
        recorder: Recorder | None = None,
        follow: bool = False,
    ) -> MountedImage:
        """Resolve an image and put its tree into the forest. A checkpoint, as long as the network takes.

        `access` is the user's; None: the node's, from the daemon's environment and its image service.
        `check` is called with the manifest, in a thread, before any layer is fetched; what it raises is raised.
        `recorder` hears of all layers, until it is detached. `follow`: something is about to start of it, so
        that traces are replayed and learned. Each call is paired with one `release`. Raise ReferenceInvalid,
        PlatformMissing, RegistryError, TrustError, FormatError or StoreError; then nothing is held.
        """
        reference = references.parse(image)
        wanted_platform = platform or oci.host_platform()
        if self._settings.offline:
            pull = Pull.NEVER
        if reference.transport != "docker":
            pull = Pull.NEWER  # it lies on this machine
        limits = LimitTeller(self.on_hop, say)
        repository = await self._in_thread(partial(self.open, reference, plain_http, pull, access, limits))
        resolved = await self._in_thread(partial(self.resolver.resolve, repository, reference, wanted_platform, pull))
        # The config comes beside the tails; only its diff IDs are needed before a layer is in use.
        manifest = resolved.manifest
        if check is not None:
            await self._in_thread(partial(check, manifest))
        remarks = await self._in_thread(partial(missing.check, self._census, reference, resolved, pull))
        with contextlib.ExitStack() as undo:
            try:
                tails = self._preparer.begin_tails(repository, manifest, self._pool, self.layers.is_preparing)
                start = self._begin_start(repository, reference.origin, manifest, tails, undo) if follow else None
                config = await self._in_thread(resolved.config.result)
                prepared = await self._prepare_all(repository, reference.origin, manifest, config, tails, say)
            except RegistryError as error:
                if isinstance(error, (BlobMissing, ManifestMissing)) and doubt_tag(repository, reference):
                    return await self.mount(
                        image,
                        platform,
                        plain_http,
                        say,
                        pull=pull,
                        check=check,
                        access=access,
                        recorder=recorder,
                        follow=follow,
                    )
                if not resolved.known or not (error.temporary or pull is Pull.NEVER):
                    raise
                gone = await self._in_thread(partial(self._census.missing, manifest))
                raise missing.incomplete(reference, gone, "" if pull is Pull.NEVER else error.message) from None
            if recorder is not None:
                recorder.attach(one.layer for one in prepared)
            if start is not None:
                held = [one.layer for one in prepared]
                self.starts.mounted(start, held, trusted=self.fillings.trusts(reference.origin))
            try:
                planted = await self.planting.plant(prepared)
            except BaseException:
                await self.layers.drop([one.layer for one in prepared])
                raise
            try:
                await self._await_trust(reference, prepared, say)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.planting.release(planted)
                raise
            facts = tuple(LayerFacts(one.layer, not one.reason, one.reason) for one in prepared)
            undo.pop_all()
            said = (*remarks, *limits.remarks)
            return MountedImage(reference, wanted_platform, manifest, config, planted, facts, said, start)

    async def regain(
        self, repository: Repository, origin: str, layers: Sequence[tuple[Descriptor, str]]
    ) -> tuple[Planted, tuple[LayerFacts, ...]]:
        """Plant a tree again that a daemon before us showed, of its layers with their diff IDs, base first.

        A checkpoint; needs no registry, as long as the store has what it had. Each call is paired with one
        `planting.release`. Raise as `mount`.
        """
        wanted = [Wanted(descriptor, diff_id, origin, regained=True) for descriptor, diff_id in layers]
        prepared = await self._hold_all(repository, wanted, lambda text: None)
        try:
            planted = await self.planting.plant(prepared)
        except BaseException:
            await self.layers.drop([one.layer for one in prepared])
            raise
        return planted, tuple(LayerFacts(one.layer, not one.reason, one.reason) for one in prepared)

    def _begin_start(
        self,
        repository: Repository,
        origin: str,
        manifest: Manifest,
        tails: dict[str, Future[bytes]],
        undo: contextlib.ExitStack,
    ) -> Start | None:
        """Begin to look for a trace, behind the requests that the mount needs; None where no layer is lazy."""
        if not any(map(self._preparer.is_lazy, manifest.layers)):
            return None
        digests = [layer.digest for layer in manifest.layers]
        trusted = self.fillings.trusts(origin)
        start = self.starts.begin(repository, manifest.digest, digests, whole=True, trusted=trusted)
        undo.callback(self.starts.end, start)
        if {layer.digest for layer in manifest.layers} == tails.keys():  # else some come another way
            self._when_done(tails.values(), partial(self.starts.clear, start))
        return start

    @staticmethod
    def _when_done(futures: Iterable[Future[bytes]], job: Callable[[], None]) -> None:
        """Have the loop do a job once these are all done. Doesn't wait."""
        token = trio.lowlevel.current_trio_token()
        left = list(futures)

        def look() -> None:
            if all(future.done() for future in left):
                job()

        def told(_: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(look, idempotent=True)

        for future in left:
            future.add_done_callback(told)

    def open(
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
            access=access or of_node(self._settings.certs_dir),
        )
        return open_repository(reference, options)

    @property
    def health(self) -> Health:
        """What is known of the hosts that images come from."""
        return self._transport.health

    @property
    def node_logins(self) -> NodeLogins:
        """What the node's image service was told."""
        return self._transport.node_logins

    def expect_exec(self, image: MountedImage, entrypoint: str | None, command: list[str]) -> None:
        """Begin to fetch what a container of the image will execute. Doesn't wait."""
        words = command_of(image.config.process, entrypoint, command)

        async def run() -> None:
            if image.start is not None:
                await self.starts.until_over(image.start)  # what is known is better than a guess
            await self._ahead.run(image.planted, words)

        self._nursery.start_soon(guard, "ahead", run)

    async def release(self, image: MountedImage) -> None:
        """Give one mount of an image back; with the last one its tree and layers go. A checkpoint."""
        if image.start is not None:
            self.starts.end(image.start)
        await self.planting.release(image.planted)

    async def close(self) -> None:
        """End all background work and close all layers and connections."""
        await self.starts.close()
        self.fillings.stop_all()
        for planted in self._forest.trees():
            await self.layers.drop(self._forest.uproot(planted))
        await self._in_thread(self._donors.close)
        await self._in_thread(self._preparer.builder.close)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    def quarantine(self, layer: ServedLayer, reason: str) -> None:
        """Stop reading from a layer: every further read of it is EIO. Called from the loop."""
        if layer.quarantine:
            return
        log.error("quarantined: %s", reason, extra=fields(layer=layer.digest))
        layer.quarantine = reason
        self._reader.forget(layer)
        note = partial(self._preparer.set_quarantine, layer, reason)
        self._nursery.start_soon(guard, "quarantine", partial(trio.to_thread.run_sync, note, limiter=self._verdicts))
        self.fillings.finish_check(layer)

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
        wanted = [
            Wanted(layer, diff_id, origin, tails.get(layer.digest))
            for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
        ]
        return await self._hold_all(repository, wanted, say)

    async def _hold_all(
        self, repository: Repository, layers: Sequence[Wanted], say: Callable[[str], None]
    ) -> list[Prepared]:
        found: dict[int, Prepared] = {}

        async def one(number: int, wanted: Wanted) -> None:
            found[number] = await self.layers.hold(repository, wanted, say)

        try:
            async with trio.open_nursery() as nursery:
                for number, wanted in enumerate(layers):
                    nursery.start_soon(one, number, wanted)
        except* LazyfsError as group:
            error = first_of(group)
            with trio.CancelScope(shield=True):
                await self.layers.drop([prepared.layer for prepared in found.values()])
            raise error from None
        except* trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self.layers.drop([prepared.layer for prepared in found.values()])
            raise
        return [found[number] for number in range(len(layers))]

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
                if not layer.verified and not layer.quarantine:
                    raise DaemonFault(f"nothing checks layer {layer.digest}", hint="see lazyfsd.log; try again")
            layer.ensure_readable()

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(job, limiter=self._limiter)
