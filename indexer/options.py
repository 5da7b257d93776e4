"""How to convert, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from indexer.frames import DEFAULT_LEVEL
from lazyfs.errors import UsageError

MAX_LEVEL = 22  # zstd's highest


class Advance(Protocol):
    """Takes note of bytes done."""

    def advance(self, count: int) -> None: ...


class _Silent:
    def advance(self, count: int) -> None:
        return


def _no_progress(label: str, total: int) -> AbstractContextManager[Advance]:
    return nullcontext(_Silent())


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert. `scratch`: a directory for temporary files, None for the system's."""

    platform: str | None = None  # of an index; None: this machine's
    level: int = DEFAULT_LEVEL
    jobs: int = 2
    force: bool = False  # convert layers although they could be taken as they are
    scratch: Path | None = None
    progress: Callable[[str, int], AbstractContextManager[Advance]] = _no_progress  # of (label, bytes to be read)

    def check(self) -> None:
        """Raise UsageError for values out of range."""
        if not 1 <= self.level <= MAX_LEVEL:
            raise UsageError(f"there is no compression level {self.level}", hint=f"1 to {MAX_LEVEL}")
        if self.jobs < 1:
            raise UsageError("--jobs must be at least 1")
