"""Traces beside an image in its registry: OCI artifacts that refer to its manifest, found by `find`, made by `attach`.

An artifact has the type ARTIFACT and one layer, the trace as a file. Up to MAX_INLINE characters of base64 also ride in
its annotation INLINE, which lists of referrers repeat: then that list is all that a reader asks for. A trace is a hint
of whoever may push there; what is malformed, enormous or of another image is passed over, and what rides inline too
where it is not the layer of the artifact whose digest the list names.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import logging
import random
import time
from collections.abc import Sequence

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import LazyfsError, ManifestMissing, PushRejected, TraceInvalid
from lazyfs.format.trace import Trace, decode, encode, ensure_within, merged
from lazyfs.limits import MAX_INLINE, MAX_READS, MAX_TRACE, MAX_TRACE_MANIFEST, MAX_TRACES
from lazyfs.oci import Descriptor
from lazyfs.registry.referrers import fallback_tag
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)

ARTIFACT = "application/vnd.lazyfs.trace.v1"  # the artifact's type
LAYER = ARTIFACT + "+zstd"  # its layer's media type
INLINE = "dev.lazyfs.trace"  # annotation: the trace's file in base64
READS = "dev.lazyfs.trace.reads"  # annotation: how many reads it tells of
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"  # OCI image-spec 1.1, "Guidance for an Empty Descriptor"
_EMPTY = b"{}"
_CREATED = "org.opencontainers.image.created"
_TRIES = 8  # until a list of referrers has our entry
_SETTLE = 0.5  # seconds at least until a list is believed to keep it


def find(
    repository: Repository,
    manifest_digest: str,
    deadline: float,
    *,
    layers: Sequence[str] | None = None,
    subject: Descriptor | None = None,
) -> Trace | None:
    """Return what the registry has of traces of a manifest, merged, the newest first; None where there is none.

    `layers` are the blob digests of that manifest, base first: a trace of others is passed over (without them the
    newest trace decides which they are). `subject` describes the manifest: with it what we attached inline is checked
    without a request. Blocking: one request where the traces ride so and the registry lists referrers, else two, one
    more for each other inline trace, two more for each large one. Raise RegistryError and DocumentInvalid when the list
    can't be had; a trace that can't be read is passed over, and those beyond `deadline` and MAX_TRACES are.
    """
    listed = _newest_first(repository.referrers(manifest_digest, deadline=deadline))
    if len(listed) > MAX_TRACES:
        log.info("%s has %d traces: the newest %d are read", manifest_digest, len(listed), MAX_TRACES)
    found: Trace | None = None
    lines = 0  # reads and requests of all that were decoded: that takes the interpreter's time, away from readers
    for entry in listed[:MAX_TRACES]:
        if time.monotonic() >= deadline or lines >= MAX_READS:
            why = "what was read before is enough" if lines >= MAX_READS else "there is no time"
            log.warning("trace %s of %s and older ones are passed over: %s", entry.digest, manifest_digest, why)
            break
        try:
            trace = _read(repository, entry, manifest_digest, subject, deadline)
            lines += len(trace.reads) + len(trace.requests)
            if layers is not None and trace.layers != tuple(layers):
                raise TraceInvalid("it is of an image with other layers")
        except LazyfsError as error:
            log.warning("trace %s of %s is passed over: %s", entry.digest, manifest_digest, error.message)
        else:
            found = merged([trace] if found is None else [found, trace])
    return found


def attach(repository: Repository, subject: Descriptor, trace: Trace) -> Descriptor:
    """Push a trace of the manifest `subject` as an artifact that refers to it; return the artifact's descriptor.

    The same trace is the same artifact, pushed once. Blocking: uploads, and where the list of referrers is a tag that
    everybody rewrites, until the list has kept our entry for a while. Raise TraceInvalid when the trace is too large or
    of another manifest, PushRejected and the repository's other errors.
    """
    if trace.manifest != subject.digest:
        raise TraceInvalid(f"the trace is of {trace.manifest}, not of {subject.digest}")
    raw = encode(trace)
    there = [entry.digest for entry in _newest_first(repository.referrers(subject.digest))]
    small = len(base64.b64encode(raw)) <= MAX_INLINE
    plain = {READS: str(len(trace.reads))}
    inline = {**plain, INLINE: base64.b64encode(raw).decode()}
    forms = [_artifact(subject, annotations, raw) for annotations in ((inline, plain) if small else (plain,))]
    for known, _ in forms:
        if known.digest in there:
            return known
    # The list is one document with a bound, for everybody's referrers: it isn't filled with traces.
    artifact, manifest = forms[0] if len(there) < MAX_TRACES else forms[-1]
    for blob in (_EMPTY, raw):
        repository.push_blob(digests.of(blob), len(blob), io.BytesIO(blob))
    for attempt in range(_TRIES):
        began = time.monotonic()
        repository.push_manifest(artifact.digest, oci.OCI_MANIFEST, manifest)
        took = time.monotonic() - began
        if _is_kept(repository, subject.digest, artifact.digest, took):
            return artifact
        # Whoever wrote at the same time does not do so again, and a registry that is slow to list it gets its time.
        time.sleep(random.uniform(0, took + attempt * _SETTLE))
    raise PushRejected(
        repository.host,
        f"{repository.host} took the trace {artifact.digest}, but does not list it as a referrer of {subject.digest}",
        hint="others may be writing that list: try it again",
    )


def _is_kept(repository: Repository, subject: str, artifact: str, took: float) -> bool:
    """Tell whether the list of referrers has our artifact, and still has it once others wrote what they had read.

    `took`: seconds that our own writing took; somebody else's takes about as long.
    """
    if not _lists(repository, subject, artifact):
        return False
    with contextlib.suppress(ManifestMissing):
        repository.manifest(fallback_tag(subject))
        time.sleep(random.uniform(1, 2) * max(_SETTLE, 2 * took))
        return _lists(repository, subject, artifact)
    return True  # the registry keeps the list itself


def _lists(repository: Repository, subject: str, artifact: str) -> bool:
    return any(entry.digest == artifact for entry in repository.referrers(subject))


def _artifact(subject: Descriptor, annotations: dict[str, str], raw: bytes) -> tuple[Descriptor, bytes]:
    """Return (descriptor, manifest) of the artifact for a trace whose file is `raw`. Pure."""
    manifest = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "artifactType": ARTIFACT,
            "config": Descriptor(_EMPTY_TYPE, digests.of(_EMPTY), len(_EMPTY)).to_json(),
            "layers": [Descriptor(LAYER, digests.of(raw), len(raw)).to_json()],
            "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
            "annotations": annotations,
        }
    )
    digest = digests.of(manifest)
    return Descriptor(oci.OCI_MANIFEST, digest, len(manifest), annotations, artifact_type=ARTIFACT), manifest


def _newest_first(listed: Sequence[Descriptor]) -> list[Descriptor]:
    """Return the traces of a list of referrers: by the time that others note, then by their reads, then the last first.

    Ours carry no time, or the same trace would be another artifact each time; but what is attached later was merged
    with what was there, and so tells of more.
    """
    found = {entry.digest: (place, entry) for place, entry in enumerate(listed) if entry.artifact_type == ARTIFACT}

    def age(item: tuple[int, Descriptor]) -> tuple[str, int, int]:
        place, entry = item
        told = entry.annotations.get(READS, "")
        number = int(told) if told.isascii() and told.isdigit() and len(told) < 10 else 0
        return entry.annotations.get(_CREATED, ""), number, place

    return [entry for _, entry in sorted(found.values(), key=age, reverse=True)]


def _read(
    repository: Repository, entry: Descriptor, manifest_digest: str, subject: Descriptor | None, deadline: float
) -> Trace:
    """Return the checked trace of a referrer. Raise TraceInvalid, and what reading it raises."""
    inline = entry.annotations.get(INLINE)
    if inline is None:
        raw = repository.blob(_layer(repository, entry, manifest_digest, deadline), deadline=deadline)
    else:
        raw = _unpacked(inline)
        # The list is nobody's word. An artifact as we make it is known by its digest, any other is asked for.
        known = subject is not None and _is_around(raw, subject, entry)
        if not known and digests.of(raw) != _layer(repository, entry, manifest_digest, deadline).digest:
            raise TraceInvalid("what rides inline is not its layer")
    trace = decode(raw)
    if trace.manifest != manifest_digest:
        raise TraceInvalid(f"it is of {trace.manifest}")
    return trace


def _is_around(raw: bytes, subject: Descriptor, entry: Descriptor) -> bool:
    """Tell whether a referrer is the artifact that we would make of a trace that rides inline. Pure."""
    annotations = {name: entry.annotations.get(name, "") for name in (READS, INLINE)}
    try:
        return _artifact(subject, annotations, raw)[0].digest == entry.digest
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _unpacked(inline: str) -> bytes:
    ensure_within(len(inline), MAX_INLINE, f"it rides in an annotation of {len(inline)} characters")
    try:
        return base64.b64decode(inline, validate=True)
    except (binascii.Error, ValueError):
        raise TraceInvalid("its annotation is not base64") from None


def _layer(repository: Repository, entry: Descriptor, manifest_digest: str, deadline: float) -> Descriptor:
    """Return the one layer of an artifact: the trace. Raise TraceInvalid, and what reading its manifest raises."""
    ensure_within(entry.size, MAX_TRACE_MANIFEST, f"its manifest has {entry.size} bytes")
    media_type, raw = repository.manifest(entry.digest, deadline=deadline)
    manifest = oci.parse_manifest(raw, media_type)
    if manifest.subject is None or manifest.subject.digest != manifest_digest:
        raise TraceInvalid("its manifest refers to something else")
    if len(manifest.layers) != 1 or manifest.layers[0].media_type != LAYER:
        raise TraceInvalid(f"it has no one layer of the type {LAYER}")
    ensure_within(manifest.layers[0].size, MAX_TRACE, f"it has {manifest.layers[0].size} bytes")
    return manifest.layers[0]
