"""What the store holds: layers and images, how much of each is here, what keeps them. Looking changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lazyfs import oci
from lazyfs.chunks.catalog import Catalog, LayerRecord, NamedImage
from lazyfs.chunks.layer_store import full_bytes, hole_chunks
from lazyfs.chunks.source import LayerSource
from lazyfs.chunks.store import Store
from lazyfs.errors import LazyfsError, StoreError, TableInvalid
from lazyfs.format.table import LayerTable
from lazyfs.oci import Manifest

log = logging.getLogger(__name__)


class Uses(Protocol):
    """What is in use right now; asked afresh each time, from any thread."""

    def layers(self) -> frozenset[str]:
        """Return the digests of layers that must not disappear."""
        ...

    def trees(self) -> frozenset[str]:
        """Return the keys of trees that are being served."""
        ...

    def mounts(self) -> dict[str, list[str]]:
        """Return where images show, by the digest of their manifest."""
        ...


@dataclass(frozen=True, slots=True)
class HeldLayer:
    """A layer's state on this node. Sizes in bytes, `last_use` in seconds since the epoch (0: not known)."""

    digest: str
    size: int  # of the blob; 0: not known
    disk: int  # what its directory takes
    present: int  # bytes of the chunks that are here, uncompressed
    full: int  # bytes of all its chunks; 0: not known, there is no table
    complete: bool  # needs no registry
    verified: bool
    quarantine: str
    pinned: bool
    used: bool  # a mount or a fetch has it open
    last_use: int
    origin: str  # the repository that it came from

    @property
    def missing(self) -> int:
        """Bytes to fetch: uncompressed, or the blob where nothing else is known."""
        return self.full - self.present if self.full else 0 if self.complete else self.size


@dataclass(frozen=True, slots=True)
class HeldImage:
    """An image that this node knows. Sizes in bytes, times in seconds since the epoch."""

    digest: str  # of the manifest
    references: tuple[str, ...]
    platform: str
    size: int  # of its layers' blobs
    layers: tuple[str, ...]  # each once; none when the manifest is not here any more
    known: bool  # manifest and config are here
    present: int
    full: int
    complete: bool  # can be mounted without the registry
    verified: bool
    pinned: bool
    mounts: tuple[str, ...]
    last_use: int
    resolved: int  # when the registry was asked last


