"""Chains that are shown: the trees of exactly these layers, held until they are let go, whoever asked for them."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from lazyfs.errors import RegistryTimeout, UsageError
from lazyfs.log import fields
from lazyfs.mount import claims
from lazyfs.mount.apart import Apart
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.claims import Claim
from lazyfs.mount.forest import SHIFT, Attributes, Forest, Planted
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.keeping import Keeping
from lazyfs.mount.mounted_image import LayerFacts
from lazyfs.mount.planting import Planting
from lazyfs.mount.prepared import Prepared
from lazyfs.mount.reachable import Reachable
from lazyfs.mount.showing import Showing, Shown
from lazyfs.mount.starts import Start, Starts
from lazyfs.oci import Descriptor

log = logging.getLogger(__name__)

PREFIX = "chain:"  # of what is left to the next daemon


@dataclass(frozen=True, slots=True)
class ChainLayer:
    """A layer that a chain is to have."""

    descriptor: Descriptor
    diff_id: str


@dataclass(eq=False, slots=True)
class Chain:
    """A chain that is shown. `image` and `manifest_digest` are those of the last one who asked for it."""

    id: str
    image: str
    manifest_digest: str
    shown: Shown
    planted: Planted
    layers: tuple[LayerFacts, ...]  # base first
    start: Start  # as far as traces are concerned

    @property
    def path(self) -> str:
        """The directory that shows it."""
        return self.shown.path

    @property
    def digests(self) -> list[str]:
        """Blob digests, base first."""
        return [fact.layer.digest for fact in self.layers]

    @property
    def size(self) -> int:
        """Bytes of all layer blobs, each counted once."""
        return sum({fact.layer.digest: fact.layer.descriptor.size for fact in self.layers}.values())


class Chains:
    """The chains of a node. Belongs to one trio loop."""

    def __init__(
        self,
        layers: ChainLayers,
        keeping: Keeping,
        reachable: Reachable,
        planting: Planting,
        forest: Forest,
        apart: Apart,
        showing: Showing,
        starts: Starts,
        inheritance: Inheritance,
    ) -> None:
        self._layers = layers
        self._keeping = keeping
        self._reachable = reachable
        self._planting = planting
        self._forest = forest
        self._apart = apart
        self._showing = showing
        self._starts = starts
        self._inheritance = inheritance
        self._chains: dict[str, Chain] = {}

    def __len__(self) -> int:
        return len(self._chains)

    def all(self) -> list[Chain]:
        """Return the chains that are shown. From any thread."""
        return list(self._chains.values())

    def places(self) -> dict[str, list[str]]:
        """Return where images show as chains, by the digest of their manifest. From any thread."""
        found: dict[str, list[str]] = {}
        for chain in self.all():
            found.setdefault(chain.manifest_digest, []).append(chain.path)
        return found

    async def mount(self, source: ChainSource, manifest_digest: str, layers: list[ChainLayer]) -> Chain:
        """Show the tree of these layers, base first, and hold it until `unmount`. A checkpoint, until the deadline.

        Raise RegistryTimeout when that passes, ImageIncomplete where bytes of them can't be had, else as `Layers.hold`
        and `ChainLayers.await_trust`.
        """
        digests = [layer.descriptor.digest for layer in layers]
        start = self._starts.begin(source.repository, manifest_digest, digests, whole=False)
        with contextlib.ExitStack() as undo, trio.move_on_after(max(0.0, source.deadline - time.monotonic())) as scope:
            undo.callback(self._starts.end, start)
            wanted = [(layer.descriptor, layer.diff_id) for layer in layers]
            prepared = await self._layers.hold_all(source, wanted)
            try:
                await self._reachable.check(source, [one.layer for one in prepared])
            except BaseException:
                with trio.CancelScope(shield=True):
                    for one in prepared:
                        await self._layers.drop(one)
                raise
            self._starts.mounted(start, [one.layer for one in prepared])
            planted = await self._plant(source, prepared)
            facts = tuple(LayerFacts(one.layer, not one.reason, one.reason) for one in prepared)
            shown = await self._show(planted)
            chain = Chain(planted.name.decode(), str(source.reference), manifest_digest, shown, planted, facts, start)
            known = await self._record(chain)
            self._leave(known, source.access)
            if known is chain:
                undo.pop_all()
            return known
        assert scope.cancelled_caught
        host = source.reference.host
        raise RegistryTimeout(host, f"the layers of {source.reference} could not be shown in time", hint="try again")

    def _leave(self, chain: Chain, access: dict[str, Any] | None) -> None:
        """Tell the next daemon of a chain."""
        layers = claims.layers_of(chain.layers)
        claim = Claim(chain.image, chain.manifest_digest, None, access, layers, chain.shown)
        numbers = claims.numbers_of(chain.planted, chain.layers)
        self._inheritance.put(PREFIX + chain.id, claim.to_json() | {"numbers": numbers})

    def regain(self, claim: Claim, planted: Planted, layers: tuple[LayerFacts, ...]) -> None:
        """Take over a chain that a daemon before us showed, with its tree."""
        self._showing.regain(planted, claim.shown)
        key = planted.name.decode()
        start = Start("", (), whole=False)
        self._chains[key] = Chain(
            key, claim.reference, claim.manifest_digest, claim.shown, planted, layers, start
        )  # fmt: skip

    async def unmount(self, chain_id: str) -> None:
        """Let a chain go; readers of it get errors. One that isn't there is no error. A checkpoint."""
        chain = self._chains.pop(chain_id, None)
        self._inheritance.remove(PREFIX + chain_id)
        if chain is not None:
            log.info("chain let go", extra=fields(chain=chain.id, image=chain.image))
            self._starts.end(chain.start)
            with trio.CancelScope(shield=True):
                await self._take_back(chain.planted, chain.shown)

    def root(self, chain: Chain) -> Attributes:
        """Return the attributes of a chain's root directory."""
        return self._forest.attributes(chain.planted.number << SHIFT)

    async def _record(self, chain: Chain) -> Chain:
        known = self._chains.get(chain.id)
        if known is None:
            self._chains[chain.id] = known = chain
            log.info("chain shown: %d layers", len(chain.layers), extra=fields(chain=chain.id, image=chain.image))
        else:
            known.image, known.manifest_digest = chain.image, chain.manifest_digest
        with trio.CancelScope(shield=True):
            if known is not chain:
                await self._take_back(chain.planted, chain.shown)
            await self._keeping.release(chain.digests)
        return known

    async def _show(self, planted: Planted) -> Shown:
        """Show a tree. A checkpoint; where the caller's time ends sooner, what was begun is of use to the next one."""

        async def show() -> Shown:
            try:
                if self._showing.elsewhere:
                    raise UsageError("this daemon shows no chains: ask the node's own")
                return await self._showing.show(planted, None)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._planting.release(planted)
                raise

        # The image of a large tree takes a child seconds, and its thread can't be left.
        return await self._apart.run(show, partial(self._take_back, planted), persist=True)

    async def _take_back(self, planted: Planted, shown: Shown) -> None:
        await self._showing.hide(planted, shown)
        await self._planting.release(planted)

    async def _plant(self, source: ChainSource, prepared: list[Prepared]) -> Planted:
        async def plant() -> Planted:
            try:
                return await self._planting.plant(prepared)
            except BaseException:
                with trio.CancelScope(shield=True):
                    for one in prepared:
                        await self._layers.drop(one)
                raise

        return await self._apart.run(plant, self._planting.release)
