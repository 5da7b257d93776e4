"""`resolve_chain`: an image's layers made ready, all side by side, and what is to be said of each; nothing is shown."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from lazyfs import oci
from lazyfs.errors import LazyfsError, ReadDeadline, RegistryTimeout, first_of
from lazyfs.mount.chain_documents import ChainDocuments, ChainImage
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.keeping import Keeping
from lazyfs.mount.preparing import TooLarge
from lazyfs.oci import Descriptor, ImageConfig

_MAX_TEXT = 600  # characters of what an image or a registry has us repeat
_GRACE = 0.25  # seconds that a request gets beyond the call's deadline, so that its own error comes no earlier


@dataclass(slots=True)
class Outcome:
    """What became of a layer. `reason`: why it is not lazy, or not ready."""

    ready: bool = False
    lazy: bool = False
    reason: str = "its image's config was not here in time"


class ChainResolver:
    """Resolves images for chains. Belongs to one trio loop."""

    def __init__(self, documents: ChainDocuments, layers: ChainLayers, keeping: Keeping) -> None:
        self._documents = documents
        self._layers = layers
        self._keeping = keeping

    async def resolve(self, source: ChainSource) -> dict[str, Any]:
        """Return what `resolve_chain` answers. A checkpoint, until `source.deadline` at most.

        What fails of a single layer is its `reason`; raise what concerns the image: RegistryError, DocumentInvalid,
        DigestMismatch, PlatformMissing.
        """
        with within(source, "the manifest"):
            image = await self._documents.image(source.repository, source.reference, source.deadline)
        layers = image.manifest.layers
        outcomes = [Outcome() for _ in layers]
        config = await self._ready(source, image, outcomes)
        if any(one.ready for one in outcomes):  # else nothing of the image stays here, and nobody would remove it
            await self._documents.remember(image, config)
        chain_ids = oci.chain_ids(config.diff_ids)
        return {
            "image": str(source.reference),
            "manifest_digest": image.manifest.digest,
            "layers": [
                {
                    "digest": layer.digest,
                    "size": layer.size,
                    "media_type": layer.media_type[:_MAX_TEXT],
                    "annotations": _telling(layer),
                    "diff_id": diff_id,
                    "chain_id": chain_id,
                    "ready": one.ready,
                    "lazy": one.lazy,
                    "reason": one.reason[:_MAX_TEXT],
                }
                for layer, diff_id, chain_id, one in zip(layers, config.diff_ids, chain_ids, outcomes, strict=True)
            ],
        }

    async def _ready(self, source: ChainSource, image: ChainImage, outcomes: list[Outcome]) -> ImageConfig:
        """Fetch the config, and make layers ready beside it."""
        here = trio.Event()
        found: list[ImageConfig] = []

        async def diff_id(number: int) -> str:
            await here.wait()
            return found[0].diff_ids[number]

        async def fetch_config() -> None:
            with within(source, "the config"):
                found.append(await self._documents.config(source.repository, image, source.deadline))
            here.set()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch_config)
                for number, layer in enumerate(image.manifest.layers):
                    nursery.start_soon(self._one, source, layer, partial(diff_id, number), outcomes[number])
        except* LazyfsError as group:
            raise first_of(group) from None
        return found[0]

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
def within(source: ChainSource, what: str) -> Iterator[None]:
    """Bound a step that all of an image waits for. Raise RegistryTimeout when the call's deadline passes in it."""
    left = source.deadline - time.monotonic()
    with trio.move_on_after(max(0.0, left) + _GRACE) as scope:
        yield
    if scope.cancelled_caught:
        host = source.reference.host
        raise RegistryTimeout(host, f"{host} did not answer in time when asked for {what} of {source.reference}")


def _telling(layer: Descriptor) -> dict[str, str]:
    """Return the annotations that tell of a TOC: an image may have megabytes of others."""
    return {
        name: value
        for name, value in layer.annotations.items()
        if name in oci.TOC_ANNOTATIONS and len(value) <= _MAX_TEXT
    }
