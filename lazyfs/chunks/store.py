"""The local store: a directory of layers, each with its TOC, its table and those chunks that were fetched.

`<root>/lock`, `<root>/catalog.db` and `<root>/layers/sha256/<hex of the blob digest>/`: `toc` (raw JSON), `table` (the
layer table), `source` (see `source.LayerSource`), `data` (chunks at their data offsets, sparse), `chunks`, `used`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lazyfs import digest as digests
from lazyfs.chunks import removal
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.evict import Budget, Evictor
from lazyfs.chunks.health import DiskHealth
from lazyfs.chunks.layer_files import LayerFiles
from lazyfs.chunks.layer_store import ChunkTable, LayerStore
from lazyfs.chunks.private_files import (
    OwnedFd,
    open_directory,
    open_file,
    open_root,
    read_whole,
    remove_tree,
    replace_file,
    translate,
)
from lazyfs.chunks.shape import Shape, shape_of
from lazyfs.chunks.source import LayerSource, decode_source, encode_source
from lazyfs.errors import StoreError, StoreLocked
from lazyfs.limits import MAX_SOURCE, MAX_STORED_TOC, REMOVAL_TIMEOUT

__all__ = ["LayerStore", "Store", "StoreStatus"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What `status` shows of the store. Bytes, and counts since the start."""

    bound: int
    used: int  # estimate between two scans
    evicted: int
    layers_open: int
    damaged: int  # chunks that failed their hash
    passed_by: int  # writes not made: disk failing or full, or no room within the bound
    write_failures: int
    passing_by: str  # why writes are passed by right now; empty: they are not


@dataclass(slots=True)
class _Slot:
    """A layer that is open in this process."""

    files: LayerFiles
    users: int = 0
    layer: LayerStore | None = None
    mounts: int = 0  # users that came through open_layer


