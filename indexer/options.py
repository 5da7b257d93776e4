"""How to convert, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from lazyfs.errors import UsageError


class OutputForm(Enum):
    """The form of converted layers."""

    ZSTD_CHUNKED = "zstd-chunked"
    ESTARGZ = "estargz"
    PODMAN = "podman"


# Lowest, highest and default compression level.
LEVELS = {
    OutputForm.ZSTD_CHUNKED: (1, 22, 3),
    OutputForm.ESTARGZ: (1, 9, 6),
    OutputForm.PODMAN: (1, 22, 6),  # its small frames need it to stay within a quarter of the whole at level 3
}


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
    form: OutputForm = OutputForm.ZSTD_CHUNKED
    level: int | None = None  # None: the form's default
    prefetch: tuple[bytes, ...] = ()  # cleaned paths, in the order in which a start reads them
    jobs: int = 2
    force: bool = False  # convert layers although they could be taken as they are
    all_platforms: bool = False  # the whole index, with what rides in it
    docker: bool = False  # images of Docker's media types keep them
    copy_referrers: bool = False
    work: Path | None = None  # the directory of conversions that can be taken up again; None: nothing outlives the run
    scratch: Path | None = None
    progress: Callable[[str, int], AbstractContextManager[Advance]] = _no_progress  # of (label, bytes to be read)

    @property
    def compression(self) -> int:
        """The compression level: the one asked for, or the form's default."""
        return LEVELS[self.form][2] if self.level is None else self.level

    def check(self) -> None:
        """Raise UsageError for values out of range, or that don't fit together."""
        lowest, highest, _ = LEVELS[self.form]
        if not lowest <= self.compression <= highest:
            raise UsageError(
                f"{self.form.value} has no compression level {self.compression}", hint=f"{lowest} to {highest}"
            )
        if self.jobs < 1:
            raise UsageError("--jobs must be at least 1")
        if self.docker and self.form is not OutputForm.ESTARGZ:
            raise UsageError(
                f"Docker's manifests have no type for {self.form.value} layers",
                hint="use --format estargz, or leave out --docker",
            )
        if self.all_platforms and self.platform is not None:
            raise UsageError("--platform and --all-platforms contradict each other")
        if self.prefetch and self.form is OutputForm.PODMAN:
            raise UsageError(
                "podman's form knows no prefetch list, so --prefetch would change nothing",
                hint="leave out --prefetch, or --compat podman",
            )
