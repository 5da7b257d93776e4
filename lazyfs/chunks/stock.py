"""The store as its operator sees it: lists, removals and checks, each answered as JSON would have it.

The daemon answers these calls for its clients; without a daemon the command line makes them itself, on the store that
it then holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from lazyfs.chunks.census import Census, HeldImage
from lazyfs.chunks.clear import Clearing, Goal, find, find_layer
from lazyfs.chunks.recheck import Checked, recheck, recheck_documents
from lazyfs.errors import UsageError
from lazyfs.limits import MAX_PAGE


class Stock:
    """Answers. Thread-safe; every method blocks on the local disk and raises StoreError and what is named."""

    def __init__(self, census: Census, *, release: Callable[[], None] = lambda: None) -> None:
        """`release` lets go of layers that are open only because they might be useful."""
        self._census = census
        self._clearing = Clearing(census, release=release)

    def layers(self, after: str) -> dict[str, Any]:
        """Return the layers whose digests follow `after`, as many as go into one answer: `layers` and `more`."""
        rows = [asdict(layer) for layer in self._census.layers() if layer.digest > after]
        return _page("layers", rows)

    def images(self, after: str) -> dict[str, Any]:
        """Return the images whose manifest digests follow `after`, as `layers` does: `images` and `more`."""
        found = sorted(self._census.images(), key=lambda image: image.digest)
        rows = [asdict(image) for image in found if image.digest > after]
        return {**_page("images", rows), "size": self._census.store.evictor.scan(), "bound": self._bound}

    @property
    def _bound(self) -> int:
        return self._census.store.budget.bound

    def remove(self, names: list[str], force: bool) -> dict[str, Any]:
        """Remove images and layers. See `Clearing.remove`."""
        return asdict(self._clearing.remove(names, force=force))

    def unpin(self, names: list[str]) -> dict[str, Any]:
        """Release pins. See `Clearing.unpin`."""
        return {"images": self._clearing.unpin(names)}

    def prune(self, size: int | None, age: float | None, everything: bool) -> dict[str, Any]:
        """Remove what is not used: down to `size` bytes, what is older than `age` seconds, or everything."""
        before = int(time.time() - age) if age is not None else None
        return asdict(self._clearing.prune(Goal(size, before, everything)))

    def verify(self, names: list[str]) -> Verification:
        """Return the check of the named images and layers, or of everything, to be driven by the caller.

        Raise ManifestMissing or UsageError for a name that means nothing.
        """
        layers = {layer.digest: layer for layer in self._census.layers()}
        if not names:
            return Verification(self._census, list(layers), sum(layer.present for layer in layers.values()), True)
        images = self._census.images(list(layers.values()))
        wanted: dict[str, None] = {}
        for name in names:
            found: list[HeldImage] = find(name, images, layers)
            digests = [digest for image in found for digest in image.layers] or [find_layer(name, layers)]
            wanted |= dict.fromkeys(digests)
        here = [digest for digest in wanted if digest in layers]
        return Verification(self._census, here, sum(layers[digest].present for digest in here), False)


class Verification:
    """A check of layers under way. `total`: bytes to hash. Not thread-safe."""

    def __init__(self, census: Census, layers: list[str], total: int, documents: bool) -> None:
        self.total = total
        self._census = census
        self._documents = documents
        self._done = Checked()
        self._steps = recheck(census, layers, self._done)

    def steps(self) -> Iterator[int]:
        """Yield the bytes hashed at each step. Blocking for some tens of milliseconds a step."""
        return self._steps

    def close(self) -> None:
        """Give the layer under way back, where the check is given up."""
        self._steps.close()

    def result(self) -> dict[str, Any]:
        """Return what was found, once all steps are done. Blocking."""
        if self._documents:
            recheck_documents(self._census, self._done)
        return {**asdict(self._done), "clean": self._done.clean}


def _page(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    taken: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        size += 700 + 80 * len(row.get("layers", ())) + sum(map(len, row.get("references", ())))
        if taken and size > MAX_PAGE:
            break
        taken.append(row)
    return {name: taken, "more": len(taken) < len(rows)}


def check_names(value: object) -> list[str]:
    """Return the names of images and layers that a call carries. Raise UsageError."""
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise UsageError("names of images and layers are a list of texts")
    return value
