"""The catalog's part on images: their documents, what references led to, and the pins that keep them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs import digest as digests
from lazyfs.chunks.catalog_file import CatalogFile
from lazyfs.errors import DocumentInvalid, StoreError
from lazyfs.limits import MAX_DOCUMENT

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The manifest that a reference led to, and when (seconds since the epoch)."""

    digest: str
    time: int


@dataclass(frozen=True, slots=True)
class NamedImage:
    """A reference that this node has resolved for a platform. Times in seconds since the epoch."""

    reference: str
    platform: str
    digest: str  # of the manifest
    time: int  # when the registry said so
    last_use: int


@dataclass(frozen=True, slots=True)
class Pin:
    """A reference whose image stays in the store; `image` is the digest of its manifest."""

    reference: str
    platform: str
    image: str


class ImageCatalog(CatalogFile):
    """Documents, references and pins. Thread-safe; every method blocks on the local disk."""

    # -- documents

    def put_document(self, raw: bytes) -> str:
        """Keep a manifest, index or config. Return its digest. Raise DocumentInvalid above MAX_DOCUMENT bytes.

        Beyond the bound of all documents the least recently used ones go.
        """
        if len(raw) > MAX_DOCUMENT:
            raise DocumentInvalid(f"a document of {len(raw)} bytes is more than the {MAX_DOCUMENT} allowed")
        digest = digests.of(raw)
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO documents (digest, body, size, last_use) VALUES (?, ?, ?, ?)",
                (digest, raw, len(raw), self._seconds()),
            )
            connection.execute(
                "DELETE FROM documents WHERE digest IN (SELECT digest FROM (SELECT digest, sum(size) OVER "
                "(ORDER BY last_use DESC, digest = ? DESC, digest) AS running FROM documents) WHERE running > ?) "
                "AND digest NOT IN (SELECT digest FROM pinned)",
                (digest, self._documents_bound),
            )
        return digest

    def document(self, digest: str, *, note: bool = True) -> bytes | None:
        """Return a document whose digest was checked just now; a damaged one is removed and None.

        Without `note` this counts for no use of it.
        """
        rows = self._rows("SELECT body, last_use FROM documents WHERE digest = ?", (digest,))
        if not rows:
            return None
        body, last_use = rows[0]
        intact = isinstance(body, bytes) and digests.of(body) == digest
        try:
            with self._using() as connection:
                if not intact:
                    connection.execute("DELETE FROM documents WHERE digest = ?", (digest,))
                elif note and last_use != self._seconds():
                    connection.execute("UPDATE documents SET last_use = ? WHERE digest = ?", (self._seconds(), digest))
        except StoreError as error:  # a full disk must not take away what can be read
            log.warning("the use of document %s is not noted: %s", digest, error)
        return body if intact else None

    def documents(self) -> dict[str, int]:
        """Return the digests of all documents kept, with their last use (seconds since the epoch)."""
        return {str(digest): int(use) for digest, use in self._rows("SELECT digest, last_use FROM documents")}

    def remove_documents(self, gone: Iterable[str]) -> None:
        """Drop documents. They can be fetched again."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM documents WHERE digest = ?", [(digest,) for digest in gone])

    # -- references

    def remember_reference(self, reference: str, platform: str, digest: str) -> None:
        """Note the manifest digest that a reference led to for a platform, as of now."""
        with self._using() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO resolved (reference, platform, digest, time, last_use) VALUES (?, ?, ?, ?, ?)",
                (reference, platform, digest, self._seconds(), self._seconds()),
            )

    def last_digest(self, reference: str, platform: str) -> Resolved | None:
        """Return what the reference led to last: for when the registry is down."""
        rows = self._rows(
            "SELECT digest, time FROM resolved WHERE reference = ? AND platform = ?", (reference, platform)
        )
        return Resolved(str(rows[0][0]), int(rows[0][1])) if rows else None

    def note_use(self, reference: str, platform: str) -> None:
        """Note that a reference is being used now."""
        with self._using() as connection:
            connection.execute(
                "UPDATE resolved SET last_use = ? WHERE reference = ? AND platform = ?",
                (self._seconds(), reference, platform),
            )

    def named_images(self) -> list[NamedImage]:
        """Return all references that led to a manifest, the most recently used first."""
        return [
            NamedImage(str(r), str(p), str(d), int(t), int(u))
            for r, p, d, t, u in self._rows(
                "SELECT reference, platform, digest, time, last_use FROM resolved "
                "ORDER BY last_use DESC, reference, platform"
            )
        ]

    def forget_image(self, image: str) -> None:
        """Forget every reference that led to the manifest `image`, and its pins."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM resolved WHERE digest = ?", (image,))
            connection.execute("DELETE FROM pins WHERE image = ?", (image,))
            connection.execute("DELETE FROM pinned WHERE image = ?", (image,))

    # -- pins

    def pin(self, pin: Pin, contents: Iterable[str]) -> None:
        """Keep an image, `contents` being the digests of its manifest, config and layers, until it is unpinned.

        A reference keeps one image: what it kept before is released, unless another one keeps that too.
        """
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO pins (reference, platform, image, time) VALUES (?, ?, ?, ?)",
                (pin.reference, pin.platform, pin.image, self._seconds()),
            )
            connection.execute("DELETE FROM pinned WHERE image NOT IN (SELECT image FROM pins)")
            connection.executemany(
                "INSERT OR IGNORE INTO pinned (image, digest) VALUES (?, ?)",
                [(pin.image, digest) for digest in contents],
            )

    def unpin(self, image: str) -> bool:
        """Keep an image no longer, whatever references kept it. False: it was not pinned."""
        with self._transaction() as connection:
            found = connection.execute("DELETE FROM pins WHERE image = ?", (image,)).rowcount
            connection.execute("DELETE FROM pinned WHERE image = ?", (image,))
        return found > 0

    def pins(self) -> list[Pin]:
        """Return all pins, by reference."""
        return [
            Pin(str(reference), str(platform), str(image))
            for reference, platform, image in self._rows(
                "SELECT reference, platform, image FROM pins ORDER BY reference, platform"
            )
        ]

    def pinned(self) -> frozenset[str]:
        """Return the digests of everything that pins keep: manifests, configs, layers."""
        return frozenset(str(row[0]) for row in self._rows("SELECT DISTINCT digest FROM pinned"))
