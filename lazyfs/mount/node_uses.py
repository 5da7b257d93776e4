"""What of the store a daemon has in use, for those who would clear it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.mount.images import Images
    from lazyfs.mount.mounted import Mounted


class NodeUses:
    """What a daemon has in use. Bound once its parts are there: they need the census that asks."""

    def __init__(self) -> None:
        self._images: Images | None = None
        self._mounted: Mounted | None = None

    def bind(self, images: Images, mounted: Mounted) -> None:
        """Name the parts that know."""
        self._images, self._mounted = images, mounted

    def layers(self) -> frozenset[str]:
        """Return the digests of layers that a mount or a fetch has open. From any thread."""
        if self._images is None:
            return frozenset()
        return self._images.layers.held() | self._images.fillings.busy()  # late work would make a removed layer anew

    def trees(self) -> frozenset[str]:
        """Return the keys of trees that are being served. From any thread."""
        return self._images.trees_held() if self._images is not None else frozenset()

    def mounts(self) -> dict[str, list[str]]:
        """Return where images show, by the digest of their manifest. From any thread."""
        return self._mounted.places() if self._mounted is not None else {}
