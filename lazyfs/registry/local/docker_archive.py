"""What `docker save`, `podman save` and `skopeo copy … docker-archive:` write, as a repository to read from.

Such an archive has no OCI manifest: one is made up of its manifest.json, the same each time. A layer's tar is named by
its diff ID, which is its digest; compressed layers are hashed, once. Whoever reads a blob verifies it as ever.
Source: moby, image/spec/v1.2.md, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import BlobMissing, DocumentInvalid, ManifestMissing, ReferenceInvalid, UsageError
from lazyfs.limits import MAX_DOCUMENT, MAX_IMAGES, MAX_LAYERS
from lazyfs.reference import docker_name
from lazyfs.registry.local.files import PIECE, FileStream, OpenRange, part_of, read_all
from lazyfs.registry.local.tar_members import ArchiveFile, Identity
from lazyfs.registry.repository import ByteStream, Repository

DOCUMENT = "manifest.json"
_NAMED_BY_DIGEST = re.compile(r"(?:.*/)?blobs/sha256/([0-9a-f]{64})")
_MAGICS = ((b"\x1f\x8b", oci.OCI_LAYER_GZIP), (b"\x28\xb5\x2f\xfd", oci.OCI_LAYER_ZSTD))
WRITING = "a docker archive can't hold a converted image: it has no place for the annotations that make layers lazy"


@dataclass(frozen=True, slots=True)
class _Listed:
    """An image as manifest.json lists it: file names in the archive, and whole names (HOST/REPO:TAG)."""

    config: str
    layers: tuple[str, ...]
    tags: tuple[str, ...]


class _Contents:
    """What one state of the archive holds. Grows as images are looked at; guarded by the repository's lock."""

    def __init__(self, identity: Identity, images: list[_Listed]) -> None:
        self.identity = identity
        self.images = images
        self.manifests: dict[int, bytes] = {}  # by place in manifest.json
        self.places: dict[str, str] = {}  # digest: file name in the archive
        self.hashed: dict[int, str] = {}  # where a layer lies in the archive, whatever links lead there: its digest


