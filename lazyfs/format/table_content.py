"""The columns of a table that tell of content: chunks in the order of the stream, and the frames that hold them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, compress, islice, repeat
from operator import add, le, ne

from lazyfs.errors import TocInvalid
from lazyfs.format.columns import Column, pick
from lazyfs.format.entry import Kind
from lazyfs.format.listing import Listing
from lazyfs.format.table import FORM_PLAIN, NO_FRAME
from lazyfs.limits import MAX_DATA
from lazyfs.units import PAGE

_REG = Kind.REG
_IS_REG = bytes(kind == Kind.REG for kind in range(256))


class ContentColumns:
    """The columns for files that have rows: `sources` tells which entry a row has its content from, -1 none.

    `kinds` are those of the rows. Markers and landmarks have content too, and nobody can read it. Where a row without
    content has its content, and its chunks, says nothing.
    """

    def __init__(self, listing: Listing, sources: Sequence[int], kinds: bytes, *, form: int, payload_end: int) -> None:
        self._listing = listing
        self._sources = sources
        self._is_plain = form == FORM_PLAIN
        self._payload_end = payload_end
        self.holes = 0  # chunks that are in no frame; known after `fill`
        self._sizes, self._counts = listing.sizes, listing.chunk_counts
        if kinds.count(_REG) != listing.kinds.count(_REG):  # some entries are gone, or nobody can read them
            lives = bytearray(len(listing))
            for source in compress(sources, kinds.translate(_IS_REG)):
                lives[source] = 1
            self._sizes = [size if live else 0 for size, live in zip(self._sizes, lives, strict=True)]
            self._counts = [count if live else 0 for count, live in zip(self._counts, lives, strict=True)]

    def fill(self, columns: dict[str, Column]) -> int:
        """Add all columns of content. Return the size of the data space in bytes. Raise TocInvalid."""
        listing, counts = self._listing, self._counts
        kept = self._kept()
        offsets, starts = pick(listing.offsets, kept), pick(listing.blob_offsets, kept)
        chunk_ends = list(accumulate(counts, initial=0))  # of the entry before, with an empty one in front
        bases, data_size = self._bases(starts, chunk_ends)
        if max(counts, default=0) <= 1:
            of_chunks: Sequence[int] = list(compress(bases, counts))
        else:
            of_chunks = list(chain.from_iterable(map(repeat, bases, counts)))
        digests = listing.digests
        columns.update(
            data_offset=array("Q", pick([*bases, 0], self._sources)),
            first_chunk=array("I", pick(chunk_ends, self._sources)),
            chunk_count=array("I", pick([*counts, 0], self._sources)),
            chunk_data_offset=array("Q", list(map(add, of_chunks, offsets)) if any(offsets) else of_chunks),
            chunk_size=array("I", pick(listing.chunk_sizes, kept)),
            chunk_inner=array("Q", pick(listing.inner_offsets, kept)),
            chunk_digest=digests
            if len(kept) == len(listing.offsets)
            else b"".join([digests[32 * chunk : 32 * chunk + 32] for chunk in kept]),
        )
        columns.update(self._frames(starts, chunk_ends))
        return data_size

    def _kept(self) -> Sequence[int]:
        """Return which of the listing's chunks are those of the files. Raise TocInvalid where a file has too few."""
        listing, counts = self._listing, self._counts
        every = range(len(listing.offsets))
        # Nearly always: each file is one chunk.
        sizes = list(filter(None, self._sizes))
        if sizes == listing.chunk_sizes and list(map(bool, self._sizes)) == counts and not any(listing.offsets):
            return every
        kept: list[int] = []
        stops = accumulate(listing.chunk_counts)
        for number, (size, count, stop) in enumerate(zip(self._sizes, counts, stops, strict=True)):
            if size or count:
                found = listing.offsets[stop - 1] + listing.chunk_sizes[stop - 1] if count else 0
                if found != size:
                    raise TocInvalid(f"{listing.paths[number][:200]!r} has chunks up to {found} of its {size} bytes")
                kept += range(stop - count, stop)
        return kept if len(kept) < len(every) else every

    def _bases(self, starts: Sequence[int], first_chunks: list[int]) -> tuple[list[int], int]:
        """Return where each entry's content lies in the data space, and the size of that. Raise TocInvalid."""
        sizes = self._sizes
        if self._is_plain:  # it was written there before anybody knew which of its names survive
            bases = [starts[first] if size else 0 for first, size in zip(first_chunks, sizes, strict=False)]
            ends = [(base + size + PAGE - 1) & -PAGE for base, size in zip(bases, sizes, strict=True)]
            data_size = max(ends, default=0)
        else:
            bases = list(accumulate([(size + PAGE - 1) & -PAGE for size in sizes], initial=0))
            data_size = bases.pop()
        if data_size > MAX_DATA:
            raise TocInvalid(f"the layer claims more than {MAX_DATA} bytes of content")
        return bases, data_size

    def _frames(self, starts: Sequence[int], chunk_ends: Sequence[int]) -> dict[str, Column]:
        """Return which frame each chunk is in, and the frames.

        `starts` are the blob offsets of the chunks' frames, `chunk_ends` the numbers of chunks before each entry.
        """
        if self._is_plain or not starts:
            none = array("I", [NO_FRAME]) * len(starts)
            return {
                "chunk_frame": none,
                "frame_blob_offset": array("Q"),
                "frame_blob_end": array("Q"),
                "frame_first_chunk": array("I"),
            }
        latest = starts
        holes: list[int] = []
        if not all(map(le, starts, islice(starts, 1, None))) or starts[0] < 0:
            latest = list(accumulate(starts, max))  # holes begin nowhere, and lie in no frame
            for chunk, (start, at) in enumerate(zip(starts, latest, strict=True)):
                if start < 0:
                    holes.append(chunk)
                elif start < at:
                    path = self._listing.paths[bisect_right(chunk_ends, chunk) - 1]
                    raise TocInvalid(f"{path[:200]!r} is not in blob order")
        begins = [latest[0] >= 0, *map(ne, islice(latest, 1, None), latest)]
        # Before the first frame there may be holes: what is written for them here they don't keep.
        frames = array("I", list(accumulate(islice(begins, 1, None), initial=0)))
        if not begins[0]:
            frames = array("I", [max(frame, 1) - 1 for frame in frames])
        self.holes = len(holes)
        for chunk in holes:
            frames[chunk] = NO_FRAME
        first = list(compress(range(len(starts)), begins))
        frame_start = pick(starts, first)
        # A frame ends where the next one in the TOC begins: headers of empty entries may lie in between, in frames of
        # their own, so a reader decodes the first frame of the range and no more.
        return {
            "chunk_frame": frames,
            "frame_blob_offset": array("Q", frame_start),
            "frame_blob_end": array("Q", [*frame_start[1:], self._payload_end] if frame_start else []),
            "frame_first_chunk": array("I", first),
        }
