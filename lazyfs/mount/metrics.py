"""What the daemon tells Prometheus: which metrics there are, and where each one's numbers come from."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from lazyfs.chunks.catalog import Catalog
from lazyfs.config import Settings
from lazyfs.errors import DaemonUnreachable, StoreError, UsageError
from lazyfs.exposition import Metric, Reading, one, render
from lazyfs.limits import ADDRESS_TIMEOUT
from lazyfs.mount.mounted import Mount, Mounted
from lazyfs.mount.status import RequestCounters, StatusReport, anonymous_memory
from lazyfs.scrape import Scrapes, parse_address
from lazyfs.stats import OTHER, Buckets

log = logging.getLogger(__name__)

_AGAIN = 0.1  # seconds between tries for an address that somebody else still has

INFO = Metric("lazyfsd_info", "gauge", "1; the labels say what runs", ("version", "driver"))
UPTIME = Metric("lazyfsd_uptime_seconds", "gauge", "time since the start")
MEMORY = Metric("lazyfsd_anonymous_memory_bytes", "gauge", "resident memory that no file backs")
FILES = Metric("lazyfsd_open_files", "gauge", "open file descriptors")
THREADS = Metric("lazyfsd_threads", "gauge", "threads of Python")
MOUNTS = Metric("lazyfsd_mounts", "gauge", "mounts that commands asked for", ("kind",))
CHAINS = Metric("lazyfsd_chains", "gauge", "chains shown for the snapshotter")
SERVED = Metric("lazyfsd_served_layers", "gauge", "layers that mounts and chains use now",
                ("form", "complete", "checked"))  # fmt: skip
KNOWN = Metric("lazyfsd_known_layers", "gauge", "layers that the node knows, in use or not")
QUARANTINED = Metric("lazyfsd_quarantined_layers", "gauge", "those of them that were found false")
FETCHED = Metric("lazyfsd_fetched_bytes_total", "counter", "compressed bytes of layers from registries", ("priority",))
READ_FROM = Metric("lazyfsd_read_bytes_total", "counter", "uncompressed bytes of chunks, by where readers' came from",
                   ("source",))  # fmt: skip
READ_TIME = Metric("lazyfsd_read_duration_seconds", "histogram", "reads of the kernel, failed ones too")
FUSE_CALLS = Metric("lazyfsd_fuse_requests_total", "counter", "requests of the kernel", ("call",))
ERRORS = Metric("lazyfsd_errors_total", "counter", "failed fetches and requests of the kernel", ("class",))
STORE = Metric("lazyfsd_store_bytes", "gauge", "bytes that the store takes on disk")
STORE_BOUND = Metric("lazyfsd_store_bound_bytes", "gauge", "bytes that it may take")
EVICTED = Metric("lazyfsd_store_evicted_bytes_total", "counter", "bytes dropped to stay within the bound")
DAMAGED = Metric("lazyfsd_store_damaged_chunks_total", "counter", "chunks that failed their hash and were dropped")
PASSED_BY = Metric("lazyfsd_store_passed_by", "gauge", "1 while the store is not written: disk full or failing")
WRITE_FAILURES = Metric("lazyfsd_store_write_failures_total", "counter", "writes to the store that failed")
CACHE = Metric("lazyfsd_memory_cache_bytes", "gauge", "decoded chunks held in memory")
CACHE_BOUND = Metric("lazyfsd_memory_cache_bound_bytes", "gauge", "bytes that they may take")
CACHE_ASKED = Metric("lazyfsd_memory_cache_lookups_total", "counter", "look-ups of chunks in memory", ("result",))
REQUEST_TIME = Metric("lazyfsd_registry_request_duration_seconds", "histogram", "requests until the end of their body",
                      ("host", "kind"))  # fmt: skip
REQUEST_BYTES = Metric("lazyfsd_registry_received_bytes_total", "counter", "bytes of bodies", ("host",))
REQUEST_ERRORS = Metric("lazyfsd_registry_errors_total", "counter", "requests without a good answer", ("host",))
HOST_TROUBLE = Metric("lazyfsd_registry_avoided", "gauge", "1 while a host is left alone, rate limited or distrusted",
                      ("host",))  # fmt: skip
QUEUE = Metric("lazyfsd_fetches", "gauge", "fetches of layers' bytes", ("state",))

METRICS = (
    INFO, UPTIME, MEMORY, FILES, THREADS, MOUNTS, CHAINS, SERVED, KNOWN, QUARANTINED, FETCHED, READ_FROM, READ_TIME,
    FUSE_CALLS, ERRORS, STORE, STORE_BOUND, EVICTED, DAMAGED, PASSED_BY, WRITE_FAILURES, CACHE, CACHE_BOUND,
    CACHE_ASKED, REQUEST_TIME, REQUEST_BYTES, REQUEST_ERRORS, HOST_TROUBLE, QUEUE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moment:
    """What belongs to the trio loop, taken at one moment."""

    status: dict[str, Any]
    reads: Buckets
    layers: dict[tuple[str, ...], float]
    mounts: dict[tuple[str, ...], float]
    chains: int


class DaemonMetrics:
    """Gathers and renders. `take` belongs to the trio loop, `text` to a thread."""

    def __init__(
        self, report: StatusReport, requests: RequestCounters, catalog: Catalog, chains: Callable[[], int]
    ) -> None:
        """`chains`: how many are shown."""
        self._report = report
        self._requests = requests
        self._catalog = catalog
        self._chains = chains

    async def answer(self, mounts: list[Mount]) -> dict[str, Any]:
        """Answer the control call. A checkpoint."""
        moment = self.take(mounts)
        text = await trio.to_thread.run_sync(self.text, moment)
        return {"text": text.decode()}

    def take(self, mounts: list[Mount]) -> Moment:
        """Return the numbers of this moment, consistent with each other. Doesn't block."""
        layers = Counter(
            ("plain" if layer.is_plain else "lazy", _yes(layer.store.complete), _yes(layer.verified))
            for layer in self._report.layers()
        )
        kinds = Counter((mount.kind,) for mount in mounts)
        return Moment(
            self._report.counters(),
            self._report.read_times(),
            {key: float(count) for key, count in layers.items()},
            {key: float(count) for key, count in kinds.items()},
            self._chains(),
        )

    def scraped(self, settings: Settings, mounted: Mounted) -> Scraped:
        """Return the listener. Raise UsageError when its address makes no sense."""
        return Scraped(settings.metrics_address, self, mounted)

    def text(self, moment: Moment) -> bytes:
        """Return the exposition. Blocking: the catalog, /proc, and 70 ms of imports the first time."""
        return render(self._readings(moment))

    def _readings(self, moment: Moment) -> list[Reading]:
        status = moment.status
        store, memory, daemon = status["cache"]["store"], status["cache"]["memory"], status["daemon"]
        received = status["bytes"]
        return [
            (INFO, {(daemon["version"], daemon["driver"]): 1}),
            one(UPTIME, daemon["uptime"]),
            one(MEMORY, anonymous_memory()),
            one(FILES, len(os.listdir("/proc/self/fd"))),
            one(THREADS, threading.active_count()),
            (MOUNTS, moment.mounts),
            one(CHAINS, moment.chains),
            (SERVED, moment.layers),
            *self._known(),
            (FETCHED, {(name,): received[name] for name in ("demand", "prefetch", "background")}),
            (READ_FROM, {
                ("memory",): received["from_memory"], ("store",): received["from_store"],
                ("other_layer",): received["from_other_layers"], ("registry",): received["from_registry"],
            }),
            (READ_TIME, {(): moment.reads}),
            (FUSE_CALLS, {(call,): number for call, number in status["fuse"].items()}),
            (ERRORS, {(name,): number for name, number in status["errors"].items()}),
            one(STORE, store["size"]),
            one(STORE_BOUND, store["bound"]),
            one(EVICTED, store["evicted"]),
            one(DAMAGED, store["damaged"]),
            one(PASSED_BY, store["passed_by"]),
            one(WRITE_FAILURES, store["write_failures"]),
            one(CACHE, memory["size"]),
            one(CACHE_BOUND, memory["bound"]),
            (CACHE_ASKED, {("hit",): memory["hits"], ("miss",): memory["misses"]}),
            *self._of_hosts(status),
        ]  # fmt: skip

    def _known(self) -> list[Reading]:
        try:
            layers = self._catalog.layers()
        except StoreError as error:
            log.warning("metrics lack what the catalog knows: %s", error)
            return []
        return [one(KNOWN, len(layers)), one(QUARANTINED, sum(bool(layer.quarantine) for layer in layers))]

    def _of_hosts(self, status: dict[str, Any]) -> list[Reading]:
        by_host: dict[str, dict[str, Any]] = status["requests"]["by_host"]
        queue = status["hosts"].values()
        return [
            (REQUEST_TIME, self._requests.times.read()),
            (REQUEST_BYTES, {(host,): facts["bytes"] for host, facts in by_host.items()}),
            (REQUEST_ERRORS, {(host,): facts["errors"] for host, facts in by_host.items()}),
            (HOST_TROUBLE, self._avoided(status["sources"], set(by_host))),
            (QUEUE, {
                ("running",): sum(host["running"] for host in queue),
                ("waiting",): sum(host["waiting"] for host in queue),
            }),
        ]  # fmt: skip

    @staticmethod
    def _avoided(sources: dict[str, dict[str, Any]], told_apart: set[str]) -> dict[tuple[str, ...], float]:
        """Return 1 for hosts in trouble; those that no request of ours is counted for are told together."""
        found: dict[tuple[str, ...], float] = {}
        for host, facts in sources.items():
            key = (host if host in told_apart else OTHER,)
            found[key] = max(found.get(key, 0), float(facts["state"] != "ok"))
        return found


