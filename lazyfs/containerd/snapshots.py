"""containerd's snapshots, of whichever snapshotter: what is unpacked where, and the steps of unpacking.

Source: containerd, api/services/snapshots/v1. Parents and names are chain IDs here; keys name what is being unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lazyfs.containerd.calls import Calls, Method, Refused
from lazyfs.containerd.proto import namespaces_pb2
from lazyfs.containerd.proto import snapshots_pb2 as messages
from lazyfs.errors import (
    LazyfsError,
    RegistryUnreachable,
    SnapshotExists,
    SnapshotMissing,
    SnapshotUnfit,
    UsageError,
)

_SERVICE = "/containerd.services.snapshots.v1.Snapshots/"
_PREPARE = Method(_SERVICE + "Prepare", messages.PrepareSnapshotRequest, messages.PrepareSnapshotResponse)
_COMMIT = Method(_SERVICE + "Commit", messages.CommitSnapshotRequest, messages.PrepareSnapshotResponse)
_REMOVE = Method(_SERVICE + "Remove", messages.RemoveSnapshotRequest, messages.PrepareSnapshotResponse)
_STAT = Method(_SERVICE + "Stat", messages.StatSnapshotRequest, messages.StatSnapshotResponse)
# Commit and Remove answer with an empty message, and any message reads it.

_PROBE = "lazyfs-probe"  # a snapshot that nobody has


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2) by which a snapshot is reached."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What containerd knows of a snapshot."""

    name: str
    parent: str
    committed: bool
    labels: dict[str, str] = field(default_factory=dict)


class Snapshots:
    """The snapshots of one snapshotter in one namespace. Thread-safe; every call blocks.

    Each raises RegistryErrors of containerd, and UsageError when this containerd has no such snapshotter.
    """

    def __init__(self, calls: Calls, snapshotter: str) -> None:
        self._calls = calls
        self.snapshotter = snapshotter

    def check(self) -> None:
        """Raise when containerd does not answer, has no such snapshotter, or can't reach it."""
        self.stat(_PROBE)

    def stat(self, name: str) -> SnapshotInfo | None:
        """Return what is known of a snapshot, None where there is none."""
        question = messages.StatSnapshotRequest(snapshotter=self.snapshotter, key=name)
        try:
            found = self._calls.one(_STAT, question).info
        except Refused as error:
            if error.code == "NOT_FOUND":
                return None
            raise self._fault(name, "looking for a snapshot", error) from None
        return SnapshotInfo(found.name, found.parent, found.kind == messages.COMMITTED, dict(found.labels))

    def prepare(self, key: str, parent: str, labels: dict[str, str], *, lease: str = "") -> tuple[Mount, ...]:
        """Make an active snapshot and return its mounts. The snapshotter may take its time: a lazy one asks registries.

        Raise SnapshotExists: of that key, or what `labels` say is to come of it; SnapshotMissing: the parent.
        """
        question = messages.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        try:
            answer = self._calls.one(_PREPARE, question, lease=lease)
        except Refused as error:
            raise self._fault(key, "preparing a snapshot", error) from None
        return tuple(Mount(one.type, one.source, tuple(one.options), one.target) for one in answer.mounts)

    def commit(self, name: str, key: str, labels: dict[str, str], *, lease: str = "") -> None:
        """Make the active snapshot `key` the finished one `name`. Raise SnapshotExists, SnapshotMissing."""
        question = messages.CommitSnapshotRequest(snapshotter=self.snapshotter, name=name, key=key, labels=labels)
        try:
            self._calls.one(_COMMIT, question, lease=lease)
        except Refused as error:
            raise self._fault(name, "committing a snapshot", error) from None

    def remove(self, key: str, *, deadline: float | None = None) -> None:
        """Remove a snapshot, if it is there. Raise SnapshotUnfit while others stand on it."""
        question = messages.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key)
        try:
            self._calls.one(_REMOVE, question, deadline=deadline)
        except Refused as error:
            if error.code != "NOT_FOUND":
                raise self._fault(key, "removing a snapshot", error) from None

    def _fault(self, key: str, what: str, error: Refused) -> LazyfsError:
        said = f"snapshotter {self.snapshotter}: {what} {key}: {error.detail[:300]}"
        match error.code:
            case "ALREADY_EXISTS":
                return SnapshotExists(key, said)
            case "NOT_FOUND":
                return SnapshotMissing(key, said)
            case "FAILED_PRECONDITION":
                return SnapshotUnfit(key, said)
            case "INVALID_ARGUMENT" if "not loaded" in error.detail:
                return self._unknown()
            case "UNAVAILABLE" if self._containerd_answers():
                return RegistryUnreachable(
                    self._calls.address,
                    f"containerd at {self._calls.address} does not reach its snapshotter {self.snapshotter}: "
                    f"{error.detail[:300]}",
                    hint=f"is the service of {self.snapshotter} running, at the address in containerd's configuration?",
                )
        return self._calls.fault(f"{what} with snapshotter {self.snapshotter}", error)

    def _unknown(self) -> UsageError:
        return UsageError(
            f"containerd at {self._calls.address} has no snapshotter {self.snapshotter}",
            hint=f'its configuration needs [proxy_plugins.{self.snapshotter}] with type = "snapshot" and address = '
            f'"SOCKET", where SOCKET is that of the snapshotter; `ctr plugins ls` shows those that it has',
        )

    def _containerd_answers(self) -> bool:
        """Tell whether it is the snapshotter that is away, and not containerd."""
        list_them = Method(
            "/containerd.services.namespaces.v1.Namespaces/List",
            namespaces_pb2.ListNamespacesRequest,
            namespaces_pb2.ListNamespacesResponse,
        )
        try:
            self._calls.one(list_them, namespaces_pb2.ListNamespacesRequest())
        except Refused:
            return False
        return True
