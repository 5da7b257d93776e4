"""`resolve_chain`: an image's layers made ready, all side by side, and what is to be said of each; nothing is shown.

A caller that asks for one layer has its answer when that one and those below it are settled; the image's other layers
go on, and the next caller finds them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from lazyfs import oci
from lazyfs.errors import LazyfsError, ReadDeadline, RegistryTimeout, first_of
from lazyfs.limits import MAX_IMAGE_WORDS, SETTLE_TIMEOUT
from lazyfs.mount.apart import Apart
from lazyfs.mount.chain_documents import ChainDocuments, ChainImage
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.early import Early
from lazyfs.mount.keeping import Keeping
from lazyfs.mount.prepared import TooLarge
from lazyfs.oci import Descriptor, ImageConfig

log = logging.getLogger(__name__)

_GRACE = 0.25  # seconds that a request gets beyond the call's deadline, so that its own error comes no earlier
_LOOK = 0.02
_HEAD_START = 0.003  # seconds that the base layer has before the others: each takes a millisecond of processor time


@dataclass(slots=True)
class Outcome:
    """What became of a layer. `reason`: why it is not lazy, or not ready. `settled`: nothing of it changes any more."""

    ready: bool = False
    lazy: bool = False
    reason: str = "its image's config was not here in time"
    settled: bool = False


class Resolution:
    """What is known so far of an image that is being resolved. Belongs to one trio loop."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # seconds, monotonic: what is not settled by then never will be
        self.image: ChainImage | None = None
        self.config: ImageConfig | None = None
        self.chain_ids: list[str] = []
        self.outcomes: list[Outcome] = []
        self.error: Exception | None = None
        self.ended = False
        self._changed = trio.Event()

    def names(self, digests: Set[str]) -> bool:
        """Tell whether one of these layers is the image's, or may be."""
        return self.image is None or any(layer.digest in digests for layer in self.image.manifest.layers)

    def change(self) -> None:
        """Have whoever waits look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, chain_id: str) -> None:
        """Return when the layer of this chain ID and those below it are settled, "": when all of it has ended.

        A checkpoint. It returns as well where the image has no such layer, or could not be resolved.
        """
        while not (self.ended or (chain_id and self._tells(chain_id))):
            await self._changed.wait()

    def _tells(self, chain_id: str) -> bool:
        if self.config is None:
            return False
        wanted = self.chain_ids.index(chain_id) + 1 if chain_id in self.chain_ids else 0
        return all(one.settled for one in self.outcomes[:wanted])


class ChainResolver:
    """Resolves images for chains. Belongs to one trio loop."""

    def __init__(
        self, documents: ChainDocuments, layers: ChainLayers, keeping: Keeping, apart: Apart, early: Early
    ) -> None:
        self._documents = documents
        self._layers = layers
        self._keeping = keeping
        self._apart = apart
        self._early = early
        self._running: dict[Hashable, Resolution] = {}  # each ends by its first caller's deadline, about

    async def resolve(self, source: ChainSource, chain_id: str = "", *, share: bool = True) -> dict[str, Any]:
        """Return what `resolve_chain` answers. A checkpoint, until `source.deadline` at most.

        `chain_id`: of the layer that is waited for, "": all of them. `share`: callers of the same image may find what
        was begun for each other; not where a caller has a login of its own.

        What fails of a single layer is its `reason`; raise what concerns the image: RegistryError, DocumentInvalid,
        DigestMismatch, PlatformMissing.
        """
        key = (str(source.reference), source.largest) if share else object()
        found = self._running.get(key)
        now = time.monotonic()
        if found is None or found.deadline - now < (source.deadline - now) / 2:  # what ends much sooner is not ours
            found = self._running[key] = Resolution(source.deadline)
            self._apart.begin(partial(self._run, key, found, source))
        with trio.move_on_after(max(0.0, source.deadline - time.monotonic()) + 2 * _GRACE):
            await found.wait(chain_id)
        if found.error is not None:
            raise found.error.with_traceback(None)
        if found.image is None or found.config is None:
            raise _late(source, "the manifest" if found.image is None else "the config")
        return _answer(source, found.image, found.config, found.outcomes)

    async def settle(self, digests: Set[str]) -> None:
        """Wait until no image with one of these layers is being resolved, or fetched ahead of its container, any more.

        A checkpoint, 10 s at most.

        Callers had their answers before; what comes behind them would be kept, and nobody would know of it.
        """
        with trio.move_on_after(SETTLE_TIMEOUT):
            # What ends being resolved begins to be fetched for its container: both, until there is neither.
            while self._early.stop(digests) or any(found.names(digests) for found in self._running.values()):
                await trio.sleep(_LOOK)

    async def _run(self, key: Hashable, found: Resolution, source: ChainSource) -> None:
        try:
            with _within(source, "the manifest"):
                image = await self._documents.image(source.repository, source.reference, source.deadline)
            found.outcomes = [Outcome() for _ in image.manifest.layers]
            found.image = image
            self._early.expect(source, image)
            config = await self._ready(source, image, found)
            if any(one.ready for one in found.outcomes):  # else nothing of it stays here, and nobody would remove it
                await self._documents.remember(image, config)
            if all(one.lazy for one in found.outcomes):
                self._early.begin(source, image, config)
        except Exception as error:  # for those who wait; there may be nobody left
            found.error = error
            level = logging.INFO if isinstance(error, LazyfsError) else logging.ERROR
            log.log(level, "%s is not resolved: %s: %s", source.reference, type(error).__name__, error)
        finally:
            if self._running.get(key) is found:
                del self._running[key]
            found.ended = True
            found.change()

    async def _ready(self, source: ChainSource, image: ChainImage, found: Resolution) -> ImageConfig:
        """Fetch the config, and make layers ready beside it."""
        here = trio.Event()
        configs: list[ImageConfig] = []

        async def diff_id(number: int) -> str:
            await here.wait()
            return configs[0].diff_ids[number]

        async def fetch_config() -> None:
            with _within(source, "the config"):
                configs.append(await self._documents.config(source.repository, image, source.deadline))
            found.config = configs[0]
            found.chain_ids = list(oci.chain_ids(configs[0].diff_ids))
            here.set()

        async def settle(number: int, layer: Descriptor) -> None:
            await self._one(source, layer, partial(diff_id, number), found.outcomes[number])
            found.outcomes[number].settled = True
            found.change()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch_config)
                for number, layer in enumerate(image.manifest.layers):
                    nursery.start_soon(settle, number, layer)
                    # From the base up, as they are waited for: what starts at once comes in any order.
                    await (trio.lowlevel.checkpoint() if number else trio.sleep(_HEAD_START))
        except* LazyfsError as group:
            raise first_of(group) from None
        return configs[0]

    async def _one(
        self, source: ChainSource, layer: Descriptor, diff_id: Callable[[], Awaitable[str]], outcome: Outcome
    ) -> None:
        try:
            with trio.move_on_after(max(0.0, source.deadline - time.monotonic())):
                outcome.reason = "its TOC was not here in time"
                prepared = await self._layers.promise(source, layer, diff_id)
                if prepared is None:
                    outcome.ready, outcome.lazy, outcome.reason = True, True, ""
                    return
                try:
                    outcome.reason = "it was not checked in full in time"
                    await self._layers.await_trust(source, prepared)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await self._layers.drop(prepared)
                    raise
                with trio.CancelScope(shield=True):
                    await self._keeping.keep(prepared)
                outcome.ready, outcome.lazy, outcome.reason = True, not prepared.reason, prepared.reason
        except TooLarge as error:
            outcome.reason = error.reason
        except ReadDeadline as error:
            outcome.reason += f": {error.message}"
        except LazyfsError as error:
            outcome.reason = error.message


@contextmanager
def _within(source: ChainSource, what: str) -> Iterator[None]:
    """Bound a step that all of an image waits for. Raise RegistryTimeout when the call's deadline passes in it."""
    left = source.deadline - time.monotonic()
    with trio.move_on_after(max(0.0, left) + _GRACE) as scope:
        yield
    if scope.cancelled_caught:
        raise _late(source, what)


