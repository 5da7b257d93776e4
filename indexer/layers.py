"""The layers of one image, side by side: each is reused, kept or converted, and its source verified.

A layer's blob ends up in a temporary file; pushing it is the caller's.
"""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from indexer.compress import Compressors
from indexer.frames import IN_FLIGHT
from indexer.layer import LayerOptions, convert_layer
from indexer.options import ConvertOptions
from indexer.push import Upload
from indexer.report import Action, LayerReport
from indexer.reuse import Earlier, as_oci, is_converted, source_key
from indexer.source import BlobSource, Pump, decompressed
from lazyfs import oci
from lazyfs.digest import hex_of
from lazyfs.errors import DiffIdMismatch, DigestMismatch, FrameInvalid, Interrupted, StoreBroken, TarInvalid
from lazyfs.registry.repository import Repository

SIDE_BY_SIDE = 4  # layers at once, at most: each has buffers of its own, and memory is promised


@dataclass(frozen=True, slots=True)
class DoneLayer:
    """What became of a layer, and the blob to be pushed."""

    descriptor: oci.Descriptor
    diff_id: str
    report: LayerReport
    upload: Upload | None  # None: at the destination already


class LayerWork:
    """The layers of one image under way."""

    def __init__(
        self,
        source: Repository,
        destination: Repository,
        options: ConvertOptions,
        scratch: Path,
        earlier: dict[str, Earlier],
    ) -> None:
        self._earlier = earlier
        self._source = source
        self._destination = destination
        self._options = options
        self._scratch = scratch
        self._cancelled = threading.Event()

    def run(self, layers: list[tuple[oci.Descriptor, str]]) -> list[DoneLayer]:
        """Return what became of each layer, in order; equal layers are worked on once. The first error ends all."""
        unique: dict[str, tuple[oci.Descriptor, str]] = {}
        for layer, diff_id in layers:
            _, known = unique.setdefault(layer.digest, (layer, diff_id))
            if known != diff_id:
                raise DiffIdMismatch(layer.digest, diff_id, known)
        if not unique:
            return []
        side_by_side = min(self._options.jobs, len(unique), SIDE_BY_SIDE)
        pool = ThreadPoolExecutor(side_by_side, "layer")
        with Compressors(self._options.compression, self._options.jobs, self._options.form) as compressors:
            try:
                futures = {
                    layer.digest: pool.submit(self._one, layer, diff_id, compressors, IN_FLIGHT // side_by_side)
                    for layer, diff_id in unique.values()
                }
                wait(futures.values(), return_when=FIRST_EXCEPTION)
                _raise_first(list(futures.values()))
            finally:
                self._cancelled.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return [futures[layer.digest].result() for layer, _ in layers]

    def _one(self, layer: oci.Descriptor, diff_id: str, compressors: Compressors, in_flight: int) -> DoneLayer:
        began = time.monotonic()
        if not self._options.force:
            found = self._reuse(layer, diff_id, began) or self._keep(layer, diff_id, began)
            if found is not None:
                return found
        label = layer.digest[7:19]
        path = self._scratch / hex_of(layer.digest)
        with self._options.progress(label, layer.size) as progress:
            # A blob that is its own diff ID is a bare tar: one pass of sha256 proves both.
            blob = BlobSource(self._source, layer, progress.advance, hashed=layer.digest != diff_id)
            pump = Pump(decompressed(blob), self._cancelled)
            try:
                with _create(path) as target:
                    options = LayerOptions(self._options.form, self._options.prefetch, self._scratch, self._cancelled)
                    result = convert_layer(pump, target, compressors, in_flight, options)
            except (TarInvalid, FrameInvalid):
                # Was it the registry's doing? Then that is what to say.
                _drain(pump, blob)
                if not blob.hashed:
                    blob = BlobSource(self._source, layer, lambda size: None)
                    _drain(Pump(blob.blocks(), self._cancelled), blob)
                if blob.digest != layer.digest:
                    raise DigestMismatch("layer", layer.digest, blob.digest) from None
                raise
        _check_source(layer, blob.digest if blob.hashed else result.source_diff_id, diff_id, result.source_diff_id)
        annotations = {**result.annotations, oci.SOURCE_LAYER: source_key(layer.digest, self._options.compression)}
        descriptor = oci.Descriptor(result.media_type, result.digest, result.size, annotations)
        report = LayerReport(
            layer.digest,
            layer.size,
            result.digest,
            result.size,
            Action.CONVERTED,
            result.entries,
            time.monotonic() - began,
            result.diff_id == diff_id,
        )
        return DoneLayer(descriptor, result.diff_id, report, Upload(result.digest, result.size, path))

    def _reuse(self, layer: oci.Descriptor, diff_id: str, began: float) -> DoneLayer | None:
        earlier = self._earlier.get(source_key(layer.digest, self._options.compression))
        if earlier is None or not self._destination.has_blob(earlier.descriptor.digest):
            return None
        report = _untouched(layer, earlier.descriptor, Action.REUSED, began, kept=diff_id == earlier.diff_id)
        return DoneLayer(earlier.descriptor, earlier.diff_id, report, None)

    def _keep(self, layer: oci.Descriptor, diff_id: str, began: float) -> DoneLayer | None:
        if not is_converted(self._source, layer):
            return None
        upload: Upload | None = None
        if not self._destination.has_blob(layer.digest):
            path = self._scratch / hex_of(layer.digest)
            self._copy(layer, diff_id, path)
            upload = Upload(layer.digest, layer.size, path)
        report = _untouched(layer, layer, Action.KEPT, began, kept=True)
        return DoneLayer(as_oci(layer, layer.annotations), diff_id, report, upload)

    def _copy(self, layer: oci.Descriptor, diff_id: str, path: Path) -> None:
        """Copy a layer to a file unchanged, verifying both its digests on the way."""
        with self._options.progress(layer.digest[7:19], layer.size) as progress, _create(path) as target:
            blob = BlobSource(self._source, layer, progress.advance)

            unpacked = hashlib.sha256()
            for block in Pump(decompressed(blob, copy=target), self._cancelled):
                unpacked.update(block)
        _check_source(layer, blob.digest, diff_id, "sha256:" + unpacked.hexdigest())


def _check_source(layer: oci.Descriptor, actual: str, diff_id: str, actual_diff_id: str) -> None:
    if actual != layer.digest:
        raise DigestMismatch("layer", layer.digest, actual)
    if actual_diff_id != diff_id:
        raise DiffIdMismatch(layer.digest, diff_id, actual_diff_id)


def _create(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise StoreBroken(f"a temporary file can't be made: {error.strerror}") from None


def _untouched(
    layer: oci.Descriptor, result: oci.Descriptor, action: Action, began: float, *, kept: bool
) -> LayerReport:
    seconds = time.monotonic() - began
    return LayerReport(layer.digest, layer.size, result.digest, result.size, action, -1, seconds, kept)


def _drain(pump: Pump, blob: BlobSource) -> None:
    """Read the rest of a layer whose content is wrong, for its digest."""
    with suppress(FrameInvalid):
        for _ in pump:
            pass
    for _ in blob.blocks():  # what damaged compression left unread; the pump's thread has ended
        pass


def _raise_first(futures: list[Future[DoneLayer]]) -> None:
    """Raise the error that ended the work, not the interruptions that followed from it."""
    errors = [future.exception() for future in futures if future.done()]
    for error in errors:
        if error is not None and not isinstance(error, Interrupted):
            raise error
