"""Make room in the store on purpose: remove images and layers by name, by age, by size, and what nobody refers to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lazyfs import digest as digests
from lazyfs import oci, private
from lazyfs import reference as references
from lazyfs.chunks.census import Census, HeldImage, HeldLayer
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.errors import LazyfsError, ManifestMissing, StoreBroken, StoreFull, UsageError

log = logging.getLogger(__name__)

_SHORT = 6  # hex digits of a digest at least
_FRESH = 60  # seconds in which a document may lie here before the reference that led to it is noted


@dataclass(frozen=True, slots=True)
class Goal:
    """What `prune` may remove of the layers that nobody uses or pins. With none set: what no known image refers to."""

    size: int | None = None  # bytes that the store may take afterwards
    before: int | None = None  # last used before this (seconds since the epoch)
    everything: bool = False


@dataclass(slots=True)
class Cleared:
    """What was done. Bytes."""

    freed: int = 0
    layers: list[str] = field(default_factory=list)  # removed
    dropped: list[str] = field(default_factory=list)  # in use: their chunks are gone and will be fetched again
    images: list[str] = field(default_factory=list)  # forgotten: digests of their manifests
    kept: dict[str, str] = field(default_factory=dict)  # layers that were wanted away and stay: why
    trees: int = 0
    documents: int = 0
    size: int = 0  # of the store afterwards


def choose(layers: Iterable[HeldLayer], known: frozenset[str], size: int, goal: Goal) -> list[str]:
    """Return the digests of the layers to remove, in that order, of a store that takes `size` bytes. Pure.

    First what no image refers to, then the least recently used. Used and pinned layers are never among them; `known`
    are the layers of known images.
    """
    free = sorted(
        (layer for layer in layers if not layer.used and not layer.pinned and layer.disk),
        key=lambda layer: (layer.digest in known, layer.last_use, layer.digest),
    )
    chosen = []
    for layer in free:
        wanted = (
            layer.digest not in known
            or goal.everything
            or (goal.before is not None and layer.last_use < goal.before)
            or (goal.size is not None and size > goal.size)
        )
        if wanted:
            chosen.append(layer.digest)
            size -= layer.disk
    return chosen


class Clearing:
    """Removes. Thread-safe as the store is; blocks on the local disk."""

    def __init__(self, census: Census, *, release: Callable[[], None] = lambda: None) -> None:
        """`release` lets go of layers that are open only because they might be useful."""
        self._census = census
        self._store = census.store
        self._catalog = census.catalog
        self._release = release
        self._traces = TraceFiles(census.store.root)

    def prune(self, goal: Goal) -> Cleared:
        """Remove what `goal` allows, and what nobody refers to: layers, documents, trees. Raise StoreError."""
        self._release()
        done = Cleared()
        layers = self._census.layers()
        images = self._census.images(layers)
        known = frozenset(layer for image in images for layer in image.layers)
        for digest in choose(layers, known, self._store.evictor.scan(), goal):
            self._remove(digest, done)
        if done.layers or goal.everything:
            self._forget_empty(images, layers, done)
        return self._finish(done)

    def remove(self, names: list[str], *, force: bool = False) -> Cleared:
        """Remove images and layers by name, pinned or not. See `find`.

        Layers that another image has too stay. Raise ManifestMissing for a name that nothing here has, UsageError for
        one that is mounted, unless `force`: then its chunks go and are fetched again when they are read.
        """
        layers = {layer.digest: layer for layer in self._census.layers()}
        images = self._census.images(list(layers.values()))
        chosen: dict[str, HeldImage] = {}
        direct: list[str] = []
        for name in names:
            found = find(name, images, layers)
            for image in found:
                chosen[image.digest] = image
            if not found:
                direct.append(find_layer(name, layers))
        rest = [image for image in images if image.digest not in chosen]
        if not force:
            _refuse(list(chosen.values()), [layers[digest] for digest in direct], rest)
        self._release()
        done = Cleared()
        needed = {layer for image in rest for layer in image.layers}
        try:
            self._forget(chosen, done)
        except StoreFull as error:  # a disk without a free block: the layers make room
            log.info("images are forgotten after their layers: %s", error)
        wanted = dict.fromkeys([*direct, *(one for image in chosen.values() for one in image.layers)])
        used = self._census.used()
        for digest in wanted:
            if digest not in layers:
                continue
            if digest in needed and digest not in direct:
                done.kept[digest] = "another image has it too"
            elif digest in used and not force:
                done.kept[digest] = "it is in use"
            elif digest in used:
                done.freed += self._store.drop_chunks(digest)
                done.dropped.append(digest)
            else:
                self._remove(digest, done)
        self._forget(chosen, done)
        for digest in chosen:
            self._traces.drop(digest)
        return self._finish(done)

    def remove_layers(self, digests: list[str]) -> Cleared:
        """Remove layers that nobody uses or pins, and the documents and trees that only they needed. Raise StoreError.

        Images of which nothing is left are forgotten; a digest that isn't here is no error.
        """
        self._release()
        done = Cleared()
        here = set(self._store.digests())
        used, pinned = self._census.used() | self._store.held(), self._catalog.pinned()
        for digest in digests:
            if digest in pinned:
                done.kept[digest] = "it is pinned"
            elif digest in used:
                done.kept[digest] = "it is in use"
            elif digest in here:
                self._remove(digest, done)
        self._forget_gone(set(digests), done)
        if done.layers:
            self._clear_trees(done)
        return done

    def unpin(self, names: list[str]) -> list[str]:
        """Release the pins of images; return their digests. Raise ManifestMissing for a name that is not pinned."""
        layers = self._census.layers()
        images = self._census.images(layers)
        out = []
        for name in names:
            found = [image for image in find(name, images, {}) if image.pinned]
            if not found:
                raise ManifestMissing("", f"{name} is not pinned", hint="lazyfs cache ls shows what is")
            out += [image.digest for image in found]
        for digest in out:
            self._catalog.unpin(digest)
        return out

    # -- parts

    def _forget(self, images: Iterable[str], done: Cleared) -> None:
        for digest in images:
            if digest not in done.images:
                self._catalog.forget_image(digest)
                done.images.append(digest)

    def _remove(self, digest: str, done: Cleared) -> None:
        size = self._store.directory_usage(digest)
        if self._store.remove_layer(digest):
            done.layers.append(digest)
            done.freed += size
        else:
            done.kept[digest] = "it is in use"

    def _forget_empty(self, images: list[HeldImage], layers: list[HeldLayer], done: Cleared) -> None:
        """Forget images of which nothing is left."""
        here = {layer.digest for layer in layers if layer.disk} - set(done.layers)
        for image in images:
            if not image.pinned and not image.mounts and not here.intersection(image.layers):
                self._catalog.forget_image(image.digest)
                done.images.append(image.digest)

    def _forget_gone(self, digests: set[str], done: Cleared) -> None:
        """Forget images that had one of these layers and have none any more, with their documents."""
        here = set(self._store.digests())
        pinned, mounted = {pin.image for pin in self._catalog.pins()}, set(self._census.uses.mounts())
        named = {one.digest for one in self._catalog.named_images()}
        manifests = {digest: self._census.manifest(digest) for digest in named}
        gone: list[str] = []
        for digest, manifest in manifests.items():
            layers = {layer.digest for layer in manifest.layers} if manifest is not None else set()
            if manifest is None or digest in pinned | mounted or not layers & digests or layers & here:
                continue
            gone += [digest, manifest.config.digest]
            self._forget([digest], done)
        needed = self._catalog.pinned() | {
            manifest.config.digest
            for digest, manifest in manifests.items()
            if manifest is not None and digest not in done.images
        }
        indexes = [digest for digest in self._catalog.documents() if self._leads_to(digest, set(done.images), named)]
        gone = [digest for digest in (*gone, *indexes) if digest not in needed]
        self._catalog.remove_documents(gone)
        done.documents = len(gone)

    def _finish(self, done: Cleared) -> Cleared:
        self._clear_documents(done)
        if done.layers or done.images:
            self._clear_trees(done)
        done.size = self._store.evictor.scan()
        return done

    def _clear_documents(self, done: Cleared) -> None:
        """Drop manifests, configs and indexes that no reference leads to any more."""
        manifests = {named.digest for named in self._catalog.named_images()} | {
            pin.image for pin in self._catalog.pins()
        }
        keep = manifests | self._catalog.pinned() | set(self._census.uses.mounts())
        for digest in tuple(keep):
            manifest = self._census.manifest(digest)
            if manifest is not None:
                keep.add(manifest.config.digest)
        limit = int(time.time()) - _FRESH
        gone = [
            digest
            for digest, last_use in self._catalog.documents().items()
            if digest not in keep and last_use < limit and not self._leads_to(digest, manifests)
        ]
        self._catalog.remove_documents(gone)
        done.documents = len(gone)

    def _leads_to(self, digest: str, manifests: set[str], but: set[str] | frozenset[str] = frozenset()) -> bool:
        """Tell whether a document is an index of one of these manifests, and of no other one in `but`."""
        raw = self._catalog.document(digest, note=False)
        try:
            if raw is None or not oci.is_index("", raw):
                return False
            found = {entry.digest for entry in oci.parse_index(raw).manifests}
        except LazyfsError:
            return False
        return bool(found & manifests) and not found & (but - manifests)

    def _clear_trees(self, done: Cleared) -> None:
        """Remove merged trees that nobody is served: they are made again from the tables of their layers."""
        used = self._census.uses.trees()
        directory = self._store.root / "trees"
        try:
            private.check_directory(directory)
            for path in directory.iterdir():
                key, _, image = path.name.partition(".")  # an image for the erofs driver is its tree's
                if key not in used:
                    path.unlink()
                    done.trees += not image
        except FileNotFoundError:
            return
        except (OSError, StoreBroken) as error:
            log.warning("trees are not removed: %s", error)


def find(name: str, images: list[HeldImage], layers: dict[str, HeldLayer]) -> list[HeldImage]:
    """Return the images that a name means: a reference, or a manifest's digest, whole or its first hex digits.

    Nothing: it means a layer of `layers`. Raise ManifestMissing when it means nothing at all, UsageError when it is
    ambiguous.
    """
    if name.startswith("sha256:"):
        found = [image for image in images if image.digest.startswith(name)] if _is_start(name) else []
        if not found and not any(layer.startswith(name) for layer in layers):
            raise ManifestMissing("", f"neither an image nor a layer in the store has the digest {name}")
        if len(found) > 1:
            raise UsageError(f"{name} is the beginning of {len(found)} images' digests", hint="give more of it")
        return found
    reference = references.parse(name)
    found = [
        image
        for image in images
        if str(reference) in image.references or (reference.digest and reference.digest == image.digest)
    ]
    if not found:
        raise ManifestMissing(reference.host, f"{name} is not in the store", hint="lazyfs cache ls shows what is")
    return found


def find_layer(name: str, layers: dict[str, HeldLayer]) -> str:
    """Return the digest of the one layer that `name` is the beginning of. Raise UsageError when there are more."""
    found = [digest for digest in layers if digest.startswith(name)]
    if len(found) != 1:
        raise UsageError(f"{name} is the beginning of {len(found)} layers' digests", hint="give more of it")
    return found[0]


def _is_start(name: str) -> bool:
    if digests.is_digest(name) or len(name) >= len("sha256:") + _SHORT:
        return True
    raise UsageError(f"{name} is too short for a digest", hint=f"give at least {_SHORT} hex digits")


def _refuse(images: list[HeldImage], direct: list[HeldLayer], rest: list[HeldImage]) -> None:
    for image in images:
        if image.mounts:
            raise UsageError(
                f"{image.references[0] if image.references else image.digest} is mounted on {image.mounts[0]}",
                hint="umount it first, or --force: its bytes go all the same and are fetched again when they are read",
            )
    for layer in direct:
        if layer.used or layer.pinned:
            raise UsageError(
                f"layer {layer.digest} is {'in use' if layer.used else 'pinned'}",
                hint="--force: its bytes go all the same and are fetched again when they are read",
            )
        if any(layer.digest in image.layers for image in rest):
            owner = next(image for image in rest if layer.digest in image.layers)
            raise UsageError(
                f"layer {layer.digest} belongs to {owner.references[0] if owner.references else owner.digest}",
                hint="remove the image, or --force: the layer is fetched again with it",
            )
