"""containerd's content store: what it has of a blob, its bytes by range, and writing a blob into it.

Source: containerd, api/services/content/v1 (offsets and sizes are bytes of the blob).
"""

from __future__ import annotations

import io
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from lazyfs.containerd.calls import Calls, Method, Refused, following
from lazyfs.containerd.proto import content_pb2 as messages
from lazyfs.errors import BadAnswer, BlobMissing, LazyfsError, PushRejected, RegistryTimeout, StoreBroken
from lazyfs.limits import SLOWEST_TRANSFER, WRITER_TIMEOUT

_SERVICE = "/containerd.services.content.v1.Content/"
_INFO = Method(_SERVICE + "Info", messages.InfoRequest, messages.InfoResponse)
_UPDATE = Method(_SERVICE + "Update", messages.UpdateRequest, messages.UpdateResponse)
_READ = Method(_SERVICE + "Read", messages.ReadContentRequest, messages.ReadContentResponse)
_STATUS = Method(_SERVICE + "Status", messages.StatusRequest, messages.StatusResponse)
_WRITE = Method(_SERVICE + "Write", messages.WriteContentRequest, messages.WriteContentResponse)
_ABORT = Method(_SERVICE + "Abort", messages.AbortRequest, messages.StatusResponse)

PIECE = 1 << 20  # bytes of a blob in one message
_LOCK_POLL = 0.1  # seconds


