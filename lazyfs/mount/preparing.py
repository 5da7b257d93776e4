"""A layer made ready to be served: TOC or whole blob, table, place in the store. Blocking; runs in worker threads."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from lazyfs.child import Builder
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.frames import read_exactly
from lazyfs.chunks.layer import Check, ServedLayer
from lazyfs.chunks.plain import PlainLayer
from lazyfs.chunks.schedule import Priority
from lazyfs.chunks.source import LayerSource
from lazyfs.chunks.spool import Spool
from lazyfs.chunks.store import Store
from lazyfs.chunks.whole import WholeCheck
from lazyfs.config import Settings
from lazyfs.errors import (
    DiffIdMismatch,
    DigestMismatch,
    FormatError,
    LayerQuarantined,
    StoreError,
    StoreFull,
    TableInvalid,
)
from lazyfs.format.footer import Form
from lazyfs.format.lazy import TABLE_FORMS, NotLazy, Toc, TocSource, read_toc, toc_source
from lazyfs.format.table import FORM_PLAIN, VERSION, LayerTable
from lazyfs.mount.unpacking import Unpacking
from lazyfs.oci import GITHUB_ZSTD_CHECKSUM, TOC_DIGEST, ZSTD_CHECKSUM, Descriptor, Manifest
from lazyfs.registry.mirrored import read_again
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB

log = logging.getLogger(__name__)

# An image may have hundreds of layers, each with a TOC of 150 MiB: to hold them, or what they parse to, takes a node.
_LARGE_TAIL = 8 * MiB  # bytes; larger ones are fetched when their layer's turn comes
_LARGE_TOC = 16 * MiB  # bytes of JSON; larger ones take a gigabyte to turn into a table
_LARGE_AT_ONCE = 2

# What a layer's `source` file calls its form.
_SOURCE_FORMS = {
    Form.ZSTD_CHUNKED: "zstd-chunked",
    Form.STORAGE_ZSTD_CHUNKED: "storage-zstd-chunked",
    Form.ESTARGZ: "estargz",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A layer that can be served. `reason`: why it is not lazy, empty when it is. `key` names its table's content."""

    layer: ServedLayer
    reason: str
    key: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A layer as an image names it."""

    descriptor: Descriptor
    diff_id: str
    origin: str  # the repository as the reference names it, for messages, the record and `lazy_from`
    tail: Future[bytes] | None = None  # the blob's last bytes, on their way since the manifest was there


class Preparer:
    """Prepare layers. Thread-safe for different layers; one layer is prepared by one thread at a time."""

    def __init__(self, store: Store, catalog: Catalog, settings: Settings) -> None:
        self._store = store
        self._catalog = catalog
        self._settings = settings
        self.builder = Builder()
        self._large = threading.BoundedSemaphore(_LARGE_AT_ONCE)
        self.unpacking = Unpacking(store, settings.host_connections, self.builder.warm)

    def begin_tails(
        self, repository: Repository, manifest: Manifest, pool: ThreadPoolExecutor
    ) -> dict[str, Future[bytes]]:
        """Start fetching the tails of layers that this node has no table of, beside the image config. By blob digest.

        All documents behind the manifest cost one round trip together that way. Doesn't block.
        """
        tails: dict[str, Future[bytes]] = {}
        for layer in manifest.layers:
            found = toc_source(layer, allow_unverified=self._settings.allow_unverified)
            table = self._settings.root / "layers" / "sha256" / layer.digest[7:] / "table"
            if not isinstance(found, TocSource) or found.size > _LARGE_TAIL:
                continue
            if layer.digest not in tails and not table.exists():
                tails[layer.digest] = pool.submit(_fetch, repository, layer.digest, found.blob_offset, found.size)
        return tails

    def is_lazy(self, descriptor: Descriptor) -> bool:
        """Tell whether a layer promises a TOC: one that doesn't is fetched whole. Doesn't block."""
        return isinstance(toc_source(descriptor, allow_unverified=self._settings.allow_unverified), TocSource)

    def prepare(
        self,
        repository: Repository,
        wanted: Wanted,
        say: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """Return the layer, from what the store has or from the registry. Blocking: one request where it is lazy.

        `alive` is called often while a layer is fetched whole; what it raises ends that. Raise LayerQuarantined,
        DiffIdMismatch, RegistryError, TrustError, FormatError or StoreError.
        """
        digest = wanted.descriptor.digest
        found = toc_source(wanted.descriptor, allow_unverified=self._settings.allow_unverified)
        known = self._store.source(digest)
        table = self._table(digest) if known is not None and self._usable(known, wanted, found) else None
        tail, whole = b"", 0
        if known is None or table is None:
            known, table, tail = self._make(repository, wanted, found, say, alive)
            whole = wanted.descriptor.size if table.form == FORM_PLAIN else 0
        reason = found.reason if isinstance(found, NotLazy) else ""
        if isinstance(found, TocSource) and table.form == FORM_PLAIN:
            reason = known.reason or "its TOC can't be used"
        prepared = self._serve(repository, wanted, known, table, tail, reason)
        prepared.layer.bytes_by_priority[Priority.DEMAND] += whole
        return prepared

    # -- what the store has

    def _usable(self, known: LayerSource, wanted: Wanted, found: TocSource | NotLazy) -> bool:
        """Tell whether the stored table may serve this image's claims. Raise when the claims are known to be false."""
        same_claims = known.diff_id == wanted.diff_id and _toc_claims(known.descriptor) == _toc_claims(
            wanted.descriptor
        )
        if known.quarantine and same_claims:
            raise LayerQuarantined(wanted.descriptor.digest, known.quarantine)
        if known.verified and known.diff_id != wanted.diff_id:
            raise DiffIdMismatch(wanted.descriptor.digest, wanted.diff_id, known.diff_id)
        if known.quarantine:
            return False
        # A verified table is the layer whatever an image says of its TOC; an unverified one must be what it says.
        return known.verified or (same_claims and isinstance(found, TocSource))

    def _table(self, digest: str) -> LayerTable | None:
        try:
            return LayerTable(self._store.path(digest) / "table")
        except (TableInvalid, StoreError) as error:
            log.info("a layer table is made again: %s", error)
            return None

    # -- making it

    def _make(
        self,
        repository: Repository,
        wanted: Wanted,
        found: TocSource | NotLazy,
        say: Callable[[str], None],
        alive: Callable[[], None],
    ) -> tuple[LayerSource, LayerTable, bytes]:
        reason = ""
        if isinstance(found, TocSource):
            try:
                made = self._make_lazy(repository, wanted, found)
            except FormatError as error:
                # A digest vouched for something that is no TOC that we read. The whole blob still has a diff ID.
                made = NotLazy(error.message)
            if not isinstance(made, NotLazy):
                return made
            reason = made.reason
            log.warning("layer %s is not lazy: %s", wanted.descriptor.digest, reason)
        return self._make_plain(repository, wanted, say, alive, reason)

    def _make_lazy(
        self, repository: Repository, wanted: Wanted, found: TocSource
    ) -> tuple[LayerSource, LayerTable, bytes] | NotLazy:
        digest = wanted.descriptor.digest
        parts: dict[int, bytes] = {}

        early = wanted.tail

        def fetch(blob_offset: int, size: int) -> bytes:
            nonlocal early
            if early is not None and (blob_offset, size) == (found.blob_offset, found.size):
                parts[blob_offset], early = early.result(), None  # once: it may be what was wrong
            else:
                parts[blob_offset] = _fetch(repository, digest, blob_offset, size)
            return parts[blob_offset]

        def read() -> Toc | NotLazy:
            parts.clear()
            return read_toc(found, fetch)

        toc = read_again(repository, digest, read, (DigestMismatch, FormatError))
        if isinstance(toc, NotLazy):
            return toc
        directory = self._store.path(digest)
        self._store.write_toc(digest, toc.raw)
        job = {
            "toc": os.fspath(directory / "toc"),
            "out": os.fspath(directory / "table"),
            "form": TABLE_FORMS[toc.form],
            "blob_size": wanted.descriptor.size,
            "payload_end": toc.payload_end,
        }
        with self._large if len(toc.raw) > _LARGE_TOC else nullcontext():
            self.builder.run({"tables": [job]})
        source = LayerSource(wanted.descriptor, _SOURCE_FORMS[toc.form], wanted.origin, wanted.diff_id)
        self._store.set_source(digest, source)
        tail = b"".join(parts[at] for at in sorted(parts))
        if found.blob_offset + found.size < wanted.descriptor.size:
            tail = b""  # the TOC alone: the check will want what lies behind it too
        return source, LayerTable(directory / "table"), tail[-(wanted.descriptor.size - toc.payload_end) :]

    def _make_plain(
        self,
        repository: Repository,
        wanted: Wanted,
        say: Callable[[str], None],
        alive: Callable[[], None],
        reason: str,
    ) -> tuple[LayerSource, LayerTable, bytes]:
        digest = wanted.descriptor.digest
        layer = self._plain_job(wanted.descriptor, wanted.diff_id)
        self.unpacking.unpack(repository, layer, say, alive)
        table = LayerTable(layer.table)
        source = LayerSource(wanted.descriptor, "plain", wanted.origin, wanted.diff_id, verified=True, reason=reason)
        self._store.set_source(digest, source)
        opened = self._store.open_layer(digest, table)
        try:
            opened.adopt(layer.data.name)
        finally:
            opened.close()
        return source, table, b""

    def _plain_job(self, descriptor: Descriptor, diff_id: str) -> PlainLayer:
        data = self.unpacking.place(descriptor.digest)
        return PlainLayer(descriptor.digest, descriptor.size, diff_id, data, data.with_name("table"))

    # -- serving it

    def _serve(
        self,
        repository: Repository,
        wanted: Wanted,
        known: LayerSource,
        table: LayerTable,
        tail: bytes,
        reason: str,
    ) -> Prepared:
        digest = wanted.descriptor.digest
        plain = table.form == FORM_PLAIN
        number = self._catalog.number(f"layer:{digest}:plain" if plain else f"layer:{digest}")
        try:
            self._catalog.add_layer(digest, wanted.descriptor.size, table.data_size)
        except StoreFull as error:  # a full disk must not keep an image from starting
            log.warning("the use of layer %s is not noted: %s", digest, error)
        opened = self._store.open_layer(digest, table)
        served = ServedLayer(
            number,
            wanted.descriptor,
            wanted.diff_id,
            table,
            opened,
            repository,
            wanted.origin,
            verified=known.verified,
        )
        if plain:
            served.refill = partial(self._refill, served)
        elif not known.verified:
            begin = partial(WholeCheck, digest, wanted.diff_id, table, f"{digest} of {wanted.origin}")
            served.check = Check(begin, Spool(self._store.path(digest)))
            if tail:
                served.check.spool.put(served.extents - 1, table.payload_end, tail)
        form = "plain" if plain else _toc_claims(known.descriptor)
        return Prepared(served, reason, f"{digest} {form} {VERSION}")

    def _refill(self, served: ServedLayer) -> None:
        """Fetch a plain layer again, because chunks of it were evicted or damaged. Blocking."""
        job = self._plain_job(served.descriptor, served.diff_id)
        # The table stays the one that is mapped: the same blob gives the same table.
        job = dataclasses.replace(job, table=job.table.with_name("table.again"))
        try:
            self.unpacking.unpack(served.repository, job, at_once=True)  # a reader waits
        finally:
            job.table.unlink(missing_ok=True)
        served.store.adopt(job.data.name)
        served.bytes_by_priority[Priority.DEMAND] += served.descriptor.size

    def tree_number(self, key: str) -> int:
        """Return the number of a tree, given out and written down before the kernel hears of it. Blocking."""
        return self._catalog.number(f"tree:{key}")

    # -- verdicts

    def set_verified(self, served: ServedLayer) -> None:
        """Remember that a layer has passed its whole check. Blocking."""
        self._update(served, verified=True, quarantine="")
        self._catalog.set_verified(served.digest)

    def set_quarantine(self, served: ServedLayer, reason: str) -> None:
        """Remember that a layer is false, and drop its chunks. Blocking."""
        self._update(served, verified=False, quarantine=reason)
        self._catalog.set_quarantine(served.digest, reason)
        served.store.forget()

    def _update(self, served: ServedLayer, *, verified: bool, quarantine: str) -> None:
        known = self._store.source(served.digest)
        if known is not None:
            self._store.set_source(served.digest, dataclasses.replace(known, verified=verified, quarantine=quarantine))


def _fetch(repository: Repository, digest: str, blob_offset: int, size: int) -> bytes:
    with repository.fetch(digest, blob_offset, size) as stream:
        return read_exactly(stream, size)


def _toc_claims(descriptor: Descriptor) -> str:
    told = descriptor.annotations
    return told.get(TOC_DIGEST) or told.get(GITHUB_ZSTD_CHECKSUM) or told.get(ZSTD_CHECKSUM) or ""
