"""A node without FUSE: store, scheduler, remote, reader and filler around layers that a registry serves.

async with node(scratch) as one:
    layer = one.serve(blob, registry)              # with the whole check ahead of it
    assert await one.read(layer, b"usr/bin/ls", 0, 100) == ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.fill import Filler
from lazyfs.chunks.layer import Check, ServedLayer
from lazyfs.chunks.memory import MemoryCache
from lazyfs.chunks.read import Reader
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.spool import Spool
from lazyfs.chunks.store import Store
from lazyfs.chunks.whole import WholeCheck
from lazyfs.errors import LazyfsError
from lazyfs.format.table import LayerTable
from lazyfs.format.table_build import LayerFacts, build_table
from lazyfs.format.toc import parse_toc
from lazyfs.reference import parse
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB
from tests.helpers.blobs import LayerBlob
from tests.helpers.fake_registry import FakeRegistry

QUICK = RetryPolicy(attempts=2, first=0.01, longest=0.02)


def build_layer_table(path: Path, blob: LayerBlob) -> LayerTable:
    """Build and open the layer table of a layer."""
    facts = LayerFacts(blob.form, len(blob.blob), blob.payload_end)
    build_table(path, facts, parse_toc(blob.toc, blob.payload_end))
    return LayerTable(path)


class Node:
    """The parts of a daemon that move bytes, put together as it does it."""

    def __init__(
        self, root: Path, nursery: trio.Nursery, *, read_timeout: float, memory: int, connections: int
    ) -> None:
        self.root = root
        self.nursery = nursery
        self.errors: list[LazyfsError] = []
        self.copies: Callable[[ServedLayer, bytes], bytes | None] = lambda layer, digest: None
        self.catalog = Catalog(root / "catalog.db")
        self.store = Store(root, 1 << 30, self.catalog)
        self.memory = MemoryCache(memory)
        self.scheduler = Scheduler(connections)
        self.remote = Remote(self.scheduler, nursery, read_timeout, self.errors.append)
        self.reader = Reader(self.memory, self.remote, self._find_copy, nursery)
        self.filler = Filler(self.scheduler, self.remote, self.reader.counters.answered)
        self.transport = Transport()
        self.layers: list[ServedLayer] = []

    def _find_copy(self, layer: ServedLayer, digest: bytes) -> bytes | None:
        return self.copies(layer, digest)

    def repository(self, host: str, *, answer_timeout: float = 2.0) -> Repository:
        """Open a repository that gives up soon."""
        options = OpenOptions(connect_timeout=1.0, answer_timeout=answer_timeout, retry=QUICK, transport=self.transport)
        return open_repository(parse(f"{host}/image"), options)

    def serve(
        self,
        blob: LayerBlob,
        where: FakeRegistry | Repository,
        *,
        check: bool = True,
        diff_id: str = "",
        answer_timeout: float = 2.0,
    ) -> ServedLayer:
        """Put a layer's blob into the registry and serve it; `diff_id` is what the image claims."""
        if isinstance(where, FakeRegistry):
            where.add_blob(blob.blob)
            where = self.repository(where.host, answer_timeout=answer_timeout)
        digest, claimed = blob.digest, diff_id or blob.diff_id
        directory = self.store.path(digest)
        table = build_layer_table(directory / "table", blob)
        number = self.catalog.number(f"layer:{digest}")
        self.catalog.add_layer(digest, len(blob.blob), table.data_size)
        layer = ServedLayer(
            number, blob.descriptor, claimed, table, self.store.open_layer(digest, table), where, where.name
        )
        if check:
            layer.check = Check(partial(WholeCheck, digest, claimed, table, "L"), Spool(directory))
        self.layers.append(layer)
        return layer

    async def read(self, layer: ServedLayer, path: bytes, offset: int = 0, size: int = 1 << 40) -> bytes:
        """Read a file by its path."""
        row = layer.table.find(path)
        assert row is not None
        return bytes(await self.reader.read(layer, layer.table.inode(row), offset, size))

    def close(self) -> None:
        for layer in self.layers:
            if layer.check is not None:
                layer.check.spool.close()
            layer.store.close()
            layer.table.close()
        self.transport.close()
        self.store.close()
        self.catalog.close()


@asynccontextmanager
async def node(
    root: Path, *, read_timeout: float = 5.0, memory: int = 16 * MiB, connections: int = 8
) -> AsyncIterator[Node]:
    """Run a node in `root`. What is under way at the end is abandoned."""
    root.mkdir(mode=0o700, exist_ok=True)
    one: Node | None = None
    try:
        async with trio.open_nursery() as nursery:
            one = Node(root, nursery, read_timeout=read_timeout, memory=memory, connections=connections)
            try:
                yield one
            finally:
                nursery.cancel_scope.cancel()
    finally:
        if one is not None:
            one.close()


def forget_chunks(layer: ServedLayer) -> None:
    """Drop all chunks of a layer from the store, as an eviction of everything would."""
    layer.store.forget()