def _yes(value: bool) -> str:
    return "yes" if value else "no"


class Scraped:
    """The listener of `metrics_address`, for the time of a `with` in the trio loop."""

    def __init__(self, address: str, metrics: DaemonMetrics, mounted: Mounted) -> None:
        parse_address(address)
        self._address = address
        self._metrics = metrics
        self._mounted = mounted
        self._scrapes: Scrapes | None = None

    def __enter__(self) -> Scraped:
        return self

    def begin(self) -> None:
        """Listen. Where that can't be, it is logged: the images of the node matter more. Doesn't block."""
        try:
            self._begin()
        except UsageError as error:
            log.error("%s", error)

    async def begin_late(self) -> None:
        """Listen as soon as a daemon before us, the end of which takes some milliseconds, has let the address go."""
        with trio.move_on_after(ADDRESS_TIMEOUT):
            while True:
                try:
                    return self._begin()
                except UsageError:
                    await trio.sleep(_AGAIN)
        self.begin()

    def _begin(self) -> None:
        token = trio.lowlevel.current_trio_token()

        def text() -> bytes:
            try:
                moment = trio.from_thread.run_sync(lambda: self._metrics.take(self._mounted.all()), trio_token=token)
            except (trio.RunFinishedError, trio.Cancelled):
                raise DaemonUnreachable("lazyfsd is about to end") from None
            return self._metrics.text(moment)

        scrapes = Scrapes(self._address, text)
        scrapes.start()
        self._scrapes = scrapes

    def __exit__(self, *_: object) -> None:
        if self._scrapes is not None:
            self._scrapes.close()
