"""How `lazyfs cache` reaches the store: through the daemon that holds it, or by holding it itself for a moment."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from lazyfs.errors import DaemonUnreachable, StoreLocked
from lazyfs.limits import STORE_PATIENCE

if TYPE_CHECKING:
    from lazyfs.chunks.catalog import Catalog, MountRecord
    from lazyfs.chunks.stock import Stock
    from lazyfs.config import Settings

_LOOK = 0.05  # seconds between looks

OnProgress = Callable[[int, int], None]


class StockCaller(Protocol):
    """Makes the calls named cache_… with the answers that the daemon gives."""

    def call(self, name: str, *, on_progress: OnProgress | None = None, **args: Any) -> dict[str, Any]: ...


class HeldStock:
    """Answers the calls from a store that this process holds."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock

    def call(self, name: str, *, on_progress: OnProgress | None = None, **args: Any) -> dict[str, Any]:
        """Make one call. Blocking. Raise LazyfsError."""
        match name:
            case "cache_layers":
                return self._stock.layers(args.get("after", ""))
            case "cache_images":
                return self._stock.images(args.get("after", ""))
            case "cache_remove":
                return self._stock.remove(args["names"], args.get("force", False))
            case "cache_unpin":
                return self._stock.unpin(args["names"])
            case "cache_prune":
                return self._stock.prune(args.get("size"), args.get("age"), args.get("everything", False))
        assert name == "cache_verify", name
        check = self._stock.verify(args.get("names", []))
        done = 0
        for size in check.steps():
            done += size
            if on_progress is not None:
                on_progress(done, check.total)
        return check.result()


class RecordedUses:
    """What other processes have in use, as far as it is written down. `alone`: there are none, we hold the store."""

    def __init__(self, catalog: Catalog, *, alone: bool) -> None:
        self._catalog = catalog
        self._alone = alone

    def _living(self) -> list[MountRecord]:
        if self._alone:
            return []
        return [record for record in self._catalog.mounts() if os.path.isdir(f"/proc/{record.pid}")]

    def layers(self) -> frozenset[str]:
        """Return nothing: whoever has a layer open holds a lock on it."""
        return frozenset()

    def trees(self) -> frozenset[str]:
        """Return the keys of the trees that are being served."""
        return frozenset(record.tree_key for record in self._living())

    def mounts(self) -> dict[str, list[str]]:
        """Return where images show, by the digest of their manifest."""
        found: dict[str, list[str]] = {}
        for record in self._living():
            found.setdefault(record.manifest_digest, []).append(record.dir)
        return found


@contextlib.contextmanager
def open_stock(settings: Settings) -> Iterator[StockCaller]:
    """Yield what answers calls on the store. Blocking, 10 s at most.

    Raise StoreLocked when a daemon holds the store and does not answer, StoreError when the store can't be used.
    """
    with contextlib.ExitStack() as stack:
        yield _reach(settings, stack)


def _reach(settings: Settings, stack: contextlib.ExitStack) -> StockCaller:
    deadline = time.monotonic() + STORE_PATIENCE
    while True:
        found = _daemon(settings, stack) if os.geteuid() == 0 else None
        try:
            return found or _hold(settings, stack)
        except StoreLocked:
            # A daemon starts or ends: either takes a moment.
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK)


def _daemon(settings: Settings, stack: contextlib.ExitStack) -> StockCaller | None:
    """Connect to the daemon that holds the store. None: there is none. An ordinary user's daemons only share it."""
    from lazyfs import control_client

    for store_only in (False, True):
        try:
            return stack.enter_context(control_client.open_daemon(settings, start=False, store_only=store_only))
        except DaemonUnreachable as error:
            if error.hint:  # it is there, and does not answer
                raise
    return None


def _hold(settings: Settings, stack: contextlib.ExitStack) -> HeldStock:
    from lazyfs.chunks.catalog import Catalog
    from lazyfs.chunks.census import Census
    from lazyfs.chunks.private_files import open_root
    from lazyfs.chunks.stock import Stock
    from lazyfs.chunks.store import Store

    open_root(os.fspath(settings.root))
    with contextlib.ExitStack() as ours:
        catalog = Catalog(settings.root / "catalog.db")
        ours.callback(catalog.close)
        store = Store(settings.root, settings.store_size, catalog)
        ours.callback(store.close)
        store.lock(exclusive=os.geteuid() == 0)
        stack.push(ours.pop_all())
    return HeldStock(Stock(Census(store, catalog, RecordedUses(catalog, alone=os.geteuid() == 0))))
