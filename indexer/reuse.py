"""Layers that need no conversion: in the wanted form already, or converted before from the same source.

The source of a converted layer is named in its annotation SOURCE_LAYER. Whoever can write the destination's manifest
can write that too, so it is believed exactly as far as the destination is, and so are the records of the work
directory and of the cache repository; `--force` converts anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace

from indexer.frames import CHUNK_SIZE, PODMAN_CHUNK_SIZE
from indexer.options import ConvertOptions, OutputForm
from indexer.plan import read_all
from indexer.work import Converted
from lazyfs import oci
from lazyfs.errors import FormatError, PlatformMissing, RegistryError, TrustError
from lazyfs.format.footer import MAX_FOOTER, Form, parse_footer
from lazyfs.format.zstd_chunked import parse_position
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import fetch_config, resolve_image

log = logging.getLogger(__name__)

# Of the bytes that a conversion makes; raised when they change.
FORMAT_VERSIONS = {OutputForm.ZSTD_CHUNKED: 1, OutputForm.ESTARGZ: 1, OutputForm.PODMAN: 1}
_FOOTERS = {
    OutputForm.ZSTD_CHUNKED: Form.ZSTD_CHUNKED,
    OutputForm.ESTARGZ: Form.ESTARGZ,
    OutputForm.PODMAN: Form.STORAGE_ZSTD_CHUNKED,
}
LAYER_TYPES = {
    OutputForm.ZSTD_CHUNKED: oci.OCI_LAYER_ZSTD,
    OutputForm.ESTARGZ: oci.OCI_LAYER_GZIP,
    OutputForm.PODMAN: oci.OCI_LAYER_ZSTD,
}
_POSITIONS = {OutputForm.ZSTD_CHUNKED: oci.ZSTD_POSITION, OutputForm.PODMAN: oci.GITHUB_ZSTD_POSITION}
_OURS = frozenset({oci.ZSTD_POSITION, oci.ZSTD_CHECKSUM})
_STORAGES = frozenset({oci.GITHUB_ZSTD_POSITION, oci.GITHUB_ZSTD_CHECKSUM})
# Annotations that a layer must and must not have to be in a form: two TOCs on one layer are refused by readers.
_NEEDED = {
    OutputForm.ZSTD_CHUNKED: frozenset({oci.TOC_DIGEST, oci.ZSTD_POSITION}),
    OutputForm.ESTARGZ: frozenset({oci.TOC_DIGEST}),
    OutputForm.PODMAN: _STORAGES,
}
_BANNED = {
    OutputForm.ZSTD_CHUNKED: _STORAGES,
    OutputForm.ESTARGZ: _STORAGES | _OURS,
    OutputForm.PODMAN: frozenset({oci.TOC_DIGEST}),  # the older annotations stand beside the newer, for podman 4
}


def fingerprint(options: ConvertOptions, prefetch: tuple[bytes, ...] = ()) -> str:
    """Return what, besides the source, decides a converted layer's bytes.

    `prefetch`: the paths that matter for the layer; () when none of the list is in it.
    """
    chunk = PODMAN_CHUNK_SIZE if options.form is OutputForm.PODMAN else CHUNK_SIZE
    base = f"{options.form.value}={FORMAT_VERSIONS[options.form]},level={options.compression},chunk={chunk}"
    if not prefetch:
        return base
    listed = hashlib.sha256(b"\0".join(prefetch)).hexdigest()
    return f"{base},prefetch={listed[:32]}"


def source_key(source_digest: str, options: ConvertOptions, prefetch: tuple[bytes, ...] = ()) -> str:
    """Return the value of SOURCE_LAYER for a source and the options, and the key of its records."""
    return f"{source_digest};{fingerprint(options, prefetch)}"


def earlier_layers(
    destination: Repository, target: Reference, platform: str | None, *, all_platforms: bool = False
) -> dict[str, Converted]:
    """Return the converted layers of what is at `target` now, by their SOURCE_LAYER.

    Blocking; {} when there is none. A destination that can't be read is no reason to fail before the push does.
    """
    found: dict[str, Converted] = {}
    try:
        for manifest, config in _images(destination, target, platform, all_platforms):
            for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
                if oci.SOURCE_LAYER in layer.annotations:
                    found[layer.annotations[oci.SOURCE_LAYER]] = Converted(layer, diff_id)
    except (RegistryError, FormatError, TrustError, PlatformMissing) as error:
        log.info("no layer of %s can be reused: %s", target, error)
    return found


def _images(
    destination: Repository, target: Reference, platform: str | None, all_platforms: bool
) -> Iterator[tuple[oci.Manifest, oci.ImageConfig]]:
    if all_platforms:
        for node in read_all(destination, target).root.images():
            assert node.manifest is not None and node.config is not None
            yield node.manifest, node.config
        return
    manifest = resolve_image(destination, target, platform).manifest
    if any(oci.SOURCE_LAYER in layer.annotations for layer in manifest.layers):
        yield manifest, fetch_config(destination, manifest)


def is_converted(repository: Repository, layer: oci.Descriptor, form: OutputForm) -> bool:
    """Tell whether `layer` is in `form` already: trust in its annotations, footer in place.

    Blocking: one request for the last bytes of a layer whose annotations say so, none for others.
    """
    told = layer.annotations.keys()
    if not told >= _NEEDED[form] or told & _BANNED[form] or LAYER_TYPES[form] not in _oci_types(layer.media_type):
        return False
    try:
        position = None
        if form in _POSITIONS:
            position = parse_position(layer.annotations[_POSITIONS[form]], layer.size)
        size = min(MAX_FOOTER, layer.size)
        last = bytearray()
        with repository.fetch(layer.digest, layer.size - size, size) as stream:
            while block := stream.read(size):
                last += block
        footer = parse_footer(bytes(last), layer.size)
    except FormatError:
        return False
    if footer.form is not _FOOTERS[form]:
        return False
    return position is None or (footer.toc_offset, footer.toc_size, footer.toc_raw_size) == position


def _oci_types(media_type: str) -> tuple[str, ...]:
    """Return OCI's names for a layer's type; some tools leave Docker's gzip type on what they recompressed."""
    if media_type == oci.DOCKER_LAYER_GZIP:
        return (oci.OCI_LAYER_GZIP,)
    return (media_type,)


def as_oci(layer: oci.Descriptor, form: OutputForm) -> oci.Descriptor:
    """Return the descriptor of a layer in `form` with OCI's media type."""
    return replace(layer, media_type=LAYER_TYPES[form], urls=(), platform={})


def docker_type(layer: oci.Descriptor) -> oci.Descriptor:
    """Return a gzip layer's descriptor with Docker's media type."""
    return replace(layer, media_type=oci.DOCKER_LAYER_GZIP)
