"""Between the pull of an image and its container: what earlier starts read is fetched while nobody reads yet.

containerd prepares a container for some hundred milliseconds after its layers are there; on a cold node that is a
good part of the time in which the bytes cross the network.
"""

from __future__ import annotations

from collections.abc import Set

import trio

from lazyfs.limits import KEPT_FOR, MAX_EARLY
from lazyfs.mount.apart import Apart
from lazyfs.mount.chain_documents import ChainImage
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.starts import Starts
from lazyfs.oci import ImageConfig


class Early:
    """Replays traces of pulled images. Belongs to one trio loop."""

    def __init__(self, layers: ChainLayers, starts: Starts, apart: Apart) -> None:
        self._layers = layers
        self._starts = starts
        self._apart = apart
        self._running: dict[str, tuple[frozenset[str], trio.CancelScope]] = {}  # by manifest digest

    def expect(self, source: ChainSource, image: ChainImage) -> None:
        """Ask what is known of starts of an image whose layers are being looked at. Doesn't wait; failures are logged.

        A round trip before `begin`, which has the answer then.
        """
        layers = image.manifest.layers
        if self._layers.trusts(source) and not any(map(self._layers.why_not_lazy, layers)):
            self._starts.ask(source.repository, image.manifest.digest, [layer.digest for layer in layers])

    def begin(self, source: ChainSource, image: ChainImage, config: ImageConfig) -> None:
        """Fetch what a start of this image will read, once its layers are here. Doesn't wait; failures are logged.

        Nothing where layers have to be checked whole before they are used.
        """
        digest = image.manifest.digest
        if digest in self._running or len(self._running) >= MAX_EARLY or not self._layers.trusts(source):
            return
        scope = trio.CancelScope()
        self._running[digest] = frozenset(layer.digest for layer in image.manifest.layers), scope

        async def run() -> None:
            try:
                with scope, trio.move_on_after(KEPT_FOR):
                    await self._run(source, image, config)
            finally:
                del self._running[digest]

        self._apart.begin(run)

    def stop(self, digests: Set[str]) -> bool:
        """End what holds one of these layers: they are about to be removed. Doesn't wait; tells whether any did."""
        stopped = [scope for held, scope in self._running.values() if held & digests]
        for scope in stopped:
            scope.cancel()
        return bool(stopped)

    async def _run(self, source: ChainSource, image: ChainImage, config: ImageConfig) -> None:
        layers = image.manifest.layers
        digests = [layer.digest for layer in layers]
        start = self._starts.begin(source.repository, image.manifest.digest, digests, whole=True, early=True)
        try:
            prepared = await self._layers.hold_all(source, list(zip(layers, config.diff_ids, strict=True)))
            try:
                self._starts.mounted(start, [one.layer for one in prepared], learns=False)
                await start.over.wait()
            finally:
                with trio.CancelScope(shield=True):
                    for one in prepared:
                        await self._layers.drop(one)
        finally:
            self._starts.end(start)
