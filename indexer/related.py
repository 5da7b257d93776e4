"""What refers to the source: listed always, copied on demand where a copy about the result is still true.

A referrer names its subject by digest, so a copy is a new manifest whose subject is the result, with an annotation that
names the original. Signatures are never copied: they sign the source's digest, and over the result they are worth
nothing. What refers to a referrer is left alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from indexer.copy import Copier
from indexer.push import Upload
from indexer.report import ReferrerReport
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import DocumentInvalid, FormatError, ManifestMissing, RegistryError, TrustError
from lazyfs.limits import LISTING_TIMEOUT, MAX_COPIED_BLOB, MAX_LAYERS
from lazyfs.registry import traces
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)

SOURCE_REFERRER = "dev.lazyfs.source.referrer"  # annotation of a copy: the original's digest
# What cosign keeps beside an image under the tag sha256-<hex>SUFFIX, without a subject.
_BESIDE = {".sig": "cosign signature", ".att": "cosign attestation", ".sbom": "cosign SBOM"}
_SIGNING = ("signature", "sigstore", "cosign", "notary", "simplesigning")


@dataclass(frozen=True, slots=True)
class Referrer:
    """One manifest that refers to `subject`, a digest of the source. `beside`: by its tag only."""

    subject: str
    entry: oci.Descriptor
    kind: str
    beside: bool = False

    @property
    def signs(self) -> bool:
        """Whether it is bound to the source's digest by a signature, as far as its type tells."""
        return any(word in self.kind.lower() for word in _SIGNING)


@dataclass(frozen=True, slots=True)
class Copied:
    """A referrer's copy: its manifest, and the blobs that it needs."""

    media_type: str
    raw: bytes
    uploads: tuple[Upload, ...]

    @property
    def digest(self) -> str:
        return digests.of(self.raw)


def list_referrers(source: Repository, subjects: list[str]) -> list[Referrer]:
    """Return what refers to the manifests `subjects` (digests). Raise RegistryError.

    Blocks for some requests each, and no longer than LISTING_TIMEOUT in all.
    """
    deadline = time.monotonic() + LISTING_TIMEOUT
    found: list[Referrer] = []
    for subject in subjects:
        found += [
            Referrer(subject, entry, entry.artifact_type or entry.media_type or "unknown")
            for entry in source.referrers(subject, deadline=deadline)
        ]
        for suffix, kind in _BESIDE.items():
            try:
                media_type, raw = source.manifest(f"sha256-{digests.hex_of(subject)}{suffix}", deadline=deadline)
            except (ManifestMissing, FormatError, TrustError):
                continue
            found.append(Referrer(subject, oci.Descriptor(media_type, digests.of(raw), len(raw)), kind, beside=True))
    return found


def copy_referrer(referrer: Referrer, result: oci.Descriptor, source: Repository, copier: Copier) -> Copied:
    """Fetch a referrer and make its copy about `result`, blobs verified. Blocks.

    Raise DocumentInvalid, DigestMismatch, RegistryError.
    """
    media_type, raw = source.manifest(referrer.entry.digest)
    document = oci.load_json(raw, "referrer")
    subject = document.get("subject")
    if not isinstance(subject, dict) or subject.get("digest") != referrer.subject:
        raise DocumentInvalid(f"the referrer {referrer.entry.digest} has another subject than the registry says")
    parts = [document["config"]] if "config" in document else []
    listed = document.get("layers") or document.get("blobs") or []
    if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
        raise DocumentInvalid(f"the referrer {referrer.entry.digest} has no list of at most {MAX_LAYERS} blobs")
    blobs = [oci.parse_descriptor(part, "blob of a referrer") for part in (*parts, *listed)]
    for blob in blobs:
        if blob.size > MAX_COPIED_BLOB:
            raise DocumentInvalid(f"a blob of the referrer {referrer.entry.digest} has {blob.size} bytes")
    annotations = document.get("annotations")
    made = oci.canonical_json(
        {
            **document,
            "subject": {"mediaType": result.media_type, "digest": result.digest, "size": result.size},
            "annotations": {
                **(annotations if isinstance(annotations, dict) else {}),
                SOURCE_REFERRER: referrer.entry.digest,
            },
        }
    )
    unique = {blob.digest: blob for blob in blobs}.values()
    uploads = tuple(upload for blob in unique if (upload := copier.take(blob)) is not None)
    return Copied(media_type or referrer.entry.media_type, made, uploads)


def reported(
    referrers: list[Referrer], copies: Mapping[str, Copied], results: Mapping[str, oci.Descriptor], *, wanted: bool
) -> tuple[ReferrerReport, ...]:
    """Return the report's part about `referrers`; `copies` are by the original's digest."""
    out = []
    for each in referrers:
        reason = why_not(each, results, wanted=wanted)
        copy = None if reason else copies.get(each.entry.digest)
        out.append(
            ReferrerReport(
                each.subject, each.entry.digest, each.kind, each.entry.size, copy.digest if copy else "", reason
            )
        )
    return tuple(out)


def why_not(referrer: Referrer, results: Mapping[str, oci.Descriptor], *, wanted: bool) -> str:
    """Return why a referrer is not copied, "" when it can be."""
    if results.get(referrer.subject, referrer.entry).digest == referrer.subject:
        return "what it is about is the same in the result"
    if referrer.signs or referrer.beside:
        return "it vouches for the source's digest, which the result doesn't have: make it anew for the result"
    if referrer.kind == traces.ARTIFACT:
        return "it is a trace of the source: give it to --prefetch, or record one of the result"
    return "" if wanted else "--copy-referrers copies it"


def note_about(referrers: list[Referrer]) -> str:
    """Return one sentence for the user about what stays behind, "" for none."""
    if not referrers:
        return ""
    kinds: dict[str, int] = {}
    for each in referrers:
        kinds[each.kind] = kinds.get(each.kind, 0) + 1
    told = ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in sorted(kinds.items()))
    return f"{told[:500]} of the source {'refers' if len(referrers) == 1 else 'refer'} to it, not to the result"


class Listing:
    """`list_referrers` under way in a daemon thread: one that hangs holds up neither a failure nor an interruption."""

    def __init__(self, source: Repository, subjects: list[str]) -> None:
        self._found: list[Referrer] = []
        self._unknown = "what refers to the source is not known"
        self._thread = threading.Thread(target=self._run, args=(source, subjects), name="referrers", daemon=True)
        self._thread.start()

    def result(self) -> tuple[list[Referrer], str]:
        """Return (what refers to the source, "") or ([], why that is not known). Blocks until it is listed."""
        self._thread.join()
        return self._found, self._unknown

    def _run(self, source: Repository, subjects: list[str]) -> None:
        try:
            self._found = list_referrers(source, subjects)
            self._unknown = ""
        except (RegistryError, FormatError, TrustError) as error:
            log.info("referrers: %s", error)
            self._unknown += f": {error.message}"
