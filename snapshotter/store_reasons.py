"""Why layers were lazy or not: the last ones, for `lazyfs why`, which reads them beside the running snapshotter."""

from __future__ import annotations

from lazyfs.limits import MAX_REASON, MAX_REASONS
from snapshotter.model import Reason
from snapshotter.store_file import StoreFile


class ReasonStore(StoreFile):
    """The reasons in the store's file."""

    def note_reason(
        self, image: str, layer_digest: str, key: str, reason: str, lazy: bool, when: int | None = None
    ) -> None:
        """Record what became of a layer; `when` in nanoseconds since the epoch, None: now.

        It is on the disk with the next thing that is recorded: a power cut may take it, which a Prepare won't wait for.
        """
        # An error's sentence may hold a file name that is no Unicode; SQLite refuses it.
        texts = [text[:MAX_REASON].encode("utf-8", "replace").decode() for text in (image, layer_digest, key, reason)]
        with self._passing() as connection:
            number = connection.execute(
                "INSERT INTO reasons (image, layer, key, reason, lazy, time) VALUES (?, ?, ?, ?, ?, ?)",
                (*texts, lazy, self._now() if when is None else when),
            ).lastrowid
            connection.execute("DELETE FROM reasons WHERE number <= ?", ((number or 0) - MAX_REASONS,))

    def reasons(self, prefix: str = "", limit: int = MAX_REASONS) -> list[Reason]:
        """Return what became of the layers of images whose reference begins so, the latest first."""
        found = self._rows(
            "SELECT image, layer, key, reason, lazy, time FROM reasons WHERE substr(image, 1, length(?)) = ? "
            "ORDER BY number DESC LIMIT ?",
            (prefix, prefix, limit),
        )
        return [Reason(image, layer, key, reason, bool(lazy), when) for image, layer, key, reason, lazy, when in found]
