"""The layers of a source, side by side: each is reused, kept or converted, and its source verified.

A layer's blob ends up in a file of the run; bringing it to the destination is the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from indexer.compress import Compressors
from indexer.copy import Copier, check_diff_id, check_digest, create
from indexer.layer import LayerOptions, convert_layer
from indexer.options import ConvertOptions
from indexer.push import Upload
from indexer.record import LayerCache
from indexer.report import Action, LayerReport, Origin
from indexer.reuse import LAYER_TYPES, as_oci, is_converted, source_key
from indexer.source import BlobSource, Pump, decompressed
from indexer.threads import side_by_side
from indexer.work import Converted, WorkDirectory
from lazyfs import oci
from lazyfs.errors import (
    DiffIdMismatch,
    DigestMismatch,
    FormatError,
    FrameInvalid,
    RegistryError,
    TarInvalid,
    TrustError,
)
from lazyfs.limits import IN_FLIGHT, SIDE_BY_SIDE
from lazyfs.registry.mirrored import read_again
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DoneLayer:
    """What became of a layer, how its blob gets to the destination, and the key that it is recorded by."""

    descriptor: oci.Descriptor
    diff_id: str
    report: LayerReport
    upload: Upload | None  # None: at the destination already
    key: str = ""  # "": not recorded


class LayerWork:
    """The layers under way. One use; `done` may be looked at from any thread."""

    def __init__(
        self,
        source: Repository,
        destination: Repository,
        options: ConvertOptions,
        work: WorkDirectory,
        earlier: dict[str, Converted],
        cache: LayerCache | None = None,
    ) -> None:
        self.done: list[LayerReport] = []  # as they get ready
        self._earlier = earlier
        self._source = source
        self._destination = destination
        self._options = options
        self._work = work
        self._cache = cache
        self._cancelled = threading.Event()
        self._copier = Copier(source, destination, options, work, self._cancelled)

    def run(self, layers: list[tuple[oci.Descriptor, str]]) -> dict[str, DoneLayer]:
        """Return what became of each layer (descriptor, diff ID) by its digest. The first error ends all."""
        unique: dict[str, tuple[oci.Descriptor, str]] = {}
        for layer, diff_id in layers:
            _, known = unique.setdefault(layer.digest, (layer, diff_id))
            if known != diff_id:
                raise DiffIdMismatch(layer.digest, diff_id, known)
        if not unique:
            return {}
        threads = min(self._options.jobs, len(unique), SIDE_BY_SIDE)
        with Compressors(self._options.compression, self._options.jobs, self._options.form) as compressors:
            done = side_by_side(
                lambda layer: self._one(*layer, compressors, IN_FLIGHT // threads),
                list(unique.values()),
                threads,
                "layer",
                self._cancelled.set,
            )
        return dict(zip(unique, done, strict=True))

    def _one(self, layer: oci.Descriptor, diff_id: str, compressors: Compressors, in_flight: int) -> DoneLayer:
        began = time.monotonic()
        found = None
        try:
            if not self._options.force:
                found = self._reuse(layer, diff_id, began) or self._keep(layer, diff_id, began)
            # A mirror's wrong bytes are no reason to fail while another source has the right ones.
            convert = partial(self._convert, layer, diff_id, compressors, in_flight, began)
            done = found or read_again(self._source, layer.digest, convert, (DigestMismatch,))
        except FormatError as error:
            error.message = f"layer {layer.digest[7:19]}: {error.message}"
            raise
        self.done.append(done.report)
        return done

    def _convert(
        self, layer: oci.Descriptor, diff_id: str, compressors: Compressors, in_flight: int, began: float
    ) -> DoneLayer:
        path = self._work.new_file(layer.digest)
        with self._options.progress(layer.digest[7:19], layer.size) as progress:
            # A blob that is its own diff ID is a bare tar: one pass of sha256 proves both.
            blob = BlobSource(self._source, layer, progress.advance, hashed=layer.digest != diff_id)
            pump = Pump(decompressed(blob), self._cancelled)
            try:
                with create(path) as target:
                    options = LayerOptions(self._options.form, self._options.prefetch, path.parent, self._cancelled)
                    result = convert_layer(pump, target, compressors, in_flight, options)
            except (TarInvalid, FrameInvalid):
                # Was it the registry's doing? Then that is what to say.
                _drain(pump, blob)
                if not blob.hashed:
                    blob = BlobSource(self._source, layer, lambda size: None)
                    _drain(Pump(blob.blocks(), self._cancelled), blob)
                check_digest(layer, blob.digest)
                raise
        check_digest(layer, blob.digest if blob.hashed else result.source_diff_id)
        check_diff_id(layer, diff_id, result.source_diff_id)
        plain = source_key(layer.digest, self._options, result.prefetched)
        descriptor = oci.Descriptor(
            result.media_type, result.digest, result.size, {**result.annotations, oci.SOURCE_LAYER: plain}
        )
        key = self._key(layer)
        self._work.keep(key, Converted(descriptor, result.diff_id), path)
        report = LayerReport(
            layer.digest,
            layer.size,
            result.digest,
            result.size,
            Action.CONVERTED,
            result.entries,
            time.monotonic() - began,
            result.diff_id == diff_id,
            notes=result.notes,
        )
        return DoneLayer(descriptor, result.diff_id, report, Upload(result.digest, result.size, path), key)

    def _key(self, layer: oci.Descriptor) -> str:
        """Return the key of a layer's records: by the whole prefetch list, for which of it matters isn't known yet."""
        return source_key(layer.digest, self._options, self._options.prefetch)

    def _reuse(self, layer: oci.Descriptor, diff_id: str, began: float) -> DoneLayer | None:
        key = self._key(layer)
        for found, origin, upload in self._candidates(key):
            descriptor = replace(found.descriptor, media_type=LAYER_TYPES[self._options.form])
            report = _untouched(layer, descriptor, Action.REUSED, began, kept=diff_id == found.diff_id, origin=origin)
            return DoneLayer(descriptor, found.diff_id, report, upload, key)
        return None

    def _candidates(self, key: str) -> Iterator[tuple[Converted, Origin, Upload | None]]:
        """Yield earlier conversions that can be had, the cheapest first."""
        there = self._earlier.get(key)
        if there is not None and self._destination.has_blob(there.descriptor.digest):
            yield there, Origin.DESTINATION, None
        local = self._work.find(key)
        if local is not None:
            digest, size = local.descriptor.digest, local.descriptor.size
            if self._destination.has_blob(digest):
                yield local, Origin.WORK, None
            elif (path := self._work.blob(key, local)) is not None:
                yield local, Origin.WORK, Upload(digest, size, path)
        cached = self._cache.find(key) if self._cache is not None else None
        if cached is not None and self._cache is not None:
            copier = Copier(self._cache.repository, self._destination, self._options, self._work, self._cancelled)
            try:
                upload = copier.take(cached.descriptor, cached.diff_id)
            except (RegistryError, FormatError, TrustError) as error:
                log.warning("a layer in the cache repository is of no use: %s", error)
                return
            yield cached, Origin.CACHE, upload

    def _keep(self, layer: oci.Descriptor, diff_id: str, began: float) -> DoneLayer | None:
        # A layer in the wanted form has files in some order; with a list they are to be in that one.
        if self._options.prefetch or not is_converted(self._source, layer, self._options.form):
            return None
        upload = self._copier.take(layer, diff_id)
        descriptor = as_oci(layer, self._options.form)
        return DoneLayer(descriptor, diff_id, _untouched(layer, layer, Action.KEPT, began, kept=True), upload)


def _untouched(
    layer: oci.Descriptor,
    result: oci.Descriptor,
    action: Action,
    began: float,
    *,
    kept: bool,
    origin: Origin | None = None,
) -> LayerReport:
    seconds = time.monotonic() - began
    return LayerReport(layer.digest, layer.size, result.digest, result.size, action, -1, seconds, kept, origin)


def _drain(pump: Pump, blob: BlobSource) -> None:
    """Read the rest of a layer whose content is wrong, for its digest."""
    with suppress(FrameInvalid):
        for _ in pump:
            pass
    for _ in blob.blocks():  # what damaged compression left unread; the pump's thread has ended
        pass
