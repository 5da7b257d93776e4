"""Exit codes: one table from error class to what the shell sees. docs/exit-codes.md says the same, held by a test."""

from __future__ import annotations

from lazyfs import errors
from lazyfs.errors import LazyfsError

OK = 0
INTERNAL = 1
USAGE = 2
NOT_FOUND = 3
NOT_AUTHORISED = 4
REGISTRY = 5
VERIFICATION = 6
MALFORMED = 7
MOUNT = 8
LOCAL = 9
RUN_FAILED = 125
RUN_NOT_EXECUTABLE = 126
RUN_NOT_FOUND = 127
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

MEANING: dict[int, str] = {
    OK: "success",
    INTERNAL: "a bug in lazyfs; again with `-v` shows the traceback",
    USAGE: "wrong options, arguments, settings or image reference",
    NOT_FOUND: "the image, a blob of it, or the platform asked for does not exist",
    NOT_AUTHORISED: "the registry wants other credentials",
    REGISTRY: "network or registry: unreachable, too slow, overloaded, refusing",
    VERIFICATION: "bytes are not what a digest promised",
    MALFORMED: "the image breaks its format",
    MOUNT: "mount, FUSE, daemon or container set-up failed",
    LOCAL: "the local disk or the store",
    RUN_FAILED: "`lazyfs run` only: lazyfs itself failed, for any of the reasons above",
    RUN_NOT_EXECUTABLE: "`lazyfs run` only: the command can't be executed",
    RUN_NOT_FOUND: "`lazyfs run` only: the command is not in the image",
    INTERRUPTED: "interrupted (SIGINT)",
    BROKEN_PIPE: "the reader of our output went away (SIGPIPE)",
    TERMINATED: "asked to stop (SIGTERM)",
}

TABLE: dict[type[LazyfsError], int] = {
    errors.UsageError: USAGE,
    errors.ReferenceInvalid: USAGE,
    errors.PlatformMissing: NOT_FOUND,
    errors.ManifestMissing: NOT_FOUND,
    errors.BlobMissing: NOT_FOUND,
    errors.Unauthorized: NOT_AUTHORISED,
    errors.RegistryUnreachable: REGISTRY,
    errors.RegistryTimeout: REGISTRY,
    errors.ImageIncomplete: REGISTRY,
    errors.TooManyRequests: REGISTRY,
    errors.RegistryFault: REGISTRY,
    errors.BadAnswer: REGISTRY,
    errors.PushRejected: REGISTRY,
    errors.ReadDeadline: REGISTRY,
    errors.DigestMismatch: VERIFICATION,
    errors.DiffIdMismatch: VERIFICATION,
    errors.TocMismatch: VERIFICATION,
    errors.LayerQuarantined: VERIFICATION,
    errors.DocumentInvalid: MALFORMED,
    errors.FooterInvalid: MALFORMED,
    errors.TocInvalid: MALFORMED,
    errors.TarInvalid: MALFORMED,
    errors.FrameInvalid: MALFORMED,
    errors.TraceInvalid: MALFORMED,
    errors.FuseUnavailable: MOUNT,
    errors.MountPointInvalid: MOUNT,
    errors.MountFailed: MOUNT,
    errors.DaemonUnreachable: MOUNT,
    errors.DaemonFault: MOUNT,
    errors.ToolMissing: MOUNT,
    errors.ContainerFailed: MOUNT,
    errors.TableInvalid: LOCAL,
    errors.StoreLocked: LOCAL,
    errors.StoreFull: LOCAL,
    errors.StoreBroken: LOCAL,
    errors.SnapshotMissing: NOT_FOUND,
    errors.SnapshotExists: LOCAL,
    errors.SnapshotUnfit: LOCAL,
    errors.SnapshotInvalid: USAGE,
    errors.Interrupted: INTERRUPTED,
}


def code_of(error: BaseException, command: str = "") -> int:
    """Return the exit code for `error` of `command`.

    `run` passes its container's status through, so all of its own failures share one code that containers rarely use.
    """
    if isinstance(error, errors.Interrupted):
        return TABLE[errors.Interrupted]
    if command == "run":
        return RUN_FAILED
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return INTERNAL


def summary() -> str:
    """Return the short form that ends every command's help."""
    return "exit codes: 0 success, 2 usage, 3 not found, 4 not authorised, 5 registry, 6 verification failed,\n" \
        "  7 malformed image, 8 mount or container, 9 local disk, 1 bug; see docs/exit-codes.md"  # fmt: skip
