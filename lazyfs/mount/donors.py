"""Chunks that another layer of this node has: copied, not fetched."""

from __future__ import annotations

import logging
from collections import OrderedDict
from threading import Lock

from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.layer_store import LayerStore
from lazyfs.chunks.store import Store
from lazyfs.errors import LazyfsError
from lazyfs.format.table import NO_FRAME, LayerTable
from lazyfs.limits import MAX_DONORS

log = logging.getLogger(__name__)


class Donors:
    """Find a chunk by its digest in complete layers. Thread-safe; blocks on the local disk."""

    def __init__(self, catalog: Catalog, store: Store) -> None:
        self._catalog = catalog
        self._store = store
        self._lock = Lock()
        self._open: OrderedDict[int, LayerStore | None] = OrderedDict()  # None: gone, or not to be opened

    def find(self, layer: ServedLayer, digest: bytes) -> bytes | None:
        """Return the verified bytes of a chunk with this digest from a layer other than `layer`, or None."""
        try:
            for number, chunk in self._catalog.places(digest):
                if number == layer.number:
                    continue
                donor = self._donor(number)
                if donor is None or chunk >= donor.table.chunk_count or donor.table.chunk_digest(chunk) != digest:
                    continue
                data = donor.read(chunk)
                if data is not None:
                    return data
        except LazyfsError as error:
            log.info("no chunk could be copied: %s", error)
        return None

    def copy(self, layer: ServedLayer, first: int, stop: int) -> None:
        """Put those frames of [first, stop) into a layer's store whose chunks other layers have, all of them.

        For who would fetch them without anybody waiting. Where a frame's first chunk is nowhere it is left: what is
        asked of the catalog is one chunk a frame then.
        """
        for frame in range(first, stop):
            for chunk in layer.table.frame_chunks(frame):
                if layer.dropped or layer.store.has(chunk) or layer.table.chunk_frame[chunk] == NO_FRAME:
                    continue
                data = self.find(layer, layer.table.chunk_digest(chunk))
                if data is None or len(data) != layer.table.chunk_size[chunk]:
                    break
                layer.store.write(chunk, data)

    def add(self, layer: ServedLayer) -> None:
        """Let a complete layer give its chunks away. Blocking: writes a row a chunk."""
        self._catalog.index_layer(layer.number, layer.table)
        with self._lock:
            self._open.pop(layer.number, None)

    def close(self) -> None:
        """Give all layers back."""
        with self._lock:
            for donor in self._open.values():
                if donor is not None:
                    donor.close()
            self._open.clear()

    def _donor(self, number: int) -> LayerStore | None:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            donor = self._try_open(number)
            self._open[number] = donor
            while len(self._open) > MAX_DONORS:
                _, old = self._open.popitem(last=False)
                if old is not None:
                    old.close()
            return donor

    def _try_open(self, number: int) -> LayerStore | None:
        key = self._catalog.key_of(number) or ""
        digest = ":".join(key.split(":")[1:3])
        source = self._store.source(digest) if key.startswith("layer:") else None
        if source is None or source.quarantine or not source.verified:
            return None
        try:
            return self._store.open_layer(digest, LayerTable(self._store.path(digest) / "table"))
        except LazyfsError:
            return None
