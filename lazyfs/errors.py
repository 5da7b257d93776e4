"""Every way lazyfs can fail, as typed errors that carry their data.

Library code raises these and nothing else across a package border; foreign exceptions are translated once, where the
library is called. Three tables turn a class into what its audience understands: `lazyfs.mount.errno_map` (errno for
the kernel), `lazyfs.cli.exit_codes` (exit status for the shell) and, with the snapshotter, gRPC status. A test asserts
that every leaf class has a row in each table.

`str(error)` is one sentence for the user: what is wrong, and where `hint` is set, what to do about it.
"""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class LazyfsError(Exception):
    """Base of all. `temporary` says whether trying the same thing again later may work."""

    temporary = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


# -- what the user typed ---------------------------------------------------------------------------------------------


class UsageError(LazyfsError):
    """Options that do not fit together, or a value out of range."""


class ReferenceInvalid(LazyfsError):
    """An image reference that cannot be parsed."""

    def __init__(self, reference: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"image reference {reference[:1000]!r} is malformed: {reason}", hint=hint)
        self.reference = reference


class PlatformMissing(LazyfsError):
    """The image index has no manifest for the platform asked for."""

    def __init__(self, wanted: str, available: list[str]) -> None:
        super().__init__(
            f"the image has no manifest for platform {wanted}", hint=f"it has: {', '.join(available) or 'none'}"
        )
        self.wanted = wanted
        self.available = available


# -- registries ------------------------------------------------------------------------------------------------------


