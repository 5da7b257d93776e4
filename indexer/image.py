"""A whole image: its layers side by side, then config, blobs and manifest.

Nothing is pushed before every layer's source was verified (blob digest and diff ID) and converted.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from indexer.layers import LayerWork
from indexer.options import ConvertOptions
from indexer.push import Upload, push_blobs
from indexer.report import ConvertReport
from indexer.reuse import earlier_layers
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import DocumentInvalid, StoreBroken, UsageError
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import fetch_config, resolve_image

_DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
_LAYER_TYPES = frozenset(
    {
        oci.OCI_LAYER,
        oci.OCI_LAYER_GZIP,
        oci.OCI_LAYER_ZSTD,
        oci.DOCKER_LAYER,
        oci.DOCKER_LAYER_GZIP,
        _DOCKER_LAYER_ZSTD,
    }
)


def convert_image(
    source: Repository,
    source_reference: Reference,
    destination: Repository,
    destination_reference: Reference,
    options: ConvertOptions,
) -> ConvertReport:
    """Convert one image (of an index, the platform's) and push it. Blocks.

    The result is an OCI image manifest whose layers are zstd-chunked; same source and options, same bytes. Raises
    before anything is pushed: RegistryError, DigestMismatch, DiffIdMismatch, PlatformMissing, DocumentInvalid,
    TarInvalid, FrameInvalid, StoreBroken (local disk), UsageError (options). Temporary files are gone when it returns
    or raises, KeyboardInterrupt included.
    """
    options.check()
    if destination_reference.digest:
        raise UsageError("an image can't be pushed to a digest", hint="name a tag")
    began = time.monotonic()
    image = resolve_image(source, source_reference, options.platform)
    manifest = image.manifest
    _check_image(manifest)
    config = fetch_config(source, manifest, platform=options.platform)
    try:
        scratch = tempfile.TemporaryDirectory(prefix="lazyfs-convert-", dir=options.scratch, ignore_cleanup_errors=True)
    except OSError as error:
        raise StoreBroken(f"no temporary directory can be made: {error.strerror}") from None
    with scratch as directory:
        earlier = {} if options.force else earlier_layers(destination, destination_reference, image.platform)
        work = LayerWork(source, destination, options, Path(directory), earlier)
        done = work.run(list(zip(manifest.layers, config.diff_ids, strict=True)))
        config_raw = _new_config(config, tuple(layer.diff_id for layer in done))
        result = _new_manifest(manifest, config_raw, [layer.descriptor for layer in done])
        uploads = [layer.upload for layer in done if layer.upload is not None]
        config_digest = digests.of(config_raw)
        pushed = push_blobs(destination, [*uploads, Upload(config_digest, len(config_raw), config_raw)])
        destination.push_manifest(destination_reference.target, oci.OCI_MANIFEST, result)
    return ConvertReport(
        str(source_reference),
        str(destination_reference),
        "/".join(filter(None, (config.os, config.architecture, config.variant))),
        manifest.digest,
        digests.of(result),
        tuple(layer.report for layer in done),
        pushed,
        time.monotonic() - began,
    )


def _check_image(manifest: oci.Manifest) -> None:
    """Refuse what is no image that can be converted, in one sentence."""
    if manifest.config.media_type not in (oci.OCI_CONFIG, oci.DOCKER_CONFIG):
        kind = manifest.config.media_type[:100] or "without a type"
        raise DocumentInvalid(f"this is no container image but an artifact (its config is {kind!r})")
    for number, layer in enumerate(manifest.layers):
        kind = layer.media_type
        if "nondistributable" in kind or "foreign" in kind:
            raise DocumentInvalid(f"layer {number} is not distributable ({kind}), so it can't be converted")
        if kind not in _LAYER_TYPES:
            raise DocumentInvalid(f"layer {number} is no file system layer (its type is {kind[:100]!r})")


def _new_config(config: oci.ImageConfig, diff_ids: tuple[str, ...]) -> bytes:
    if diff_ids == config.diff_ids:
        return config.raw
    rootfs = {**config.document["rootfs"], "diff_ids": list(diff_ids)}
    return oci.canonical_json({**config.document, "rootfs": rootfs})


def _new_manifest(source: oci.Manifest, config_raw: bytes, layers: list[oci.Descriptor]) -> bytes:
    config = oci.Descriptor(
        oci.OCI_CONFIG, digests.of(config_raw), len(config_raw), annotations=source.config.annotations
    )
    document: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if source.annotations:
        document["annotations"] = source.annotations
    return oci.canonical_json(document)
