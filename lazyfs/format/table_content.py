"""The columns of a table that tell of content: chunks in the order of the stream, and the frames that hold them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, repeat
from operator import add

from lazyfs.errors import TocInvalid
from lazyfs.format.columns import Column, pick
from lazyfs.format.entry import Kind
from lazyfs.format.listing import Listing
from lazyfs.format.table import FORM_PLAIN, NO_FRAME
from lazyfs.units import PAGE

MAX_DATA = 1 << 46  # bytes of data space: far above any layer, far below what overflows an offset


class ContentColumns:
    """The columns for files that have rows: `sources` tells which entry a row has its content from, -1 none.

    `kinds` are those of the rows. Markers and landmarks have content too, and nobody can read it.
    """

    def __init__(self, listing: Listing, sources: Sequence[int], kinds: bytes, *, form: int, payload_end: int) -> None:
        self._listing = listing
        self._is_plain = form == FORM_PLAIN
        self._payload_end = payload_end
        self._row_count = len(kinds)
        row_of = [-1] * (len(listing) + 1)  # one more, for rows that have none
        for row, source in enumerate(sources):
            row_of[source] = row
        row_of[-1] = -1
        rows_of_files = [row if row >= 0 and kinds[row] == Kind.REG else -1 for row in row_of]
        with_content = zip(listing.sizes, listing.chunk_counts, rows_of_files, strict=False)
        self._files = [number for number, (size, count, row) in enumerate(with_content) if row >= 0 and (size or count)]
        self._rows = pick(row_of, self._files)
        self._sizes = pick(listing.sizes, self._files)
        self._counts = pick(listing.chunk_counts, self._files)

    def fill(self, columns: dict[str, Column]) -> int:
        """Add all columns of content. Return the size of the data space in bytes. Raise TocInvalid."""
        kept = self._kept()
        offsets, starts = pick(self._listing.offsets, kept), pick(self._listing.blob_offsets, kept)
        first_chunks = list(accumulate(self._counts, initial=0))
        bases, data_size = self._bases(pick(starts, first_chunks[:-1]))
        data_offset, first_chunk, chunk_count = ([0] * self._row_count for _ in range(3))
        for row, base, first, count in zip(self._rows, bases, first_chunks, self._counts, strict=False):
            data_offset[row], first_chunk[row], chunk_count[row] = base, first, count
        of_chunks = bases if len(bases) == len(kept) else chain.from_iterable(map(repeat, bases, self._counts))
        digests = self._listing.digests
        columns.update(
            data_offset=array("Q", data_offset),
            first_chunk=array("I", first_chunk),
            chunk_count=array("I", chunk_count),
            chunk_data_offset=array("Q", map(add, of_chunks, offsets)),
            chunk_size=array("I", pick(self._listing.chunk_sizes, kept)),
            chunk_inner=array("Q", pick(self._listing.inner_offsets, kept)),
            chunk_digest=digests
            if len(kept) == len(self._listing.offsets)
            else b"".join([digests[32 * chunk : 32 * chunk + 32] for chunk in kept]),
        )
        columns.update(self._frames(starts, first_chunks))
        return data_size

    def _kept(self) -> Sequence[int]:
        """Return which of the listing's chunks are those of the files. Raise TocInvalid where a file has too few."""
        listing = self._listing
        ends = list(accumulate(listing.chunk_counts))
        lasts = [end - 1 for end in pick(ends, self._files)]
        stops = map(add, pick(listing.offsets, lasts), pick(listing.chunk_sizes, lasts)) if listing.offsets else ()
        if 0 in self._counts or list(stops) != list(self._sizes):
            for number, last, size, count in zip(self._files, lasts, self._sizes, self._counts, strict=True):
                stop = listing.offsets[last] + listing.chunk_sizes[last] if count else 0
                if stop != size:
                    raise TocInvalid(f"{listing.paths[number][:200]!r} has chunks up to {stop} of its {size} bytes")
        if sum(self._counts) == len(listing.offsets):
            return range(len(listing.offsets))
        spans = (range(last - count + 1, last + 1) for last, count in zip(lasts, self._counts, strict=True))
        return list(chain.from_iterable(spans))

    def _bases(self, first_starts: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return where each file lies in the data space, and the size of that. Raise TocInvalid."""
        if self._is_plain:  # it was written there before anybody knew which of its names survive
            bases = first_starts
            ends = [(base + size + PAGE - 1) & -PAGE for base, size in zip(bases, self._sizes, strict=True)]
        else:
            ends = list(accumulate([(size + PAGE - 1) & -PAGE for size in self._sizes]))
            bases = [0, *ends[:-1]]
        if max(ends, default=0) > MAX_DATA:
            raise TocInvalid(f"the layer claims more than {MAX_DATA} bytes of content")
        return bases, ends[-1] if ends else 0

    def _frames(self, starts: Sequence[int], first_chunks: Sequence[int]) -> dict[str, Column]:
        """Return which frame each chunk is in, and the frames. `starts` are the blob offsets of the chunks' frames."""
        frame_start, frame_first = array("Q"), array("I")
        frames: list[int] = []
        frame, frame_at = -1, -2  # the last one: its number, and where it starts
        add_frame = frames.append
        for chunk, start in enumerate(starts if not self._is_plain else ()):
            if start == frame_at:
                add_frame(frame)
            elif start < 0:
                add_frame(NO_FRAME)
            else:
                if start < frame_at:
                    number = self._files[bisect_right(first_chunks, chunk) - 1]
                    raise TocInvalid(f"{self._listing.paths[number][:200]!r} is not in blob order")
                frame, frame_at = frame + 1, start
                frame_start.append(start)
                frame_first.append(chunk)
                add_frame(frame)
        # A frame ends where the next one in the TOC begins: headers of empty entries may lie in between, in frames of
        # their own, so a reader decodes the first frame of the range and no more.
        return {
            "chunk_frame": array("I", frames) if not self._is_plain else array("I", [NO_FRAME]) * len(starts),
            "frame_blob_offset": frame_start,
            "frame_blob_end": array("Q", [*frame_start[1:], self._payload_end]) if frame_start else array("Q"),
            "frame_first_chunk": frame_first,
        }