def _late(source: ChainSource, what: str) -> RegistryTimeout:
    host = source.reference.host
    return RegistryTimeout(host, f"{host} did not answer in time when asked for {what} of {source.reference}")


def _answer(source: ChainSource, image: ChainImage, config: ImageConfig, outcomes: list[Outcome]) -> dict[str, Any]:
    layers = image.manifest.layers
    chain_ids = oci.chain_ids(config.diff_ids)
    return {
        "image": str(source.reference),
        "manifest_digest": image.manifest.digest,
        "layers": [
            {
                "digest": layer.digest,
                "size": layer.size,
                "media_type": layer.media_type[:MAX_IMAGE_WORDS],
                "annotations": _telling(layer),
                "diff_id": diff_id,
                "chain_id": chain_id,
                "ready": one.ready,
                "lazy": one.lazy,
                "reason": one.reason[:MAX_IMAGE_WORDS],
                "settled": one.settled,
            }
            for layer, diff_id, chain_id, one in zip(layers, config.diff_ids, chain_ids, outcomes, strict=True)
        ],
    }


def _telling(layer: Descriptor) -> dict[str, str]:
    """Return the annotations that tell of a TOC: an image may have megabytes of others."""
    return {
        name: value
        for name, value in layer.annotations.items()
        if name in oci.TOC_ANNOTATIONS and len(value) <= MAX_IMAGE_WORDS
    }
