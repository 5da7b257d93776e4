"""Background work of layers in use: prefetch, fill, the whole check; and the wait of those who need it done."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from lazyfs.chunks.fill import Filler
from lazyfs.chunks.host import STEP_BACK
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.read import Reader
from lazyfs.config import Settings
from lazyfs.errors import DaemonFault, ReadDeadline, StoreFull
from lazyfs.limits import FILL_PATIENCE, TROUBLE_PATIENCE
from lazyfs.mount.donors import Donors
from lazyfs.mount.preparing import Preparer
from lazyfs.registry.offline import OfflineRepository

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between looks at how far a layer is
_ROUNDS = 3  # fills of one layer after which its chunks don't stay


@dataclass(eq=False, slots=True)
class _Filling:
    """The background work of one layer, from its first user to its last."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    checked: trio.Event = field(default_factory=trio.Event)  # the whole check has ended, either way
    wanted: trio.Event = field(default_factory=trio.Event)  # somebody wants the layer complete now
    idle: trio.Event = field(default_factory=trio.Event)  # nothing is under way
    ended: bool = False


class Fillings:
    """One task a layer. Belongs to one trio loop."""

    def __init__(
        self,
        settings: Settings,
        nursery: trio.Nursery,
        filler: Filler,
        reader: Reader,
        preparer: Preparer,
        donors: Donors,
        quarantine: Callable[[ServedLayer, str], None],
    ) -> None:
        self._settings = settings
        self._nursery = nursery
        self._filler = filler
        self._reader = reader
        self._preparer = preparer
        self._donors = donors
        self._quarantine = quarantine
        self._limiter = trio.CapacityLimiter(4)
        # Waits while something more urgent is being fetched ahead for a layer's image.
        self.before: Callable[[ServedLayer], Awaitable[None]] = _nothing
        self._fillings: dict[str, _Filling] = {}
        self._resting: dict[str, ServedLayer] | None = None  # what begins when we work
        self._works = trio.Event()
        self._works.set()
        self._working: Counter[str] = Counter()  # tasks that have not ended yet, their threads being in a request

    def start(self, layer: ServedLayer) -> None:
        """Begin with a layer, unless that has been done. Doesn't wait."""
        if self._resting is not None:
            self._resting[layer.digest] = layer
        elif layer.digest not in self._fillings:
            filling = self._fillings[layer.digest] = _Filling()
            self._working[layer.digest] += 1
            self._nursery.start_soon(guard, "background", partial(self._work, layer, filling))

    def stop(self, layer: ServedLayer) -> None:
        """End the work on a layer that nobody uses any more. Doesn't wait."""
        if self._resting is not None:
            self._resting.pop(layer.digest, None)
        filling = self._fillings.pop(layer.digest, None)
        if filling is not None:
            filling.scope.cancel()

    def rest(self) -> None:
        """Begin with nothing before `work`: another daemon does what is to be done."""
        self._resting, self._works = {}, trio.Event()

    def work(self) -> None:
        """Begin with what was to be begun meanwhile. Doesn't wait."""
        layers, self._resting = self._resting, None
        self._works.set()
        for layer in (layers or {}).values():
            self.start(layer)

    def busy(self) -> frozenset[str]:
        """Return the digests of layers that are worked on, even where nobody uses them any more. From any thread."""
        return frozenset(list(self._working))

    def stop_all(self) -> None:
        """End all work. Doesn't wait."""
        for filling in self._fillings.values():
            filling.scope.cancel()

    def finish_check(self, layer: ServedLayer) -> None:
        """Wake those who wait for a layer's check: there is a verdict."""
        filling = self._fillings.get(layer.digest)
        if filling is not None:
            filling.checked.set()

    def trusts(self, origin: str) -> bool:
        """Tell whether `lazy_from` lists a `Reference.origin`: its layers are used before the whole check has ended."""
        return any(fnmatch.fnmatchcase(origin, pattern) for pattern in self._settings.lazy_from)

    async def _work(self, layer: ServedLayer, filling: _Filling) -> None:
        try:
            with filling.scope:
                await self._fill(layer, filling)
        finally:
            filling.ended = True
            filling.idle.set()
            self._working[layer.digest] -= 1
            if not self._working[layer.digest]:
                del self._working[layer.digest]

    async def _fill(self, layer: ServedLayer, filling: _Filling) -> None:
        await self._let_traces_pass(layer, filling)
        if self._settings.prefetch and layer.table.landmark:
            await self._filler.prefetch(layer)
        due = layer.check is not None or not layer.store.complete
        if due and not self._works_ahead(layer):
            await filling.wanted.wait()
        while True:
            filling.wanted = trio.Event()
            was_verified = layer.verified
            false = await self._filler.fill(layer)
            if false:
                self._quarantine(layer, false)
                return
            if layer.verified and not was_verified:
                await self._in_thread(partial(self._preparer.set_verified, layer))
            filling.checked.set()
            await self._in_thread(partial(self._donors.add, layer))
            filling.idle.set()
            await filling.wanted.wait()

    async def _let_traces_pass(self, layer: ServedLayer, filling: _Filling) -> None:
        """Wait while what a trace tells of is fetched, for a while, and not where somebody wants the layer complete."""
        with trio.move_on_after(STEP_BACK) as scope:
            async with trio.open_nursery() as nursery:

                async def until_wanted() -> None:
                    await filling.wanted.wait()
                    scope.cancel()

                nursery.start_soon(until_wanted)
                await self.before(layer)
                nursery.cancel_scope.cancel()

    def _works_ahead(self, layer: ServedLayer) -> bool:
        """Tell whether a layer is to be fetched before anybody asks for it."""
        if isinstance(layer.repository, OfflineRepository):
            return False
        return self._settings.background or (layer.check is not None and not self.trusts(layer.origin))

    async def _in_thread(self, job: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(job, limiter=self._limiter)

    def rests(self, digest: str) -> bool:
        """Tell whether all is done that would be for a layer in use, its chunks kept or not. From any thread."""
        filling = self._fillings.get(digest)
        return filling is not None and filling.idle.is_set()

    # -- waiting

    async def until_checked(self, layer: ServedLayer) -> None:
        """Wait for the end of a layer's whole check, for as long as bytes of it come. Raise ReadDeadline.

        Raise TableInvalid where the layer's own table is damaged: the check would wait for a sound one.
        """
        await trio.to_thread.run_sync(layer.table.ensure_names)
        await self._works.wait()
        filling = self._fillings.get(layer.digest)
        patience = self._settings.read_timeout or FILL_PATIENCE
        while filling is not None and not filling.checked.is_set():
            before = sum(layer.bytes_by_priority)
            filling.wanted.set()
            with trio.move_on_after(patience), self._filler.awaited(layer):
                await filling.checked.wait()
            if not filling.checked.is_set() and sum(layer.bytes_by_priority) == before:
                raise ReadDeadline(patience, f"the check of layer {layer.digest} does not go on")

    async def complete(self, layer: ServedLayer) -> None:
        """Have every byte of a layer in the store, and the layer checked. A checkpoint, as long as bytes come.

        Raise what keeps it from that: RegistryError, ReadDeadline, LayerQuarantined, or StoreFull when the chunks don't
        stay.
        """
        layer.collected += 1
        try:
            with self._filler.awaited(layer):
                await self._complete(layer)
        finally:
            layer.collected -= 1

    async def _complete(self, layer: ServedLayer) -> None:
        await self._works.wait()
        for _ in range(_ROUNDS):
            layer.ensure_readable()
            if layer.verified and layer.store.complete:
                return
            if layer.is_plain:
                await self._reader.refill(layer)
                continue
            filling = self._fillings.get(layer.digest)
            if filling is None or filling.ended:
                raise DaemonFault(f"nothing fetches layer {layer.digest} any more", hint="see lazyfsd.log; try again")
            if filling.idle.is_set():
                filling.idle = trio.Event()
            filling.wanted.set()
            await self._until_idle(layer, filling.idle)
        layer.ensure_readable()
        if not (layer.verified and layer.store.complete):
            raise StoreFull(
                f"layer {layer.digest} was fetched and is not whole: the store does not keep its chunks",
                hint="lazyfs status tells why: store_size is too small, or its disk is full or fails",
            )

    async def _until_idle(self, layer: ServedLayer, idle: trio.Event) -> None:
        since, before = trio.current_time(), -1
        while not idle.is_set():
            with trio.move_on_after(_LOOK):
                await idle.wait()
            trouble = layer.trouble
            if trouble is not None and not trouble.temporary:
                raise trouble
            arrived = sum(layer.bytes_by_priority)
            if arrived != before:
                since, before = trio.current_time(), arrived
            patience = self._settings.read_timeout or FILL_PATIENCE
            if trouble is not None:
                patience = min(patience, TROUBLE_PATIENCE)
            if trio.current_time() - since >= patience and not idle.is_set():
                raise trouble or ReadDeadline(patience, f"layer {layer.digest} does not go on")


async def _nothing(layer: ServedLayer) -> None:
    """Wait for nothing."""


async def guard(what: str, work: Callable[[], Awaitable[object]]) -> None:
    """Run background work; whatever it raises, the daemon and its readers go on."""
    try:
        await work()
    except Exception:
        log.exception("%s work broke", what)
