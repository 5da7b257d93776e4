"""A whole source: its layers side by side, then configs, blobs, manifests, and the destination's tag last of all.

Nothing is pushed before every byte that is to be pushed was verified (blob digests and diff IDs) and converted.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from indexer import related
from indexer.copy import Copier
from indexer.documents import manifest_type, new_config, new_manifest, rewrite_index
from indexer.layers import DoneLayer, LayerWork
from indexer.options import ConvertOptions
from indexer.plan import Node, Plan, Role, is_foreign, read_all, read_image
from indexer.push import Upload, push_blobs
from indexer.record import LayerCache
from indexer.report import SCHEMA, ConvertReport, ImageReport, KeptReport, LayerReport, Origin
from indexer.reuse import docker_type, earlier_layers
from indexer.work import Converted, WorkDirectory
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import LazyfsError, StoreBroken, UsageError
from lazyfs.limits import MAX_COPIED
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)

_DOCKER_NOTE = (
    "Docker's manifests know no annotations, though registries and containerd keep them: a tool that rewrites the "
    "manifest makes the layers ordinary ones"
)


def convert_image(
    source: Repository,
    source_reference: Reference,
    destination: Repository,
    destination_reference: Reference,
    options: ConvertOptions,
    cache: Repository | None = None,
) -> ConvertReport:
    """Convert one image, or with `all_platforms` everything that the source names, and push it. Blocks.

    Same source and options, same bytes. `cache` is a repository with records of converted layers. Raises before
    anything is pushed: RegistryError, DigestMismatch, DiffIdMismatch, PlatformMissing, DocumentInvalid, TarInvalid,
    FrameInvalid, StoreBroken (local disk), UsageError (options). Temporary files are gone when it returns or raises,
    KeyboardInterrupt included; only `options.work` keeps what the next run can use.
    """
    return Conversion(source, source_reference, destination, destination_reference, options, cache).run()


class Conversion:
    """One conversion. `layers` are the reports of the layers that are ready; any thread may look at them."""

    def __init__(
        self,
        source: Repository,
        source_reference: Reference,
        destination: Repository,
        destination_reference: Reference,
        options: ConvertOptions,
        cache: Repository | None = None,
    ) -> None:
        self.layers: list[LayerReport] = []
        self.notes: list[str] = []
        self._source = source
        self._source_reference = source_reference
        self._destination = destination
        self._destination_reference = destination_reference
        self._options = options
        self._cache = None if cache is None else LayerCache(cache)
        self._cancelled = threading.Event()

    def run(self) -> ConvertReport:
        """Convert and push. Blocks. See `convert_image`."""
        options = self._options
        options.check()
        if self._destination_reference.digest:
            raise UsageError("an image can't be pushed to a digest", hint="name a tag")
        began = time.monotonic()
        plan = self._plan()
        self.notes += plan.notes
        with self._ending(), _work_directory(options) as work:
            images = plan.root.images()
            subjects = list(dict.fromkeys([plan.root.digest, *(node.digest for node in images)]))
            listing = related.Listing(self._source, subjects)
            done = self._convert_layers(images, work)
            result = _Result(plan.root, done, options)
            copier = Copier(self._source, self._destination, options, work, self._cancelled)
            uploads = [layer.upload for layer in done.values() if layer.upload is not None]
            uploads += [Upload(digests.of(raw), len(raw), raw, self._holder()) for _, raw in result.configs]
            kept = [node for node in plan.root.walk() if node.role is Role.KEPT]
            for node in {node.digest: node for node in kept}.values():
                uploads += self._kept_blobs(node, copier)
            referrers, unknown = listing.result()
            if unknown and options.copy_referrers:
                raise UsageError(f"--copy-referrers can't be done: {unknown}")
            copies = self._copy_referrers(referrers, result, copier)
            left = [each for each in referrers if each.entry.digest not in copies]
            self.notes += filter(None, (unknown, related.note_about(left)))
            for copy in copies.values():
                uploads += copy.uploads
            moved = push_blobs(self._destination, uploads)
            self._push_documents(result, copies)
            self._record(done, work)
            reported = related.reported(referrers, copies, result.descriptors, wanted=options.copy_referrers)
        self.notes += result.notes
        return ConvertReport(
            str(self._source_reference),
            str(self._destination_reference),
            options.form.value,
            options.compression,
            plan.root.digest,
            result.descriptors[plan.root.digest].digest,
            tuple(
                ImageReport(
                    node.name,
                    node.digest,
                    result.descriptors[node.digest].digest,
                    tuple(done[layer.digest].report for layer in _layers(node)),
                )
                for node in images
            ),
            tuple(KeptReport(node.name, node.digest) for node in kept),
            reported,
            tuple(self.notes),
            moved.pushed,
            moved.mounted,
            time.monotonic() - began,
        )

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Tell the threads that read a source that nobody wants it any more, however the work ended."""
        try:
            yield
        finally:
            self._cancelled.set()

    def so_far(self) -> dict[str, Any]:
        """Return the report of a conversion that failed, without its error: the layers that got ready."""
        return {
            "schema": SCHEMA,
            "status": "failed",
            "source": str(self._source_reference),
            "destination": str(self._destination_reference),
            "form": self._options.form.value,
            "level": self._options.compression,
            "layers": [layer.to_json() for layer in list(self.layers)],
            "notes": list(self.notes),
        }

    def _plan(self) -> Plan:
        if self._options.all_platforms:
            return read_all(self._source, self._source_reference)
        return read_image(self._source, self._source_reference, self._options.platform)

    def _convert_layers(self, images: list[Node], work: WorkDirectory) -> dict[str, DoneLayer]:
        earlier: dict[str, Converted] = {}
        if not self._options.force:
            earlier = earlier_layers(
                self._destination,
                self._destination_reference,
                self._options.platform,
                all_platforms=self._options.all_platforms,
            )
        layers = LayerWork(self._source, self._destination, self._options, work, earlier, self._cache)
        self.layers = layers.done
        wanted = []
        for node in images:
            assert node.config is not None
            wanted += list(zip(_layers(node), node.config.diff_ids, strict=True))
        return layers.run(wanted)

    def _holder(self) -> Repository | None:
        return self._source if self._source.host == self._destination.host else None

    def _kept_blobs(self, node: Node, copier: Copier) -> list[Upload]:
        assert node.manifest is not None
        blobs = [node.manifest.config, *(layer for layer in node.manifest.layers if not is_foreign(layer))]
        unique = {blob.digest: blob for blob in blobs}.values()
        return [upload for blob in unique if (upload := copier.take(blob)) is not None]

    def _copy_referrers(
        self, referrers: list[related.Referrer], result: _Result, copier: Copier
    ) -> dict[str, related.Copied]:
        if not self._options.copy_referrers:
            return {}
        wanted = [each for each in referrers if not related.why_not(each, result.descriptors, wanted=True)]
        if len(wanted) > MAX_COPIED:
            raise UsageError(f"{len(wanted)} things refer to the source, more than the {MAX_COPIED} copied")
        return {
            each.entry.digest: related.copy_referrer(each, result.descriptors[each.subject], self._source, copier)
            for each in wanted
        }

    def _push_documents(self, result: _Result, copies: dict[str, related.Copied]) -> None:
        """Push what the tag's document names before the tag, so that what it names is there whenever it is."""
        *below, (media_type, raw) = result.documents
        for kind, document in below:
            self._destination.push_manifest(digests.of(document), kind, document)
        for copy in copies.values():
            self._destination.push_manifest(copy.digest, copy.media_type, copy.raw)
        self._destination.push_manifest(self._destination_reference.target, media_type, raw)

    def _record(self, done: dict[str, DoneLayer], work: WorkDirectory) -> None:
        """Record the layers converted; their blobs are at the destination, from where a registry takes them over."""
        cache = self._cache
        for layer in done.values():
            if not layer.key:
                continue
            if cache is not None and layer.report.origin is not Origin.CACHE:
                try:
                    self._add_to_cache(cache, layer, work)
                except LazyfsError as error:  # whatever it is: the image is pushed
                    self.notes.append(f"the cache repository took no record: {error.message}")
                    cache = None
            work.arrived(layer.key)

    def _add_to_cache(self, cache: LayerCache, layer: DoneLayer, work: WorkDirectory) -> None:
        converted = Converted(layer.descriptor, layer.diff_id)
        if layer.report.origin is not None and cache.find(layer.key) == converted:
            return
        holder = self._destination if self._destination.host == cache.repository.host else None
        content = layer.upload.content if layer.upload is not None else None
        copier = Copier(self._destination, cache.repository, self._options, work, self._cancelled)
        upload = Upload(
            layer.descriptor.digest,
            layer.descriptor.size,
            content,
            holder,
            lambda: copier.fetch(layer.descriptor, layer.diff_id),
        )
        cache.add(layer.key, converted, upload)


