"""What the snapshotter needs of others, and stand-ins that do nothing: with them every snapshot is an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lazyfs.errors import DaemonUnreachable
from snapshotter.model import LazyOffer, LazyPlace, Shown, Usage


class Extraction(Protocol):
    """Decides whether a layer is lazy. Thread-safe."""

    def offer(self, key: str, parent: str, labels: Mapping[str, str]) -> LazyOffer | None:
        """Return the lazy layer that the labels ask for; None: an ordinary one, and the reason was noted. Blocking."""
        ...


class Chains(Protocol):
    """Shows lazy chains. Thread-safe."""

    def show(self, place: LazyPlace) -> Shown:
        """Have a chain shown, and return where. Blocking, with a deadline. Raise LazyfsError."""
        ...

    def usage(self, digests: Sequence[str]) -> Usage:
        """Return what these layers hold on this disk together. Blocking. Raise LazyfsError."""
        ...


class Collector(Protocol):
    """Gives back what no snapshot refers to any more. Thread-safe."""

    def wake(self) -> None:
        """Look soon, in the background. Returns at once."""
        ...

    def run(self, deadline: float) -> None:
        """Look now, no longer than `deadline` (monotonic). Blocking. Raise LazyfsError."""
        ...


class NoExtraction:
    """Every layer is fetched in full."""

    def offer(self, key: str, parent: str, labels: Mapping[str, str]) -> LazyOffer | None:
        """Offer nothing."""
        return None


class NoChains:
    """No daemon."""

    def show(self, place: LazyPlace) -> Shown:
        """Raise DaemonUnreachable."""
        raise DaemonUnreachable(f"{place.image.reference} is lazy, and no lazyfsd is there to show it")

    def usage(self, digests: Sequence[str]) -> Usage:
        """Raise DaemonUnreachable."""
        raise DaemonUnreachable("no lazyfsd is there to say what layers hold")


class NoCollector:
    """Nothing is given back."""

    def wake(self) -> None:
        """Do nothing."""

    def run(self, deadline: float) -> None:
        """Do nothing."""