class Source(Protocol):
    """Where a blob's bytes come from: as much of a binary file as is needed."""

    def read(self, size: int, /) -> bytes: ...

    def seekable(self) -> bool: ...

    def tell(self) -> int: ...

    def seek(self, offset: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What the store knows of a blob: bytes, and labels."""

    digest: str
    size: int
    labels: dict[str, str]


class ContentStream:
    """A ByteStream over a range of a blob, as containerd sends it. Owns the call."""

    def __init__(self, calls: Calls, call: Any, digest: str, size: int) -> None:
        self._calls = calls
        self._call = call
        self._digest = digest
        self._left = size  # bytes not yet returned
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end. Raise RegistryError."""
        if not self._left:
            return b""
        while not self._rest:
            try:
                answer = following(self._call)
            except Refused as error:
                raise _missing_or(self._calls, self._digest, error) from None
            if answer is None:
                raise BadAnswer(
                    self._calls.address,
                    f"containerd's blob {self._digest} is {self._left} bytes shorter than asked for",
                )
            self._rest = memoryview(answer.data)
            if len(self._rest) > self._left:
                raise BadAnswer(self._calls.address, f"containerd sent more of {self._digest} than asked for")
        data = bytes(self._rest[:size])
        self._rest = self._rest[len(data) :]
        self._left -= len(data)
        return data

    def reject(self, reason: str) -> None:
        """There is no other source to turn to."""

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ContentStore:
    """The content store of one namespace. Thread-safe; every call blocks and raises RegistryErrors."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def info(self, digest: str, *, deadline: float | None = None) -> BlobInfo | None:
        """Return what the store knows of a blob, None when it doesn't have it (whole)."""
        try:
            found = self._calls.one(_INFO, messages.InfoRequest(digest=digest), deadline=deadline).info
        except Refused as error:
            if error.code == "NOT_FOUND":
                return None
            raise self._calls.fault(f"looking for blob {digest}", error) from None
        return BlobInfo(found.digest, found.size, dict(found.labels))

    def read(self, digest: str, offset: int, size: int, *, deadline: float | None = None) -> ContentStream:
        """Start reading `size` bytes at `offset`. The stream raises BlobMissing where there is no such blob."""
        if not size:  # to containerd 0 means "all"
            return ContentStream(self._calls, None, digest, 0)
        question = messages.ReadContentRequest(digest=digest, offset=offset, size=size)
        call = self._calls.answers(_READ, question, deadline=self._limit(deadline, size))
        return ContentStream(self._calls, call, digest, size)

    def label(self, digest: str, labels: dict[str, str]) -> None:
        """Add labels to a blob; others stay. Raise BlobMissing."""
        question = messages.UpdateRequest(info=messages.Info(digest=digest, labels=labels))
        question.update_mask.paths.extend(f"labels.{key}" for key in sorted(labels))
        try:
            self._calls.one(_UPDATE, question)
        except Refused as error:
            raise _missing_or(self._calls, digest, error) from None

    def take_over(self, digest: str, size: int, lease: str) -> bool:
        """Have a blob here that another namespace has, and hold it by `lease`; no byte is sent.

        False when it is nowhere, or when this containerd's namespaces share no content.
        """
        # Where content is shared, containerd says of a blob that it has elsewhere that all of it was uploaded already.
        upload = _Upload(self._calls, digest, size, io.BytesIO(), {}, f"lazyfs-take-{digest}")
        try:
            upload.run(lease, None)
            return True  # committed, or here before
        except PushRejected:  # bytes were asked for
            self.abort(upload.ref)
            return False
        except Refused as error:
            if _is_locked(error):
                return False
            raise self._calls.fault(f"taking over blob {digest}", error) from None

    def write(
        self,
        digest: str,
        size: int,
        source: Source,
        *,
        labels: dict[str, str] | None = None,
        lease: str = "",
        deadline: float | None = None,
        ref: str = "",
    ) -> bool:
        """Write a blob from where `source` stands; False when it was there already, now held by `lease`.

        An upload that broke off earlier is gone on with. containerd hashes what it gets: PushRejected for bytes of
        another digest or size. With a `source` that can't seek a failed upload fails for good. `ref` names the upload:
        two of one name wait for each other, as long as the other one gets on.
        """
        start = source.tell() if source.seekable() else None
        until = time.monotonic() + WRITER_TIMEOUT
        seen = -1
        deadline = self._limit(deadline, size)
        fresh = False
        while True:
            upload = _Upload(self._calls, digest, size, source, labels or {}, ref)
            try:
                return upload.run(lease, deadline)
            except Refused as error:
                if _is_locked(error) and not upload.touched:
                    there = self.uploaded(upload.ref)
                    if there != seen:
                        seen, until = there, time.monotonic() + WRITER_TIMEOUT
                    if time.monotonic() > min(until, deadline):
                        raise RegistryTimeout(
                            self._calls.address,
                            f"another process has been writing blob {digest} to containerd for long",
                        ) from None
                    time.sleep(_LOCK_POLL)
                elif error.code in ("FAILED_PRECONDITION", "OUT_OF_RANGE"):
                    self.abort(upload.ref)
                    if fresh or start is None or not upload.resumed:
                        raise PushRejected(
                            self._calls.address, f"containerd refused blob {digest}: {error.detail[:300]}"
                        ) from None
                    fresh = True  # what was there of it before was no part of it
                else:
                    raise self._calls.fault(f"writing blob {digest}", error) from None
                if start is not None:
                    source.seek(start)

    def _limit(self, deadline: float | None, size: int) -> float:
        return deadline if deadline is not None else time.monotonic() + self._calls.timeout + size / SLOWEST_TRANSFER

    def uploaded(self, ref: str) -> int:
        """Return how many bytes of an upload under way are here; 0 where there is none."""
        try:
            return self._calls.one(_STATUS, messages.StatusRequest(ref=ref)).status.offset
        except Refused as error:
            if error.code == "NOT_FOUND":
                return 0
            raise self._calls.fault(f"looking for the upload {ref}", error) from None

    def abort(self, ref: str) -> None:
        """Forget an upload under way, if there is one."""
        try:
            self._calls.one(_ABORT, messages.AbortRequest(ref=ref))
        except Refused as error:
            if error.code != "NOT_FOUND":
                raise self._calls.fault(f"forgetting the upload {ref}", error) from None


class _Upload:
    """One try at writing a blob: STAT, whose answer says how much is there, then the rest, then COMMIT."""

    def __init__(
        self, calls: Calls, digest: str, size: int, source: Source, labels: dict[str, str], ref: str = ""
    ) -> None:
        self.ref = ref or f"lazyfs-{digest}"
        self.touched = False  # the source was read from
        self.resumed = False  # an earlier upload was gone on with
        self._calls = calls
        self._digest = digest
        self._size = size
        self._source = source
        self._labels = labels
        self._offset: queue.SimpleQueue[int] = queue.SimpleQueue()  # from the answer to STAT; -1: stop
        self._failed: BaseException | None = None

    def run(self, lease: str, deadline: float | None) -> bool:
        call = self._calls.exchange(_WRITE, self._questions(), lease=lease, deadline=deadline)
        committed = False
        try:
            first = following(call)
            if first is None:
                raise BadAnswer(self._calls.address, f"containerd ended the upload of {self._digest} at once")
            self.resumed = first.offset > 0
            self._offset.put(first.offset)
            while (answer := following(call)) is not None:
                committed = answer.action == messages.COMMIT
        except Refused as error:
            if error.code == "ALREADY_EXISTS":
                return False
            self._raise_own()
            raise
        finally:
            self._offset.put(-1)
            call.cancel()
        self._raise_own()
        if not committed:
            raise BadAnswer(self._calls.address, f"containerd ended the upload of {self._digest} too early")
        return True

    def _raise_own(self) -> None:
        """Raise what went wrong on our side, which gRPC can't tell."""
        error = self._failed
        if isinstance(error, OSError):
            raise StoreBroken(f"blob {self._digest} can't be read: {error.strerror}") from None
        if error is not None:
            raise error

    def _questions(self) -> Iterator[messages.WriteContentRequest]:
        yield messages.WriteContentRequest(action=messages.STAT, ref=self.ref, total=self._size, expected=self._digest)
        at = self._offset.get()
        if at < 0:
            return
        try:
            yield from self._rest(at)
        except (OSError, LazyfsError) as error:
            self._failed = error

    def _rest(self, at: int) -> Iterator[messages.WriteContentRequest]:
        self.touched = True
        skip = at if at < self._size else 0
        if skip and self._source.seekable():
            self._source.seek(self._source.tell() + skip)
            skip = 0
        while skip:
            skip -= len(self._read(skip))
        while at < self._size:
            data = self._read(self._size - at)
            yield messages.WriteContentRequest(action=messages.WRITE, ref=self.ref, offset=at, data=data)
            at += len(data)
        yield messages.WriteContentRequest(
            action=messages.COMMIT,
            ref=self.ref,
            total=self._size,
            expected=self._digest,
            offset=at,
            labels=self._labels,
        )

    def _read(self, size: int) -> bytes:
        data = self._source.read(min(size, PIECE))
        if not data:
            raise PushRejected(self._calls.address, f"the bytes for blob {self._digest} are too few")
        return data


def _is_locked(error: Refused) -> bool:
    return error.code == "UNAVAILABLE" and "locked" in error.detail


def _missing_or(calls: Calls, digest: str, error: Refused) -> LazyfsError:
    if error.code == "NOT_FOUND":
        return BlobMissing(
            calls.address,
            f"containerd (namespace {calls.namespace}) does not have blob {digest}",
            hint="it was pulled lazily or for another platform, or its content was discarded: "
            "`lazyfs fetch --content IMAGE` gets it",
        )
    if error.code == "OUT_OF_RANGE":
        return BadAnswer(calls.address, f"containerd has fewer bytes of {digest} than asked for")
    return calls.fault(f"reading blob {digest}", error)
