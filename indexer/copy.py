"""Blobs that are taken over as they are: by the registry itself where it can, else fetched and verified."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from indexer.options import ConvertOptions
from indexer.push import Upload
from indexer.source import BlobSource, Pump, decompressed
from indexer.work import WorkDirectory
from lazyfs import oci
from lazyfs.errors import DiffIdMismatch, DigestMismatch, FrameInvalid, StoreBroken
from lazyfs.registry.mirrored import read_again
from lazyfs.registry.repository import Repository


class Copier:
    """Takes over blobs of `source` for `destination`. Thread-safe; blocks."""

    def __init__(
        self,
        source: Repository,
        destination: Repository,
        options: ConvertOptions,
        work: WorkDirectory,
        cancelled: threading.Event,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._work = work
        self._cancelled = cancelled

    def take(self, blob: oci.Descriptor, diff_id: str = "") -> Upload | None:
        """Return how the blob comes to the destination, None when it is there.

        Where the destination's registry has it in another repository, its bytes are not looked at unless it won't take
        them over; else they are fetched and verified now, `diff_id` included. Raise RegistryError, DigestMismatch,
        DiffIdMismatch, FrameInvalid, StoreBroken.
        """
        if self._destination.has_blob(blob.digest):
            return None
        if self._source.host == self._destination.host:
            return Upload(blob.digest, blob.size, None, self._source, lambda: self.fetch(blob, diff_id))
        return Upload(blob.digest, blob.size, self.fetch(blob, diff_id))

    def fetch(self, blob: oci.Descriptor, diff_id: str = "") -> Path:
        """Copy a blob to a file of this run unchanged, verifying its digest and its diff ID if there is one."""
        return read_again(
            self._source, blob.digest, partial(self._fetch, blob, diff_id), (DigestMismatch, FrameInvalid)
        )

    def _fetch(self, blob: oci.Descriptor, diff_id: str) -> Path:
        path = self._work.new_file(blob.digest)
        with self._options.progress(blob.digest[7:19], blob.size) as progress, create(path) as target:
            source = BlobSource(self._source, blob, progress.advance)
            if not diff_id:
                for block in Pump(source.blocks(), self._cancelled):
                    _write(target, block)
                check_digest(blob, source.digest)
                return path
            unpacked = hashlib.sha256()
            for block in Pump(decompressed(source, copy=target), self._cancelled):
                unpacked.update(block)
        check_digest(blob, source.digest)
        check_diff_id(blob, diff_id, "sha256:" + unpacked.hexdigest())
        return path


def check_digest(blob: oci.Descriptor, actual: str) -> None:
    """Raise DigestMismatch unless a blob has the digest promised."""
    if actual != blob.digest:
        raise DigestMismatch("layer", blob.digest, actual)


def check_diff_id(layer: oci.Descriptor, diff_id: str, actual: str) -> None:
    """Raise DiffIdMismatch unless a layer unpacks to what the image's config promises."""
    if actual != diff_id:
        raise DiffIdMismatch(layer.digest, diff_id, actual)


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file for writing. Raise StoreBroken, also for a disk that is full when the last bytes go to it."""
    try:
        target = path.open("wb")
    except OSError as error:
        raise StoreBroken(f"a temporary file can't be made: {error.strerror}") from None
    try:
        yield target
    except BaseException:
        with suppress(OSError):
            target.close()
        raise
    try:
        target.close()
    except OSError as error:
        raise StoreBroken(f"a temporary file can't be written: {error.strerror}") from None


def _write(target: BinaryIO, block: bytes) -> None:
    try:
        target.write(block)
    except OSError as error:
        raise StoreBroken(f"a temporary file can't be written: {error.strerror}") from None
