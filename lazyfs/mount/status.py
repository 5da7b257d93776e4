"""The object that `lazyfs status --json` prints, and the counters behind it."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import trio

import lazyfs
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.memory import MemoryCache
from lazyfs.chunks.read import ReadCounters
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.store import Store
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError
from lazyfs.mount.chains import Chain
from lazyfs.mount.forest import Forest
from lazyfs.mount.mounted import Mount
from lazyfs.mount.mounted_image import LayerFacts
from lazyfs.mount.operations import Operations
from lazyfs.mount.session import Session
from lazyfs.mount.showing import Showing
from lazyfs.mount.starts import NONE, Start
from lazyfs.registry.health import Health
from lazyfs.registry.hops import Hop
from lazyfs.stats import REQUEST_BOUNDS, Buckets, Histograms, Names


class RequestCounters:
    """Requests by host, and errors by class, since the start. Thread-safe.

    The first 50 hosts are told apart: a registry may redirect to any number of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names = Names()
        self.times = Histograms(REQUEST_BOUNDS)  # by host and kind
        self._hosts: dict[str, dict[str, float]] = {}
        self._kinds: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def note_hop(self, hop: Hop) -> None:
        """Count a request."""
        name = self._names.bounded(hop.host)
        self.times.note(hop.seconds, name, hop.kind)
        with self._lock:
            host = self._hosts.setdefault(name, {"requests": 0, "errors": 0, "ms": 0.0, "bytes": 0})
            host["requests"] += 1
            host["errors"] += not 200 <= hop.status < 400 and not (hop.status == 401 and hop.kind == "challenge")
            host["ms"] += hop.seconds * 1000
            host["bytes"] += hop.size
            self._kinds[hop.kind] += 1

    def note_error(self, error: LazyfsError) -> None:
        """Count a failed fetch."""
        with self._lock:
            self.errors[type(error).__name__] += 1

    def snapshot(self) -> dict[str, Any]:
        """Return the numbers of this moment."""
        with self._lock:
            return {
                "count": int(sum(host["requests"] for host in self._hosts.values())),
                "errors": int(sum(host["errors"] for host in self._hosts.values())),
                "by_host": {name: {**host, "ms": round(host["ms"], 1)} for name, host in self._hosts.items()},
                "by_kind": dict(self._kinds),
            }


