"""Hash what lies in the store against what was promised: every chunk that is here, every table, every document."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from lazyfs.chunks.census import Census
from lazyfs.errors import LazyfsError, StoreBroken, TableInvalid
from lazyfs.format.table import LayerTable
from lazyfs.units import MiB

SLICE = 64 * MiB  # bytes hashed between two looks at whether somebody wants us to stop


@dataclass(slots=True)
class Checked:
    """What a check found. Bytes and chunks are those that are here; damaged ones are dropped and fetched again."""

    layers: int = 0
    chunks: int = 0
    bytes: int = 0
    damaged: dict[str, int] = field(default_factory=dict)  # layer → chunks that had other bytes
    tables: list[str] = field(default_factory=list)  # layers whose table was damaged: made again at their next mount
    documents: list[str] = field(default_factory=list)  # manifests and configs that were damaged, and dropped
    skipped: dict[str, str] = field(default_factory=dict)  # layers that could not be looked at: why

    @property
    def clean(self) -> bool:
        """Whether all was as promised."""
        return not (self.damaged or self.tables or self.documents)


def recheck(census: Census, layers: list[str], done: Checked) -> Generator[int, None, None]:
    """Check layers one after another, into `done`; yield the bytes hashed since the last time, every SLICE or earlier.

    Blocking between two yields, about a second for 1.3 GB. Doesn't count as a use. Raise StoreError.
    """
    for digest in layers:
        yield from _layer(census, digest, done)


def recheck_documents(census: Census, done: Checked) -> None:
    """Check all documents. Damaged ones are dropped. Blocking. Raise StoreError."""
    for digest in census.catalog.documents():
        if census.catalog.document(digest, note=False) is None:
            done.documents.append(digest)


def _layer(census: Census, digest: str, done: Checked) -> Iterator[int]:
    path = census.store.table_path(digest)
    existed = path.exists()
    try:
        table = LayerTable(path)  # also where it is mapped already: that was checked then, not now
        table.ensure_names()
    except TableInvalid:
        if existed:
            done.tables.append(digest)
            _unlink(path.unlink)
        return
    try:
        layer = census.store.open_layer(digest, table)
    except LazyfsError as error:
        done.skipped[digest] = error.message
        return
    try:
        done.layers += 1
        size = 0
        for chunk in range(table.chunk_count):
            right = layer.examine(chunk)
            if right is None:
                continue
            done.chunks += 1
            done.bytes += table.chunk_size[chunk]
            size += table.chunk_size[chunk]
            if not right:
                done.damaged[digest] = done.damaged.get(digest, 0) + 1
            if size >= SLICE:
                yield size
                size = 0
        yield size
    finally:
        layer.close()


def _unlink(remove: Callable[[], None]) -> None:
    try:
        remove()
    except OSError as error:
        raise StoreBroken(f"a damaged table can't be removed: {error.strerror}") from None