class RegistryError(LazyfsError):
    """Base of what goes wrong between us and a registry (or an OCI layout directory). `host` names it."""

    def __init__(self, host: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.host = host


class RegistryUnreachable(RegistryError):
    """No connection: name not resolved, refused, reset before an answer, TLS failed."""

    temporary = True


class RegistryTimeout(RegistryError):
    """A deadline passed without the bytes that were asked for."""

    temporary = True


class Unauthorized(RegistryError):
    """401 or 403 although the credentials at hand were offered."""


class BlobMissing(RegistryError):
    """The registry does not have a blob that a manifest names. An I/O error for readers, never "no such file"."""


class ManifestMissing(RegistryError):
    """No such tag or manifest."""


class ImageIncomplete(RegistryError):
    """An image of which bytes are missing on this node, where its registry can't be asked, or must not be."""


class TooManyRequests(RegistryError):
    """429. `retry_after` in seconds, 0 when the registry did not say."""

    temporary = True

    def __init__(self, host: str, message: str, *, retry_after: float = 0.0) -> None:
        when = f"try again in {retry_after:.0f} s" if retry_after else "try again later"
        super().__init__(host, message, hint=f"{when}; a login or a mirror may be allowed more")
        self.retry_after = retry_after


class RegistryFault(RegistryError):
    """A 5xx answer. `status` is the HTTP status; `retry_after` in seconds, 0 when the registry did not say."""

    temporary = True

    def __init__(self, host: str, message: str, *, status: int, retry_after: float = 0.0) -> None:
        super().__init__(host, message)
        self.status = status
        self.retry_after = retry_after


class BadAnswer(RegistryError):
    """An answer that breaks the protocol: 200 to a Range request, wrong Content-Range, short body, redirect loop."""

    temporary = True


class PushRejected(RegistryError):
    """The registry refused an upload for a reason that another try won't change."""


# -- trust -----------------------------------------------------------------------------------------------------------


class TrustError(LazyfsError):
    """Base of failed verification: bytes that are not what a digest promised."""


class DigestMismatch(TrustError):
    """Bytes whose sha256 is not the one that was promised."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(f"{what} has digest {actual}, not {expected} as promised: it was damaged or tampered with")
        self.what = what
        self.expected = expected
        self.actual = actual


class DiffIdMismatch(TrustError):
    """A layer whose decompressed bytes do not have the diff ID of the image config."""

    def __init__(self, layer: str, expected: str, actual: str) -> None:
        super().__init__(f"layer {layer} unpacks to {actual}, but the image config declares diff ID {expected}")
        self.layer = layer
        self.expected = expected
        self.actual = actual


class TocMismatch(TrustError):
    """A TOC that tells of an entry something else than the layer's tar does."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"the TOC of layer {layer} does not describe its tar: {reason}")
        self.layer = layer


class LayerQuarantined(TrustError):
    """A layer found false by an earlier check; nothing is read from it any more."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"layer {layer} is quarantined: {reason}")
        self.layer = layer
        self.reason = reason


# -- formats ---------------------------------------------------------------------------------------------------------


class FormatError(LazyfsError):
    """Base of malformed input: documents, blobs and files that break their format."""


class DocumentInvalid(FormatError):
    """A manifest, index or image config that is not what the OCI specification says."""


class FooterInvalid(FormatError):
    """A blob's last bytes are no footer that we read."""


class TocInvalid(FormatError):
    """A TOC that breaks a rule of the format or one of our bounds."""


class TarInvalid(FormatError):
    """A tar stream that can't be a layer. `entry` names the offender (printable form)."""

    def __init__(self, reason: str, entry: bytes = b"") -> None:
        shown = entry.decode("utf-8", "backslashreplace")
        super().__init__(f"tar entry {shown!r}: {reason}" if entry else f"tar stream: {reason}")
        self.entry = entry


class FrameInvalid(FormatError):
    """A zstd frame or gzip member that does not decode, or decodes to another size than promised."""


class TraceInvalid(FormatError):
    """A trace that is malformed, or beyond one of our bounds."""


class TableInvalid(FormatError):
    """A layer table or tree file of another version, or damaged. It is rebuilt, never repaired."""


# -- local store -----------------------------------------------------------------------------------------------------


class StoreError(LazyfsError):
    """Base of what goes wrong with the local store directory."""


class StoreLocked(StoreError):
    """Another daemon holds the store."""


class StoreFull(StoreError):
    """ENOSPC or EDQUOT where there is no way around it (a table, the database, a file being written)."""


class StoreBroken(StoreError):
    """The store's disk or database fails."""


# -- snapshots -------------------------------------------------------------------------------------------------------


class SnapshotError(LazyfsError):
    """Base of what a client of the snapshotter may ask in vain. `key` names the snapshot."""

    def __init__(self, key: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.key = key


class SnapshotMissing(SnapshotError):
    """There is no snapshot of that name, or its parent is gone."""


class SnapshotExists(SnapshotError):
    """A snapshot of that name is there already; for an extraction: its layer is, and nothing has to be downloaded."""


class SnapshotUnfit(SnapshotError):
    """The snapshot is of the wrong kind for this, or others stand on it."""


class SnapshotInvalid(SnapshotError):
    """A request that makes no sense whatever snapshots there are: an empty key, a filter that can't be parsed."""


# -- reading ---------------------------------------------------------------------------------------------------------


class ReadDeadline(LazyfsError):
    """`read_timeout` passed before a chunk was there."""

    temporary = True

    def __init__(self, seconds: float, last: str = "") -> None:
        super().__init__(f"no bytes within {seconds:.0f} s{': ' + last if last else ''}")
        self.seconds = seconds


# -- mounts, daemon, containers --------------------------------------------------------------------------------------


class FuseUnavailable(LazyfsError):
    """No /dev/fuse, no pyfuse3, or no permission to mount."""


class MountPointInvalid(LazyfsError):
    """A mount point that is missing, not a directory, busy, or not ours."""

    def __init__(self, path: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"mount point {path} {reason}", hint=hint)
        self.path = path


class MountFailed(LazyfsError):
    """mount(2) or umount(2) refused. `errno` is the kernel's."""

    def __init__(self, message: str, *, errno: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class DaemonUnreachable(LazyfsError):
    """lazyfsd does not answer on its control socket, or did not start."""


class DaemonFault(LazyfsError):
    """lazyfsd answered with an error of a kind that this client doesn't know, or broke the protocol."""


class ToolMissing(LazyfsError):
    """A program that a command needs is not installed. `tool` names it."""

    def __init__(self, tool: str, *, hint: str = "") -> None:
        super().__init__(f"{tool} is not installed", hint=hint)
        self.tool = tool


class ContainerFailed(LazyfsError):
    """The container could not be set up or started. `status` is docker's exit status for it: 125, 126 or 127."""

    def __init__(self, message: str, *, hint: str = "", status: int = 125) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class Interrupted(LazyfsError):
    """The user or the system asked us to stop (SIGINT, SIGTERM)."""


def first_of(group: BaseExceptionGroup[E]) -> E:
    """Return the first exception in a group, however deep: side by side, one reason is what a caller wants to hear."""
    found: BaseExceptionGroup[E] | E = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def leaf_classes(base: type[LazyfsError] = LazyfsError) -> list[type[LazyfsError]]:
    """Every error class without subclasses, for the tests of the three border tables."""
    below = base.__subclasses__()
    return [leaf for sub in below for leaf in leaf_classes(sub)] if below else [base]
