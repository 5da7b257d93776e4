"""Ranges of local files as byte streams: what layouts and archives are read through."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lazyfs.errors import BadAnswer, DocumentInvalid, RegistryFault
from lazyfs.registry.repository import ByteStream

PIECE = 256 << 10  # bytes per read


@dataclass(frozen=True, slots=True)
class OpenRange:
    """`size` bytes at `offset` of an open file. Whoever gets it owns the descriptor."""

    descriptor: int
    offset: int
    size: int

    def close(self) -> None:
        os.close(self.descriptor)


class FileStream(ByteStream):
    """A ByteStream over a range of an open file. Owns the descriptor; reads by pread, so nothing is shared."""

    def __init__(self, descriptor: int, offset: int, size: int, host: str, what: str) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._left = size
        self._host = host
        self._what = what

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end. Raise BadAnswer when the file is too short, RegistryFault (EIO)."""
        if not self._left or self._descriptor < 0:
            return b""
        try:
            data = os.pread(self._descriptor, min(size, self._left, PIECE), self._offset)
        except OSError as error:
            raise fault(self._host, self._what, error) from None
        if not data:
            raise BadAnswer(self._host, f"{self._what} in {self._host} is {self._left} bytes shorter than asked for")
        self._offset += len(data)
        self._left -= len(data)
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def part_of(whole: OpenRange, blob_offset: int, size: int, host: str, what: str) -> FileStream:
    """Return `size` bytes at `blob_offset` of a range as a stream, which takes the range over. Raise BadAnswer."""
    if blob_offset + size > whole.size:
        whole.close()
        error = BadAnswer(host, f"{host} has no bytes {blob_offset}+{size} of {what}: it has {whole.size}")
        error.temporary = False
        raise error
    return FileStream(whole.descriptor, whole.offset + blob_offset, size, host, what)


def read_all(whole: OpenRange, limit: int, host: str, what: str) -> bytes:
    """Return all bytes of a range, which is closed. Raise DocumentInvalid for more than `limit`, BadAnswer."""
    with FileStream(whole.descriptor, whole.offset, whole.size, host, what) as stream:
        if whole.size > limit:
            raise DocumentInvalid(f"{what} in {host} has {whole.size} bytes, more than the {limit} allowed")
        return b"".join(iter(lambda: stream.read(PIECE), b""))


def fault(host: str, what: str, error: OSError) -> RegistryFault:
    """Return an error of the local disk as a fault of the "registry" that lies on it; no use to try again."""
    failed = RegistryFault(host, f"{what} in {host}: {error.strerror or error}", status=0)
    failed.temporary = False
    return failed
