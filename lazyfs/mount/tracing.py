"""A start of an image as it happens: the first demand of each chunk, in order and by the clock, and every request.

What is noted while it happens is two numbers a chunk. Only at the end it becomes paths and offsets, in a thread.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator

from lazyfs.chunks.layer import ServedLayer
from lazyfs.format.entry import Kind
from lazyfs.format.table import NO_FRAME, LayerTable
from lazyfs.format.trace import Read, Request, Trace
from lazyfs.limits import MAX_READS, MAX_REQUESTS, MAX_TRACE_LAYERS
from lazyfs.mount.advance import spans_of


class Recorder:
    """Notes one start from its making on. A witness of layers; belongs to the trio loop, except `trace`."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.last = self.began  # when a chunk was demanded for the first time, or came, most recently
        self._layers: dict[int, ServedLayer] = {}  # by layer number
        self._reads: dict[tuple[int, int], list[float]] = {}  # (layer, chunk) → when, and how long it took
        self._requests: list[tuple[int, int, int, int, float, float, float]] = []

    def __len__(self) -> int:
        """How many chunks were demanded."""
        return len(self._reads)

    # -- whose start it is

    def attach(self, layers: Iterable[ServedLayer]) -> None:
        """Listen to these layers."""
        for layer in layers:
            self._layers[layer.number] = layer
            if self not in layer.witnesses:
                layer.witnesses = (*layer.witnesses, self)

    def detach(self) -> None:
        """Listen no more. What was noted stays."""
        for layer in self._layers.values():
            layer.witnesses = tuple(each for each in layer.witnesses if each is not self)

    # -- what happens

    def demanded(self, layer: int, chunk: int) -> None:
        key = layer, chunk
        if key not in self._reads and len(self._reads) < MAX_READS:
            self.last = time.monotonic()
            self._reads[key] = [self.last, 0.0]

    def waited(self, layer: int, chunk: int, seconds: float) -> None:
        read = self._reads.get((layer, chunk))
        if read is not None and not read[1]:
            self.last = time.monotonic()
            read[1] = seconds

    def requested(
        self, layer: int, blob_offset: int, size: int, priority: int, began: float, first: float, ended: float
    ) -> None:
        if len(self._requests) < MAX_REQUESTS:
            self._requests.append((layer, blob_offset, size, priority, began, first, ended))

    # -- what came of it

    def trace(self, manifest: str, digests: Iterable[str], ready: float, command: tuple[str, ...] = ()) -> Trace:
        """Return what was noted, with paths; `digests`: all layers of the image, base first.

        Blocking, milliseconds for large layers; after `detach`, in any thread.
        """
        named = tuple(digests)[:MAX_TRACE_LAYERS]
        places = {digest: place for place, digest in reversed(list(enumerate(named)))}
        place_of = {number: places[one.digest] for number, one in self._layers.items() if one.digest in places}
        by_layer: dict[int, set[int]] = defaultdict(set)
        for layer, chunk in self._reads:
            by_layer[layer].add(chunk)
        rows = {layer: rows_of(self._layers[layer].table, chunks) for layer, chunks in by_layer.items()}
        paths: dict[tuple[int, int], bytes] = {}
        reads = []
        for (layer, chunk), (at, waited) in sorted(self._reads.items(), key=lambda each: each[1][0]):
            row = rows[layer].get(chunk)
            if row is None or layer not in place_of:
                continue
            table = self._layers[layer].table
            path = paths.get((layer, row))
            if path is None:
                path = paths[layer, row] = table.path_of(row)
            offset = table.chunk_data_offset[chunk] - table.data_offset[row]
            reads.append(Read(path, place_of[layer], offset, table.chunk_size[chunk], at - self.began, waited))
        spans = spans_of(self._first_frames(place_of))
        requests = [
            Request(place_of[layer], offset, size, priority, *(at - self.began for at in times))
            for layer, offset, size, priority, *times in sorted(self._requests, key=lambda each: each[4])
            if layer in place_of
        ]
        return Trace(manifest, named, tuple(reads), tuple(requests), ready, command, spans)

    def _first_frames(self, place_of: dict[int, int]) -> Iterator[tuple[int, LayerTable, int]]:
        """Yield the frames of what was demanded in its order, each once, with the place and table of their layer."""
        seen: set[tuple[int, int]] = set()
        for layer, chunk in sorted(self._reads, key=lambda each: self._reads[each][0]):
            table = self._layers[layer].table
            if layer not in place_of or self._layers[layer].is_plain:
                continue
            frame = int(table.chunk_frame[chunk])
            if frame != NO_FRAME and (layer, frame) not in seen:
                seen.add((layer, frame))
                yield place_of[layer], table, frame


def rows_of(table: LayerTable, chunks: Iterable[int]) -> dict[int, int]:
    """Return the row of the regular file that each of these chunks is of. Blocking: it looks at every row once."""
    wanted = sorted(chunks)
    files = sorted(
        (first, row)
        for row, (first, count) in enumerate(zip(table.first_chunk, table.chunk_count_of, strict=True))
        if count and table.kind[row] == Kind.REG
    )
    out = {}
    for chunk in wanted:
        at = bisect_right(files, (chunk, table.rows)) - 1
        if at >= 0 and chunk in table.file_chunks(row := files[at][1]):
            out[chunk] = row
    return out
