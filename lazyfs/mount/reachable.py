"""Whether the registry of a chain that is not whole here answers: a container that can't have its files is told so.

Asked only where nothing was heard of the registry lately, so that pods pay no round trip for it.
"""

from __future__ import annotations

import time
from functools import partial

import trio

from lazyfs.chunks.census import Census, HeldLayer
from lazyfs.chunks.layer import ServedLayer
from lazyfs.errors import RegistryError, Unauthorized
from lazyfs.limits import MAX_REACHABLE, REACHABLE_TIMEOUT
from lazyfs.mount import missing
from lazyfs.mount.apart import Links
from lazyfs.mount.chain_layers import ChainSource
from lazyfs.registry.hops import Hop, OnHop
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository

_FRESH = 30.0  # seconds for which an answer tells that it is there


class Reachable:
    """What was heard of registries. Belongs to one trio loop; `noting` gives something for any thread."""

    def __init__(self, links: Links, census: Census) -> None:
        self._links = links
        self._census = census
        self._heard: dict[str, float] = {}

    def noting(self, host: str, rest: OnHop) -> OnHop:
        """Return a listener that takes every answer as a word from `host`, whichever mirror of it gave it."""

        def note(hop: Hop) -> None:
            if 0 < hop.status < 500:
                self._note(host)
            rest(hop)

        return note

    async def check(self, source: ChainSource, layers: list[ServedLayer]) -> None:
        """Return unless bytes of these layers are not here and nobody gives them. A checkpoint, 5 s at most.

        Raise ImageIncomplete, which says what is missing and why.
        """
        gone = [layer for layer in layers if not layer.store.complete]
        if not gone:
            return
        reason = ""
        if not isinstance(source.repository, OfflineRepository):
            reason = await self._ask(source, gone[0])
            if not reason:
                return
        held = await trio.to_thread.run_sync(self._held, gone)
        raise missing.incomplete(source.reference, held, reason)

    def _held(self, gone: list[ServedLayer]) -> list[HeldLayer]:
        return [self._census.layer(layer.digest) for layer in gone]

    async def _ask(self, source: ChainSource, layer: ServedLayer) -> str:
        """Return why the registry can't be asked for the layer, "" when it can."""
        host = source.reference.host
        if time.monotonic() - self._heard.get(host, -_FRESH) < _FRESH:
            return ""
        try:
            with trio.move_on_after(min(REACHABLE_TIMEOUT, max(0.1, source.deadline - time.monotonic()))):
                await self._links.ask(host, partial(_ask_a_byte, source.repository, layer.digest))
                self._note(host)
                return ""
        except RegistryError as error:
            # What the registry says of this blob alone is no reason to keep a container from what is here.
            return error.message if error.temporary or isinstance(error, Unauthorized) else ""
        return f"{host} has not answered within {REACHABLE_TIMEOUT:.0f} s"

    def _note(self, host: str) -> None:
        if len(self._heard) >= MAX_REACHABLE:
            self._heard = {}
        self._heard[host] = time.monotonic()


def _ask_a_byte(repository: Repository, digest: str) -> None:
    """Ask as readers would, so that a mirror that is well is enough. Blocking."""
    with repository.fetch(digest, 0, 1, deadline=time.monotonic() + REACHABLE_TIMEOUT) as stream:
        stream.read(1)
