"""`fetch`: an image completed in the store, checked, and pinned where that is wanted; nothing of it is shown."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.chunks.catalog import Catalog, Pin
from lazyfs.chunks.census import Census
from lazyfs.chunks.store import Store
from lazyfs.config import Settings
from lazyfs.errors import LayerQuarantined, LazyfsError, ManifestMissing, StoreFull, first_of
from lazyfs.mount.control import Say
from lazyfs.mount.images import Images
from lazyfs.mount.mounted_image import MountedImage
from lazyfs.mount.resolving import Pull
from lazyfs.oci import Manifest
from lazyfs.registry.config.access import Access
from lazyfs.units import format_size

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two reports of progress


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to fetch, as the call names it."""

    image: str
    platform: str | None
    plain_http: bool | None
    access: Access | None
    pull: Pull
    pin: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of it. Bytes; `fetched` crossed the network in its compressed form."""

    reference: str
    manifest_digest: str
    layers: int
    size: int  # of the layers' blobs
    fetched: int
    stored: int  # of the chunks, uncompressed
    pinned: bool
    notes: tuple[str, ...]


class Fetcher:
    """Fetch images side by side. Belongs to the trio loop; `_reserve` runs in threads."""

    def __init__(self, settings: Settings, images: Images, census: Census, store: Store, catalog: Catalog) -> None:
        self._settings = settings
        self._images = images
        self._census = census
        self._store = store
        self._catalog = catalog
        self._limiter = trio.CapacityLimiter(4)
        self._lock = threading.Lock()
        self._needs: dict[object, dict[str, int]] = {}  # bytes that each fetch under way needs, by layer

    async def fetch(self, wanted: Wanted, say: Say) -> Fetched:
        """Return once every byte of the image is in the store and checked. A checkpoint, as long as bytes come.

        Raise StoreFull before anything is fetched when the image can't fit beside what is pinned or being fetched;
        else as `Images.mount` and `Fillings.complete`. A cancelled fetch keeps what came so far.
        """
        before = 0

        def begin(manifest: Manifest) -> None:
            nonlocal before
            before = self._images.layers.fetched_of(layer.digest for layer in manifest.layers)
            self._begin(wanted, stack, manifest)

        with contextlib.ExitStack() as stack:
            image = await self._images.mount(
                wanted.image,
                wanted.platform,
                wanted.plain_http,
                say,
                pull=wanted.pull,
                check=begin,
                access=wanted.access,
            )
            try:
                # Now that their tables are here it is known what the layers take.
                await self._in_thread(partial(self._resize, wanted, image, stack))
                await self._complete(image, say)
                if wanted.pin:
                    await self._in_thread(partial(self._pin, image))
                pins = await trio.to_thread.run_sync(self._catalog.pins, limiter=self._limiter)
                return Fetched(
                    str(image.reference),
                    image.manifest.digest,
                    len(image.layers),
                    image.size,
                    max(0, self._images.layers.fetched_of(layer.digest for layer in image.manifest.layers) - before),
                    sum(layer.store.present_bytes for layer in image.distinct_layers()),
                    any(pin.image == image.manifest.digest for pin in pins),
                    image.remarks,
                )
            finally:
                with trio.CancelScope(shield=True):
                    await self._images.release(image)

    def state(self, image: str, platform: str | None) -> dict[str, Any]:
        """Return how much is here of an image that this node knows, as `image_state` answers. Blocking (local disk).

        `coming`: whatever is missing is being fetched; `preparing`: some of it by a way that shows no progress here.
        Raise ReferenceInvalid, ManifestMissing, LayerQuarantined.
        """
        reference = references.parse(image)
        manifest = self._images.resolver.known(reference, platform or oci.host_platform())
        if manifest is None:
            raise ManifestMissing(
                reference.host, f"{reference} is not on this node", hint="lazyfs fetch, mount or pull it first"
            )
        digests = {layer.digest: layer.size for layer in manifest.layers}
        # Looked at first: a layer whose fill has ended and that is not whole then has no room in the store.
        resting = {digest for digest in digests if self._images.fillings.rests(digest)}
        filled = digests.keys() - resting if self._settings.background else frozenset[str]()
        layers = [self._census.layer(digest) for digest in digests]
        for layer in layers:
            if layer.quarantine:
                raise LayerQuarantined(layer.digest, layer.quarantine)
        due = [layer for layer in layers if not (layer.complete and layer.verified)]
        with self._lock:
            fetched = {digest for needs in self._needs.values() for digest in needs}
        preparing = {layer.digest for layer in due if self._images.layers.is_preparing(layer.digest)}
        return {
            "reference": str(reference),
            "manifest_digest": manifest.digest,
            "layers": len(layers),
            "missing": [layer.digest for layer in due],
            "present": sum(layer.present for layer in layers),
            "full": sum(layer.full or layer.size or digests[layer.digest] for layer in layers),
            "whole": not due,
            "coming": all(
                layer.digest in preparing or (layer.used and (layer.digest in filled or layer.digest in fetched))
                for layer in due
            ),
            "preparing": bool(preparing),
        }

    async def _complete(self, image: MountedImage, say: Say) -> None:
        layers = image.distinct_layers()
        total = sum(layer.store.full_bytes for layer in layers)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report, image, total, say)
                async with trio.open_nursery() as fetches:
                    for layer in layers:
                        fetches.start_soon(self._images.fillings.complete, layer)
                nursery.cancel_scope.cancel()
        except* LazyfsError as group:
            raise first_of(group) from None
        say("", done=total, total=total)

    async def _report(self, image: MountedImage, total: int, say: Say) -> None:
        while True:
            done = sum(layer.store.present_bytes for layer in image.distinct_layers())
            say("", done=min(done, total), total=total)
            await trio.sleep(_LOOK)

    def _pin(self, image: MountedImage) -> None:
        pin = Pin(str(image.reference), image.platform, image.manifest.digest)
        layers = [layer.digest for layer in image.manifest.layers]
        self._catalog.pin(pin, [image.manifest.digest, image.manifest.config.digest, *layers])

    # -- room

    def _begin(self, wanted: Wanted, stack: contextlib.ExitStack, manifest: Manifest) -> None:
        """Reserve what the layers take at least, as far as that is known by now."""
        sizes = {}
        for descriptor in manifest.layers:
            layer = self._census.layer(descriptor.digest)
            sizes[descriptor.digest] = max(layer.disk, layer.full) if layer.full else descriptor.size
        stack.enter_context(self._reserved(wanted, sizes))
        stack.enter_context(self._store.hold(sizes))

    def _resize(self, wanted: Wanted, image: MountedImage, stack: contextlib.ExitStack) -> None:
        sizes = {
            layer.digest: max(self._store.directory_usage(layer.digest), layer.store.full_bytes)
            for layer in image.distinct_layers()
        }
        stack.enter_context(self._reserved(wanted, sizes))

    @contextlib.contextmanager
    def _reserved(self, wanted: Wanted, sizes: dict[str, int]) -> Iterator[None]:
        key = object()
        with self._lock:
            self._check_room(wanted, sizes)
            self._needs[key] = sizes
        try:
            yield
        finally:
            with self._lock:
                del self._needs[key]

    def _check_room(self, wanted: Wanted, sizes: dict[str, int]) -> None:
        """Raise StoreFull unless these layers fit beside the pinned ones and those of other fetches."""
        others: dict[str, int] = {}
        for needs in self._needs.values():
            for digest, size in needs.items():
                others[digest] = max(size, others.get(digest, 0))
        pinned = {digest: self._store.directory_usage(digest) for digest in self._catalog.pinned()}
        need = sum(sizes.values())
        kept = sum(size for digest, size in (others | pinned).items() if digest not in sizes)
        bound = self._store.budget.bound
        if need + kept > bound:
            beside = f" and {format_size(kept)} are pinned or being fetched" if kept else ""
            raise StoreFull(
                f"{wanted.image} takes {format_size(need)} at least, the store may hold {format_size(bound)}{beside}",
                hint="set a larger store_size" + (", or release pins: lazyfs cache unpin" if kept else ""),
            )
        missing = need - sum(min(size, self._store.directory_usage(digest)) for digest, size in sizes.items())
        try:
            found = os.statvfs(self._store.root)
        except OSError as error:
            log.info("the disk's free space is not known: %s", error)
            return
        # What the store holds beyond what must stay can be evicted for it.
        evictable = max(0, self._store.budget.used - kept - (need - missing))
        if missing > found.f_bavail * found.f_frsize + evictable:
            raise StoreFull(
                f"{wanted.image} needs {format_size(missing)} more on the disk of {self._store.root}, "
                f"{format_size(found.f_bavail * found.f_frsize)} are free",
                hint="free some space, or take another --root",
            )

    async def _in_thread(self, job: partial[None]) -> None:
        await trio.to_thread.run_sync(job, limiter=self._limiter)
