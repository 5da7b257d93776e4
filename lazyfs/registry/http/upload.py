"""Pushing: POST for an upload session, then the whole blob in one PUT; manifests in one PUT.

Two requests a blob, which every registry takes (distribution-spec 1.1, "POST then PUT"). Bodies stream. After a failure
the registry is asked what it has of the upload; one that keeps nothing, as Debian's, gets it from the start.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import quote

from lazyfs import digest as digests
from lazyfs.errors import BadAnswer, PushRejected, RegistryError, UsageError
from lazyfs.registry.http.exchange import Body, Exchange, follow_location
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.status import error_for, registry_words
from lazyfs.registry.http.transport import Answer, host_of

PIECE = 256 << 10  # bytes per write to the socket


class _Source:
    """`size` bytes of a file from where it stands, again and again if it can seek."""

    def __init__(self, file: BinaryIO, size: int, what: str) -> None:
        self._file = file
        self.size = size
        self._what = what
        self._used = False
        try:
            self._start: int | None = file.tell() if file.seekable() else None
        except (OSError, io.UnsupportedOperation):
            self._start = None

    @property
    def repeatable(self) -> bool:
        """Whether open() works: for the first time, or again."""
        return self._start is not None or not self._used

    def open(self, skip: int = 0) -> bytes | _Pieces:
        """Return the content without its first `skip` bytes, which takes a source that can seek."""
        if not self.repeatable:
            raise UsageError(f"{self._what} can't be sent again from a source that can't seek")
        if (self._used or skip) and self._start is not None:
            self._file.seek(self._start + skip)
        self._used = True
        left = self.size - skip
        return _Pieces(self._file, left, self._what) if left else b""


class _Pieces:
    """An iterable with a length, which requests sends as a stream with a Content-Length."""

    def __init__(self, file: BinaryIO, size: int, what: str) -> None:
        self._file = file
        self._size = size
        self._what = what

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        left = self._size
        while left:
            try:
                piece = self._file.read(min(PIECE, left))
            except OSError as error:
                raise UsageError(f"{self._what} can't be read while it is sent: {error}") from None
            if not piece:
                raise UsageError(f"{self._what} ends {left} bytes before its size")
            left -= len(piece)
            yield piece


class Uploader:
    """Uploads to one repository, the one whose URL is `root` (".../v2/NAME"). Thread-safe; every call blocks."""

    def __init__(self, exchange: Exchange, retry: RetryPolicy, root: str) -> None:
        self._exchange = exchange
        self._retry = retry
        self._root = root

    def blob(self, digest: str, size: int, source: BinaryIO) -> None:
        """Upload `size` bytes of `source`. Raise PushRejected, and UsageError when the source fails or is too short.

        An upload that broke off goes on where it was, where the registry tells how much of it it has.
        """
        what = f"upload of {digest}"
        limit = self._exchange.timeouts.deadline(None, size)
        content = _Source(source, size, what)
        location = ""  # of an upload that was begun

        def attempt() -> None:
            nonlocal location
            location, sent = self._left_at(location, content, what, limit)
            location = location or self._begin(what, limit)
            try:
                self._send(location, digest, content, sent, what, limit)
            except RegistryError as error:
                if isinstance(error, PushRejected) and sent:
                    location, error.temporary = "", True  # it had other bytes than it said: from the start again
                if not content.repeatable:
                    error.temporary = False
                raise

        self._retry.run(attempt, limit)

    def _left_at(self, location: str, content: _Source, what: str, deadline: float) -> tuple[str, int]:
        """Return where an upload goes on, and how many bytes the registry has of it; ("", 0) to begin anew."""
        if not location or not content.repeatable:
            return "", 0
        try:
            answer = self._exchange.ask("GET", location, kind="upload", what=what, deadline=deadline, pushes=True)
            answer.discard()
            told = re.fullmatch(r"(?:bytes=)?0-([0-9]{1,15})", answer.headers.get("Range", ""))
            # "0-0" is said of nothing and of one byte.
            if answer.status not in (202, 204) or told is None or not 0 < int(told[1]) < content.size:
                return "", 0
            return follow_location(answer, answer.headers.get("Location", "") or location), int(told[1]) + 1
        except RegistryError:
            return "", 0

    def _begin(self, what: str, deadline: float) -> str:
        session = self._exchange.ask(
            "POST",
            f"{self._root}/blobs/uploads/",
            kind="upload",
            what=what,
            deadline=deadline,
            body=Body(0, lambda: b""),
            pushes=True,
        )
        if session.status not in (201, 202):
            raise _rejected(session)
        session.discard()
        return follow_location(session, session.headers.get("Location", ""))

    def _send(self, location: str, digest: str, content: _Source, sent: int, what: str, deadline: float) -> None:
        joint = "&" if "?" in location else "?"
        headers = {"Content-Type": "application/octet-stream"}
        if 0 < sent < content.size:
            headers["Content-Range"] = f"{sent}-{content.size - 1}"
        answer = self._exchange.ask(
            "PUT",
            f"{location}{joint}digest={quote(digest, safe='')}",
            kind="upload",
            what=what,
            deadline=deadline,
            headers=headers,
            body=Body(content.size - sent, lambda: content.open(sent)),
            pushes=True,
        )
        _check_stored(answer, digest)

    def mount(self, digest: str, source: str) -> bool:
        """Have the registry take over a blob of its repository `source`. False when it won't (distribution-spec)."""
        what = f"mount of {digest} from {source}"
        limit = self._exchange.timeouts.deadline(None)

        def attempt() -> bool:
            answer = self._exchange.ask(
                "POST",
                f"{self._root}/blobs/uploads/?mount={quote(digest, safe='')}&from={quote(source, safe='')}",
                kind="upload",
                what=what,
                deadline=limit,
                body=Body(0, lambda: b""),
                pushes=True,
            )
            if answer.status == 201:
                _check_stored(answer, digest)
                return True
            if answer.status != 202:
                raise _rejected(answer)
            answer.discard()
            # An ordinary upload was begun instead; it is given up, and whoever pushes begins his own.
            location = follow_location(answer, answer.headers.get("Location", ""))
            if host_of(location) == answer.host:  # nothing is deleted on another host because a registry says so
                self._exchange.ask(
                    "DELETE", location, kind="upload", what=f"end of the {what}", deadline=limit, pushes=True
                ).discard()
            return False

        return self._retry.run(attempt, limit)

    def manifest(self, target: str, media_type: str, raw: bytes) -> bool:
        """Store a manifest or index under a tag or its digest. Raise PushRejected.

        Returns whether the registry listed it among the referrers of its subject.
        """
        limit = self._exchange.timeouts.deadline(None, len(raw))

        def attempt() -> bool:
            answer = self._exchange.ask(
                "PUT",
                f"{self._root}/manifests/{quote(target, safe=':')}",
                kind="upload",
                what=f"upload of manifest {target}",
                deadline=limit,
                headers={"Content-Type": media_type},
                body=Body(len(raw), lambda: raw),
                pushes=True,
            )
            _check_stored(answer, digests.of(raw))
            return "OCI-Subject" in answer.headers

        return self._retry.run(attempt, limit)


def _check_stored(answer: Answer, digest: str) -> None:
    if answer.status not in (200, 201, 202, 204):
        raise _rejected(answer)
    answer.discard()
    stored = answer.headers.get("Docker-Content-Digest", "")
    if digests.is_digest(stored) and stored != digest:
        raise BadAnswer(answer.host, f"{answer.host} stored the {answer.what} under another digest: {stored}")


def _rejected(answer: Answer) -> RegistryError:
    if answer.status in (408, 429) or answer.status >= 500 or answer.status in (401, 403):
        return error_for(answer)
    said = registry_words(answer.discard())
    detail = f": {said}" if said else ""
    return PushRejected(answer.host, f"{answer.host} rejected the {answer.what} with status {answer.status}{detail}")
