"""A range of a blob that is read from one source after another, resumed where the last one stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lazyfs.errors import BadAnswer, RegistryError
from lazyfs.registry.health import Health
from lazyfs.registry.repository import ByteStream

log = logging.getLogger(__name__)

# (blob_offset, size, hosts to be passed by) -> (stream, host that sends). Raises RegistryError.
Begin = Callable[[int, int, frozenset[str]], tuple[ByteStream, str]]


class RelayedStream(ByteStream):
    """A range that is read from one member after another. The ByteStream protocol."""

    def __init__(
        self, begin: Begin, health: Health, digest: str, blob_offset: int, size: int, limit: float, tries: int
    ) -> None:
        """`begin` starts the rest at a source. `limit` is a time.monotonic() value,
        `tries` the failures in a row after which it gives up. The first source is asked here. Raise RegistryError.
        """
        self._begin = begin
        self._health = health
        self._digest = digest
        self._at = blob_offset
        self._left = size
        self._limit = limit
        self._tries = tries
        self._stream: ByteStream | None = None
        self._host = ""  # of the source that sends, or sent last
        self._passed_by: set[str] = set()  # hosts that failed in this stream
        self._futile = 0  # failures in a row without a byte between them
        self._got = 0  # bytes of the source that sends
        self._waited = 0.0  # seconds that they took
        if size:
            self._open()

    def _open(self) -> ByteStream:
        self._stream, self._host = self._begin(self._at, self._left, frozenset(self._passed_by))
        self._got, self._waited = 0, 0.0
        return self._stream

    def read(self, size: int) -> bytes:
        while self._left:
            stream = self._stream or self._open()
            began = time.monotonic()
            try:
                data = stream.read(min(size, self._left))
                if not data:
                    raise BadAnswer(self._host, f"{self._host} sent {self._left} bytes too few of blob {self._digest}")
            except RegistryError as error:
                self._fail(error)
                continue
            self._waited += time.monotonic() - began
            self._got += len(data)
            self._at += len(data)
            self._left -= len(data)
            self._futile = 0
            if not self._left:
                self._leave()
                self._health.note_done(self._host)
            return data
        return b""

    def _fail(self, error: RegistryError) -> None:
        self._health.note_error(self._host, self._digest, error)
        self._leave()
        self._passed_by.add(self._host)
        self._futile += 1
        if time.monotonic() >= self._limit or self._futile > self._tries:
            raise error
        log.info("%s failed after %d bytes, going on elsewhere: %s", self._host, self._got, error)

    def _leave(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            if self._got:
                self._health.note_body(self._host, self._digest, self._got, self._waited)

    def reject(self, reason: str) -> None:
        if not self._host:
            return
        host = self._host
        self._leave()
        self._passed_by.add(host)
        self._health.note_lie(host, self._digest, reason)

    def close(self) -> None:
        self._leave()
