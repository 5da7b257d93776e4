"""gRPC status: one table from error class to the code that containerd sees. The message is the error's sentence.

containerd acts on some: ALREADY_EXISTS ends an extraction well, NOT_FOUND has CRI unpack an image again, and
FAILED_PRECONDITION of Remove is left for the next collection. So nothing else may carry these by accident: a blob that
a registry lost is no snapshot that is missing.
"""

from __future__ import annotations

from grpc import StatusCode

from lazyfs import errors
from lazyfs.errors import LazyfsError
from lazyfs.limits import MAX_GRPC_WORDS

INTERNAL = "lazyfs-snapshotter failed in a way that it should not: its log says more"

TABLE: dict[type[LazyfsError], StatusCode] = {
    errors.SnapshotMissing: StatusCode.NOT_FOUND,
    errors.SnapshotExists: StatusCode.ALREADY_EXISTS,
    errors.SnapshotUnfit: StatusCode.FAILED_PRECONDITION,
    errors.SnapshotInvalid: StatusCode.INVALID_ARGUMENT,
    errors.UsageError: StatusCode.INVALID_ARGUMENT,
    errors.ReferenceInvalid: StatusCode.INVALID_ARGUMENT,
    errors.PlatformMissing: StatusCode.INVALID_ARGUMENT,
    errors.Unauthorized: StatusCode.PERMISSION_DENIED,
    errors.RegistryUnreachable: StatusCode.UNAVAILABLE,
    errors.RegistryTimeout: StatusCode.UNAVAILABLE,
    errors.TooManyRequests: StatusCode.UNAVAILABLE,
    errors.RegistryFault: StatusCode.UNAVAILABLE,
    errors.BadAnswer: StatusCode.UNAVAILABLE,
    errors.ImageIncomplete: StatusCode.UNAVAILABLE,
    errors.ReadDeadline: StatusCode.UNAVAILABLE,
    errors.DaemonUnreachable: StatusCode.UNAVAILABLE,
    errors.StoreLocked: StatusCode.UNAVAILABLE,
    errors.Interrupted: StatusCode.UNAVAILABLE,
    errors.BlobMissing: StatusCode.DATA_LOSS,
    errors.ManifestMissing: StatusCode.DATA_LOSS,
    errors.DigestMismatch: StatusCode.DATA_LOSS,
    errors.DiffIdMismatch: StatusCode.DATA_LOSS,
    errors.TocMismatch: StatusCode.DATA_LOSS,
    errors.LayerQuarantined: StatusCode.DATA_LOSS,
    errors.DocumentInvalid: StatusCode.DATA_LOSS,
    errors.FooterInvalid: StatusCode.DATA_LOSS,
    errors.TocInvalid: StatusCode.DATA_LOSS,
    errors.TarInvalid: StatusCode.DATA_LOSS,
    errors.FrameInvalid: StatusCode.DATA_LOSS,
    errors.TraceInvalid: StatusCode.DATA_LOSS,
    errors.StoreFull: StatusCode.RESOURCE_EXHAUSTED,
    errors.StoreBroken: StatusCode.INTERNAL,
    errors.TableInvalid: StatusCode.INTERNAL,
    errors.PushRejected: StatusCode.INTERNAL,
    errors.FuseUnavailable: StatusCode.INTERNAL,
    errors.MountPointInvalid: StatusCode.INTERNAL,
    errors.MountFailed: StatusCode.INTERNAL,
    errors.DaemonFault: StatusCode.INTERNAL,
    errors.ToolMissing: StatusCode.INTERNAL,
    errors.ContainerFailed: StatusCode.INTERNAL,
}


def code_of(error: LazyfsError) -> StatusCode:
    """Return the code of an error. One that passes (`temporary`) is UNAVAILABLE whatever its class: ask again."""
    if error.temporary:
        return StatusCode.UNAVAILABLE
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return StatusCode.INTERNAL


def message_of(error: LazyfsError) -> str:
    """Return an error's sentence as a gRPC message can carry it: one line, bounded, valid Unicode."""
    text = " ".join(str(error).split()).encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_GRPC_WORDS else text[: MAX_GRPC_WORDS - 1] + "…"