class _Result:
    """The documents of the result, in the order in which they are pushed; the last is what the tag names."""

    def __init__(self, root: Node, done: dict[str, DoneLayer], options: ConvertOptions) -> None:
        self.descriptors: dict[str, oci.Descriptor] = {}  # of each document, by the source's digest
        self.documents: list[tuple[str, bytes]] = []  # (media type, raw)
        self.configs: list[tuple[Node, bytes]] = []
        self.notes: list[str] = []
        for node in {node.digest: node for node in root.walk()}.values():
            media_type, raw = self._document(node, done, options)
            self.descriptors[node.digest] = oci.Descriptor(media_type, digests.of(raw), len(raw))
            self.documents.append((media_type, raw))

    def _document(self, node: Node, done: dict[str, DoneLayer], options: ConvertOptions) -> tuple[str, bytes]:
        if node.role is Role.KEPT:
            return node.media_type, node.raw
        if node.role is Role.INDEX:
            raw = rewrite_index(node.raw, node.media_type, self.descriptors, docker=options.docker)
            return oci.parse_index(raw).media_type, raw
        assert node.manifest is not None and node.config is not None
        layers = [done[layer.digest] for layer in node.manifest.layers]
        config = new_config(node.config, tuple(layer.diff_id for layer in layers))
        self.configs.append((node, config))
        docker = options.docker and node.media_type == oci.DOCKER_MANIFEST
        descriptors = [docker_type(layer.descriptor) if docker else layer.descriptor for layer in layers]
        if docker and _DOCKER_NOTE not in self.notes:
            self.notes.append(_DOCKER_NOTE)
        return manifest_type(docker), new_manifest(node.manifest, config, descriptors, docker=docker)


def _layers(node: Node) -> tuple[oci.Descriptor, ...]:
    assert node.manifest is not None
    return node.manifest.layers


@contextmanager
def _work_directory(options: ConvertOptions) -> Iterator[WorkDirectory]:
    try:
        with _made_directory(options) as work:
            yield work
    except StoreBroken as error:
        where = options.work or options.scratch or tempfile.gettempdir()
        error.hint = error.hint or f"the work is done in {where}; --work-dir names another directory"
        raise


@contextmanager
def _made_directory(options: ConvertOptions) -> Iterator[WorkDirectory]:
    if options.work is not None:
        with WorkDirectory(options.work) as work:
            yield work
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix="lazyfs-convert-", dir=options.scratch, ignore_cleanup_errors=True)
    except OSError as error:
        raise StoreBroken(f"no temporary directory can be made: {error.strerror}") from None
    with scratch as directory, WorkDirectory(Path(directory), keep=False) as work:
        yield work
