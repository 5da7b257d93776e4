"""The catalog's file: its one connection, and the bounds of what it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lazyfs.chunks.catalog_schema import open_database, translated
from lazyfs.database import OneConnection
from lazyfs.limits import DOCUMENTS_BOUND


class CatalogFile(OneConnection):
    """The connection to `<root>/catalog.db`."""

    def __init__(
        self,
        path: Path,
        *,
        documents_bound: int = DOCUMENTS_BOUND,
        now: Callable[[], float] = time.time,
        anew: bool = True,
    ) -> None:
        """Open `<root>/catalog.db`, made where missing, in a directory that only we can write to.

        A damaged file is moved aside with a warning, unless `anew` is false. Raise StoreFull, or StoreBroken (also for
        a newer version).
        """
        super().__init__(path, f"the catalog {path}", open_database(path, anew=anew), translated)
        self._documents_bound = documents_bound
        self._now = now

    def _seconds(self) -> int:
        return int(self._now())
