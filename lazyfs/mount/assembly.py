"""The parts of a data plane, put together: which there are, and who knows whom. Nothing is mounted yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.census import Census
from lazyfs.chunks.fill import Filler
from lazyfs.chunks.host import Priority
from lazyfs.chunks.memory import MemoryCache
from lazyfs.chunks.read import Reader
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.stock import Stock
from lazyfs.chunks.store import Store
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.config import Settings
from lazyfs.errors import UsageError
from lazyfs.mount.ahead import Ahead
from lazyfs.mount.chain_service import ChainService, serve_chains
from lazyfs.mount.donors import Donors
from lazyfs.mount.fetching import Fetcher
from lazyfs.mount.filling import Fillings
from lazyfs.mount.forest import SHIFT, Forest, Owner, Planted
from lazyfs.mount.images import Images
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.mounted import Mounted
from lazyfs.mount.node_uses import NodeUses
from lazyfs.mount.operations import Operations
from lazyfs.mount.preparing import Preparer
from lazyfs.mount.resolving import Resolver
from lazyfs.mount.session import Session
from lazyfs.mount.showing import Showing
from lazyfs.mount.starts import Starts
from lazyfs.mount.status import RequestCounters, StatusReport
from lazyfs.mount.stock_calls import StockCalls
from lazyfs.mount.succession import Succession
from lazyfs.oci import Descriptor

if TYPE_CHECKING:
    from lazyfs.format.trace import Trace
    from lazyfs.mount.metrics import DaemonMetrics, Scraped
    from lazyfs.registry.repository import Repository


@dataclass(frozen=True, slots=True)
class Role:
    """What a daemon is for: the whole node, one mount point alone (`solo`), or filling the store and no more."""

    solo: Path | None
    store_only: bool

    @property
    def is_alone(self) -> bool:
        """Whether it is the node's one daemon, rather than one of several that share a store."""
        return self.solo is None and not self.store_only


@dataclass(frozen=True, slots=True)
class Parts:
    """What the daemon begins, asks and takes down. `session` is None where nothing is shown."""

    images: Images
    preparer: Preparer
    memory: MemoryCache
    uses: NodeUses
    showing: Showing
    chains: ChainService
    mounted: Mounted
    succession: Succession
    session: Session | None
    scraped: Scraped | None


def assemble(
    settings: Settings,
    role: Role,
    catalog: Catalog,
    store: Store,
    nursery: trio.Nursery,
    *,
    estate: int | None,
    stop: Callable[[], None],
) -> Parts:
    """Return the parts; their background work is to run in `nursery`. Doesn't block.

    `estate`: the memory that outlives the daemon, see mount.inheritance; None: nobody takes over. `stop` is called when
    a client asks for the end.
    """
    requests = RequestCounters()
    rates = {Priority.PREFETCH: settings.prefetch_rate, Priority.BACKGROUND: settings.background_rate}
    scheduler = Scheduler(settings.host_connections, rates=rates)
    memory = MemoryCache(settings.memory_size)
    donors = Donors(catalog, store)
    preparer = Preparer(store, catalog, settings)
    squash = Owner(os.geteuid(), os.getegid()) if os.geteuid() != 0 else None
    forest = Forest(solo=role.solo is not None, squash=squash)
    remote = Remote(scheduler, nursery, settings.read_timeout, requests.note_error)
    reader = Reader(memory, remote, donors.find, nursery)
    filler = Filler(scheduler, remote, reader.counters.answered)
    uses = NodeUses()
    census = Census(store, catalog, uses)
    traces = TraceFiles(settings.root)
    find = partial(_find_trace, census)
    starts = Starts(settings, traces, census, remote, scheduler, nursery, find, requests.note_error, donors.copy)
    images = Images(
        settings,
        forest,
        scheduler,
        Ahead(reader, remote),
        partial(Fillings, settings, nursery, filler, reader, preparer, donors),
        donors,
        reader,
        preparer,
        census,
        starts,
        partial(Resolver, catalog, settings, lambda manifest: not census.missing(manifest)),
        nursery,
        requests.note_hop,
    )
    showing = Showing(settings, images.planting.ensure_image, partial(_path_of, settings, role), _why_not_erofs(role))
    images.planting.with_images = lambda: showing.wants_images
    operations = Operations(forest, reader)
    mountpoint = role.solo or settings.session
    inheritance = Inheritance(estate, follows=estate is not None)
    session = None
    if not role.store_only:
        session = Session(
            operations,
            mountpoint,
            allow_other=os.geteuid() == 0,
            board=inheritance,
            on_guilty=partial(_accuse, images, forest),
        )
    report = StatusReport(
        settings,
        forest,
        operations,
        session,
        showing,
        store,
        memory,
        reader.counters,
        scheduler,
        requests,
        images.health,
        lambda: images.layers.fetched,
    )
    fetcher = Fetcher(settings, images, census, store, catalog)
    stock = StockCalls(Stock(census, release=donors.close), fetcher)
    service = serve_chains(settings, images, preparer, forest, census, donors, nursery, showing, stock, inheritance)
    report.chains = service.chains.all
    metrics = partial(_metrics, report, requests, catalog, lambda: len(service.chains))
    mounted = Mounted(
        settings,
        images,
        catalog,
        showing,
        report.report,
        lambda mounts: metrics().answer(mounts),
        stop,
        service,
        traces,
        inheritance,
    )
    succession = Succession(settings, inheritance, images, catalog, store, reader, mounted, service.chains)
    scraped = metrics().scraped(settings, mounted) if settings.metrics_address and role.is_alone else None
    uses.bind(images, mounted)
    return Parts(images, preparer, memory, uses, showing, service, mounted, succession, session, scraped)


def _path_of(settings: Settings, role: Role, planted: Planted) -> str:
    if role.store_only:
        raise UsageError("this daemon only fills the store, it shows no image")
    if role.solo is not None:
        return os.fspath(role.solo)
    return os.fspath(settings.session / planted.name.decode())


def _why_not_erofs(role: Role) -> str:
    if role.store_only:
        return "it only fills the store"
    if role.solo is not None or os.geteuid() != 0:
        return "erofs can be mounted by root alone"
    return ""


def _accuse(images: Images, forest: Forest, node: int) -> None:
    """Stop reading from the layer that a node is of: a request for it has ended several daemons."""
    layer = forest.layer(node >> SHIFT)
    if layer is not None:
        images.quarantine(layer, "reading it has ended lazyfsd several times")


def _metrics(
    report: StatusReport, requests: RequestCounters, catalog: Catalog, chains: Callable[[], int]
) -> DaemonMetrics:
    from lazyfs.mount.metrics import DaemonMetrics  # not at the start, which is measured in milliseconds

    return DaemonMetrics(report, requests, catalog, chains)


def _find_trace(
    census: Census, repository: Repository, manifest: str, deadline: float, layers: Sequence[str] | None
) -> Trace | None:
    from lazyfs.registry import traces  # not at the start, which is measured in milliseconds

    known = census.manifest(manifest)
    subject = Descriptor(known.media_type, known.digest, len(known.raw)) if known is not None else None
    return traces.find(repository, manifest, deadline, layers=layers, subject=subject)
