"""Single byte ranges: the request's header, the checks of a 206, the body as a stream of exactly that many bytes."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict

from lazyfs.errors import BadAnswer
from lazyfs.limits import MAX_SIGNED
from lazyfs.registry.http.transport import Answer
from lazyfs.registry.repository import ByteStream

MAX_READ = 256 << 10  # bytes per read at most, so that a reader can decode while more comes

_CONTENT_RANGE = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)")


def range_header(blob_offset: int, size: int) -> dict[str, str]:
    """Return the header that asks for `size` > 0 bytes at `blob_offset`."""
    return {"Range": f"bytes={blob_offset}-{blob_offset + size - 1}"}


def check_range(answer: Answer, blob_offset: int, size: int) -> None:
    """Check that a 200 or 206 brings exactly the range asked for, as far as its header tells. Raise BadAnswer.

    200 is accepted for a whole blob only: offset 0 and a Content-Length of `size`.
    """
    host, what = answer.host, answer.what
    length = answer.headers.get("Content-Length", "")
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    wrong = ""
    if encoding not in ("identity", ""):
        wrong = f"{host} sent {what} with a Content-Encoding that nobody asked for"
    elif answer.status == 200:
        if blob_offset != 0 or length != str(size):
            wrong = f"{host} ignored the Range of a request for {what}: it does not serve ranges"
    else:
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        if match is None or (int(match[1]), int(match[2])) != (blob_offset, blob_offset + size - 1):
            wrong = f"{host} answered {what} with another range than {blob_offset}+{size}"
        elif length and length != str(size):
            wrong = f"{host} announced {length[:20]} bytes of {what} instead of {size}"
    if wrong:
        answer.close()
        raise BadAnswer(host, wrong)


class BodyStream(ByteStream):
    """A ByteStream over an answer that check_range() has passed. Gives exactly `size` bytes or raises."""

    def __init__(self, answer: Answer, size: int) -> None:
        self._answer = answer
        self._left = size

    def read(self, size: int) -> bytes:
        """Return 1 to min(`size`, MAX_READ) bytes, b"" after the last. Raise RegistryTimeout, BadAnswer."""
        if not self._left:
            return b""
        data = self._answer.read(min(size, self._left, MAX_READ))
        if not data:
            self.close()
            raise BadAnswer(
                self._answer.host, f"{self._answer.host} sent {self._left} bytes too few of {self._answer.what}"
            )
        self._left -= len(data)
        if not self._left:
            self._answer.finish()
        return data

    def close(self) -> None:
        self._answer.close()


class EmptyStream(ByteStream):
    """A ByteStream of no bytes: HTTP has no range for it."""

    def read(self, size: int) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing is held."""


class SignedUrls:
    """Where the registry redirected each blob to, the last MAX_SIGNED of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._urls: OrderedDict[str, str] = OrderedDict()

    def get(self, digest: str) -> str | None:
        with self._lock:
            if digest in self._urls:
                self._urls.move_to_end(digest)
            return self._urls.get(digest)

    def keep(self, digest: str, url: str) -> None:
        with self._lock:
            self._urls[digest] = url
            self._urls.move_to_end(digest)
            while len(self._urls) > MAX_SIGNED:
                self._urls.popitem(last=False)

    def forget(self, digest: str, url: str) -> None:
        """Drop `url` unless another thread has replaced it already."""
        with self._lock:
            if self._urls.get(digest) == url:
                del self._urls[digest]
