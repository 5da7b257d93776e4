"""OCI and Docker documents as frozen values: descriptor, manifest, index, image config.

Parsing checks everything that later code relies on (digests well formed, sizes sane, layer count bounded) and keeps the
raw bytes, because a document's identity is the digest of its bytes. Source: OCI image-spec 1.1, Docker schema 2.
"""

from __future__ import annotations

import json
import platform as _platform
from dataclasses import dataclass, field
from typing import Any

from lazyfs import digest as digests
from lazyfs.errors import DocumentInvalid, PlatformMissing
from lazyfs.limits import MAX_BLOB, MAX_DOCUMENT, MAX_LAYERS

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
ACCEPT = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX))


# Descriptor annotations of layers with a TOC (specs: estargz.md section 5).
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
ZSTD_CHECKSUM = "io.containers.zstd-chunked.manifest-checksum"
ZSTD_POSITION = "io.containers.zstd-chunked.manifest-position"
GITHUB_ZSTD_CHECKSUM = "io.github.containers.zstd-chunked.manifest-checksum"
GITHUB_ZSTD_POSITION = "io.github.containers.zstd-chunked.manifest-position"
GITHUB_TAR_SPLIT_POSITION = "io.github.containers.zstd-chunked.tarsplit-position"
TOC_ANNOTATIONS = frozenset(
    {
        TOC_DIGEST,
        UNCOMPRESSED_SIZE,
        ZSTD_CHECKSUM,
        ZSTD_POSITION,
        GITHUB_ZSTD_CHECKSUM,
        GITHUB_ZSTD_POSITION,
        GITHUB_TAR_SPLIT_POSITION,
    }
)
# Our own: what a converted layer was made from, so that the next conversion can reuse it.
SOURCE_LAYER = "dev.lazyfs.source.layer"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to a blob or manifest: media type, "sha256:<hex>", size in bytes, annotations."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)
    platform: dict[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()
    artifact_type: str = ""  # of a manifest that is no image, in a list of referrers

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.urls:
            out["urls"] = list(self.urls)
        if self.annotations:
            out["annotations"] = dict(sorted(self.annotations.items()))
        if self.platform:
            out["platform"] = self.platform
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        return out


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest. `raw` are the bytes as stored, `digest` theirs."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str]
    raw: bytes
    digest: str
    subject: Descriptor | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """An image index (manifest list)."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str]
    raw: bytes
    digest: str


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image config: what `run` needs of it, the diff IDs base first, and the whole document."""

    os: str
    architecture: str
    variant: str
    diff_ids: tuple[str, ...]
    document: dict[str, Any]
    raw: bytes
    digest: str

    @property
    def process(self) -> dict[str, Any]:
        """The `config` object (Env, Entrypoint, Cmd, User, WorkingDir, StopSignal …); empty when absent."""
        value = self.document.get("config")
        return value if isinstance(value, dict) else {}


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most MAX_DOCUMENT bytes. Raise DocumentInvalid naming `what`."""
    if len(raw) > MAX_DOCUMENT:
        raise DocumentInvalid(f"{what} has {len(raw)} bytes, more than the {MAX_DOCUMENT} allowed")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DocumentInvalid(f"{what} is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise DocumentInvalid(f"{what} is not a JSON object")
    return value


def _strings(value: object, what: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise DocumentInvalid(f"{what} is not a map of strings")
    return dict(value)


def parse_descriptor(value: object, what: str) -> Descriptor:
    """Check one descriptor object. Raise DocumentInvalid naming `what`."""
    if not isinstance(value, dict):
        raise DocumentInvalid(f"{what} is not an object")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB:
        raise DocumentInvalid(f"{what} has the size {str(size)[:50]}")
    media_type = value.get("mediaType", "")
    if not isinstance(media_type, str):
        raise DocumentInvalid(f"{what} has no media type")
    digests.parse(value.get("digest", ""), f"{what}'s digest")
    platform_raw = value.get("platform")
    platform = {k: v for k, v in platform_raw.items() if isinstance(v, str)} if isinstance(platform_raw, dict) else {}
    urls_raw = value.get("urls") or ()
    urls = tuple(u for u in urls_raw if isinstance(u, str)) if isinstance(urls_raw, list) else ()
    artifact_type = value.get("artifactType")
    return Descriptor(
        media_type,
        value["digest"],
        size,
        _strings(value.get("annotations"), f"{what}'s annotations"),
        platform,
        urls,
        artifact_type if isinstance(artifact_type, str) else "",
    )


def parse_manifest(raw: bytes, media_type: str = "") -> Manifest:
    """Parse an image manifest of either family. Raise DocumentInvalid."""
    value = load_json(raw, "image manifest")
    media_type = value.get("mediaType") or media_type or OCI_MANIFEST
    if media_type not in MANIFEST_TYPES:
        raise DocumentInvalid(f"manifest has the media type {str(media_type)[:100]!r}, which is no image manifest")
    if value.get("schemaVersion") != 2:
        raise DocumentInvalid("image manifest is not of schema version 2")
    layers = value.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise DocumentInvalid(f"image manifest has no list of at most {MAX_LAYERS} layers")
    descriptors = tuple(parse_descriptor(layer, f"layer {i}") for i, layer in enumerate(layers))
    sizes: dict[str, int] = {}
    for layer in descriptors:
        if sizes.setdefault(layer.digest, layer.size) != layer.size:
            raise DocumentInvalid(
                f"image manifest has layer {layer.digest} with {sizes[layer.digest]} and with {layer.size} bytes"
            )
    subject = value.get("subject")
    return Manifest(
        media_type,
        parse_descriptor(value.get("config"), "config descriptor"),
        descriptors,
        _strings(value.get("annotations"), "manifest annotations"),
        raw,
        digests.of(raw),
        parse_descriptor(subject, "subject") if subject else None,
    )


def parse_index(raw: bytes, media_type: str = "") -> Index:
    """Parse an image index or manifest list. Raise DocumentInvalid."""
    value = load_json(raw, "image index")
    media_type = value.get("mediaType") or media_type or OCI_INDEX
    entries = value.get("manifests")
    if not isinstance(entries, list) or len(entries) > MAX_LAYERS:
        raise DocumentInvalid(f"image index has no list of at most {MAX_LAYERS} manifests")
    return Index(
        media_type,
        tuple(parse_descriptor(entry, f"manifest {i} of the index") for i, entry in enumerate(entries)),
        _strings(value.get("annotations"), "index annotations"),
        raw,
        digests.of(raw),
    )


def parse_config(raw: bytes) -> ImageConfig:
    """Parse an image config. Raise DocumentInvalid."""
    value = load_json(raw, "image config")
    rootfs = value.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(digests.is_digest(d) for d in diff_ids):
        raise DocumentInvalid("image config has no list of sha256 diff IDs")

    def word(key: str) -> str:
        found = value.get(key, "")
        return found if isinstance(found, str) else ""

    return ImageConfig(word("os"), word("architecture"), word("variant"), tuple(diff_ids), value, raw, digests.of(raw))


def is_index(media_type: str, raw: bytes) -> bool:
    """Tell an index from a manifest: by media type, else by the presence of `manifests` (old layouts omit the type)."""
    if media_type in INDEX_TYPES or media_type in MANIFEST_TYPES:
        return media_type in INDEX_TYPES
    return "manifests" in load_json(raw, "manifest or index")


# What uname(2) says, where the OCI name is another word.
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "i686": "386",
    "i386": "386",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
}


def host_platform() -> str:
    """Return this machine's platform as "linux/amd64"."""
    machine = _platform.machine()
    return "linux/" + _MACHINES.get(machine, machine)


def split_platform(text: str) -> tuple[str, str, str]:
    """Split "os/arch[/variant]" into three words; arm64's variant v8 is the same as none."""
    os_name, _, rest = text.partition("/")
    arch, _, variant = rest.partition("/")
    return os_name, arch, "" if (arch, variant) == ("arm64", "v8") else variant


def choose(index: Index, wanted: str) -> Descriptor:
    """Return the manifest descriptor for platform `wanted`. Raise PlatformMissing with what there is."""
    names: list[str] = []
    target = split_platform(wanted)
    fallback: Descriptor | None = None
    for entry in index.manifests:
        found = entry.platform
        if not found:
            if len(index.manifests) == 1:
                return entry
            continue
        name = "/".join(filter(None, (found.get("os"), found.get("architecture"), found.get("variant"))))
        if found.get("os") == "unknown":
            continue  # attestations ride in indexes under this name
        names.append(name)
        this = split_platform(name)
        if this == target:
            return entry
        if this[:2] == target[:2] and (not target[2] or not this[2]):
            fallback = fallback or entry
    if fallback is not None:
        return fallback
    raise PlatformMissing(wanted, names)


def canonical_json(value: object) -> bytes:
    """Serialise a document the one way that lazyfs writes them, so that equal documents have equal digests."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


def chain_ids(diff_ids: tuple[str, ...]) -> list[str]:
    """Return the chain ID of each prefix of the layers, base first (OCI image-spec, config, layer ChainID)."""
    out: list[str] = []
    for diff_id in diff_ids:
        out.append(digests.of(f"{out[-1]} {diff_id}".encode()) if out else diff_id)
    return out
