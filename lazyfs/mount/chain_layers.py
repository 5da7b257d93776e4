"""Layers of chains made ready: side by side, each within its call's deadline, and in no other registry's way."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import trio

from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import DaemonFault, ImageIncomplete, LazyfsError, first_of
from lazyfs.limits import BUILDERS, LOCAL_THREADS, MAX_REFUSED, MAX_WAITING_TOCS, SETTLE_TIMEOUT
from lazyfs.mount.apart import Apart, Links
from lazyfs.mount.filling import Fillings
from lazyfs.mount.keeping import Keeping
from lazyfs.mount.layers import Layers
from lazyfs.mount.prepared import Prepared, TooLarge, Wanted
from lazyfs.mount.preparing import Preparer
from lazyfs.mount.toc_parts import TocParts
from lazyfs.oci import Descriptor
from lazyfs.reference import Reference
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB

T = TypeVar("T")

_LARGE = 1 * MiB  # compressed bytes of a large one
_LOOK = 0.02
_TAILS_FIRST = 0.1  # seconds that a table lets TOCs go first
_PERSISTENT = (
    1024  # layers of a host that come even where nobody waits for them any more: calls are made again and again
)


@dataclass(frozen=True, slots=True)
class ChainSource:
    """Where the layers of a chain come from, and what a call may take."""

    reference: Reference
    repository: Repository
    deadline: float
    largest: int | None = None  # bytes of a layer without TOC that may be fetched in full; None: any
    access: dict[str, Any] | None = None  # the caller's, as it was said: secrets

    def wanted(self, descriptor: Descriptor, diff_id: str) -> Wanted:
        """Return one of the layers, as the preparer wants to have it told."""
        return Wanted(
            descriptor, diff_id, self.reference.origin, largest=self.largest, deadline=self.deadline
        )  # fmt: skip


class ChainLayers:
    """Hold layers for chains. Belongs to one trio loop."""

    def __init__(
        self,
        layers: Layers,
        fillings: Fillings,
        preparer: Preparer,
        keeping: Keeping,
        apart: Apart,
        links: Links,
    ) -> None:
        self._layers = layers
        self._fillings = fillings
        self._preparer = preparer
        self._keeping = keeping
        self._apart = apart
        self._links = links
        self._local = trio.CapacityLimiter(LOCAL_THREADS)
        self._builders = {large: trio.CapacityLimiter(BUILDERS) for large in (False, True)}
        self._promised: Counter[str] = Counter()  # layers that are being kept ready in the background
        self._promises: dict[str, tuple[object, str]] = {}  # what was said of them, and their diff IDs
        self._tails: SingleFlight[object, TocParts | str] = SingleFlight()
        self._waiting = 0
        self._persistent: Counter[str] = Counter()  # layers that come whoever waits for them, by host
        self._refused: OrderedDict[tuple[object, ...], str] = OrderedDict()  # TOCs that are malformed, and why

    async def hold(
        self, source: ChainSource, descriptor: Descriptor, diff_id: Callable[[], Awaitable[str]]
    ) -> Prepared:
        """Return a layer with one more user. A checkpoint; whoever is cancelled in here holds nothing.

        `diff_id` is awaited beside the request for the layer's TOC. Raise as `Layers.hold`.
        """
        wanted = await self._look(source, descriptor, diff_id)
        # A layer of a chain that is to be shown is needed sooner or later: what can't come in time comes for the next
        # call, which else would begin anew for ever.
        host = source.repository.host
        persist = source.largest is None and self._persistent[host] < _PERSISTENT
        give_back = self._keep if persist else self.drop

        async def hold() -> Prepared:
            self._persistent[host] += persist
            try:
                return await self._hold(source, wanted)
            finally:
                self._persistent[host] -= persist
                if not self._persistent[host]:
                    del self._persistent[host]

        return await self._apart.run(hold, give_back, persist=persist)

    async def hold_all(self, source: ChainSource, wanted: Sequence[tuple[Descriptor, str]]) -> list[Prepared]:
        """Hold layers, told with their diff IDs, side by side, each once it may be used; or none. A checkpoint.

        Raise as `Layers.hold` and `await_trust`.
        """
        found: dict[int, Prepared] = {}

        async def one(number: int, descriptor: Descriptor, told: str) -> None:
            async def diff_id() -> str:
                return told

            found[number] = await self.hold(source, descriptor, diff_id)
            await self.await_trust(source, found[number])

        try:
            async with trio.open_nursery() as nursery:
                for number, (descriptor, told) in enumerate(wanted):
                    nursery.start_soon(one, number, descriptor, told)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                for prepared in found.values():
                    await self.drop(prepared)
            if isinstance(error, BaseExceptionGroup):
                failed, rest = error.split(LazyfsError)
                if failed is not None and (rest is None or rest.split(trio.Cancelled)[1] is None):
                    raise first_of(failed) from None
            raise
        return [found[number] for number in range(len(wanted))]

    async def promise(
        self, source: ChainSource, descriptor: Descriptor, diff_id: Callable[[], Awaitable[str]]
    ) -> Prepared | None:
        """Do as `hold`, but return None as soon as the layer's TOC is here and its digest right, where that is enough.

        The table is built, and the layer kept, in the background: that takes 26 µs an entry. A TOC that can't be used
        after all is remembered; its layer is then fetched in full when it is to be shown.
        """
        wanted = await self._look(source, descriptor, diff_id)
        if self._waiting > MAX_WAITING_TOCS and wanted.parts is not None:
            wanted = replace(wanted, parts=TocParts({}, doubtful=True))
        if wanted.parts is not None and not wanted.parts.doubtful and self.trusts(source):
            self._waiting += wanted.parts.size
            self._promised[descriptor.digest] += 1
            self._promises[descriptor.digest] = _claims(descriptor), wanted.diff_id
            self._apart.begin(partial(self._fulfil, source, wanted))
            return None
        if self.trusts(source) and self._promises.get(descriptor.digest) == (_claims(descriptor), wanted.diff_id):
            return None  # as promised to somebody else just now
        return await self._apart.run(partial(self._hold, source, wanted), self.drop)

    async def _fulfil(self, source: ChainSource, wanted: Wanted) -> None:
        try:
            await self._let_tails_pass()
            await self._keep(await self._hold(source, wanted))
        finally:
            self._waiting -= wanted.parts.size if wanted.parts is not None else 0
            self._promised[wanted.descriptor.digest] -= 1
            if not self._promised[wanted.descriptor.digest]:
                del self._promised[wanted.descriptor.digest]
                self._promises.pop(wanted.descriptor.digest, None)

    async def _let_tails_pass(self) -> None:
        """Wait while TOCs are on their way, a moment at most: somebody waits for those, and tables take processors."""
        with trio.move_on_after(_TAILS_FIRST):
            while len(self._tails):
                await trio.sleep(_LOOK / 4)

    async def settle(self, digests: Iterable[str]) -> None:
        """Wait until what was begun for these layers, and nobody waits for, has ended. A checkpoint, 10 s at most."""
        wanted = set(digests)
        with trio.move_on_after(SETTLE_TIMEOUT):
            while any(self._promised[one] for one in wanted) or wanted & (self._fillings.busy() - self._layers.held()):
                await trio.sleep(_LOOK)

    async def _look(self, source: ChainSource, descriptor: Descriptor, diff_id: Callable[[], Awaitable[str]]) -> Wanted:
        """Fetch a layer's TOC, unless nothing of it is missing. Raise TooLarge and what is known against the layer."""
        parts: TocParts | str | None = None
        while self._promised[descriptor.digest] and not self._layers.is_coming(descriptor.digest):
            await trio.sleep(_LOOK / 4)  # its TOC is here, and its table lets others' TOCs pass
        if not await self._seems_here(descriptor):
            parts = await self._fetch_parts(source, descriptor)
        wanted = source.wanted(descriptor, await diff_id())
        if not self._layers.is_coming(descriptor.digest):
            known = await self.in_thread(partial(self._preparer.knows, wanted))
            if known:
                parts = None
            elif parts is None:
                parts = await self._fetch_parts(source, descriptor)
        elif parts is None:
            parts = TocParts({}, doubtful=True)  # whoever makes it ready may fail: then we ask our own registry
        if not isinstance(parts, str):
            return replace(wanted, parts=parts)
        if source.largest is not None and descriptor.size > source.largest:
            raise TooLarge(parts)
        return self._in_full(source, wanted, parts)

    def _in_full(self, source: ChainSource, wanted: Wanted, reason: str) -> Wanted:
        """Return a layer as one to be fetched in full; without a deadline where it must come in the end."""
        deadline = None if source.largest is None else source.deadline
        return replace(wanted, deadline=deadline, parts=None, whole=reason)

    async def _hold(self, source: ChainSource, wanted: Wanted) -> Prepared:
        host = source.repository.host
        if wanted.parts is not None and wanted.parts.parts:
            builders = self._builders[wanted.parts.size > _LARGE]
            try:
                return await self._layers.hold(source.repository, replace(wanted, largest=-1), limiter=builders)
            except TooLarge as error:  # it is malformed
                self._refuse(wanted.descriptor, error.reason)
                if source.largest is not None and wanted.descriptor.size > source.largest:
                    raise
                wanted = self._in_full(source, wanted, error.reason)
        if wanted.whole:
            async with self._links.whole(host):
                return await self._layers.hold(source.repository, wanted)
        limiter = self._local if wanted.parts is None else self._links.limiter(host)
        return await self._layers.hold(source.repository, wanted, limiter=limiter)

    def _refuse(self, descriptor: Descriptor, reason: str) -> None:
        self._refused[_claims(descriptor)] = reason
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    async def _keep(self, prepared: Prepared) -> None:
        await self._keeping.keep(prepared)

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
        return self._layers.is_coming(digest) or await self.in_thread(partial(self._preparer.has_table, digest))

    async def _fetch_parts(self, source: ChainSource, descriptor: Descriptor) -> TocParts | str:
        """Return what holds a layer's TOC, or why it can't be lazy."""
        reason = self.why_not_lazy(descriptor)
        if reason:
            return reason
        repository = source.repository
        request = partial(self._preparer.fetch_parts, repository, descriptor, source.deadline)
        return await self._links.share(self._tails, (repository.host, _claims(descriptor)), repository.host, request)

    def why_not_lazy(self, descriptor: Descriptor) -> str:
        """Return why a layer can't be lazy, as far as that is known without a request; "" when it may be."""
        return self._preparer.why_not_lazy(descriptor) or self._refused.get(_claims(descriptor), "")


def _claims(descriptor: Descriptor) -> tuple[object, ...]:
    """Return what an image says of a layer, to compare."""
    return descriptor.digest, descriptor.size, descriptor.media_type, tuple(sorted(descriptor.annotations.items()))
