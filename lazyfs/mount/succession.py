"""Taking over from a daemon that died: all that it showed is planted again, before requests are answered.

A standby does most of that beforehand, and follows what changes. Readers wait for the rest, so it asks no registry and
waits for none. What can't be had again is left out: its readers get errors, all others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.read import Reader
from lazyfs.chunks.store import Store
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, StoreBroken
from lazyfs.limits import REPLANT_TIMEOUT
from lazyfs.mount import chains, claims, mounted
from lazyfs.mount.chains import Chains
from lazyfs.mount.forest import Planted
from lazyfs.mount.images import Images
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.mounted import Mounted
from lazyfs.mount.mounted_image import LayerFacts, MountedImage
from lazyfs.mount.resolving import Pull
from lazyfs.registry.config import access as accesses
from lazyfs.units import MiB

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between looks at what the daemon that serves shows
_LOOK_AT_LAYERS = 5.0  # seconds between looks whether a layer of that is known by another table, or false, meanwhile
_REHEARSED, _LOOKED_AT = 8, 64  # chunks to rehearse with, and in how many of each layer they are looked for


@dataclass(frozen=True, slots=True)
class _Ready:
    """What is planted already. `of`: all that it depends on, see `Succession._signs`."""

    of: object
    planted: Planted
    facts: tuple[LayerFacts, ...]
    documents: tuple[oci.Manifest, oci.ImageConfig] | None  # None: a chain, which needs none


class Succession:
    """What is taken over. Belongs to the trio loop, before the session serves."""

    def __init__(
        self,
        settings: Settings,
        inheritance: Inheritance,
        images: Images,
        catalog: Catalog,
        store: Store,
        reader: Reader,
        mounts: Mounted,
        shown: Chains,
    ) -> None:
        self._settings = settings
        self._inheritance = inheritance
        self._images = images
        self._catalog = catalog
        self._store = store
        self._reader = reader
        self._mounts = mounts
        self._chains = shown
        self._ready: dict[str, _Ready] = {}
        self._late: dict[str, dict[str, Any]] = {}  # what could not be planted in time when we took over
        self._told: set[str] = set()  # of what it was said that it is refused
        self._refused: dict[str, object] = {}  # signs of what could not be planted: not tried again while they last

    async def follow(self, is_warm: Callable[[], None]) -> None:
        """Keep planted what the daemon that serves shows, until cancelled. `is_warm` is called after the first look.

        Others go on using the store: nothing is fetched, and nothing on the disk is changed but what is counted.
        """
        self._images.fillings.rest()
        self._store.follow()
        await self._prepare()
        await self._rehearse()
        looked, told = trio.current_time(), False
        while True:
            if not told and self._ready.keys() == self._values().keys():  # an upgrade that could not show all waits
                is_warm()
                told = True
            await trio.sleep(_LOOK)
            is_due = trio.current_time() > looked + _LOOK_AT_LAYERS
            if self._inheritance.look() or is_due:
                if is_due:
                    self._refused.clear()  # it may have been a busy disk
                await self._prepare()
                looked = trio.current_time()

    async def _prepare(self) -> None:
        values = self._values()
        signs = await trio.to_thread.run_sync(self._all_signs, values)
        for name in list(self._ready):
            if signs.get(name) != self._ready[name].of:
                await self._let_go(name)
        self._refused = {name: of for name, of in self._refused.items() if signs.get(name) == of}
        for name, of in signs.items():
            if of is None or name in self._ready or name in self._refused:
                continue
            try:
                with trio.fail_after(REPLANT_TIMEOUT):
                    self._ready[name] = await self._plant(name, values[name], of)
            except Exception as error:
                if name not in self._told:
                    log.warning("%s could not be taken over: %s", name, error or "its files do not come")
                    self._told.add(name)
                self._refused[name] = of

    async def _rehearse(self) -> None:
        """Read some chunks that are here, as readers will: what runs for the first time takes ten times as long."""
        layers = {fact.layer for ready in self._ready.values() for fact in ready.facts}
        here = (
            (layer, chunk)
            for layer in layers
            if not layer.is_plain
            for chunk in range(min(layer.table.chunk_count, _LOOKED_AT))
            if layer.table.chunk_size[chunk] <= MiB and layer.store.has(chunk)
        )
        async with trio.open_nursery() as nursery:
            for layer, chunk in islice(here, _REHEARSED):
                nursery.start_soon(self._read_one, layer, chunk)

    async def _read_one(self, layer: ServedLayer, chunk: int) -> None:
        # Found right on the disk just now, it is read from there: nothing may be fetched.
        if await trio.to_thread.run_sync(layer.store.examine, chunk):
            with suppress(LazyfsError), trio.move_on_after(REPLANT_TIMEOUT):
                await self._reader.chunk(layer, chunk, Priority.DEMAND, chunk)

    async def _let_go(self, name: str) -> None:
        with trio.CancelScope(shield=True):
            await self._images.planting.release(self._ready.pop(name).planted)

    def _all_signs(self, values: dict[str, dict[str, Any]]) -> dict[str, object]:
        """Return all that planting each depends on; None: a layer is not there. Blocking, two system calls a layer."""
        stamp = cache(self._store.stamp)
        signs: dict[str, object] = {}
        for name, value in values.items():
            try:
                stamps = [stamp(layer["descriptor"]["digest"]) for layer in value["layers"]]
            except (KeyError, TypeError):  # of another release, perhaps: it is refused alone
                stamps = [None]
            told = [value.get(key) for key in ("reference", "manifest_digest", "plain_http", "access", "layers")]
            signs[name] = None if None in stamps else (stamps, told)
        return signs

    async def run(self) -> None:
        """Take all over, side by side, once the daemon before us has ended. A checkpoint, 10 s at most."""
        self._inheritance.own()
        for value in self._inheritance.values(mounted.LOGINS).values():
            with suppress(LazyfsError):
                self._images.node_logins.update(value.get("logins"))
        values = self._values()
        self._reserve_numbers(values)
        signs = self._all_signs(values)
        # All of these first: what somebody plants anew would be the layer that is open already, as it was known before.
        for name in [name for name, ready in self._ready.items() if signs.get(name) != ready.of]:
            await self._let_go(name)
        ready = [name for name in values if name in self._ready]
        for name in ready:
            await self._one(name, values[name])  # in the order in which they came
        async with trio.open_nursery() as nursery:
            for name in values:
                if name not in ready:
                    nursery.start_soon(self._one, name, values[name])

    async def clear(self) -> None:
        """Begin with the background's work, for which mounts may wait, and try once more what could not be had in time.

        A checkpoint, 10 s at most for each of these.
        """
        self._images.fillings.work()
        for name, value in list(self._late.items()):
            if self._values().get(name) is value:  # else somebody has let it go meanwhile, or shows it anew
                await self._one(name, value)
            if self._late.pop(name, None) is not None and self._values().get(name) is value:
                self._inheritance.remove(name)
        await trio.to_thread.run_sync(self._store.evictor.scan)  # others have written since we looked

    def _values(self) -> dict[str, dict[str, Any]]:
        return {**self._inheritance.values(mounted.PREFIX), **self._inheritance.values(chains.PREFIX)}

    async def _one(self, name: str, value: dict[str, Any]) -> None:
        ready: _Ready | None = None
        try:
            with trio.fail_after(REPLANT_TIMEOUT):
                ready = self._ready.pop(name, None) or await self._plant(name, value, None)
            if name.startswith(mounted.PREFIX):
                self._mount(name, value, ready)
            else:
                self._chain(name, value, ready)
            self._late.pop(name, None)
            return
        except trio.TooSlowError:
            log.error("%s can't be shown yet: its files do not come", name)
            self._late[name] = value
            return
        except LazyfsError as error:
            log.error("%s can't be shown any more: %s", name, error)
        except Exception:
            log.exception("%s can't be shown any more", name)
        if ready is not None:
            await self._images.planting.release(ready.planted)
        self._late.pop(name, None)
        self._inheritance.remove(name)

    def _reserve_numbers(self, values: dict[str, dict[str, Any]]) -> None:
        """Give out no number that the kernel knows: a catalog that was begun anew does not know them."""
        with suppress(LazyfsError):
            self._catalog.reserve(
                max((number for value in values.values() for number in value.get("numbers") or ()), default=0)
            )

    def _mount(self, name: str, value: dict[str, Any], ready: _Ready) -> None:
        assert ready.documents is not None
        reference = references.parse(value["reference"])
        image = MountedImage(reference, value["platform"], *ready.documents, ready.planted, ready.facts, (), None)
        self._mounts.regain(name.removeprefix(mounted.PREFIX), value, image)

    def _chain(self, name: str, value: dict[str, Any], ready: _Ready) -> None:
        self._chains.regain(claims.from_json(value), ready.planted, ready.facts)

    async def _plant(self, name: str, value: dict[str, Any], of: object) -> _Ready:
        claim = claims.from_json(value)
        documents = None
        if name.startswith(mounted.PREFIX):
            read = partial(self._documents, claim.manifest_digest)
            documents = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        reference = references.parse(claim.reference)
        access = None if claim.access is None else accesses.from_json(claim.access)
        pull = Pull.NEVER if self._settings.offline else Pull.NEWER
        repository = await trio.to_thread.run_sync(
            partial(self._images.open, reference, claim.plain_http, pull, access, self._images.on_hop),
            abandon_on_cancel=True,
        )
        planted, facts = await self._images.regain(repository, reference.origin, claim.layers)
        if value.get("numbers") not in (None, claims.numbers_of(planted, facts)):
            # The kernel knows files by these: under others it would be given those of another layer.
            await self._images.planting.release(planted)
            raise StoreBroken("its layers have other numbers than the kernel knows them by: the catalog was begun anew")
        return _Ready(of, planted, facts, documents)

    def _documents(self, digest: str) -> tuple[oci.Manifest, oci.ImageConfig]:
        raw = self._catalog.document(digest)
        manifest = None if raw is None else oci.parse_manifest(raw)
        raw = None if manifest is None else self._catalog.document(manifest.config.digest)
        if manifest is None or raw is None:
            raise StoreBroken(f"the documents of {digest} are not in the store any more")
        return manifest, oci.parse_config(raw)
