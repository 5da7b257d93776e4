"""The lazy half put together: the daemon, who decides about layers, who collects, logins, metrics."""

from __future__ import annotations

import os
import time
from functools import partial

from lazyfs.config import Settings
from lazyfs.errors import UsageError
from snapshotter import image_service
from snapshotter.collaborators import Collaborators
from snapshotter.collect import Collected, Collector
from snapshotter.directories import Directories
from snapshotter.extraction import Extraction
from snapshotter.metrics import Metrics
from snapshotter.model import LazyPlace, Shown
from snapshotter.node_logins import NodeLogins
from snapshotter.noting import Noting
from snapshotter.records import count_held
from snapshotter.remote import Remote
from snapshotter.store import Store


class CountedRemote(Remote):
    """The daemon, with the time that chains take to be shown told to the metrics."""

    metrics: Metrics | None = None

    def show(self, place: LazyPlace) -> Shown:
        """Have the tree of a chain shown; see Remote."""
        began, shown = time.monotonic(), False
        try:
            found = super().show(place)
            shown = True
            return found
        finally:
            if self.metrics is not None:
                self.metrics.note_chain(time.monotonic() - began, shown=shown)


def connect(settings: Settings, store: Store, directories: Directories, *, start_daemon: bool) -> Collaborators:
    """Return the real collaborators of a snapshotter, at work. Doesn't wait for the daemon.

    `start_daemon`: start one where none runs; else wait for the one that somebody else keeps.
    """
    upstream = settings.image_service.removeprefix("unix://")
    if upstream and os.path.abspath(upstream) == os.path.abspath(settings.snapshotter_address):
        raise UsageError("image_service is the snapshotter's own socket", hint="give it containerd's")
    logins = NodeLogins()
    remote = CountedRemote(settings, start=start_daemon, in_use=store.chains_in_use, greet=logins.greet)
    metrics = Metrics(lambda: count_held(store, store.walk()), lambda: remote.restarts)
    remote.metrics = metrics
    extraction = Extraction(remote.resolve, store.put_image, Noting(store, metrics))
    collector = Collector(store, directories, remote, partial(_note_look, metrics), extraction.forget)
    handlers = []
    if settings.image_service:
        handlers = image_service.handlers(settings.image_service, logins, metrics.note_pull)
    scrapes = metrics.serve(settings.snapshotter_metrics_address)
    remote.start()
    collector.start()
    # The daemon first: a look under way would wait for one that isn't there.
    ends = (remote.close, collector.close) if scrapes is None else (remote.close, collector.close, scrapes.close)
    return Collaborators(extraction, remote, collector, ends, tuple(handlers), metrics.note_call)


def _note_look(metrics: Metrics, done: Collected) -> None:
    metrics.note_collection(done.directories, done.chains, done.layers, done.freed, failed=bool(done.failed))