class DockerArchiveRepository:
    """One archive (the reading half of the Repository protocol). Thread-safe. Writing raises UsageError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name or str(path)
        self.host = str(path)
        self._archive = ArchiveFile(path)
        self._lock = threading.Lock()
        self._contents: _Contents | None = None

    def close(self) -> None:
        """Nothing is held open between calls."""

    # -- read ------------------------------------------------------------------------------------------------------

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Return the made-up manifest of an image by HOST/REPO:TAG, "@NUMBER", its digest, or "" for the only one.

        Blocking: compressed layers are read once to hash them. Raise ManifestMissing, DocumentInvalid.
        """
        with self._lock:
            contents = self._load()
            if not digests.is_digest(target):
                return oci.OCI_MANIFEST, self._made_up(contents, self._choose(contents.images, target))
            for number in range(len(contents.images)):
                raw = self._made_up(contents, number)
                if digests.of(raw) == target:
                    return oci.OCI_MANIFEST, raw
        raise ManifestMissing(self.host, f"{self.host} has no image whose manifest has the digest {target}")

    def blob(self, descriptor: oci.Descriptor, *, deadline: float | None = None) -> bytes:
        """Return a small document, verified; see Repository."""
        what = f"document {descriptor.digest}"
        raw = read_all(self._open(descriptor.digest, what), MAX_DOCUMENT, self.host, what)
        digests.check(raw, descriptor.digest, f"{what} in {self.host}")
        return raw

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Open a range of a layer; see Repository."""
        what = f"blob {digest}"
        return part_of(self._open(digest, what), blob_offset, size, self.host, what)

    def has_blob(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        digests.parse(digest)
        try:
            self._open(digest, f"blob {digest}").close()
        except BlobMissing:
            return False
        return True

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[oci.Descriptor]:
        """[]: such archives hold images only."""
        return []

    # -- write -----------------------------------------------------------------------------------------------------

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Raise UsageError."""
        raise not_writable()

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Raise UsageError."""
        raise not_writable()

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """Raise UsageError."""
        raise not_writable()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _load(self) -> _Contents:
        identity, members = self._archive.members()
        if self._contents is None or self._contents.identity != identity:
            if DOCUMENT not in members and "index.json" in members:
                raise ManifestMissing(self.host, f"{self.host} is no docker archive", hint="oci-archive: reads it")
            raw = self._read(DOCUMENT)
            self._contents = _Contents(identity, _parse(raw, self.host))
        return self._contents

    def _choose(self, images: list[_Listed], target: str) -> int:
        if target.startswith("@"):
            fits = [number for number in range(len(images)) if number == int(target[1:])]
        else:
            fits = [number for number, image in enumerate(images) if not target or target in image.tags]
        if len(fits) == 1:
            return fits[0]
        names = [tag for image in images for tag in image.tags]
        problem = f"{self.host} has no image {target}" if target else f"{self.host} holds {len(images)} images"
        if len(fits) > 1 and target:
            problem = f"{self.host} holds several images named {target}"
        has = f"it has: {', '.join(names)[:1000] or 'no named image'}, or by number, @0 to @{len(images) - 1}"
        raise ManifestMissing(self.host, problem, hint=has)

    def _made_up(self, contents: _Contents, number: int) -> bytes:
        """Return the manifest of an image; what it names is in `places` then."""
        known = contents.manifests.get(number)
        if known is not None:
            return known
        image = contents.images[number]
        config_raw = self._read(image.config)
        config = oci.parse_config(config_raw)
        if len(config.diff_ids) != len(image.layers):
            raise DocumentInvalid(
                f"image {number} in {self.host} has {len(image.layers)} layers and {len(config.diff_ids)} diff IDs"
            )
        layers = []
        for name, diff_id in zip(image.layers, config.diff_ids, strict=True):
            layer = self._describe(contents, name, diff_id)
            contents.places.setdefault(layer.digest, name)
            layers.append(layer.to_json())
        contents.places.setdefault(config.digest, image.config)
        document = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": oci.Descriptor(oci.OCI_CONFIG, config.digest, len(config_raw)).to_json(),
            "layers": layers,
        }
        raw = contents.manifests[number] = oci.canonical_json(document)
        return raw

    def _describe(self, contents: _Contents, name: str, diff_id: str) -> oci.Descriptor:
        whole = self._member(name)
        with FileStream(whole.descriptor, whole.offset, whole.size, self.host, name[:200]) as stream:
            head = stream.read(512)
            kind = next((kind for magic, kind in _MAGICS if head.startswith(magic)), oci.OCI_LAYER)
            named = _NAMED_BY_DIGEST.fullmatch(name)
            if named is not None:
                return oci.Descriptor(kind, f"sha256:{named[1]}", whole.size)
            if kind == oci.OCI_LAYER:
                return oci.Descriptor(kind, diff_id, whole.size)
            digest = contents.hashed.get(whole.offset)
            if digest is None:
                hasher = hashlib.sha256(head)
                while piece := stream.read(PIECE):
                    hasher.update(piece)
                digest = contents.hashed[whole.offset] = "sha256:" + hasher.hexdigest()
            return oci.Descriptor(kind, digest, whole.size)

    def _open(self, digest: str, what: str) -> OpenRange:
        with self._lock:
            try:
                contents = self._load()
            except ManifestMissing as error:
                raise BlobMissing(self.host, error.message, hint=error.hint) from None
            name = contents.places.get(digest)
            for number in range(len(contents.images) if name is None else 0):
                self._made_up(contents, number)
                name = contents.places.get(digest)
                if name is not None:
                    break
        if name is None:
            raise BlobMissing(self.host, f"{self.host} has no {what}")
        return self._archive.open(name, what, BlobMissing)

    def _member(self, name: str) -> OpenRange:
        return self._archive.open(name, f"member {name[:200]!r}", BlobMissing)

    def _read(self, name: str) -> bytes:
        missing = self._archive.open(name, f"member {name[:200]!r}", ManifestMissing)
        return read_all(missing, MAX_DOCUMENT, self.host, f"member {name[:200]!r}")


def not_writable() -> UsageError:
    """Return the error for whoever wants to write a docker archive."""
    return UsageError(WRITING, hint="write oci-archive:FILE:REF instead")


def _parse(raw: bytes, host: str) -> list[_Listed]:
    """Parse manifest.json. Raise DocumentInvalid."""
    what = f"{DOCUMENT} in {host}"
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DocumentInvalid(f"{what} is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, list) or not 0 < len(value) <= MAX_IMAGES:
        raise DocumentInvalid(f"{what} is no list of 1 to {MAX_IMAGES} images")
    return [_listed(item, f"image {number} of {what}") for number, item in enumerate(value)]


def _listed(item: Any, what: str) -> _Listed:
    config = item.get("Config") if isinstance(item, dict) else None
    if not isinstance(config, str) or not config:
        raise DocumentInvalid(f"{what} names no config")
    layers = _strings(item.get("Layers"), f"the layers of {what}")
    if len(layers) > MAX_LAYERS:
        raise DocumentInvalid(f"{what} has more than {MAX_LAYERS} layers")
    tags = []
    for tag in _strings(item.get("RepoTags"), f"the names of {what}"):
        try:
            tags.append(docker_name(tag))
        except ReferenceInvalid:
            tags.append(tag)  # nobody can ask for it, but it is told
    return _Listed(config, tuple(layers), tuple(tags))


def _strings(value: Any, what: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise DocumentInvalid(f"{what} are no list of strings")
    return value
