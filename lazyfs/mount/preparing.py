"""A layer made ready to be served: TOC or whole blob, table, place in the store. Blocking; runs in worker threads."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from lazyfs import digest as digests
from lazyfs.child import Builder
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import Check, ServedLayer
from lazyfs.chunks.plain import PlainLayer
from lazyfs.chunks.source import LayerSource
from lazyfs.chunks.spool import Spool
from lazyfs.chunks.store import Store
from lazyfs.chunks.whole import WholeCheck
from lazyfs.config import Settings
from lazyfs.errors import (
    DiffIdMismatch,
    FormatError,
    LayerQuarantined,
    StoreBroken,
    StoreError,
    StoreFull,
    TableInvalid,
)
from lazyfs.format.footer import Form
from lazyfs.format.lazy import TABLE_FORMS, NotLazy, TocSource, toc_source
from lazyfs.format.table import FORM_PLAIN, VERSION, LayerTable
from lazyfs.limits import BUILT_AT_ONCE, DECODED_AT_ONCE, LARGE_AT_ONCE
from lazyfs.mount.prepared import Prepared, TooLarge, Wanted, toc_claims
from lazyfs.mount.toc_parts import LARGE_TAIL, Parts, TocParts, fetch_parts, fetch_range, read_parts
from lazyfs.mount.unpacking import Unpacking
from lazyfs.oci import Descriptor, Manifest
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB

log = logging.getLogger(__name__)

# An image may have hundreds of layers, each with a TOC of 200 MiB: to hold them, or what they parse to, takes a node.
_LARGE_TOC = 16 * MiB  # bytes of JSON; larger ones take a gigabyte to turn into a table

# What a layer's `source` file calls its form.
_SOURCE_FORMS = {
    Form.ZSTD_CHUNKED: "zstd-chunked",
    Form.STORAGE_ZSTD_CHUNKED: "storage-zstd-chunked",
    Form.ESTARGZ: "estargz",
}


class Preparer:
    """Prepare layers. Thread-safe for different layers; one layer is prepared by one thread at a time."""

    def __init__(self, store: Store, catalog: Catalog, settings: Settings) -> None:
        self._store = store
        self._catalog = catalog
        self._settings = settings
        self.builder = Builder()
        self._building = threading.BoundedSemaphore(BUILT_AT_ONCE)
        self._decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)
        self._large = threading.BoundedSemaphore(LARGE_AT_ONCE)
        self.unpacking = Unpacking(store, settings.host_connections, self.builder.warm)

    def begin_tails(
        self,
        repository: Repository,
        manifest: Manifest,
        pool: ThreadPoolExecutor,
        is_preparing: Callable[[str], bool],
    ) -> dict[str, Future[bytes]]:
        """Start fetching the tails of layers that this node has no table of, beside the image config. By blob digest.

        All documents behind the manifest cost one round trip together that way. `is_preparing`: those that somebody has
        asked for already. Doesn't block.
        """
        tails: dict[str, Future[bytes]] = {}
        for layer in manifest.layers:
            found = self._toc_source(layer)
            if not isinstance(found, TocSource) or found.size > LARGE_TAIL:
                continue
            known = layer.digest in tails or is_preparing(layer.digest)
            if not known and not self.has_table(layer.digest):
                tails[layer.digest] = pool.submit(fetch_range, repository, layer.digest, found.blob_offset, found.size)
        return tails

    def is_lazy(self, descriptor: Descriptor) -> bool:
        """Tell whether a layer promises a TOC: one that doesn't is fetched whole. Doesn't block."""
        return isinstance(self._toc_source(descriptor), TocSource)

    def _toc_source(self, descriptor: Descriptor) -> TocSource | NotLazy:
        return toc_source(descriptor, allow_unverified=self._settings.allow_unverified)

    def why_not_lazy(self, descriptor: Descriptor) -> str:
        """Return why a layer promises no TOC; "" when it does. Doesn't block."""
        found = self._toc_source(descriptor)
        return found.reason if isinstance(found, NotLazy) else ""

    # -- step by step, for callers who want to know early whether a layer can be lazy

    def has_table(self, digest: str) -> bool:
        """Tell whether there is a table of a layer, whatever it was made from. Blocking (local disk)."""
        return self._store.table_path(digest).exists()

    def knows(self, wanted: Wanted) -> bool:
        """Tell whether `prepare` needs no request. Blocking (local disk).

        Raise what `prepare` raises of false claims.
        """
        digest = wanted.descriptor.digest
        known = self._store.source(digest)
        if known is None:
            return False
        return self._usable(known, wanted, self._toc_source(wanted.descriptor)) and self.has_table(digest)

    def fetch_parts(self, repository: Repository, descriptor: Descriptor, deadline: float) -> TocParts | str:
        """Fetch what holds a layer's TOC and hold the TOC against its digest; a text says why it can't be lazy.

        Blocking: one request, or two where the TOC is large. One that is too large to wait in memory is left alone.
        Raise RegistryError, DigestMismatch or StoreError.
        """
        found = self._toc_source(descriptor)
        if isinstance(found, NotLazy):
            return found.reason
        return fetch_parts(repository, found, deadline, self._decoding)

    def prepare(
        self,
        repository: Repository,
        wanted: Wanted,
        say: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """Return the layer, from what the store has or from the registry. Blocking: one request where it is lazy.

        `alive` is called often while a layer is fetched whole; what it raises ends that. Raise LayerQuarantined,
        DiffIdMismatch, RegistryError, TrustError, FormatError or StoreError, and TooLarge because of
        `wanted.largest`.
        """
        digest = wanted.descriptor.digest
        found = self._toc_source(wanted.descriptor)
        known = self._store.source(digest)
        table = None
        if known is not None and self._usable(known, wanted, found):
            table = self._table(digest) or self._remake(known)
        tail, whole = b"", 0
        if wanted.regained and (known is None or table is None):
            # Readers wait, or another daemon serves the layer: no time to ask a registry, nor to change records.
            raise StoreBroken(f"the table of layer {digest} is not in the store any more")
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
        same_claims = known.diff_id == wanted.diff_id and toc_claims(known.descriptor) == toc_claims(wanted.descriptor)
        # What another registry sent may be false where this one's is true.
        if known.quarantine and same_claims and known.origin == wanted.origin:
            if wanted.regained:
                return True
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

    def _remake(self, known: LayerSource) -> LayerTable | None:
        """Make a table again from the TOC that the store has; None: it has none, or not what it was."""
        digest = known.descriptor.digest
        try:
            raw = self._store.read_toc(digest)
            if raw is None or not known.toc or digests.of(raw) != known.toc:
                return None
            form = next(form for form, name in _SOURCE_FORMS.items() if name == known.form)
            return self._build(known.descriptor, form, known.payload_end, len(raw))
        except (FormatError, StoreError, StopIteration) as error:
            log.info("a layer table can't be made from the store: %s", error)
            return None

    def _build(self, descriptor: Descriptor, form: Form, payload_end: int, size: int) -> LayerTable:
        """Make a layer's table from its `toc` file of `size` bytes. Raise FormatError or StoreError."""
        directory = self._store.path(descriptor.digest)
        job = {
            "toc": os.fspath(directory / "toc"),
            "out": os.fspath(directory / "table"),
            "form": TABLE_FORMS[form],
            "blob_size": descriptor.size,
            "payload_end": payload_end,
        }
        with self._large if size > _LARGE_TOC else nullcontext(), self._building:
            self.builder.run({"tables": [job]})
        return LayerTable(directory / "table")

    # -- making it

    def _make(
        self,
        repository: Repository,
        wanted: Wanted,
        found: TocSource | NotLazy,
        say: Callable[[str], None],
        alive: Callable[[], None],
    ) -> tuple[LayerSource, LayerTable, bytes]:
        reason = found.reason if isinstance(found, NotLazy) else ""
        if isinstance(found, TocSource):
            try:
                made = NotLazy(wanted.whole) if wanted.whole else self._make_lazy(repository, wanted, found)
            except FormatError as error:
                # A digest vouched for something that is no TOC that we read. The whole blob still has a diff ID.
                made = NotLazy(error.message)
            if not isinstance(made, NotLazy):
                return made
            reason = made.reason
            log.warning("layer %s is not lazy: %s", wanted.descriptor.digest, reason)
        if wanted.largest is not None and wanted.descriptor.size > wanted.largest:
            raise TooLarge(reason)
        return self._make_plain(repository, wanted, say, alive, reason if isinstance(found, TocSource) else "")

    def _make_lazy(
        self, repository: Repository, wanted: Wanted, found: TocSource
    ) -> tuple[LayerSource, LayerTable, bytes] | NotLazy:
        digest = wanted.descriptor.digest
        self.builder.warm()  # it starts while the TOC is on its way
        parts: Parts = {}
        early = dict(wanted.parts.parts) if wanted.parts is not None else {}
        if wanted.tail is not None and not early:
            early[found.blob_offset] = wanted.tail.result()
        toc = read_parts(repository, found, parts, wanted.deadline, early)
        if isinstance(toc, NotLazy):
            return toc
        directory = self._store.path(digest)
        self._store.write_toc(digest, toc.raw)
        try:
            table = self._build(wanted.descriptor, toc.form, toc.payload_end, len(toc.raw))
        except FormatError:
            _discard(directory)
            raise
        source = LayerSource(
            wanted.descriptor,
            _SOURCE_FORMS[toc.form],
            wanted.origin,
            wanted.diff_id,
            payload_end=toc.payload_end,
            toc=digests.of(toc.raw),
        )
        self._store.set_source(digest, source)
        tail = b"".join(parts[at] for at in sorted(parts))
        if found.blob_offset + found.size < wanted.descriptor.size:
            tail = b""  # the TOC alone: the check will want what lies behind it too
        return source, table, tail[-(wanted.descriptor.size - toc.payload_end) :]

    def _make_plain(
        self,
        repository: Repository,
        wanted: Wanted,
        say: Callable[[str], None],
        alive: Callable[[], None],
        reason: str,
    ) -> tuple[LayerSource, LayerTable, bytes]:
        digest = wanted.descriptor.digest
        layer = dataclasses.replace(self._plain_job(wanted.descriptor, wanted.diff_id), deadline=wanted.deadline)
        try:
            self.unpacking.unpack(repository, layer, say, alive)
        except BaseException:
            _discard(layer.table.parent)
            raise
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
        beside = f":{wanted.beside}" if wanted.beside else ""
        # The kernel keeps pages by node id, also those of an image that is gone: another TOC of the same blob must not
        # get the same ids. What a table was made from tells whether it is the same one.
        toc = "plain" if plain else toc_claims(known.descriptor).removeprefix("sha256:") + beside
        number = self._catalog.number(f"layer:{digest}:{toc}")
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
        if wanted.regained:
            served.quarantine = known.quarantine
        if plain:
            served.refill = partial(self._refill, served)
        elif not known.verified:
            begin = partial(WholeCheck, digest, wanted.diff_id, table, f"{digest} of {wanted.origin}")
            served.check = Check(begin, Spool(self._store.path(digest)))
            if tail:
                served.check.spool.put(served.extents - 1, table.payload_end, tail)
        # Not the tree of a false layer either: whoever says something else of a blob must get another one.
        form = "plain" if plain else f"{toc_claims(known.descriptor)} {wanted.diff_id}{beside}"
        return Prepared(served, reason, f"{digest} {form} {VERSION}", wanted.beside)

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
        if self._update(served, verified=True, quarantine=""):
            self._catalog.set_verified(served.digest)

    def set_quarantine(self, served: ServedLayer, reason: str) -> None:
        """Remember that a layer is false, and drop its chunks. Blocking."""
        if self._update(served, verified=False, quarantine=reason):
            self._catalog.set_quarantine(served.digest, reason)
        served.store.forget()

    def _update(self, served: ServedLayer, *, verified: bool, quarantine: str) -> bool:
        """Write down a verdict. False: the layer has gone, or the blob is known under other claims meanwhile."""
        with self._store.borrow(served.digest) as files:  # or a removal at the same moment would leave the verdict here
            known = self._store.source(served.digest) if files is not None else None
            if known is None or (known.diff_id, toc_claims(known.descriptor)) != (
                served.diff_id,
                toc_claims(served.descriptor),
            ):
                return False
            self._store.set_source(served.digest, dataclasses.replace(known, verified=verified, quarantine=quarantine))
        return True


def _discard(directory: Path) -> None:
    """Leave nothing of a layer that could not be made: what has no chunks would pass for one being fetched."""
    if not (directory / "table").exists():
        with suppress(OSError):
            (directory / "toc").unlink(missing_ok=True)
            directory.rmdir()  # it stays where another process is at work in it
