"""The images of lazy snapshots, and who still refers to them: what there is to collect, and what must be shown."""

from __future__ import annotations

import sqlite3

from snapshotter import rows
from snapshotter.model import Kind, LazyImage, LazyPlace
from snapshotter.store_file import image_finder
from snapshotter.store_reasons import ReasonStore

_IMAGE = "number, reference, manifest_digest, layers"


class ImageStore(ReasonStore):
    """The lazy images in the store's file."""

    def put_image(self, image: LazyImage) -> LazyImage:
        """Record an image and return it with its number; one that is recorded keeps its own."""
        with self._transaction() as connection:
            return put_image(connection, image, self._now())

    def find_image(self, reference: str, manifest_digest: str) -> LazyImage | None:
        """Return the image that was recorded last under this name and digest, or None."""
        found = self._rows(
            f"SELECT {_IMAGE} FROM images WHERE manifest_digest = ? AND reference = ? ORDER BY number DESC LIMIT 1",
            (manifest_digest, reference),
        )
        return rows.image_of(*found[0]) if found else None

    def images_unreferenced(self, before: int | None = None) -> list[LazyImage]:
        """Return the images without a snapshot that nobody put since `before` (ns since the epoch; None: now)."""
        found = self._rows(
            f"SELECT {_IMAGE} FROM images WHERE used < ? AND number NOT IN "
            "(SELECT image FROM snapshots WHERE image IS NOT NULL) ORDER BY number",
            (self._now() + 1 if before is None else before,),
        )
        return [rows.image_of(*row) for row in found]

    def images_settled(self, before: int) -> list[LazyImage]:
        """Return all images that nobody put since `before` (ns since the epoch): no pull of them is under way."""
        found = self._rows(f"SELECT {_IMAGE} FROM images WHERE used < ? ORDER BY number", (before,))
        return [rows.image_of(*row) for row in found]

    def drop_image(self, number: int) -> bool:
        """Forget an image. False, and nothing done: a snapshot refers to it."""
        with self._transaction() as connection:
            if connection.execute("SELECT 1 FROM snapshots WHERE image = ? LIMIT 1", (number,)).fetchone():
                return False
            connection.execute("DELETE FROM images WHERE number = ?", (number,))
            return True

    def layers_referenced(self) -> set[str]:
        """Return the blob digests of all layers that lazy snapshots stand for, those below them in their chain too."""
        with self._looking() as connection:
            image = image_finder(connection)
            found = connection.execute(
                "SELECT image, max(position) FROM snapshots WHERE image IS NOT NULL GROUP BY image"
            ).fetchall()
            return {layer.digest for number, top in found for layer in image(number).layers[: top + 1]}

    def chains_in_use(self) -> list[LazyPlace]:
        """Return the lazy chains that active snapshots and views stand on: those that must be shown. Each one once."""
        with self._looking() as connection:
            image = image_finder(connection)
            found = connection.execute("SELECT key, parent, kind, image, position FROM snapshots").fetchall()
            parents = {key: (parent, number, position) for key, parent, _, number, position in found}
            chains: set[tuple[int, int]] = set()
            done: set[str] = set()
            for key, parent, kind, _, _ in found:
                if kind == Kind.COMMITTED:
                    continue
                key = parent
                while key and key not in done:
                    done.add(key)
                    key, number, position = parents.get(key, ("", None, None))
                    if number is not None:
                        chains.add((number, position))
                        break
            return [LazyPlace(image(number), position) for number, position in sorted(chains)]


def put_image(connection: sqlite3.Connection, image: LazyImage, now: int) -> LazyImage:
    """Record an image within a transaction, and return it with its number."""
    layers = rows.pack_layers(image.layers)
    found = connection.execute(
        "SELECT number FROM images WHERE manifest_digest = ? AND reference = ? AND layers = ?",
        (image.manifest_digest, image.reference, layers),
    ).fetchone()
    if found is not None:
        number = int(found[0])
        connection.execute("UPDATE images SET used = ? WHERE number = ?", (now, number))
    else:
        number = int(
            connection.execute(
                "INSERT INTO images (reference, manifest_digest, layers, used) VALUES (?, ?, ?, ?)",
                (image.reference, image.manifest_digest, layers, now),
            ).lastrowid
            or 0
        )
    return LazyImage(number, image.reference, image.manifest_digest, image.layers)
