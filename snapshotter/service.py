"""The snapshots service on the wire: containerd.services.snapshots.v1.Snapshots, and nothing but translation.

Source: containerd, api/services/snapshots/v1. Timestamps are always set: without them clients see the year 1.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from lazyfs.containerd.proto import snapshots_pb2 as messages
from lazyfs.errors import LazyfsError
from lazyfs.limits import LIST_THREADS
from snapshotter.model import Mount, Snapshot
from snapshotter.snapshotter import Snapshotter
from snapshotter.status import INTERNAL, code_of, message_of

log = logging.getLogger(__name__)

SERVICE = "containerd.services.snapshots.v1.Snapshots"
_BATCH = 100  # snapshots in one answer of List
_NANO = 10**9
_LOCAL = ("Commit", "Remove", "Stat", "Update", "List")  # they ask nobody; the others may wait for the daemon
_QUIET = frozenset({grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.NOT_FOUND})  # part of every day

NoteCall = Callable[[str, str, float], None]  # (method, gRPC's name of the code, seconds)

Q = TypeVar("Q")
A = TypeVar("A")


def no_note(method: str, code: str, seconds: float) -> None:
    """Count nothing."""


class Service:
    """Answers gRPC's calls with what a Snapshotter does. Every method raises LazyfsErrors; `handler` translates."""

    def __init__(self, snapshotter: Snapshotter, note: NoteCall = no_note) -> None:
        """`note` is told of each call's end."""
        self._snapshotter = snapshotter
        self._note = note
        # Threads of their own: whatever a registry or a daemon does to the other calls, these are answered.
        self._quick = ThreadPoolExecutor(LIST_THREADS, "quick")

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return what a gRPC server needs to offer the service."""
        one: dict[str, tuple[Callable[[Any], Any], Any]] = {
            "Prepare": (self._prepare, messages.PrepareSnapshotRequest),
            "View": (self._view, messages.ViewSnapshotRequest),
            "Mounts": (self._mounts, messages.MountsRequest),
            "Commit": (self._commit, messages.CommitSnapshotRequest),
            "Remove": (self._remove, messages.RemoveSnapshotRequest),
            "Stat": (self._stat, messages.StatSnapshotRequest),
            "Update": (self._update, messages.UpdateSnapshotRequest),
            "Usage": (self._usage, messages.UsageRequest),
            "Cleanup": (self._cleanup, messages.CleanupRequest),
        }
        guarded: dict[str, Any] = {name: _guarded(name, call, self._note) for name, (call, _) in one.items()}
        guarded["List"] = _guarded_stream("List", self._list, self._note)
        for name in _LOCAL:
            guarded[name].experimental_thread_pool = self._quick
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(guarded[name], question.FromString, _wire)
            for name, (_, question) in one.items()
        }
        methods["List"] = grpc.unary_stream_rpc_method_handler(
            guarded["List"], messages.ListSnapshotsRequest.FromString, _wire
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _prepare(self, asked: messages.PrepareSnapshotRequest) -> messages.PrepareSnapshotResponse:
        mounts = self._snapshotter.prepare(asked.key, asked.parent, dict(asked.labels))
        return messages.PrepareSnapshotResponse(mounts=_mounts(mounts))

    def _view(self, asked: messages.ViewSnapshotRequest) -> messages.ViewSnapshotResponse:
        mounts = self._snapshotter.view(asked.key, asked.parent, dict(asked.labels))
        return messages.ViewSnapshotResponse(mounts=_mounts(mounts))

    def _mounts(self, asked: messages.MountsRequest) -> messages.MountsResponse:
        return messages.MountsResponse(mounts=_mounts(self._snapshotter.mounts(asked.key)))

    def _commit(self, asked: messages.CommitSnapshotRequest) -> Empty:
        self._snapshotter.commit(asked.name, asked.key, dict(asked.labels), asked.parent)
        return Empty()

    def _remove(self, asked: messages.RemoveSnapshotRequest) -> Empty:
        self._snapshotter.remove(asked.key)
        return Empty()

    def _stat(self, asked: messages.StatSnapshotRequest) -> messages.StatSnapshotResponse:
        return messages.StatSnapshotResponse(info=_info(self._snapshotter.stat(asked.key)))

    def _update(self, asked: messages.UpdateSnapshotRequest) -> messages.UpdateSnapshotResponse:
        changed = self._snapshotter.update(asked.info.name, dict(asked.info.labels), list(asked.update_mask.paths))
        return messages.UpdateSnapshotResponse(info=_info(changed))

    def _list(self, asked: messages.ListSnapshotsRequest) -> Iterator[messages.ListSnapshotsResponse]:
        found = self._snapshotter.walk(list(asked.filters))
        for first in range(0, len(found), _BATCH):
            yield messages.ListSnapshotsResponse(info=map(_info, found[first : first + _BATCH]))

    def _usage(self, asked: messages.UsageRequest) -> messages.UsageResponse:
        usage = self._snapshotter.usage(asked.key)
        return messages.UsageResponse(size=usage.size, inodes=usage.inodes)

    def _cleanup(self, asked: messages.CleanupRequest) -> Empty:
        self._snapshotter.cleanup()
        return Empty()


def _wire(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return raw


def _guarded(name: str, call: Callable[[Q], A], note: NoteCall) -> Callable[[Q, grpc.ServicerContext], A]:
    def answer(asked: Q, context: grpc.ServicerContext) -> A:
        with _counted(name, note, context):
            return call(asked)

    return answer


def _guarded_stream(
    name: str, call: Callable[[Q], Iterator[A]], note: NoteCall
) -> Callable[[Q, grpc.ServicerContext], Iterator[A]]:
    def answer(asked: Q, context: grpc.ServicerContext) -> Iterator[A]:
        with _counted(name, note, context):
            yield from call(asked)

    return answer


@contextlib.contextmanager
def _counted(name: str, note: NoteCall, context: grpc.ServicerContext) -> Iterator[None]:
    """Count a call, and end it with the code of what it raises."""
    began, code = time.monotonic(), grpc.StatusCode.OK
    try:
        yield
    except Exception as error:
        code = code_of(error) if isinstance(error, LazyfsError) else grpc.StatusCode.INTERNAL
        _fail(name, error, code, context)
    finally:
        note(name, code.name, time.monotonic() - began)


def _fail(name: str, error: Exception, code: grpc.StatusCode, context: grpc.ServicerContext) -> NoReturn:
    if not isinstance(error, LazyfsError):
        log.error("%s broke", name, exc_info=error)
        context.abort(code, INTERNAL)
    log.log(logging.DEBUG if code in _QUIET else logging.WARNING, "%s: %s: %s", name, code.name, error)
    context.abort(code, message_of(error))


def _mounts(mounts: Iterable[Mount]) -> list[messages.Mount]:
    return [
        messages.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        for mount in mounts
    ]


def _info(snapshot: Snapshot) -> messages.Info:
    kind = snapshot.kind.name  # the same names as on the wire
    info = messages.Info(name=snapshot.key, parent=snapshot.parent, kind=kind, labels=snapshot.labels)
    for stamp, moment in ((info.created_at, snapshot.created), (info.updated_at, snapshot.updated)):
        stamp.seconds, stamp.nanos = divmod(moment, _NANO)
    return info
