"""lazyfs fetch --content: the blobs of an image that containerd knows, and whose content it has only in part.

Push, export, save and commit read blobs; an image that was pulled lazily has documents and snapshots only.
"""

from __future__ import annotations

import argparse
import threading
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.cli import common
from lazyfs.cli.blob_download import ContentFiller, Downloads, filling
from lazyfs.cli.output import Output
from lazyfs.cli.pull_image import containerd_name
from lazyfs.containerd import gc_labels
from lazyfs.containerd.address import namespace_name, socket_path
from lazyfs.containerd.client import Client, connect
from lazyfs.errors import DocumentInvalid, ManifestMissing, ReferenceInvalid, UsageError
from lazyfs.limits import BLOB_TIMEOUT, MAX_INDEX_DEPTH, MAX_MANIFESTS
from lazyfs.oci import Descriptor
from lazyfs.registry.local.containerd_store import ContainerdRepository
from lazyfs.registry.open import open_repository

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.reference import Reference
    from lazyfs.registry.repository import Repository

_JOBS = 3  # blobs of one image at a time


def fetch_content(args: argparse.Namespace, settings: Settings, image: str, out: Output) -> dict[str, Any]:
    """Have all blobs of one image in containerd's content store. Blocking. Raise LazyfsError."""
    given = references.parse(image)
    if given.transport not in ("docker", "containerd"):
        raise UsageError(f"{image} is not in containerd", hint="name it as `ctr image ls` does")
    inside = given.transport == "containerd"
    address = socket_path((given.path if inside else "") or args.containerd_address or "")
    namespace = namespace_name((given.host if inside else "") or args.containerd_namespace or "")
    name = given.tag if inside else containerd_name(given)
    options = replace(common.open_options(args, settings), total_timeout=BLOB_TIMEOUT)
    with closing(connect(address, namespace)) as client:
        local = ContainerdRepository(client, name)
        found = _find(local, name, image)
        origin = _origin(found.name)
        with closing(open_repository(origin, options)) as repository:
            content = _Content(client, local, repository, origin, args.platform, args.all_platforms, out)
            return {"name": found.name, "namespace": namespace, **content.complete(found.target)}


def _find(local: ContainerdRepository, name: str, image: str) -> Any:
    try:
        return local.find(name)
    except ManifestMissing as error:
        hint = error.hint if error.hint.startswith("namespace ") else f"pull it first: `lazyfs pull {image}`"
        raise ManifestMissing(error.host, error.message, hint=hint) from None


def _origin(name: str) -> Reference:
    """Return where an image of containerd's came from. Raise UsageError when its name does not say."""
    try:
        origin = references.parse(name)
    except ReferenceInvalid:
        origin = None
    if origin is None or origin.transport != "docker" or containerd_name(origin) != name:
        raise UsageError(
            f"containerd's image {name} is not named after a registry, so its content is nowhere to be had",
            hint="tag it as HOST/REPO:TAG, and fetch that",
        )
    return origin


class _Content:
    """The blobs of one image: which there are, and which containerd lacks."""

    def __init__(
        self,
        client: Client,
        local: ContainerdRepository,
        repository: Repository,
        origin: Reference,
        platform: str | None,
        all_platforms: bool,
        out: Output,
    ) -> None:
        self._client = client
        self._local = local
        self._repository = repository
        self._origin = origin
        self._platform = platform
        self._all = all_platforms
        self._out = out
        self._blobs: dict[str, Descriptor] = {}
        self._manifests = 0

    def complete(self, target: Descriptor) -> dict[str, Any]:
        """Fetch what is missing. The image's own labels keep it afterwards, as long as the image is there."""
        with filling(self._client, self._repository, self._origin) as filler:
            self._walk(filler, target, 0)
            return self._fetch(filler)

    def _walk(self, filler: ContentFiller, target: Descriptor, depth: int) -> None:
        """Collect the blobs below a manifest or an index; documents that are missing are fetched on the way."""
        self._manifests += 1
        if depth > MAX_INDEX_DEPTH or self._manifests > MAX_MANIFESTS:
            raise DocumentInvalid(f"{self._origin} is an index of too many indexes")
        here = self._client.content.info(target.digest) is not None
        media_type, raw = (self._local if here else self._repository).manifest(target.digest)
        media_type = target.media_type or media_type
        if oci.is_index(media_type, raw):
            index = oci.parse_index(raw, media_type)
            filler.document(index.digest, raw, gc_labels.of_index(index))
            for child in self._chosen(index):
                self._walk(filler, child, depth + 1)
            return
        manifest = oci.parse_manifest(raw, media_type)
        filler.document(manifest.digest, raw, gc_labels.of_manifest(manifest))
        for blob in (manifest.config, *manifest.layers):
            if blob.urls:
                self._out.note(f"layer {blob.digest} is kept elsewhere by its makers, and left out")
            else:
                self._blobs[blob.digest] = blob

    def _chosen(self, index: oci.Index) -> list[Descriptor]:
        """Return the manifests that the image is here for: those asked for, and those that were pulled."""
        if self._all:
            return list(index.manifests)
        here = [child for child in index.manifests if self._client.content.info(child.digest) is not None]
        if self._platform is not None or not here:
            wanted = oci.choose(index, self._platform or oci.host_platform())
            here += [wanted] if wanted not in here else []
        return here

    def _fetch(self, filler: ContentFiller) -> dict[str, Any]:
        missing = [blob for blob in self._blobs.values() if self._client.content.info(blob.digest) is None]
        total = sum(blob.size for blob in missing)
        with self._out.progress(containerd_name(self._origin), total) as bar:

            def fetch(blob: Descriptor, stop: threading.Event) -> int:
                return filler.blob(blob, stop, bar.advance)

            downloads = Downloads(fetch, _JOBS)
            try:
                downloads.start(missing)
                fetched = sum(downloads.wait(blob.digest) for blob in missing)
            finally:
                downloads.stop()
        return {
            "blobs": len(self._blobs),
            "missing": len(missing),
            "size": sum(blob.size for blob in self._blobs.values()),
            "fetched": fetched,
        }
