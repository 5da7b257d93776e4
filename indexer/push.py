"""Blobs to the destination, side by side; the manifest goes last, by the caller, so an image is there whole or not."""

from __future__ import annotations

import io
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lazyfs.errors import StoreBroken
from lazyfs.registry.repository import Repository

_UPLOADS = 4  # at once


@dataclass(frozen=True, slots=True)
class Upload:
    """A blob to be pushed: in a file, or in memory."""

    digest: str
    size: int
    content: Path | bytes


def push_blobs(destination: Repository, uploads: list[Upload]) -> int:
    """Push what is not there yet. Return the bytes that had to be sent.

    Blocks until all are there. The first failure is raised, when the uploads under way have ended: PushRejected,
    other RegistryErrors, StoreBroken when a file can't be read.
    """
    unique = {upload.digest: upload for upload in uploads}
    with ThreadPoolExecutor(_UPLOADS, "push") as pool:
        futures: list[Future[int]] = [pool.submit(_push, destination, upload) for upload in unique.values()]
        try:
            return sum(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _push(destination: Repository, upload: Upload) -> int:
    with _open(upload) as source:
        return upload.size if destination.push_blob(upload.digest, upload.size, source) else 0


def _open(upload: Upload) -> BinaryIO:
    if isinstance(upload.content, bytes):
        return io.BytesIO(upload.content)
    try:
        return upload.content.open("rb")
    except OSError as error:
        raise StoreBroken(f"the converted layer can't be read back: {error.strerror}") from None
