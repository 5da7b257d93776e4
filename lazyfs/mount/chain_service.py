"""Puts the parts together that show chains to a snapshotter."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from lazyfs.chunks.census import Census
from lazyfs.chunks.clear import Clearing
from lazyfs.config import Settings
from lazyfs.mount.apart import Apart, Links
from lazyfs.mount.chain_calls import ChainCalls, Next
from lazyfs.mount.chain_documents import ChainDocuments
from lazyfs.mount.chain_layers import ChainLayers
from lazyfs.mount.chain_resolving import ChainResolver
from lazyfs.mount.chains import Chains
from lazyfs.mount.donors import Donors
from lazyfs.mount.early import Early
from lazyfs.mount.forest import Forest
from lazyfs.mount.images import Images
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.keeping import Keeping
from lazyfs.mount.preparing import Preparer
from lazyfs.mount.reachable import Reachable
from lazyfs.mount.resolving import Pull
from lazyfs.mount.showing import Showing
from lazyfs.reference import Reference
from lazyfs.registry.config.access import Access
from lazyfs.registry.repository import Repository


@dataclass(frozen=True, slots=True)
class ChainService:
    """What the daemon needs of it: the calls, the chains that are shown, and the layers kept for those to come."""

    calls: ChainCalls
    chains: Chains
    keeping: Keeping


def serve_chains(
    settings: Settings,
    images: Images,
    preparer: Preparer,
    forest: Forest,
    census: Census,
    donors: Donors,
    nursery: trio.Nursery,
    showing: Showing,
    rest: Next,
    inheritance: Inheritance,
) -> ChainService:
    """Return the service; `rest` answers the calls that are none of its own. `showing` may refuse with UsageError."""
    apart, links = Apart(nursery), Links()
    keeping = Keeping(images.layers)
    layers = ChainLayers(images.layers, images.fillings, preparer, keeping, apart, links)
    documents = ChainDocuments(census.catalog, images.resolver, links)
    reachable = Reachable(links, census)
    chains = Chains(layers, keeping, reachable, images.planting, forest, apart, showing, images.starts, inheritance)
    clearing = Clearing(census, release=donors.close)

    def open_repository(reference: Reference, access: Access | None) -> Repository:
        pull = Pull.NEVER if settings.offline else Pull.NEWER
        return images.open(reference, None, pull, access, reachable.noting(reference.host, images.on_hop))

    resolver = ChainResolver(documents, layers, keeping, apart, Early(layers, images.starts, apart))
    calls = ChainCalls(open_repository, resolver, chains, layers, keeping, census.store, clearing, rest)
    return ChainService(calls, chains, keeping)
