"""What a source holds: one image, or an index with images and what rides along with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from lazyfs import oci
from lazyfs.errors import DocumentInvalid
from lazyfs.limits import MAX_INDEX_DEPTH, MAX_LAYERS, MAX_SOURCE_DOCUMENTS
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import check_unambiguous, fetch_config, resolve_image

# Buildkit's attestations ride in an index as images for "unknown/unknown" that name the image they are about.
REFERENCE_DIGEST = "vnd.docker.reference.digest"
_REFERENCE_TYPE = "vnd.docker.reference.type"

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


class Role(Enum):
    """What becomes of a document."""

    INDEX = auto()  # rewritten: its entries name the results
    IMAGE = auto()  # converted
    KEPT = auto()  # copied as it is


@dataclass(frozen=True, slots=True)
class Node:
    """One manifest or index of the source, as stored. `name` is for the user: a platform, or what it is."""

    role: Role
    name: str
    media_type: str
    raw: bytes
    digest: str
    manifest: oci.Manifest | None = None  # of images and kept manifests
    config: oci.ImageConfig | None = None  # of images
    children: tuple[Node, ...] = ()  # of indexes, in order

    def walk(self) -> Iterator[Node]:
        """Yield what is below, each before what names it, and itself last: the order in which they can be pushed."""
        for child in self.children:
            yield from child.walk()
        yield self

    def images(self) -> list[Node]:
        """Return the images to be converted, each digest once."""
        return list({node.digest: node for node in self.walk() if node.role is Role.IMAGE}.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """The source's documents, and what the user should know about them."""

    root: Node
    notes: tuple[str, ...]


def read_image(source: Repository, reference: Reference, platform: str | None) -> Plan:
    """Return the one image for `platform` (None: this machine's). Blocks. Raise as `resolve_image` does."""
    image = resolve_image(source, reference, platform)
    _check_image(image.manifest)
    config = fetch_config(source, image.manifest, platform=platform)
    notes = []
    if image.index is not None:
        others = [name for entry in image.index.manifests if (name := _left_out(entry, image.platform))]
        if attested := sum(REFERENCE_DIGEST in entry.annotations for entry in image.index.manifests):
            others.append("1 attestation" if attested == 1 else f"{attested} attestations")
        if others:
            notes.append(f"left out: {', '.join(others)[:500]} (--all-platforms converts the whole index)")
    return Plan(_image(image.manifest, config), tuple(notes))


def read_all(source: Repository, reference: Reference) -> Plan:
    """Return everything that `reference` names: an index with all that is below it, or the one image.

    Blocks for a request a document. Raise ManifestMissing, DigestMismatch, DocumentInvalid (also for indexes too deep
    or too large), and the repository's errors.
    """
    return _Reader(source).read(reference)


class _Reader:
    def __init__(self, source: Repository) -> None:
        self._source = source
        self._notes: list[str] = []
        self._size = 0
        self._known: dict[str, Node] = {}

    def read(self, reference: Reference) -> Plan:
        media_type, raw = self._source.manifest(reference.target)
        root = self._node(media_type, raw, None, 0)
        if not root.images():
            raise DocumentInvalid(f"{reference} holds no image that could be converted{self._because()}")
        return Plan(root, tuple(self._notes))

    def _because(self) -> str:
        return f": {self._notes[0]}" if self._notes else ""

    def _child(self, entry: oci.Descriptor, depth: int) -> Node:
        if entry.digest not in self._known:
            media_type, raw = self._source.manifest(entry.digest)
            if len(raw) != entry.size:
                raise DocumentInvalid(f"manifest {entry.digest} has {len(raw)} bytes, its descriptor says {entry.size}")
            self._known[entry.digest] = self._node(media_type or entry.media_type, raw, entry, depth)
        return self._known[entry.digest]

    def _node(self, media_type: str, raw: bytes, entry: oci.Descriptor | None, depth: int) -> Node:
        self._size += len(raw)
        if depth > MAX_INDEX_DEPTH or self._size > MAX_SOURCE_DOCUMENTS or len(self._known) > MAX_LAYERS:
            raise DocumentInvalid("the index is too deep, or holds too many or too large manifests")
        check_unambiguous(raw)
        if oci.is_index(media_type, raw):
            index = oci.parse_index(raw, media_type)
            children = tuple(self._child(each, depth + 1) for each in index.manifests)
            return Node(Role.INDEX, "index", index.media_type, raw, index.digest, children=children)
        manifest = oci.parse_manifest(raw, media_type)
        name = _name(entry) if entry else ""
        if entry is not None and (REFERENCE_DIGEST in entry.annotations or manifest.subject is not None):
            kind = entry.annotations.get(_REFERENCE_TYPE, "").removesuffix("-manifest") or "manifest"
            about = entry.annotations.get(REFERENCE_DIGEST) or (manifest.subject.digest if manifest.subject else "")
            self._notes.append(
                f"kept: the {kind[:50]} {manifest.digest[7:19]}, which is about {about[:19]} of the source and not "
                "about the result"
            )
            return Node(Role.KEPT, kind[:50], manifest.media_type, raw, manifest.digest, manifest)
        try:
            _check_image(manifest)
        except DocumentInvalid as error:
            if entry is None:
                raise
            self._notes.append(f"kept as it is: {name or manifest.digest[7:19]}, because {error.message}")
            return Node(Role.KEPT, name or "artifact", manifest.media_type, raw, manifest.digest, manifest)
        config = fetch_config(self._source, manifest)
        if config.os not in ("linux", "") and entry is not None:
            self._notes.append(f"kept as it is: {name or config.os}, because only Linux images can be lazy")
            return Node(Role.KEPT, name or config.os, manifest.media_type, raw, manifest.digest, manifest)
        return _image(manifest, config)


def _image(manifest: oci.Manifest, config: oci.ImageConfig) -> Node:
    name = "/".join(filter(None, (config.os, config.architecture, config.variant)))
    return Node(Role.IMAGE, name, manifest.media_type, manifest.raw, manifest.digest, manifest, config)


def _name(entry: oci.Descriptor) -> str:
    told = entry.platform
    return "/".join(filter(None, (told.get("os"), told.get("architecture"), told.get("variant"))))


def _left_out(entry: oci.Descriptor, chosen: str) -> str:
    """Return the name of a platform that is not the chosen one; "" for that, and for what is no platform."""
    name = _name(entry)
    same = oci.split_platform(name)[:2] == oci.split_platform(chosen)[:2]
    return "" if same or entry.platform.get("os") in (None, "unknown") else name


def _check_image(manifest: oci.Manifest) -> None:
    """Refuse what is no image that can be converted, in one sentence."""
    if manifest.config.media_type not in (oci.OCI_CONFIG, oci.DOCKER_CONFIG):
        kind = manifest.config.media_type[:100] or "without a type"
        raise DocumentInvalid(f"this is no container image but an artifact (its config is {kind!r})")
    for number, layer in enumerate(manifest.layers):
        kind = layer.media_type
        if is_foreign(layer):
            raise DocumentInvalid(f"layer {number} is not distributable ({kind}), so it can't be converted")
        if kind not in _LAYER_TYPES:
            raise DocumentInvalid(f"layer {number} is no file system layer (its type is {kind[:100]!r})")


def is_foreign(layer: oci.Descriptor) -> bool:
    """Tell whether a layer's blob must not be copied; it lies elsewhere, where its `urls` say."""
    return "nondistributable" in layer.media_type or "foreign" in layer.media_type
