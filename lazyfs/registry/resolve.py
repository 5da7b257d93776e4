"""From a reference to the manifest of one platform, and from that to its config: the documents that make an image."""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs import oci
from lazyfs.errors import DocumentInvalid, ManifestMissing, PlatformMissing
from lazyfs.limits import MAX_INDEX_DEPTH
from lazyfs.oci import ImageConfig, Index, Manifest
from lazyfs.reference import Reference
from lazyfs.registry.mirrored import MirroredRepository
from lazyfs.registry.repository import Repository


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """The manifest of one platform. `index` is the outermost index it was chosen from, None when there was none;
    `inner` are the indexes within it on the way to the manifest, mostly none.

    `platform` is what was asked for, "os/arch[/variant]"; a manifest without an index may be for another one, which
    fetch_config() finds out.
    """

    reference: Reference
    manifest: Manifest
    index: Index | None
    platform: str
    inner: tuple[Index, ...] = ()

    @property
    def media_type(self) -> str:
        return self.manifest.media_type

    @property
    def digest(self) -> str:
        return self.manifest.digest


def resolve_image(
    repository: Repository, reference: Reference, platform: str | None = None, *, deadline: float | None = None
) -> ResolvedImage:
    """Fetch the manifest of `reference` for `platform` (None: this machine's), through an index where there is one.

    Blocks for one request a document. A mirror's tag that leads to what nobody has is asked of the next
    source. Raise ManifestMissing, PlatformMissing, DocumentInvalid, DigestMismatch, and the repository's errors.
    """
    wanted = platform or oci.host_platform()
    while True:
        try:
            return _resolve(repository, reference, wanted, deadline)
        except ManifestMissing:
            if not doubt_tag(repository, reference):
                raise


def doubt_tag(repository: Repository, reference: Reference) -> bool:
    """Tell that a tag led to something that is nowhere. True: another source may know better, resolve again."""
    return isinstance(repository, MirroredRepository) and not reference.digest and repository.doubt(reference.tag)


def _resolve(repository: Repository, reference: Reference, wanted: str, deadline: float | None) -> ResolvedImage:
    media_type, raw = repository.manifest(reference.target, deadline=deadline)
    way: list[Index] = []
    for _ in range(MAX_INDEX_DEPTH + 1):
        check_unambiguous(raw)
        if not oci.is_index(media_type, raw):
            outermost = way[0] if way else None
            return ResolvedImage(reference, oci.parse_manifest(raw, media_type), outermost, wanted, tuple(way[1:]))
        index = oci.parse_index(raw, media_type)
        way.append(index)
        chosen = oci.choose(index, wanted)
        media_type, raw = repository.manifest(chosen.digest, deadline=deadline)
        if len(raw) != chosen.size:
            raise DocumentInvalid(f"manifest {chosen.digest} has {len(raw)} bytes, its descriptor says {chosen.size}")
    raise DocumentInvalid(f"{reference} is an index of indexes deeper than {MAX_INDEX_DEPTH}")


def fetch_config(
    repository: Repository, manifest: Manifest, *, platform: str | None = None, deadline: float | None = None
) -> ImageConfig:
    """Fetch a manifest's config. Blocks for one request. Raise DocumentInvalid when it doesn't fit the layers.

    With `platform` an image for another operating system or architecture raises PlatformMissing.
    """
    return check_config(oci.parse_config(repository.blob(manifest.config, deadline=deadline)), manifest, platform)


def check_config(config: ImageConfig, manifest: Manifest, platform: str | None) -> ImageConfig:
    """Return `config` if it fits the manifest's layers and is for `platform` (None: any). Raise as `fetch_config`."""
    if len(config.diff_ids) != len(manifest.layers):
        raise DocumentInvalid(
            f"image config {config.digest} has {len(config.diff_ids)} diff IDs for {len(manifest.layers)} layers"
        )
    if platform is not None and config.architecture:
        has = "/".join(filter(None, (config.os, config.architecture, config.variant)))
        if oci.split_platform(has)[:2] != oci.split_platform(platform)[:2]:
            raise PlatformMissing(platform, [has])
    return config


def check_unambiguous(raw: bytes) -> None:
    """Refuse a document that is a manifest to one reader and an index to another: the digest would name two images."""
    document = oci.load_json(raw, "manifest")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise DocumentInvalid("a document is an image manifest and an index at once")
