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
        self._sources = sources
        self._is_plain = form == FORM_PLAIN
        self._payload_end = payload_end
        lives = bytearray(len(listing) + 1)  # one more, for rows that have none
        for source, kind in zip(sources, kinds, strict=True):
            if kind == Kind.REG:
                lives[source] = 1
        # By entry, nothing where nobody can read it.
        self._sizes = [size if live else 0 for size, live in zip(listing.sizes, lives, strict=False)]
        self._counts = [count if live else 0 for count, live in zip(listing.chunk_counts, lives, strict=False)]

    def fill(self, columns: dict[str, Column]) -> int:
        """Add all columns of content. Return the size of the data space in bytes. Raise TocInvalid."""
        listing, counts = self._listing, self._counts
        kept = self._kept()
        offsets, starts = pick(listing.offsets, kept), pick(listing.blob_offsets, kept)
        ends = list(accumulate(counts))
        first_chunks = [end - count if count else 0 for end, count in zip(ends, counts, strict=True)]
        bases, data_size = self._bases(starts, first_chunks)
        if sum(counts) == len(counts) - counts.count(0):
            of_chunks: Sequence[int] = [base for base, count in zip(bases, counts, strict=True) if count]
        else:
            of_chunks = list(chain.from_iterable(map(repeat, bases, counts)))
        digests = listing.digests
        columns.update(
            data_offset=array("Q", pick([*bases, 0], self._sources)),
            first_chunk=array("I", pick([*first_chunks, 0], self._sources)),
            chunk_count=array("I", pick([*counts, 0], self._sources)),
            chunk_data_offset=array("Q", list(map(add, of_chunks, offsets)) if any(offsets) else of_chunks),
            chunk_size=array("I", pick(listing.chunk_sizes, kept)),
            chunk_inner=array("Q", pick(listing.inner_offsets, kept)),
            chunk_digest=digests
            if len(kept) == len(listing.offsets)
            else b"".join([digests[32 * chunk : 32 * chunk + 32] for chunk in kept]),
        )
        columns.update(self._frames(starts, ends))
        return data_size

    def _kept(self) -> Sequence[int]:
        """Return which of the listing's chunks are those of the files. Raise TocInvalid where a file has too few."""
        listing, counts = self._listing, self._counts
        every = range(len(listing.offsets))
        # Nearly always: each file is one chunk.
        sizes = [size for size in self._sizes if size]
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
            bases = [starts[first] if size else 0 for first, size in zip(first_chunks, sizes, strict=True)]
            data_size = max(
                [(base + size + PAGE - 1) & -PAGE for base, size in zip(bases, sizes, strict=True)], default=0
            )
        else:
            ends = list(accumulate([(size + PAGE - 1) & -PAGE for size in sizes], initial=0))
            bases = [end if size else 0 for end, size in zip(ends, sizes, strict=False)]
            data_size = ends[-1]
        if data_size > MAX_DATA:
            raise TocInvalid(f"the layer claims more than {MAX_DATA} bytes of content")
        return bases, data_size

    def _frames(self, starts: Sequence[int], ends: Sequence[int]) -> dict[str, Column]:
        """Return which frame each chunk is in, and the frames.

        `starts` are the blob offsets of the chunks' frames, `ends` the numbers of chunks up to each entry.
        """
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
                    number = bisect_right(ends, chunk)
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
