"""From what the user typed to manifest and config, with the node's memory for when the registry is down. Blocking."""

from __future__ import annotations

import concurrent.futures
import enum
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lazyfs import oci
from lazyfs.chunks.catalog import Catalog
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, ManifestMissing, RegistryError, RegistryTimeout, StoreError
from lazyfs.limits import DOCUMENTS_PATIENCE, KNOWN_PATIENCE, WHOLE_PATIENCE
from lazyfs.oci import ImageConfig, Manifest
from lazyfs.reference import Reference
from lazyfs.registry.repository import Repository
from lazyfs.registry.resolve import ResolvedImage, check_config, fetch_config, resolve_image

log = logging.getLogger(__name__)


class Pull(enum.Enum):
    """When to ask the registry what a tag is now."""

    NEWER = "newer"  # always; where it doesn't answer, what the tag was last will do
    ALWAYS = "always"  # always, and its answer or nothing
    MISSING = "missing"  # only for a tag that this node doesn't know
    NEVER = "never"  # never, nor for anything else: what is not here is an error


@dataclass(frozen=True, slots=True)
class Resolved:
    """An image's documents. `config` is on its way beside the layers' tails; `stale` says why memory had to do.

    `known`: they were here before, so that parts of the image may be too.
    """

    manifest: Manifest
    config: Future[ImageConfig]
    stale: str = ""
    known: bool = False


class Resolver:
    """Resolve references; remember what they led to. Thread-safe.

    `whole` tells whether everything that a manifest names is on this node; it may block on the local disk.
    """

    def __init__(
        self, catalog: Catalog, settings: Settings, whole: Callable[[Manifest], bool], pool: ThreadPoolExecutor
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._whole = whole
        self._pool = pool
        self._lock = threading.Lock()
        self._configs: dict[tuple[str, str], Future[ImageConfig]] = {}  # on their way, by manifest and platform

    def resolve(self, repository: Repository, reference: Reference, platform: str, pull: Pull = Pull.NEWER) -> Resolved:
        """Return the documents of `reference` for `platform`. Blocking, for the manifest only.

        A digest that this node knows needs no request. A tag is asked for as `pull` says, and where the registry
        doesn't answer in time the last digest it led to is used: after 2 s when all of that image is here, else after
        10 s. Raise what the registry raised when there is none, ManifestMissing when it must not be asked.
        """
        name = str(reference)
        known = self.known(reference, platform)
        if known is not None and (reference.digest or pull in (Pull.MISSING, Pull.NEVER)):
            self.note_use(name, platform, known)
            return self._with_config(repository, known, platform, known=True)
        if pull is Pull.NEVER:
            raise ManifestMissing(
                reference.host, f"{name} is not on this node", hint="leave --offline away, or lazyfs fetch it first"
            )
        if known is None or pull is Pull.ALWAYS:
            image = resolve_image(repository, reference, platform, deadline=time.monotonic() + DOCUMENTS_PATIENCE)
            self.remember(name, platform, image)
            return self._with_config(repository, image.manifest, platform)
        return self._newer(repository, reference, platform, known)

    def _newer(self, repository: Repository, reference: Reference, platform: str, known: Manifest) -> Resolved:
        name = str(reference)
        deadline = time.monotonic() + KNOWN_PATIENCE
        # In a thread of its own: a name server that is gone holds it up for longer than any deadline of ours.
        asked = self._pool.submit(resolve_image, repository, reference, platform, deadline=deadline)
        try:
            image = self._answer(asked, known, deadline)
        except RegistryError as error:
            if isinstance(error, ManifestMissing) or not error.temporary:
                raise
            log.warning("using the last digest of %s: %s", name, error)
            asked.add_done_callback(lambda late: self._remember_late(name, platform, late))
            self.note_use(name, platform, known)
            return self._with_config(repository, known, platform, error.message, known=True)
        self.remember(name, platform, image)
        return self._with_config(repository, image.manifest, platform, known=image.digest == known.digest)

    def _answer(self, asked: Future[ResolvedImage], known: Manifest, deadline: float) -> ResolvedImage:
        """Wait for the registry, for as long as that is worth it. Raise its error, or RegistryTimeout."""
        began = time.monotonic()
        try:
            return asked.result(WHOLE_PATIENCE)
        except concurrent.futures.TimeoutError:
            pass
        try:
            if not self._whole(known):
                return asked.result(max(0.0, deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            pass
        raise RegistryTimeout("", f"no answer within {time.monotonic() - began:.0f} s")

    def _remember_late(self, name: str, platform: str, asked: Future[ResolvedImage]) -> None:
        """Keep an answer that came too late for this mount: the next one is to have it."""
        if not asked.cancelled() and asked.exception() is None:
            self.remember(name, platform, asked.result())

    # -- what the node knows

    def known(self, reference: Reference, platform: str) -> Manifest | None:
        """Return the manifest that a reference leads to, as far as this node remembers. Blocking (local disk)."""
        try:
            digest = reference.digest
            if not digest:
                last = self._catalog.last_digest(str(reference), platform)
                digest = last.digest if last is not None else ""
            raw = self._catalog.document(digest) if digest else None
            if raw is not None and oci.is_index("", raw):
                raw = self._catalog.document(oci.choose(oci.parse_index(raw), platform).digest)
            return oci.parse_manifest(raw) if raw is not None else None
        except LazyfsError as error:
            log.warning("what is known of %s can't be read: %s", reference, error)
            return None

    def note_use(self, name: str, platform: str, manifest: Manifest) -> None:
        """Note that an image is used under a name. Blocking (local disk); never raises."""
        try:
            if self._catalog.last_digest(name, platform) is None:
                self._catalog.remember_reference(name, platform, manifest.digest)
            else:
                self._catalog.note_use(name, platform)
        except StoreError as error:
            log.warning("the use of %s is not noted: %s", name, error)

    def remember(self, name: str, platform: str, image: ResolvedImage) -> None:
        """Keep an image's documents, and what led to them. Blocking (local disk); never raises."""
        try:
            if image.index is not None:
                self._catalog.put_document(image.index.raw)
            self._catalog.put_document(image.manifest.raw)
            self._catalog.remember_reference(name, platform, image.digest)
        except StoreError as error:  # a full disk must not keep an image from starting
            log.warning("%s is not remembered: %s", name, error)

    def _with_config(
        self, repository: Repository, manifest: Manifest, platform: str, stale: str = "", *, known: bool = False
    ) -> Resolved:
        key = (manifest.digest, platform)
        with self._lock:
            config = self._configs.get(key)
            if config is None:
                config = self._configs[key] = self._pool.submit(self._config, repository, manifest, platform)
        config.add_done_callback(lambda done: self._forget_config(key))
        return Resolved(manifest, config, stale, known)

    def _forget_config(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._configs.pop(key, None)  # from now on the catalog has it

    def _config(self, repository: Repository, manifest: Manifest, platform: str) -> ImageConfig:
        raw = self._catalog.document(manifest.config.digest)
        if raw is not None:
            return check_config(oci.parse_config(raw), manifest, platform)
        config = fetch_config(repository, manifest, platform=platform, deadline=time.monotonic() + DOCUMENTS_PATIENCE)
        try:
            self._catalog.put_document(config.raw)
        except StoreError as error:
            log.warning("an image config is not remembered: %s", error)
        return config
