"""What the snapshotter counts and tells Prometheus. Cheap where things happen; thread-safe throughout."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import lazyfs
from lazyfs.errors import LazyfsError, UsageError
from lazyfs.exposition import Metric, one, render
from lazyfs.scrape import Scrapes, parse_address
from lazyfs.stats import CALL_BOUNDS, Counts, Histograms
from snapshotter.reasons import Outcome

log = logging.getLogger(__name__)

INFO = Metric("lazyfs_snapshotter_info", "gauge", "1; the label says what runs", ("version",))
UPTIME = Metric("lazyfs_snapshotter_uptime_seconds", "gauge", "time since the start")
CALL_TIME = Metric("lazyfs_snapshotter_call_duration_seconds", "histogram", "calls of the snapshots service",
                   ("method", "code"))  # fmt: skip
CHAIN_TIME = Metric("lazyfs_snapshotter_chain_duration_seconds", "histogram",
                    "from asking the daemon for a chain until it is shown", ("result",))  # fmt: skip
LAYERS = Metric("lazyfs_snapshotter_layers_total", "counter", "layers of extractions by what became of them",
                ("outcome", "reason"))  # fmt: skip
LAYER_TIME = Metric("lazyfs_snapshotter_layer_duration_seconds", "histogram", "until that was decided", ("outcome",))
SNAPSHOTS = Metric("lazyfs_snapshotter_snapshots", "gauge", "snapshots in the records", ("kind",))
CHAINS = Metric("lazyfs_snapshotter_chains_in_use", "gauge", "lazy chains that active snapshots and views stand on")
COLLECTIONS = Metric("lazyfs_snapshotter_collections_total", "counter", "looks for what nobody refers to any more",
                     ("result",))  # fmt: skip
COLLECTED = Metric("lazyfs_snapshotter_collected_total", "counter", "what they gave back", ("what",))
FREED = Metric("lazyfs_snapshotter_freed_bytes_total", "counter", "bytes of layers that they gave back")
RESTARTS = Metric("lazyfs_snapshotter_daemon_restarts_total", "counter", "daemons met after the first one")
PULLS = Metric("lazyfs_snapshotter_image_service_pulls_total", "counter", "pulls that kubelet asked for through us",
               ("code",))  # fmt: skip
FILES = Metric("lazyfs_snapshotter_open_files", "gauge", "open file descriptors")
THREADS = Metric("lazyfs_snapshotter_threads", "gauge", "threads of Python")

METRICS = (
    INFO, UPTIME, CALL_TIME, CHAIN_TIME, LAYERS, LAYER_TIME, SNAPSHOTS, CHAINS, COLLECTIONS, COLLECTED, FREED, RESTARTS,
    PULLS, FILES, THREADS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """What the records hold. `snapshots`: number by kind ("view", "active", "committed", "lazy")."""

    snapshots: Mapping[str, int] = field(default_factory=dict)
    chains: int = 0


class Metrics:
    """All counters of one snapshotter. `note_…` never block and never raise.

    `held`: asked at each scrape, in the thread of whoever asks; may block and raise LazyfsError. `restarts`: how many
    daemons were met after the first one.
    """

    def __init__(
        self,
        held: Callable[[], Held] = Held,
        restarts: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.held = held
        self.restarts = restarts
        self._clock = clock
        self._began = clock()
        self._calls = Histograms(CALL_BOUNDS)
        self._chains = Histograms(CALL_BOUNDS)
        self._layers = Counts()
        self._layer_times = Histograms(CALL_BOUNDS)
        self._collections = Counts()
        self._collected = Counts()
        self._freed = Counts()
        self._pulls = Counts()

    def note_call(self, method: str, code: str, seconds: float) -> None:
        """Count a call of the service: "Prepare", "OK" or gRPC's name of the error."""
        self._calls.note(seconds, method, code)

    def note_chain(self, seconds: float, *, shown: bool) -> None:
        """Count a chain that the daemon was asked to show."""
        self._chains.note(seconds, "shown" if shown else "failed")

    def note_layer(self, outcome: Outcome, seconds: float = 0.0) -> None:
        """Count what became of a layer at an extraction, and what finding out took."""
        word = outcome.value if outcome.is_ready else "fallback"
        self._layers.add(1, word, "" if outcome.is_ready else outcome.value)
        self._layer_times.note(seconds, word)

    def note_collection(
        self, directories: int = 0, chains: int = 0, layers: int = 0, freed: int = 0, *, failed: bool = False
    ) -> None:
        """Count a look for what nobody refers to any more, and what it gave back (`freed`: bytes of layers)."""
        self._collections.add(1, "failed" if failed else "done")
        for what, number in (("directories", directories), ("chains", chains), ("layers", layers)):
            self._collected.add(number, what)
        self._freed.add(freed)

    def note_pull(self, code: str) -> None:
        """Count a pull that went through the image service, by gRPC's name of its end."""
        self._pulls.add(1, code)

    def text(self) -> bytes:
        """Return the exposition. Blocking, as `held` is; without its numbers when it fails."""
        try:
            held = self.held()
        except LazyfsError as error:
            log.warning("metrics lack the records' numbers: %s", error)
            held = Held()
        return render(
            [
                (INFO, {(lazyfs.__version__,): 1}),
                one(UPTIME, round(self._clock() - self._began, 1)),
                (CALL_TIME, self._calls.read()),
                (CHAIN_TIME, self._chains.read()),
                (LAYERS, self._layers.read()),
                (LAYER_TIME, self._layer_times.read()),
                (SNAPSHOTS, {(kind,): number for kind, number in held.snapshots.items()}),
                one(CHAINS, held.chains),
                (COLLECTIONS, self._collections.read()),
                (COLLECTED, self._collected.read()),
                one(FREED, sum(self._freed.read().values())),
                one(RESTARTS, self.restarts()),
                (PULLS, self._pulls.read()),
                one(FILES, len(os.listdir("/proc/self/fd"))),
                one(THREADS, threading.active_count()),
            ]
        )

    def serve(self, address: str) -> Scrapes | None:
        """Listen on `snapshotter_metrics_address`, "" for nowhere. Close what comes back.

        None, and a line in the log: the address is taken; pods matter more. Raise UsageError when it makes no sense.
        """
        if not address:
            return None
        parse_address(address)
        try:
            scrapes = Scrapes(address, self.text)
        except UsageError as error:
            log.error("%s", error)
            return None
        scrapes.start()
        return scrapes
