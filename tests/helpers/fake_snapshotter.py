"""A proxy snapshotter for containerd, in memory, that is lazy with the layers that a test unpacked for it.

    with FakeSnapshotter(directory) as fake, real.containerd(place, fake.config("fake")) as daemon:
        fake.lazy[layer_digest] = unpacked_directory

It answers ALREADY_EXISTS to the extraction of such a layer, as long as all below it are lazy, and remembers each
Prepare's labels. Everything else is an ordinary overlay. Only what containerd's client and `ctr run` need.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from lazyfs.containerd.proto import snapshots_pb2 as messages

REF = "containerd.io/snapshot.ref"
LAYER = "containerd.io/snapshot/cri.layer-digest"


@dataclass
class Snapshot:
    """One snapshot, and the directory of its own files."""

    kind: Any
    parent: str
    directory: Path
    labels: dict[str, str] = field(default_factory=dict)


class FakeSnapshotter:
    """The service; start it with `with`. `asked`: labels of each extraction so far, in order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "s.sock"
        self.lazy: dict[str, Path] = {}
        self.asked: list[dict[str, str]] = []
        self.snapshots: dict[str, Snapshot] = {}
        self._lock = threading.RLock()
        self._number = 0

    def config(self, name: str) -> str:
        """Return what containerd's configuration needs."""
        return f'[proxy_plugins.{name}]\ntype = "snapshot"\naddress = "{self.socket}"\n'

    def __enter__(self) -> FakeSnapshotter:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4))
        requests: dict[str, Any] = {
            "Prepare": messages.PrepareSnapshotRequest,
            "View": messages.ViewSnapshotRequest,
            "Mounts": messages.MountsRequest,
            "Commit": messages.CommitSnapshotRequest,
            "Remove": messages.RemoveSnapshotRequest,
            "Stat": messages.StatSnapshotRequest,
            "Usage": messages.UsageRequest,
            "Cleanup": messages.CleanupRequest,
        }
        calls = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self, name.lower()), request.FromString, lambda answer: answer.SerializeToString()
            )
            for name, request in requests.items()
        }
        calls["List"] = grpc.unary_stream_rpc_method_handler(
            self.walk, messages.ListSnapshotsRequest.FromString, lambda answer: answer.SerializeToString()
        )
        service = grpc.method_handlers_generic_handler("containerd.services.snapshots.v1.Snapshots", calls)
        self._server.add_generic_rpc_handlers((service,))
        self._server.add_insecure_port(f"unix:{self.socket}")
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait(10)

    # -- the calls -----------------------------------------------------------------------------------------------------

    def prepare(self, request: Any, context: Any) -> Any:
        labels = dict(request.labels)
        with self._lock:
            self._find(request.parent, context)
            target = labels.get(REF)
            if target:
                self.asked.append(labels)
                tree = self.lazy.get(labels.get(LAYER, ""))
                if tree is not None and self._all_lazy(request.parent):
                    self.snapshots[target] = Snapshot(messages.COMMITTED, request.parent, tree, labels)
                    context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{target} is here")
            self._make(request, messages.ACTIVE, labels)
            return messages.PrepareSnapshotResponse(mounts=self._mounts(request.key))

    def view(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._find(request.parent, context)
            self._make(request, messages.VIEW, dict(request.labels))
            return messages.ViewSnapshotResponse(mounts=self._mounts(request.key))

    def mounts(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._find(request.key, context)
            return messages.MountsResponse(mounts=self._mounts(request.key))

    def commit(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._find(request.key, context)
            found = self.snapshots.pop(request.key)
            self.snapshots[request.name] = Snapshot(
                messages.COMMITTED, found.parent, found.directory, dict(request.labels)
            )
            return Empty()

    def remove(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._find(request.key, context)
            if any(one.parent == request.key for one in self.snapshots.values()):
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it has children")
            del self.snapshots[request.key]
            return Empty()

    def stat(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._find(request.key, context)
            return messages.StatSnapshotResponse(info=self._info(request.key))

    def usage(self, request: Any, context: Any) -> Any:
        return messages.UsageResponse(size=0, inodes=0)

    def cleanup(self, request: Any, context: Any) -> Any:
        return Empty()

    def walk(self, request: Any, context: Any) -> Iterator[Any]:
        """All of them: containerd holds each against its filter again."""
        with self._lock:
            infos = [self._info(key) for key in self.snapshots]
        yield messages.ListSnapshotsResponse(info=infos)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _find(self, key: str, context: Any) -> None:
        if key and key not in self.snapshots:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no snapshot {key}")

    def _make(self, request: Any, kind: Any, labels: dict[str, str]) -> None:
        self._number += 1
        directory = self.directory / str(self._number) / "fs"
        directory.mkdir(parents=True)
        (directory.parent / "work").mkdir()
        self.snapshots[request.key] = Snapshot(kind, request.parent, directory, labels)

    def _all_lazy(self, key: str) -> bool:
        while key:
            if self.snapshots[key].directory not in self.lazy.values():
                return False
            key = self.snapshots[key].parent
        return True

    def _mounts(self, key: str) -> list[Any]:
        found = self.snapshots[key]
        below = []
        parent = found.parent
        while parent:
            below.append(str(self.snapshots[parent].directory))
            parent = self.snapshots[parent].parent
        writable = found.kind == messages.ACTIVE
        if not below:
            options = ["rbind", "rw" if writable else "ro"]
            return [messages.Mount(type="bind", source=str(found.directory), options=options)]
        if not writable and len(below) == 1:
            return [messages.Mount(type="bind", source=below[0], options=["rbind", "ro"])]
        options = [f"lowerdir={':'.join(below)}"]
        if writable:
            options += [f"upperdir={found.directory}", f"workdir={found.directory.parent / 'work'}"]
        return [messages.Mount(type="overlay", source="overlay", options=options)]

    def _info(self, key: str) -> Any:
        found = self.snapshots[key]
        info = messages.Info(name=key, parent=found.parent, kind=found.kind, labels=found.labels)
        info.created_at.GetCurrentTime()
        info.updated_at.GetCurrentTime()
        return info
