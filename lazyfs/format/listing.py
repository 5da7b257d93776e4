"""What an archive or TOC lists, by columns: one item an entry in each, in the order of the stream.

Half a million entries are a handful of lists here instead of a million objects; what few entries have lies in
dictionaries by their number. Single entries can still be had, as `(Entry, chunks)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lazyfs.format.entry import Chunk, Entry, Kind


@dataclass(slots=True)
class Listing:
    """Entries and the chunks of their content. Fields are those of `Entry` and `Chunk`."""

    paths: list[bytes] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    uids: list[int] = field(default_factory=list)
    gids: list[int] = field(default_factory=list)
    mtimes: list[int] = field(default_factory=list)  # nanoseconds
    sizes: list[int] = field(default_factory=list)
    chunk_counts: list[int] = field(default_factory=list)  # by entry; its chunks lie side by side in these columns:
    offsets: list[int] = field(default_factory=list)
    chunk_sizes: list[int] = field(default_factory=list)
    blob_offsets: list[int] = field(default_factory=list)
    inner_offsets: list[int] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)  # 32 bytes a chunk
    links: dict[int, bytes] = field(default_factory=dict)
    rdevs: dict[int, tuple[int, int]] = field(default_factory=dict)
    xattrs: dict[int, tuple[tuple[bytes, bytes], ...]] = field(default_factory=dict)
    unames: dict[int, str] = field(default_factory=dict)
    gnames: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Iterable[tuple[Entry, list[Chunk]]]) -> Listing:
        """Return the listing of these entries, each with its chunks."""
        out = cls()
        for number, (entry, chunks) in enumerate(pairs):
            out.paths.append(entry.path)
            out.kinds.append(entry.kind)
            out.modes.append(entry.mode & 0o7777)
            out.uids.append(entry.uid)
            out.gids.append(entry.gid)
            out.mtimes.append(entry.mtime_ns)
            out.sizes.append(entry.size if entry.kind is Kind.REG else 0)
            out.chunk_counts.append(len(chunks))
            for chunk in chunks:
                out.add_chunk(chunk.offset, chunk.size, chunk.blob_offset, chunk.inner_offset, chunk.digest)
            if entry.link:
                out.links[number] = entry.link
            if entry.rdev != (0, 0):
                out.rdevs[number] = entry.rdev
            if entry.xattrs:
                out.xattrs[number] = entry.xattrs
            if entry.uname:
                out.unames[number] = entry.uname
            if entry.gname:
                out.gnames[number] = entry.gname
        return out

    def add_chunk(self, offset: int, size: int, blob_offset: int, inner_offset: int, digest: bytes) -> None:
        """Add a chunk behind the last one; `chunk_counts` is left to the caller."""
        self.offsets.append(offset)
        self.chunk_sizes.append(size)
        self.blob_offsets.append(blob_offset)
        self.inner_offsets.append(inner_offset)
        self.digests += digest

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[Entry, list[Chunk]]]:
        """Yield single entries with their chunks: a microsecond and several objects each."""
        chunk = 0
        for number, count in enumerate(self.chunk_counts):
            yield self._entry(number), [self._chunk(at) for at in range(chunk, chunk + count)]
            chunk += count

    def _entry(self, number: int) -> Entry:
        return Entry(
            self.paths[number],
            self.kinds[number],
            self.modes[number],
            self.uids[number],
            self.gids[number],
            self.mtimes[number],
            self.sizes[number],
            self.links.get(number, b""),
            self.rdevs.get(number, (0, 0)),
            self.xattrs.get(number, ()),
            self.unames.get(number, ""),
            self.gnames.get(number, ""),
        )

    def _chunk(self, at: int) -> Chunk:
        return Chunk(
            self.offsets[at],
            self.chunk_sizes[at],
            self.blob_offsets[at],
            self.inner_offsets[at],
            bytes(self.digests[32 * at : 32 * at + 32]),
        )
