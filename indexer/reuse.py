"""Layers that need no conversion: in the wanted form already, or converted before from the same source.

The source of a converted layer is named in its annotation SOURCE_LAYER. Whoever can write the destination's manifest
can write that too, so it is believed exactly as far as the destination is; `--force` converts anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from indexer.frames import CHUNK_SIZE
from lazyfs import oci
from lazyfs.errors import FormatError, ManifestMissing, PlatformMissing, RegistryError, TrustError
from lazyfs.format.footer import MAX_FOOTER, Form, parse_footer
from lazyfs.format.zstd_chunked import parse_position
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import fetch_config, resolve_image

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of the bytes that a conversion makes; raise it when they change


@dataclass(frozen=True, slots=True)
class Earlier:
    """A converted layer at the destination."""

    descriptor: oci.Descriptor
    diff_id: str


def fingerprint(level: int) -> str:
    """Return what, besides the source, decides a converted layer's bytes."""
    return f"zstd-chunked={FORMAT_VERSION},level={level},chunk={CHUNK_SIZE}"


def source_key(source_digest: str, level: int) -> str:
    """Return the value of SOURCE_LAYER for a source and the options."""
    return f"{source_digest};{fingerprint(level)}"


def earlier_layers(destination: Repository, target: Reference, platform: str) -> dict[str, Earlier]:
    """Return the converted layers of the image that is at `target` now, by their SOURCE_LAYER.

    Blocking; {} when there is none. A destination that can't be read is no reason to fail before the push does.
    """
    try:
        manifest = resolve_image(destination, target, platform).manifest
        if not any(oci.SOURCE_LAYER in layer.annotations for layer in manifest.layers):
            return {}
        config = fetch_config(destination, manifest)
    except ManifestMissing:
        return {}
    except (RegistryError, FormatError, TrustError, PlatformMissing) as error:
        log.info("no layer of %s can be reused: %s", target, error)
        return {}
    return {
        layer.annotations[oci.SOURCE_LAYER]: Earlier(layer, diff_id)
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
        if oci.SOURCE_LAYER in layer.annotations
    }


def is_converted(repository: Repository, layer: oci.Descriptor) -> bool:
    """Tell whether `layer` is a zstd:chunked layer in our form: trust in its annotations, footer in place.

    Blocking: one request for the last bytes of a layer whose annotations say so, none for others.
    """
    annotations = layer.annotations
    if oci.TOC_DIGEST not in annotations or oci.ZSTD_POSITION not in annotations:
        return False
    if oci.GITHUB_ZSTD_POSITION in annotations or oci.GITHUB_ZSTD_CHECKSUM in annotations:
        return False  # two TOCs on one layer: readers refuse it
    try:
        position = parse_position(annotations[oci.ZSTD_POSITION], layer.size)
        size = min(MAX_FOOTER, layer.size)
        last = bytearray()
        with repository.fetch(layer.digest, layer.size - size, size) as stream:
            while block := stream.read(size):
                last += block
        footer = parse_footer(bytes(last), layer.size)
    except FormatError:
        return False
    return footer.form is Form.ZSTD_CHUNKED and (footer.toc_offset, footer.toc_size, footer.toc_raw_size) == position


def as_oci(layer: oci.Descriptor, annotations: dict[str, str]) -> oci.Descriptor:
    """Return the descriptor of a zstd layer with OCI's media type and `annotations`."""
    return replace(layer, media_type=oci.OCI_LAYER_ZSTD, annotations=annotations, urls=())
