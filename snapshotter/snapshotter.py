"""The ten calls of the snapshots service, without gRPC.

Thread-safe. Nothing here holds a lock while it asks the daemon, so calls wait for each other's network never; and for
each other's disk only as long as a transaction takes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from lazyfs.errors import LazyfsError, SnapshotExists, SnapshotInvalid, SnapshotUnfit, StoreError
from lazyfs.limits import CLEANUP, MAX_USAGES
from snapshotter import filters, rows
from snapshotter.directories import Directories, Owner
from snapshotter.disk_usage import disk_usage
from snapshotter.model import REF_LABEL, Kind, LazyOffer, Mount, Snapshot, Usage
from snapshotter.overlay import Overlay, mapped_root
from snapshotter.parts import Chains, Collector, Extraction
from snapshotter.store import Store

log = logging.getLogger(__name__)


class Snapshotter:
    """Answers containerd. Every method blocks, and raises LazyfsErrors: SnapshotErrors for what is asked in vain."""

    def __init__(
        self,
        store: Store,
        directories: Directories,
        overlay: Overlay,
        extraction: Extraction,
        chains: Chains,
        collector: Collector,
    ) -> None:
        self._store = store
        self._directories = directories
        self._overlay = overlay
        self._extraction = extraction
        self._chains = chains
        self._collector = collector
        self._usages: dict[str, Usage] = {}  # of lazy layers, as they were last known

    # -- making

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make an active snapshot and return its mounts.

        For an extraction whose layer is there lazily SnapshotExists says so: it was committed under its chain ID.
        """
        self._check(key, labels)
        offer = None
        if labels.get(REF_LABEL):
            offer = self._extract(key, parent, labels)
        return self._create(Kind.ACTIVE, key, parent, labels, offer)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make a view, which is mounted read-only, and return its mounts."""
        self._check(key, labels)
        return self._create(Kind.VIEW, key, parent, labels, None)

    def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or a view. A lazy chain below it is shown again where it must be."""
        rows.check_key(key)
        chain = self._store.get_chain(key)
        if chain[0].kind == Kind.COMMITTED:
            raise SnapshotUnfit(key, f"snapshot {key!r} is committed, so it can't be mounted: make a view of it")
        numbers, lowerdirs, _ = self._below([] if chain[0].lazy is not None else chain[1:])
        return self._overlay.mounts(chain[0], numbers, lowerdirs)

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make an active snapshot a committed one; `parent` for one that was made without."""
        rows.check_key(name, "name")
        rows.check_key(key)
        snapshot = self._store.get(key)
        if self._store.find(name) is not None:
            raise SnapshotExists(name, f"there is a snapshot {name!r} already")
        usage = Usage()
        if snapshot.kind == Kind.ACTIVE and snapshot.lazy is None:
            usage = self._measure(snapshot)
        self._store.commit(name, key, labels, usage, parent)

    # -- the rest

    def remove(self, key: str) -> None:
        """Forget a snapshot. What it took is given back in the background."""
        self._store.remove(key)
        self._collector.wake()

    def stat(self, key: str) -> Snapshot:
        """Return a snapshot."""
        return self._store.get(rows.check_key(key))

    def update(self, key: str, labels: Mapping[str, str], fieldpaths: Iterable[str]) -> Snapshot:
        """Change labels; see Store.update."""
        return self._store.update(key, labels, fieldpaths)

    def walk(self, texts: Sequence[str]) -> list[Snapshot]:
        """Return the snapshots that match any of these filters, as they are at one moment."""
        match = filters.parse_all(texts)
        return [snapshot for snapshot in self._store.walk() if match(snapshot)]

    def usage(self, key: str) -> Usage:
        """Return what a snapshot takes on this disk: of a lazy one what is here of its layer by now."""
        rows.check_key(key)
        snapshot, recorded = self._store.get_with_usage(key)
        if snapshot.lazy is not None:
            if snapshot.kind != Kind.COMMITTED:
                return recorded
            digest = snapshot.lazy.layer.digest
            try:
                found = self._chains.usage([digest])
            except LazyfsError as error:
                # Asked for all snapshots every few seconds: a daemon that is away is told of elsewhere.
                log.debug("the usage of %s is what was known of it: %s", key, error)
                return self._usages.get(digest, recorded)
            if len(self._usages) >= MAX_USAGES:
                self._usages.clear()
            self._usages[digest] = found
            return found
        return self._measure(snapshot) if snapshot.kind == Kind.ACTIVE else recorded

    def cleanup(self) -> None:
        """Give back now what nobody refers to."""
        self._collector.run(time.monotonic() + CLEANUP)

    # -- parts

    def _measure(self, snapshot: Snapshot) -> Usage:
        try:
            return disk_usage(self._directories.fs(snapshot.number))
        except StoreError:
            self._store.get(snapshot.key)  # removed meanwhile: that is what the caller is told
            raise

    def _check(self, key: str, labels: Mapping[str, str]) -> None:
        """Refuse what can't be before any work is done for it."""
        rows.check_key(key)
        rows.pack_labels(labels)
        if self._store.find(key) is not None:
            raise SnapshotExists(key, f"there is a snapshot {key!r} already")

    def _extract(self, key: str, parent: str, labels: Mapping[str, str]) -> LazyOffer | None:
        """Commit the layer lazily and raise SnapshotExists; None: it must be downloaded; an offer: it is staged."""
        chain_id = labels[REF_LABEL]
        rows.check_key(chain_id, "name")
        if parent:
            self._committed(parent)
        # containerd looks for the label and the parent, not for the name. In another namespace the parent may be an
        # ordinary snapshot with another name: then the chain ID itself is taken, and this one gets a longer name.
        names = (chain_id, f"{chain_id}@{hashlib.sha256(parent.encode()).hexdigest()[:16]}")
        if any(self._is_extracted(name, chain_id, parent) for name in names):
            raise _there(chain_id)
        offer = self._extraction.offer(key, parent, labels)
        if offer is None or offer.staged:
            return offer
        kept = {**offer.labels, REF_LABEL: chain_id}
        for name in names:
            try:
                self._store.commit_lazy(name, parent, kept, offer.image, offer.index, Usage())
            except SnapshotExists:
                if not self._is_extracted(name, chain_id, parent):
                    continue
            raise _there(chain_id)
        return None  # both names are taken by something else

    def _is_extracted(self, name: str, chain_id: str, parent: str) -> bool:
        found = self._store.find(name)
        return (
            found is not None
            and found.kind == Kind.COMMITTED
            and found.parent == parent
            and found.labels.get(REF_LABEL) == chain_id
        )

    def _committed(self, parent: str) -> list[Snapshot]:
        """Return a parent and its ancestors."""
        chain = self._store.get_chain(parent)
        if chain[0].kind != Kind.COMMITTED:
            raise SnapshotInvalid(parent, f"the parent {parent!r} is not committed")
        return chain

    def _create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str], offer: LazyOffer | None
    ) -> list[Mount]:
        staged = None if offer is None else (offer.image, offer.index)
        numbers, lowerdirs, owner = self._below(self._committed(parent) if parent and not staged else [])
        root = mapped_root(labels)
        if root is not None:
            owner = Owner(owner.mode, *root)
        made = ""
        try:
            made = self._directories.make(owner, work=kind == Kind.ACTIVE)
            snapshot = self._store.create(
                key,
                parent,
                kind,
                labels,
                place=lambda number: self._directories.settle(made, number),
                withdraw=lambda number: self._directories.withdraw(made, number),
                staged=staged,
            )
        except BaseException:
            if made:
                self._directories.discard(made)
            if lowerdirs:
                self._collector.wake()  # a chain is shown for nothing
            raise
        return self._overlay.mounts(snapshot, numbers, lowerdirs)

    def _below(self, chain: Sequence[Snapshot]) -> tuple[list[int], tuple[str, ...], Owner]:
        """Return what a snapshot on `chain` stands on (nearest first): directories, and whose their root is."""
        numbers: list[int] = []
        for snapshot in chain:
            if snapshot.lazy is not None:
                shown = self._chains.show(snapshot.lazy)
                owner = self._directories.owner(numbers[0]) if numbers else Owner(shown.mode, shown.uid, shown.gid)
                return numbers, shown.lowerdirs, owner
            numbers.append(snapshot.number)
        return numbers, (), self._directories.owner(numbers[0]) if numbers else Owner()


def _there(chain_id: str) -> SnapshotExists:
    return SnapshotExists(chain_id, f"the layer {chain_id} is there already")
