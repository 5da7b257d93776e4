"""The content of a TOC's files: its chunks checked and turned into columns.

There is one set of rules, for one file at a time. Runs of ordinary files, each one chunk, are checked by columns, which
takes a tenth of the time; a run that is not above all doubt is left to the rules, and they say what is wrong.
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Sequence
from itertools import compress, islice
from operator import add, gt, le

from lazyfs.errors import TocInvalid
from lazyfs.format.listing import Listing
from lazyfs.format.toc_json import HOLE, MIN_HOLE, TocItem
from lazyfs.format.zeros import ZeroDigests
from lazyfs.limits import MAX_CHUNK, MAX_HOLES, MAX_INNER

_LEAST = 8  # items of a run that is worth columns
_PREFIX = "sha256:"
_DIGEST = len(_PREFIX) + 64  # characters


class Content:
    """One pass over a TOC's items, block by block: their chunks go to a listing.

    `payload_end` is the blob offset behind the last frame.
    """

    def __init__(self, listing: Listing, payload_end: int) -> None:
        self.number = 0  # of the item in the block that is looked at
        self._listing = listing
        self._items: list[TocItem] = []
        self._payload_end = payload_end
        self._frame = -1  # blob offset of the frame of the last chunk
        self._inner_end = 0  # bytes of that frame's decompressed form that are taken
        self._end = 0  # blob offset before which the last file with an `endOffset` claims all frames
        self._zeros = ZeroDigests()
        self._holes = 0  # bytes of zeros so far

    def read(self, items: list[TocItem], types: Sequence[str]) -> None:
        """Take a block of items, all chunks of its last file among them; `types` are theirs.

        Raise TocInvalid; `number` tells of which.
        """
        self._items, self.number = items, 0
        odd: list[int] = []
        if "chunk" in types or any([item.chunk_size or item.chunk_offset or item.chunk_type for item in items]):
            odd = [number for number, item in enumerate(items) if _is_odd(item)]
        for number in (*odd, len(items)):
            if number < self.number:  # of a file that was read already
                continue
            if number - self.number < _LEAST or not self._ordinary(self.number, number):
                while self.number < number:
                    self._one()
            if number < len(items):
                self._one()

    # -- by columns

    def _ordinary(self, start: int, stop: int) -> bool:
        """Take a run of items none of which is odd. False: nothing was taken, for not all of them are in order."""
        items = self._items[start:stop]
        files = [item for item in items if item.size and item.type == "reg"]
        if files:
            sizes = [item.size for item in files]
            frames = [item.offset for item in files]
            inner = [item.inner_offset for item in files]
            whole = [item.digest for item in files]
            told = [item.chunk_digest or item.digest for item in files]
            claims = [item.end_offset for item in files]
            raw = _digests(told)
            if (
                raw is None
                or max(sizes) > MAX_CHUNK
                or (whole != told and any(one and one != other for one, other in zip(whole, told, strict=True)))
                or not self._in_order(frames, inner, sizes)
                or (any(claims) and not self._bounded(frames, claims))
            ):
                return False
            out = self._listing
            out.offsets += [0] * len(files)
            out.chunk_sizes += sizes
            out.blob_offsets += frames
            out.inner_offsets += inner
            out.digests += raw
            self._frame, self._inner_end = frames[-1], inner[-1] + sizes[-1]
        if len(files) == len(items):
            self._listing.chunk_counts += [1] * len(files)
        else:
            self._listing.chunk_counts += [1 if item.size and item.type == "reg" else 0 for item in items]
        self.number = stop
        return True

    def _in_order(self, frames: list[int], inner: list[int], sizes: list[int]) -> bool:
        """Tell whether `_place` would take these chunks."""
        if max(inner) > MAX_INNER or frames[-1] >= self._payload_end or frames[0] < self._end:
            return False
        # A chunk may begin before the end of the one before it where it is in another frame.
        overlap = map(gt, map(add, inner, sizes), islice(inner, 1, None))
        return (
            (self._frame, self._inner_end) <= (frames[0], inner[0])
            and all(map(le, frames, islice(frames, 1, None)))
            and all(frames[at] < frames[at + 1] for at in compress(range(len(frames)), overlap))
        )

    def _bounded(self, frames: list[int], claims: list[int]) -> bool:
        """Tell whether `_bound` and then `_place` would take these files."""
        before = self._end
        for frame, end in zip(frames, claims, strict=True):
            if frame < before:
                return False
            if end:
                if not max(frame, before - 1) < end <= self._payload_end:
                    return False
                before = end
        self._end = before
        return True

    # -- one by one

    def _one(self) -> None:
        """Take one entry with all its chunks."""
        item = self._items[self.number]
        if item.type == "chunk":
            raise TocInvalid("is a chunk of no file")
        before = len(self._listing.offsets)
        if item.size and item.type == "reg":
            self.number = self._chunks(self.number)
        self._listing.chunk_counts.append(len(self._listing.offsets) - before)
        self.number += 1

    def _chunks(self, number: int) -> int:
        """Take the chunks of the file at `number`; return the number of the last item that belongs to it."""
        items = self._items
        file = items[number]
        size, done, first = file.size, 0, len(self._listing.offsets)
        while True:
            item = items[number]
            if item.chunk_type not in ("", "zeros"):
                raise TocInvalid(f"has a chunk of the unknown type {item.chunk_type[:20]!r}")
            chunk_size = item.chunk_size or size - done
            if item.chunk_offset != done or not 0 < chunk_size <= size - done:
                raise TocInvalid(f"its chunk of {chunk_size} at {item.chunk_offset} does not follow {done} of {size}")
            told = item.chunk_digest
            if not told and chunk_size == size:
                told = file.digest
            if item.chunk_type and chunk_size >= MIN_HOLE:
                self._hole(done, chunk_size, told)
            else:
                if chunk_size > MAX_CHUNK:
                    raise TocInvalid(f"has a chunk of {chunk_size} bytes, more than the {MAX_CHUNK} allowed")
                self._place(item, chunk_size)
                self._listing.add_chunk(done, chunk_size, item.offset, item.inner_offset, _digest(told))
            done += chunk_size
            if done == size:
                break
            number += 1
            if number == len(items) or items[number].type != "chunk":
                raise TocInvalid(f"has chunks for {done} of its {size} bytes")
            if items[number].name not in (file.name, ""):
                raise TocInvalid(f"is followed by a chunk of {items[number].name[:200]!r}")
        if file.digest and file.digest != told:
            _digest(file.digest)
        if file.end_offset:
            self._bound(file.end_offset, self._listing.blob_offsets[first:])
        return number

    def _hole(self, offset: int, size: int, told: str) -> None:
        """Add a run of zeros, which nobody fetches, in pieces that are no trouble to read."""
        self._holes += size
        if self._holes > MAX_HOLES:
            raise TocInvalid(f"is one too many for the {MAX_HOLES} bytes of zeros that a layer may claim")
        if told and _digest(told) != self._zeros.digest(size):
            raise TocInvalid(f"has a chunk of {size} zeros whose digest is not that of zeros")
        for start in range(0, size, HOLE):
            piece = min(HOLE, size - start)
            self._listing.add_chunk(offset + start, piece, -1, 0, self._zeros.digest(piece))

    def _bound(self, end: int, blob_offsets: list[int]) -> None:
        """Check what a file says of the end of its frames: no other may begin before it."""
        last = max(blob_offsets)
        if not max(last, self._end - 1) < end <= self._payload_end:
            raise TocInvalid(f"its last frame begins at {last} and claims to end at {end}")
        self._end = end

    def _place(self, item: TocItem, size: int) -> None:
        """Check that a chunk lies behind the one before it: content of one stream can't overlap."""
        at, inner = item.offset, item.inner_offset
        if at >= self._payload_end:
            raise TocInvalid(f"its content at {at} lies behind the last frame's end, {self._payload_end}")
        if at < self._end:
            raise TocInvalid(f"its content at {at} lies in another file's, which ends at {self._end}")
        if inner > MAX_INNER:
            raise TocInvalid(f"its content lies {inner} bytes into a frame, more than {MAX_INNER}")
        if at < self._frame or (at == self._frame and inner < self._inner_end):
            raise TocInvalid(f"its content at {at}+{inner} is not in blob order")
        self._frame, self._inner_end = at, inner + size


def _is_odd(item: TocItem) -> bool:
    return bool(
        item.chunk_offset
        or (item.chunk_size and item.chunk_size != item.size)
        or item.chunk_type
        or item.type == "chunk"
    )


def _digest(text: str) -> bytes:
    try:
        raw = unhexlify(text[7:])
    except ValueError:
        raw = b""
    if len(raw) == 32 and f"sha256:{raw.hex()}" == text:  # unhexlify takes capitals too
        return raw
    raise TocInvalid(f"has content without a sha256 digest for it: {text[:80]!r}")


def _digests(texts: list[str]) -> bytes | None:
    """Return the raw bytes of many digests, end to end. None: one of them is none."""
    if set(map(len, texts)) != {_DIGEST}:
        return None
    joined = "".join(texts)
    digits = joined.replace(_PREFIX, "")
    try:
        raw = unhexlify(digits)
    except ValueError:
        return None
    # Digits have no "s", and as many prefixes as there are texts are gone: each text begins with one.
    is_sound = len(raw) == 32 * len(texts) and raw.hex() == digits and joined[::_DIGEST] == "s" * len(texts)
    return raw if is_sound else None