class Store:
    """All layers of one root directory. Thread-safe; methods block on the local disk."""

    def __init__(
        self,
        root: Path,
        bound: int,
        catalog: Catalog,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open or make the store at `root`; `bound` in bytes. Raise StoreFull or StoreBroken. Takes no lock yet."""
        self.root = root
        self.catalog = catalog
        self._now = now
        self._root = open_root(os.fspath(root))
        layers = open_directory(self._root, "layers", create=True)
        assert layers is not None
        directory = open_directory(layers, "sha256", create=True)
        assert directory is not None
        self._layers = directory
        self._lock = threading.RLock()
        self._slots: dict[str, _Slot] = {}
        self._lock_file: OwnedFd | None = None
        self._shared = False
        self._follows = False
        self._closed_damaged = 0  # of layers that were closed since
        self._held: Counter[str] = Counter()  # layers that a fetch completes, by how many
        # Tells, from any thread, which layers can't be fetched again for those who read them; set by the daemon.
        self.irreplaceable: Callable[[], frozenset[str]] = frozenset
        self.health = DiskHealth(monotonic=monotonic)
        self.budget = Budget(bound, monotonic=monotonic)
        self.evictor = Evictor(self, self.budget, self._kept)
        self.evictor.scan()

    # -- the store as a whole

    def lock(self, exclusive: bool) -> None:
        """Take the store for this process until `close`: alone, or beside others that share it. Doesn't wait.

        Raise StoreLocked when somebody holds it.
        """
        try:
            fd = open_file(self._root, "lock", create=True)
            assert fd is not None
            fcntl.flock(fd.number, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(
                f"another daemon uses the store {self.root}", hint="stop it, or take another --root"
            ) from None
        except OSError as error:
            raise translate(error, f"the store's lock {self.root}/lock") from None
        self._lock_file = fd
        with self._lock:
            self._shared = not exclusive
            for slot in self._slots.values():
                slot.files.shared = self._shared
        if exclusive:
            try:
                removal.sweep(self._layers)
            except OSError as error:
                self.health.failed(error)

    def follow(self) -> None:
        """Open layers beside the daemon that has the store, and change nothing of them, until `take`."""
        self._shared = self._follows = True
        self.evictor.rests = True

    def take(self) -> None:
        """Have the layers ourselves: the daemon that we followed has ended. A few system calls a layer."""
        with self._lock:
            self._follows = self.evictor.rests = False
            for slot in self._slots.values():
                try:
                    slot.files.take()
                except StoreError as error:
                    log.warning("layer %s can't be taken over: %s", slot.files.digest, error)

    @contextmanager
    def hold(self, wanted: Iterable[str]) -> Iterator[None]:
        """Keep layers from eviction while they are being completed. Doesn't block."""
        held = Counter(wanted)
        with self._lock:
            self._held += held
        try:
            yield
        finally:
            with self._lock:
                self._held -= held

    def held(self) -> frozenset[str]:
        """Return the layers that `hold` keeps. Doesn't block."""
        with self._lock:
            return frozenset(self._held)

    def _kept(self) -> frozenset[str]:
        return self.catalog.pinned() | self.held() | self.irreplaceable()

    def close(self) -> None:
        """Stop evicting, close all layers, release the lock. Waits 10 s at most for an eviction under way."""
        self.evictor.close()
        with self._lock:
            for slot in self._slots.values():
                slot.files.close()
            self._slots.clear()
            self._lock_file = None

    def note_written(self, size: int) -> None:
        """Count bytes that went to the disk past `LayerStore` (a table, a TOC). May start an eviction."""
        self.budget.note_written(size)

    def status(self) -> StoreStatus:
        """Return the numbers of this moment. Doesn't block."""
        layers = [slot.layer for slot in list(self._slots.values()) if slot.layer is not None]
        return StoreStatus(
            self.budget.bound,
            self.budget.used,
            self.evictor.evicted,
            len(layers),
            self._closed_damaged + sum(layer.damaged for layer in layers),
            self.health.passed_by + self.budget.passed_by,
            self.health.failures,
            self.health.reason,
        )

    # -- layers

    def layer(self, digest: str) -> LayerStore | None:
        """Return a layer that is open in this process. The caller doesn't own it. Doesn't block."""
        slot = self._slots.get(digest)
        return slot.layer if slot is not None else None

    def open_layer(self, digest: str, table: ChunkTable) -> LayerStore:
        """Open a layer's chunks, or begin with none. Each call is paired with one `LayerStore.close`.

        Until then the layer counts as mounted. A layer that is open already comes back with the table it has. What is
        on disk in another shape is dropped. Raise StoreFull, StoreBroken (also for a newer version) or StoreLocked.
        """
        shape = shape_of(table)
        with self._lock:
            slot = self._acquire(digest, shape)
            assert slot is not None
            if slot.layer is None:
                slot.files.ensure(shape)
                slot.layer = LayerStore(
                    slot.files, table, self.budget, self.health, partial(self._release, digest, mounted=True)
                )
            slot.mounts += 1
            return slot.layer

    def _acquire(self, digest: str, shape: Shape | None) -> _Slot | None:
        slot = self._slots.get(digest)
        if slot is None:
            files = self._open_files(digest, shape)
            if files is None:
                return None
            slot = self._slots[digest] = _Slot(files)
        slot.users += 1
        return slot

    def _open_files(self, digest: str, shape: Shape | None) -> LayerFiles | None:
        """Open a layer's files; while another process removes the layer, try again for a second."""
        deadline = time.monotonic() + REMOVAL_TIMEOUT
        name = digests.hex_of(digest)
        while True:
            directory = open_directory(self._layers, name, create=shape is not None)
            if directory is None:
                return None
            try:
                files = LayerFiles(
                    digest, directory, shape, self.health, shared=self._shared, follows=self._follows, now=self._now
                )
                if os.stat(name, dir_fd=self._layers.number).st_ino == os.fstat(directory.number).st_ino:
                    return files
                files.close()
            except FileNotFoundError:
                pass  # removed while we opened it: begin again
            except OSError as error:
                raise translate(error, f"layer {digest} in the store") from None
            except StoreLocked:
                if shape is None or time.monotonic() >= deadline:
                    raise
            if time.monotonic() >= deadline:
                raise StoreLocked(f"layer {digest} is being removed from the store", hint="try again")
            time.sleep(0.01)

    def _release(self, digest: str, *, mounted: bool = False) -> None:
        with self._lock:
            slot = self._slots.get(digest)
            if slot is None:
                return  # the store was closed first
            slot.users -= 1
            slot.mounts -= mounted
            if slot.mounts == 0 and slot.layer is not None:
                self._closed_damaged += slot.layer.damaged
                slot.layer = None
            if slot.users == 0:
                slot.files.close()
                del self._slots[digest]

    # -- what lies beside the chunks

    def path(self, digest: str) -> Path:
        """Return a layer's directory, made where missing (mode 0700): the child process writes `table` there.

        Raise StoreFull or StoreBroken.
        """
        name = digests.hex_of(digest)
        open_directory(self._layers, name, create=True)
        return self.root / "layers" / "sha256" / name

    def read_toc(self, digest: str) -> bytes | None:
        """Return the raw TOC, not verified: the caller compares it with the digest that the manifest promised."""
        return self._read(digest, "toc", MAX_STORED_TOC)

    def stamp(self, digest: str) -> tuple[int, ...] | None:
        """Return what changes when a layer's table, or what is known of it, is replaced. None: one of them is not here.

        Blocking, two system calls.
        """
        found: list[int] = []
        for name in ("source", "table"):
            try:
                stat = os.lstat(f"{digests.hex_of(digest)}/{name}", dir_fd=self._layers.number)
            except OSError:
                return None
            found += [stat.st_ino, stat.st_mtime_ns, stat.st_size]
        return tuple(found)

    def write_toc(self, digest: str, raw: bytes) -> None:
        """Keep the raw TOC. Raise StoreFull or StoreBroken."""
        self._write(digest, "toc", raw)

    def source(self, digest: str) -> LayerSource | None:
        """Return what is known of where a layer came from; None: nothing, or damaged. StoreBroken: newer version."""
        raw = self._read(digest, "source", MAX_SOURCE)
        return decode_source(raw) if raw is not None else None

    def set_source(self, digest: str, source: LayerSource) -> None:
        """Replace what is known of a layer. Raise StoreFull or StoreBroken."""
        self._write(digest, "source", encode_source(source))

    def _read(self, digest: str, name: str, bound: int) -> bytes | None:
        directory = open_directory(self._layers, digests.hex_of(digest), create=False)
        return read_whole(directory, name, bound) if directory is not None else None

    def _write(self, digest: str, name: str, data: bytes) -> None:
        if self._follows:
            raise StoreLocked(f"layer {digest} is another daemon's")
        directory = open_directory(self._layers, digests.hex_of(digest), create=True)
        assert directory is not None
        replace_file(directory, name, data)
        self.budget.note_written(len(data))

    # -- for eviction

    def digests(self) -> list[str]:
        """Return the blob digests of all layers on disk, sorted."""
        try:
            names = os.listdir(self._layers.number)
        except OSError as error:
            self.health.failed(error)
            return []
        return sorted(digest for name in names if digests.is_digest(digest := f"sha256:{name}"))

    @contextmanager
    def borrow(self, digest: str) -> Iterator[LayerFiles | None]:
        """Hold a layer's files open for a while without mounting it; None where they can't be used."""
        slot: _Slot | None = None
        try:
            with self._lock:
                slot = self._acquire(digest, None)
        except StoreError as error:
            log.info("layer %s is left alone: %s", digest, error)
        try:
            yield slot.files if slot is not None else None
        finally:
            if slot is not None:
                self._release(digest)

    def is_mounted(self, digest: str) -> bool:
        """Tell whether `open_layer` has the layer open in this process. Doesn't block."""
        slot = self._slots.get(digest)
        return slot is not None and slot.mounts > 0

    def used_elsewhere(self, digest: str) -> bool:
        """Tell whether another process has the layer open. Always False for a store that is held alone."""
        if not self._shared:
            return False
        try:
            return removal.is_open(self._layers, digest)
        except (OSError, StoreError):
            return False

    def drop_chunks(self, digest: str) -> int:
        """Forget a layer's chunks while it stays in use. Return the bytes freed: readers fetch them again."""
        with self.borrow(digest) as files:
            freed = files.evict_all() if files is not None else 0
        self.budget.freed(freed)
        return freed

    def directory_usage(self, digest: str) -> int:
        """Return the bytes that a layer's directory takes on disk, all files together."""
        return removal.usage(self._layers, digest)

    def directory_inodes(self, digest: str) -> int:
        """Return how many inodes a layer's directory takes, 0 when it isn't there."""
        return removal.inodes(self._layers, digest)

    def remove_layer(self, digest: str) -> bool:
        """Remove a layer's directory and its place in the catalog. False: it is in use, here or by another process.

        A directory that is just being filled (no chunks yet, younger than an hour) counts as in use. Never raises.
        """
        try:
            with self._lock:
                gone = None if digest in self._slots else removal.hide(self._layers, digest, self._now())
            if gone is None:
                return False
            remove_tree(self._layers, gone)
            self.catalog.remove_layer(digest)
        except (OSError, StoreError) as error:
            log.warning("layer %s can't be removed from the store: %s", digest, error)
            return False
        return True

    def table_path(self, digest: str) -> Path:
        """Return where a layer's table lies, if it is there. Doesn't block."""
        return self.root / "layers" / "sha256" / digests.hex_of(digest) / "table"