class Census:
    """Looks at a store. Thread-safe; every method blocks on the local disk, about a millisecond a layer."""

    def __init__(self, store: Store, catalog: Catalog, uses: Uses) -> None:
        self.store = store
        self.catalog = catalog
        self.uses = uses

    def layers(self) -> list[HeldLayer]:
        """Return all layers that have a directory, or a row in the catalog that must not be lost; by digest."""
        records = {record.digest: record for record in self.catalog.layers()}
        here = self.store.digests()
        lost = [digest for digest, record in records.items() if record.pinned or record.quarantine]
        used = self.used()
        return [self._layer(digest, records.get(digest), used) for digest in sorted({*here, *lost})]

    def used(self) -> frozenset[str]:
        """Return the layers that are in use, here or by another process that shares the store."""
        ours = self.uses.layers()
        return ours | {digest for digest in self.store.digests() if self.store.used_elsewhere(digest)}

    def layer(self, digest: str) -> HeldLayer:
        """Return the state of one layer, whether it is here or not."""
        return self._layer(digest, self.catalog.layer(digest), self.uses.layers())

    def _layer(self, digest: str, record: LayerRecord | None, used: frozenset[str]) -> HeldLayer:
        source = self.source(digest)
        present = full = last_use = 0
        complete = False
        with self.store.borrow(digest) as files:
            table = self.table(digest)
            if files is not None:
                last_use = files.last_use()
            if table is not None:
                full = full_bytes(table)
                if files is not None and len(files.flags) == table.chunk_count:
                    flags = bytearray(files.flags)
                    for hole in hole_chunks(table):
                        flags[hole] = 0
                    present = sum(size for size, flag in zip(table.chunk_size, flags, strict=True) if flag)
                complete = present == full
        quarantine = (source.quarantine if source else "") or (record.quarantine if record else "")
        return HeldLayer(
            digest,
            record.blob_size if record and record.blob_size else source.descriptor.size if source else 0,
            self.store.directory_usage(digest),
            present,
            full,
            complete and source is not None and not quarantine,
            source is not None and source.verified,
            quarantine,
            record is not None and record.pinned,
            digest in used,
            max(last_use, record.last_use if record else 0),
            source.origin if source else "",
        )

    def table(self, digest: str) -> LayerTable | None:
        """Return a layer's table, checked just now; None when it is missing or damaged."""
        layer = self.store.layer(digest)
        try:
            if layer is not None and isinstance(layer.table, LayerTable):
                return layer.table
            return LayerTable(self.store.table_path(digest))
        except TableInvalid:
            return None

    def source(self, digest: str) -> LayerSource | None:
        """Return what a layer's directory says of where it came from."""
        try:
            return self.store.source(digest)
        except StoreError as error:
            log.info("layer %s: %s", digest, error)
            return None

    # -- images

    def images(self, layers: list[HeldLayer] | None = None) -> list[HeldImage]:
        """Return all images that a reference led to or that are pinned, the most recently used first."""
        held = {layer.digest: layer for layer in (self.layers() if layers is None else layers)}
        names: dict[str, list[NamedImage]] = {}
        for named in self.catalog.named_images():
            names.setdefault(named.digest, []).append(named)
        pinned: dict[str, list[str]] = {}
        platforms: dict[str, str] = {}
        for pin in self.catalog.pins():
            pinned.setdefault(pin.image, []).append(pin.reference)
            platforms[pin.image] = pin.platform
        mounts = self.uses.mounts()
        found = [
            self._image(
                digest,
                names.get(digest, []),
                pinned.get(digest, []),
                platforms.get(digest, ""),
                mounts.get(digest, []),
                held.get,
            )
            for digest in sorted({*names, *pinned})
        ]
        return sorted(found, key=lambda image: (-image.last_use, image.digest))

    def _image(
        self,
        digest: str,
        names: list[NamedImage],
        pins: list[str],
        platform: str,
        mounts: list[str],
        held: Callable[[str], HeldLayer | None],
    ) -> HeldImage:
        manifest = self.manifest(digest)
        sizes = {layer.digest: layer.size for layer in manifest.layers} if manifest else {}
        layers = {layer: held(layer) for layer in sizes}
        known = manifest is not None and self.catalog.document(manifest.config.digest, note=False) is not None
        return HeldImage(
            digest,
            tuple(sorted({*(name.reference for name in names), *pins})),
            names[0].platform if names else platform,
            sum(sizes.values()),
            tuple(sizes),
            known,
            sum(layer.present for layer in layers.values() if layer),
            sum(layer.full if layer and layer.full else sizes[name] for name, layer in layers.items()),
            known and all(layer is not None and layer.complete for layer in layers.values()),
            known and all(layer is not None and layer.verified for layer in layers.values()),
            bool(pins),
            tuple(sorted(mounts)),
            max((name.last_use for name in names), default=0),
            max((name.time for name in names), default=0),
        )

    def manifest(self, digest: str) -> Manifest | None:
        """Return a manifest that is here; None for one that is not, and for anything else of that digest."""
        try:
            raw = self.catalog.document(digest, note=False)
            return oci.parse_manifest(raw) if raw is not None and not oci.is_index("", raw) else None
        except LazyfsError as error:
            log.info("manifest %s: %s", digest, error)
            return None

    def missing(self, manifest: Manifest) -> list[HeldLayer]:
        """Return those layers of an image that need the registry, each once."""
        wanted = {layer.digest: layer for layer in manifest.layers}
        found = []
        for digest, descriptor in wanted.items():
            layer = self.layer(digest)
            if not layer.complete:
                found.append(layer if layer.size else _unknown(digest, descriptor.size))
        return found


def _unknown(digest: str, size: int) -> HeldLayer:
    return HeldLayer(digest, size, 0, 0, 0, False, False, "", False, False, 0, "")