class StatusReport:
    """Gathers the numbers of all parts of a daemon."""

    def __init__(
        self,
        settings: Settings,
        forest: Forest,
        operations: Operations,
        session: Session | None,
        showing: Showing,
        store: Store,
        memory: MemoryCache,
        reads: ReadCounters,
        scheduler: Scheduler,
        requests: RequestCounters,
        health: Health,
        gone: Callable[[], list[int]],
    ) -> None:
        """`gone`: what was fetched for layers that are in use no more, as their `bytes_by_priority`."""
        self._settings = settings
        self._forest = forest
        self._operations = operations
        self._session = session
        self._showing = showing
        self._store = store
        self._memory = memory
        self._reads = reads
        self._scheduler = scheduler
        self._requests = requests
        self._health = health
        self._gone = gone
        self.chains: Callable[[], list[Chain]] = list  # those that are shown; set by the daemon
        self._began = time.monotonic()

    async def report(self, mounts: list[Mount]) -> dict[str, Any]:
        """Return the status object. A checkpoint; no part of it reads the mount."""
        counters = self.counters()
        counters["daemon"]["memory"] = anonymous_memory()
        pins = await trio.to_thread.run_sync(self._store.catalog.pins)
        pinned = {pin.image for pin in pins}
        shown = [*map(self._mount, mounts), *map(self._chain, self.chains())]
        for each in shown:
            each["pinned"] = each["manifest_digest"] in pinned
        return {**counters, "mounts": shown, "pins": [asdict(pin) for pin in pins]}

    def layers(self) -> list[ServedLayer]:
        """Return the layers in use, each once. Doesn't block."""
        return list({layer.digest: layer for layer in self._forest.layers()}.values())

    def read_times(self) -> Buckets:
        """Return how long the kernel's reads took."""
        return self._operations.reads.buckets()

    def counters(self) -> dict[str, Any]:
        """Return what the status says of the daemon as a whole, without its memory. Doesn't block."""
        gone = self._gone()
        layers = self.layers()
        fetched = [gone[p] + sum(layer.bytes_by_priority[p] for layer in layers) for p in Priority]
        store = self._store.status()
        driver, reason = self._showing.choice()
        if self._session is None:
            driver, reason = "none", "it only fills the store"
        elif self._session.reason:
            reason += f"; {self._session.reason}"
        return {
            "daemon": {
                "version": lazyfs.__version__,
                "pid": os.getpid(),
                "holder": 0 if self._session is None else self._session.holder,
                "uptime": round(time.monotonic() - self._began, 1),
                "memory": 0,
                "driver": driver,
                "reason": reason,
                "root": os.fspath(self._settings.root),
            },
            "bytes": {
                "demand": fetched[Priority.DEMAND],
                "prefetch": fetched[Priority.PREFETCH],
                "background": fetched[Priority.BACKGROUND],
                "from_memory": self._reads.from_memory,
                "from_store": self._reads.from_store,
                "from_other_layers": self._reads.from_other_layer,
                "from_registry": self._reads.from_registry,
            },
            "cache": {
                "memory": asdict(self._memory.statistics()),
                "store": {
                    "size": store.used,
                    "bound": store.bound,
                    "damaged": store.damaged,
                    "passed_by": bool(store.passing_by),
                    "reason": store.passing_by,
                    "evicted": store.evicted,
                    "write_failures": store.write_failures,
                },
            },
            "requests": self._requests.snapshot(),
            "errors": dict(self._requests.errors + self._operations.failures),
            "fuse": dict(self._operations.calls),
            "sources": self._health.snapshot(),
            "hosts": {name: asdict(each) for name, each in self._scheduler.statistics().items()},
        }

    def _mount(self, mount: Mount) -> dict[str, Any]:
        return {
            "mount": mount.id,
            "image": mount.name,
            "manifest_digest": mount.image.manifest.digest,
            "dir": mount.dir,
            "kind": mount.kind,
            "driver": mount.shown.driver,
            "reason": mount.shown.reason,
            "trace": _trace(mount.image.start),
            **_filled(mount.image.layers, mount.image.size),
        }

    def _chain(self, chain: Chain) -> dict[str, Any]:
        return {
            "mount": chain.id,
            "image": chain.image,
            "manifest_digest": chain.manifest_digest,
            "dir": chain.path,
            "kind": "chain",
            "driver": chain.shown.driver,
            "reason": chain.shown.reason,
            "trace": _trace(chain.start),
            **_filled(chain.layers, chain.size),
        }


def _trace(start: Start | None) -> dict[str, Any]:
    """Return where a mount's trace came from, and how many compressed bytes were asked for because of it."""
    return {"source": NONE, "bytes": 0} if start is None else {"source": start.source, "bytes": start.asked.size}


def _filled(facts: tuple[LayerFacts, ...], size: int) -> dict[str, Any]:
    """Return what is here of layers whose blobs have `size` bytes together."""
    layers = []
    fetched = 0
    for fact in {fact.layer.digest: fact for fact in facts}.values():
        layer = fact.layer
        got = layer.descriptor.size if layer.is_plain else sum(layer.bytes_by_priority)
        fetched += min(got, layer.descriptor.size)
        layers.append(
            {
                "digest": layer.digest,
                "size": layer.descriptor.size,
                "lazy": fact.lazy,
                "reason": fact.reason,
                "present": layer.store.present_bytes,
                "complete": layer.store.complete,
                "verified": layer.verified,
                "quarantine": layer.quarantine,
                "bytes": dict(zip(("demand", "prefetch", "background"), layer.bytes_by_priority, strict=True)),
                "dropped_xattrs": layer.table.dropped_xattrs,
            }
        )
    return {"size": size, "share": round(fetched / size, 4) if size else 0.0, "layers": layers}


def anonymous_memory() -> int:
    """Return this process's anonymous resident memory in bytes: what no file or cache backs."""
    try:
        with open("/proc/self/smaps_rollup") as handle:
            for line in handle:
                if line.startswith("Anonymous:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0
