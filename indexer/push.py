"""Blobs to the destination, side by side; the manifest goes last, by the caller, so an image is there whole or not."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from indexer.threads import side_by_side
from lazyfs.errors import RegistryError, StoreBroken
from lazyfs.limits import UPLOADS
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Upload:
    """A blob to be brought to the destination: out of a file, memory, or another repository.

    `holder` is a repository that has it, from which a registry may take it over. Without `content`, `fetch` gets it
    from there where the registry won't: it returns a file with the blob, verified.
    """

    digest: str
    size: int
    content: Path | bytes | None
    holder: Repository | None = None
    fetch: Callable[[], Path] | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of blobs: uploaded, and taken over by the registry from another of its repositories."""

    pushed: int
    mounted: int


def push_blobs(destination: Repository, uploads: list[Upload]) -> Moved:
    """Bring to the destination what is not there yet.

    First blobs are taken over from other repositories, and those that a registry won't take over are fetched and
    verified; only then anything is sent. Blocks until all are there. The first failure is raised, when the uploads
    under way have ended: PushRejected, other RegistryErrors, StoreBroken when a file can't be read, and what `fetch`
    raises.
    """
    unique = list({upload.digest: upload for upload in uploads}.values())
    settled = side_by_side(lambda upload: _settle(destination, upload), unique, UPLOADS, "push")
    waiting = [upload for upload in settled if upload is not None]
    mounted = sum(before.size for before, after in zip(unique, settled, strict=True) if after is None)
    pushed = sum(side_by_side(lambda upload: _push(destination, upload), waiting, UPLOADS, "push"))
    return Moved(pushed, mounted)


def _settle(destination: Repository, upload: Upload) -> Upload | None:
    """Return the upload with its content, or None once the registry has taken the blob over."""
    if upload.holder is not None:
        try:
            if destination.mount_blob(upload.digest, upload.size, upload.holder):
                return None
        except RegistryError as error:  # a registry without mounts; an upload says what is really wrong
            log.info("%s is not taken over from %s: %s", upload.digest, upload.holder.name, error)
    if upload.content is None:
        assert upload.fetch is not None
        return replace(upload, content=upload.fetch())
    return upload


def _push(destination: Repository, upload: Upload) -> int:
    with _open(upload) as source:
        return upload.size if destination.push_blob(upload.digest, upload.size, source) else 0


def _open(upload: Upload) -> BinaryIO:
    if isinstance(upload.content, bytes):
        return io.BytesIO(upload.content)
    assert upload.content is not None
    try:
        return upload.content.open("rb")
    except OSError as error:
        raise StoreBroken(f"the converted layer can't be read back: {error.strerror}") from None
