"""The documents of the result: config, manifest and index, made from those of the source. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from indexer.plan import REFERENCE_DIGEST
from lazyfs import digest as digests
from lazyfs import oci


def new_config(config: oci.ImageConfig, diff_ids: tuple[str, ...]) -> bytes:
    """Return the config with other diff IDs; the very bytes of the source when they are the same."""
    if diff_ids == config.diff_ids:
        return config.raw
    rootfs = {**config.document["rootfs"], "diff_ids": list(diff_ids)}
    return oci.canonical_json({**config.document, "rootfs": rootfs})


def manifest_type(docker: bool) -> str:
    """Return the media type of a result's manifest."""
    return oci.DOCKER_MANIFEST if docker else oci.OCI_MANIFEST


def new_manifest(
    source: oci.Manifest, config_raw: bytes, layers: list[oci.Descriptor], *, docker: bool = False
) -> bytes:
    """Return the result's manifest: of the OCI family, or with `docker` of Docker's."""
    config_type = oci.DOCKER_CONFIG if docker else oci.OCI_CONFIG
    config = oci.Descriptor(config_type, digests.of(config_raw), len(config_raw), annotations=source.config.annotations)
    document: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": manifest_type(docker),
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if source.annotations:
        document["annotations"] = source.annotations
    return oci.canonical_json(document)


def rewrite_index(raw: bytes, media_type: str, results: Mapping[str, oci.Descriptor], *, docker: bool = False) -> bytes:
    """Return an index whose entries name the results: digest -> descriptor (only type, digest and size are used).

    What isn't in `results` stays as it is, and so does everything else in the document: order, platforms, annotations
    and fields that we don't know. An attestation's reference to an image follows the image. `media_type` is the
    source's; Docker's lists become OCI indexes unless `docker`.
    """
    document = oci.load_json(raw, "image index")
    entries = [_rewrite_entry(entry, results) for entry in document["manifests"]]
    keeps_docker = docker and media_type == oci.DOCKER_INDEX
    return oci.canonical_json(
        {**document, "mediaType": oci.DOCKER_INDEX if keeps_docker else oci.OCI_INDEX, "manifests": entries}
    )


def _rewrite_entry(entry: dict[str, Any], results: Mapping[str, oci.Descriptor]) -> dict[str, Any]:
    out = dict(entry)
    result = results.get(entry["digest"])
    if result is not None:
        out |= {"mediaType": result.media_type, "digest": result.digest, "size": result.size}
        out.pop("data", None)  # the source's bytes, embedded
        out.pop("urls", None)
    annotations: dict[str, str] = entry.get("annotations") or {}
    about = results.get(annotations.get(REFERENCE_DIGEST, ""))
    if about is not None:
        out["annotations"] = {**annotations, REFERENCE_DIGEST: about.digest}
    return out
