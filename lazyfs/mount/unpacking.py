"""Plain layers on their way into the store: whose turn it is, what the user hears, and what is tried when it fails."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from lazyfs.chunks.lines import Lines
from lazyfs.chunks.plain import PlainLayer, unpack_plain
from lazyfs.chunks.store import Store
from lazyfs.errors import DigestMismatch, StoreFull
from lazyfs.registry.mirrored import read_again
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB, format_size

log = logging.getLogger(__name__)

UNPACKED = "data.new"  # what the unpacker fills, until the store takes it over; the process's number follows
_REPORT = 1.0  # seconds between two remarks on a layer
_STEP = 8 * MiB  # bytes between two signs that a layer's directory is in use
_SPARE = 64 * MiB  # bytes of disk beyond what a layer is expected to take
_SWELLS = 3  # times a blob's size, where nothing better is known of what it unpacks to
_ROOMS = 2  # times that room is made for one layer


class Unpacking:
    """Unpack plain layers. Thread-safe; every call blocks, in a worker thread."""

    def __init__(self, store: Store, connections: int, nearly: Callable[[], None] = lambda: None) -> None:
        """`connections`: what one host may have at a time. `nearly` is called when a layer's last bytes are there."""
        self._store = store
        self._nearly = nearly
        self.lines = Lines(connections)

    def place(self, digest: str) -> Path:
        """Return where a layer's chunks are to be unpacked, and drop what died there. Raise StoreError."""
        directory = self._store.path(digest)
        with suppress(OSError):  # then it stays until the layer goes
            for left in directory.glob(f"{UNPACKED}.*"):
                if not Path("/proc", left.suffix[1:]).exists():
                    left.unlink(missing_ok=True)
        return directory / f"{UNPACKED}.{os.getpid()}"

    def unpack(
        self,
        repository: Repository,
        layer: PlainLayer,
        say: Callable[[str], None] = lambda text: None,
        alive: Callable[[], None] = lambda: None,
        *,
        at_once: bool = False,
    ) -> None:
        """Fetch and unpack a layer, when its turn comes or `at_once`. `alive` is called often; what it raises ends the
        work.

        Wrong bytes are fetched again from the next source; a disk that is too full for it is emptied of what was used
        least. Errors as `unpack_plain`; nothing is left behind then.
        """
        with nullcontext() if at_once else self.lines.place(repository.host, layer.blob_size, alive):
            for room in range(_ROOMS + 1):
                progress = _Progress(layer, say, alive, self._nearly)
                try:
                    read_again(
                        repository,
                        layer.blob_digest,
                        lambda progress=progress: self._once(repository, layer, progress),  # type: ignore[misc]
                        (DigestMismatch,),
                    )
                    return
                except StoreFull as error:
                    self._make_room(layer, progress, error if room == _ROOMS else None)

    def _once(self, repository: Repository, layer: PlainLayer, progress: _Progress) -> None:
        # Bytes that were wrong once come over one connection, so that it is known who sent them.
        lines = None if progress.begun else self.lines
        progress.begin()
        try:
            unpack_plain(repository, layer, progress.note, lines)
        except StoreFull:
            progress.measure()
            layer.data.unlink(missing_ok=True)
            raise
        except BaseException:
            layer.data.unlink(missing_ok=True)
            raise

    def _make_room(self, layer: PlainLayer, progress: _Progress, last: StoreFull | None) -> None:
        """Evict what a layer seems to need. Raise StoreFull where that can't help."""
        free = _free(layer.data.parent)
        freed = 0 if last is not None else self._store.evictor.free(max(progress.expected + _SPARE - free, _SPARE))
        if not freed:
            raise StoreFull(
                f"layer {layer.blob_digest} takes more than {format_size(progress.used)} unpacked, "
                f"and the store's disk has {format_size(free)} free",
                hint="free some space, or put the store on another disk with --root",
            ) from None
        log.info("%s freed, for layer %s", format_size(freed), layer.blob_digest)


class _Progress:
    """How far one layer is."""

    def __init__(
        self, layer: PlainLayer, say: Callable[[str], None], alive: Callable[[], None], nearly: Callable[[], None]
    ) -> None:
        self._nearly = nearly
        self._layer = layer
        self._say = say
        self._alive = alive
        self._done = 0
        self._told = self._began = time.monotonic()
        self.begun = False
        self.used = 0  # bytes of disk, when it was full
        self.expected = layer.blob_size * _SWELLS  # bytes of disk for all of it

    def begin(self) -> None:
        """Begin from the blob's first byte, perhaps again."""
        self._done, self.begun = 0, True
        self._told = self._began = time.monotonic()

    def note(self, size: int) -> None:
        """Count bytes of the blob, and tell the user now and then."""
        self._alive()
        before, self._done = self._done, self._done + size
        if before // _STEP != self._done // _STEP:
            with suppress(OSError):
                os.utime(self._layer.data.parent)  # or it would pass for the rest of a crash one day
        if self._done == self._layer.blob_size:
            self._nearly()
        now = time.monotonic()
        if now - self._told >= _REPORT:
            self._told = now
            layer, rate = self._layer, self._done / (now - self._began)
            self._say(
                f"layer {layer.blob_digest[7:19]}: {format_size(self._done)} of {format_size(layer.blob_size)}, "
                f"{format_size(int(rate))}/s"
            )

    def measure(self) -> None:
        """Work out from what is unpacked so far what all of it takes."""
        try:
            self.used = self._layer.data.stat().st_blocks * 512
        except OSError:
            return
        self.expected = int(self.used * self._layer.blob_size / max(self._done, 1))


def _free(directory: Path) -> int:
    """Return the bytes that the disk under `directory` has left for us; 0 where it doesn't say."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
