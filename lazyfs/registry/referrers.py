"""Manifests that refer to another one by `subject`: signatures, SBOMs, attestations. Pure; no HTTP in here.

Source: OCI distribution-spec 1.1, "Listing Referrers" and "Referrers Tag Schema": registries without the API keep the
list as an index under the tag sha256-<hex>, which clients maintain.
"""

from __future__ import annotations

from collections.abc import Callable

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import DocumentInvalid, ManifestMissing
from lazyfs.limits import MAX_LAYERS, MAX_REFERRERS


def fallback_tag(digest: str) -> str:
    """Return the tag that lists the referrers of `digest` where the registry has no API for it."""
    return "sha256-" + digests.hex_of(digest)


def by_fallback_tag(manifest: Callable[[str], tuple[str, bytes]], digest: str) -> list[oci.Descriptor]:
    """Return what the fall-back tag lists, [] where there is none. `manifest` gives a tag's (media type, raw)."""
    try:
        media_type, raw = manifest(fallback_tag(digest))
        if not oci.is_index(media_type, raw):
            return []
        return list(oci.parse_index(raw, media_type).manifests)[:MAX_REFERRERS]
    except ManifestMissing:
        return []


def described(media_type: str, raw: bytes) -> tuple[str, oci.Descriptor] | None:
    """Return (subject's digest, descriptor for a list of referrers) of a manifest; None when it refers to nothing.

    Raise DocumentInvalid for a subject that is malformed.
    """
    document = oci.load_json(raw, "manifest")
    subject = document.get("subject")
    if not subject:
        return None
    about = oci.parse_descriptor(subject, "subject").digest
    config = document.get("config")
    kind = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else "")
    annotations = document.get("annotations")
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        annotations = {}
    entry = oci.Descriptor(
        media_type, digests.of(raw), len(raw), annotations, artifact_type=kind if isinstance(kind, str) else ""
    )
    return about, entry


def listed_with(old: list[oci.Descriptor], entry: oci.Descriptor) -> bytes:
    """Return the index for the fall-back tag: `old` and `entry`, each digest once.

    Raise DocumentInvalid when it is full.
    """
    entries = [known for known in old if known.digest != entry.digest]
    if len(entries) >= MAX_LAYERS:
        raise DocumentInvalid(f"the list of referrers already has {len(entries)} entries")
    return oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_INDEX,
            "manifests": [each.to_json() for each in (*entries, entry)],
        }
    )
