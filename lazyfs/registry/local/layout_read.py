"""Reading an OCI layout, wherever its files lie: in a directory or in an archive. Source: OCI image-spec 1.1,
image-layout.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import BlobMissing, FormatError, ManifestMissing, TrustError
from lazyfs.limits import MAX_DOCUMENT, MAX_REFERRERS
from lazyfs.registry.local.files import OpenRange, part_of, read_all
from lazyfs.registry.referrers import by_fallback_tag, described
from lazyfs.registry.repository import ByteStream

REF_NAME = "org.opencontainers.image.ref.name"
VERSION = "1.0.0"  # of the layout format
INDEX = "index.json"
MARKER = "oci-layout"

Missing = type[BlobMissing | ManifestMissing]


class LayoutReader:
    """The reading half of the Repository protocol over a layout's files. `host` names it in messages."""

    host: str

    def open_file(self, name: str, what: str, missing: Missing) -> OpenRange:
        """Return a file of the layout by its name in it ("index.json"). Raise `missing`, RegistryFault."""
        raise NotImplementedError

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Return the manifest or index named by a ref or digest; "" is the only image of the layout. See Repository."""
        media_type = ""
        digest = target
        if not digests.is_digest(target):
            found = self._find(target)
            media_type, digest = found.media_type, found.digest
        what = f"manifest {digest}"
        try:
            raw = self._read(blob_name(digest), what, BlobMissing)
        except BlobMissing as error:
            raise ManifestMissing(self.host, error.message) from None
        digests.check(raw, digest, f"{what} in {self.host}")
        if not media_type:
            declared = oci.load_json(raw, what).get("mediaType")
            media_type = declared if isinstance(declared, str) else ""
        return media_type, raw

    def blob(self, descriptor: oci.Descriptor, *, deadline: float | None = None) -> bytes:
        """Return a small document, verified; see Repository."""
        what = f"document {descriptor.digest}"
        raw = self._read(blob_name(descriptor.digest), what, BlobMissing)
        digests.check(raw, descriptor.digest, f"{what} in {self.host}")
        return raw

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Open a range of a blob; see Repository. Raise BadAnswer when it is shorter."""
        what = f"blob {digest}"
        return part_of(self.open_file(blob_name(digest), what, BlobMissing), blob_offset, size, self.host, what)

    def has_blob(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        try:
            self.open_file(blob_name(digest), f"blob {digest}", BlobMissing).close()
        except BlobMissing:
            return False
        return True

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[oci.Descriptor]:
        """Return the manifests in index.json whose subject is `digest`, and what a fall-back tag lists."""
        found = {entry.digest: entry for entry in by_fallback_tag(self.manifest, digest)}
        try:
            raw = self._read(INDEX, INDEX, ManifestMissing)
        except ManifestMissing:
            return list(found.values())
        for entry in oci.parse_index(raw).manifests:
            try:
                about = described(*self.manifest(entry.digest))
            except (ManifestMissing, FormatError, TrustError):
                continue  # listed, but not there or not sound: it refers to nothing
            if about is not None and about[0] == digest:
                found.setdefault(entry.digest, replace(about[1], media_type=entry.media_type))
        return list(found.values())[:MAX_REFERRERS]

    def index_document(self) -> dict[str, Any]:
        """Return index.json, or an empty one where there is none. Raise DocumentInvalid."""
        try:
            raw = self._read(INDEX, INDEX, ManifestMissing)
        except ManifestMissing:
            return {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": []}
        oci.parse_index(raw)
        return oci.load_json(raw, INDEX)

    def _find(self, ref: str) -> oci.Descriptor:
        index = oci.parse_index(self._read(INDEX, INDEX, ManifestMissing))
        names = sorted({name for entry in index.manifests if (name := entry.annotations.get(REF_NAME))})
        # What refers to an image is no image of its own: "the only image" stays the only one beside its SBOM.
        fits = [e for e in index.manifests if (e.annotations.get(REF_NAME) == ref if ref else not e.artifact_type)]
        if len({entry.digest for entry in fits}) == 1:
            return fits[0]
        has = f"it has: {', '.join(names)[:1000] or 'no named image'}"
        if fits:
            problem = f"{self.host} holds several images" + (f" named {ref}" if ref else "")
        else:
            problem = f"{self.host} has no image {ref}".rstrip()
        raise ManifestMissing(self.host, problem, hint=has)

    def _read(self, name: str, what: str, missing: Missing) -> bytes:
        return read_all(self.open_file(name, what, missing), MAX_DOCUMENT, self.host, what)


def blob_name(digest: str) -> str:
    """Return a blob's file name in a layout. Raise DocumentInvalid for what is no digest: it never is a path."""
    return "blobs/sha256/" + digests.hex_of(digest)


def new_entry(target: str, media_type: str, raw: bytes) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return what naming a manifest `target` does to index.json; None where a digest needs no entry.

    What refers to another manifest is listed without a name (image-spec, "Image Layout").
    """
    digest = digests.of(raw)
    if not digests.is_digest(target):
        entry = oci.Descriptor(media_type, digest, len(raw), {REF_NAME: target} if target else {})
        return lambda document: _with(document, entry, lambda old: _ref_name(old) == target)
    about = described(media_type, raw)
    if about is None:
        return None
    listed = about[1]
    return lambda document: _with(document, listed, lambda old: old.get("digest") == digest)


def index_bytes(document: dict[str, Any]) -> bytes:
    """Return index.json as it is written."""
    return json.dumps(document, indent=2).encode()


def marker_bytes() -> bytes:
    """Return the file oci-layout as it is written."""
    return json.dumps({"imageLayoutVersion": VERSION}).encode()


def _with(
    document: dict[str, Any], entry: oci.Descriptor, replaces: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    kept = [old for old in document["manifests"] if not replaces(old)]
    return {**document, "manifests": [*kept, entry.to_json()]}


def _ref_name(entry: dict[str, Any]) -> str:
    return str((entry.get("annotations") or {}).get(REF_NAME, ""))
