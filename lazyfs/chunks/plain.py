"""Plain layers, those without a TOC that we read: unpacked whole into chunks and a layer table, checked on the way.

The work is done in a process of its own (`unpack`), fed with the blob through a pipe: hashing, inflating and parsing
don't hold the daemon up, and what the tar makes of memory goes away with it. The result has the shape of every other
layer, so that it is mapped, verified on each read, and evictable.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lazyfs.child import command, read_answer
from lazyfs.chunks.lines import Lines
from lazyfs.chunks.whole_blob import WholeBlob
from lazyfs.errors import StoreBroken, TarInvalid
from lazyfs.limits import UNPACK_CPU, UNPACK_CPU_RATE, UNPACK_WAIT
from lazyfs.registry.repository import Repository
from lazyfs.units import MiB

_PIPE = MiB  # bytes that the pipe to the child holds, where the kernel lets us
# Blocks of a megabyte come and go a thousand times: glibc is not to give each back to the kernel and fault it in again.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * MiB), "MALLOC_TRIM_THRESHOLD_": str(128 * MiB)}


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """What to unpack and what it must turn out to be. Sizes in bytes."""

    blob_digest: str
    blob_size: int
    diff_id: str
    data: Path  # chunks go here, in data space
    table: Path
    deadline: float | None = None  # of the requests for it; None: what they usually have


def unpack_plain(
    repository: Repository, layer: PlainLayer, on_bytes: Callable[[int], None], lines: Lines | None = None
) -> None:
    """Fetch a whole blob and unpack it into `layer.data` and `layer.table`. Blocking, for as long as the fetch takes.

    `on_bytes` is told how many bytes of the blob each block had; what it raises ends the work. `lines` lends
    connections; without it there is one. Raise RegistryError, DigestMismatch, DiffIdMismatch, FormatError or
    StoreError; then neither file counts.
    """
    job = {
        "blob_digest": layer.blob_digest, "blob_size": layer.blob_size, "diff_id": layer.diff_id,
        "data": os.fspath(layer.data), "table": os.fspath(layer.table),
        "seconds": UNPACK_CPU + layer.blob_size // UNPACK_CPU_RATE,
    }  # fmt: skip
    words = command("lazyfs.chunks.unpack", json.dumps(job))
    try:
        # Unbuffered: what is left in a buffer would be written when the pipe is closed, and fail there.
        child = subprocess.Popen(
            words,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | _MALLOC,
        )
    except OSError as error:
        raise StoreBroken(f"the unpacker can't be started: {error.strerror}") from None
    with child:
        assert child.stdin is not None
        _widen(child.stdin)
        os.set_blocking(child.stdin.fileno(), False)  # our end alone
        try:
            blob = WholeBlob(repository, layer.blob_digest, layer.blob_size, lines or Lines(0), deadline=layer.deadline)
            with closing(iter(blob)) as blocks:
                for block in blocks:
                    _write(child.stdin, block, layer.blob_digest)
                    on_bytes(len(block))
        except BrokenPipeError:
            pass  # the child gave up; its answer says why
        except BaseException:
            child.kill()
            raise
        try:
            answer, complaint = child.communicate(timeout=UNPACK_WAIT)
        except subprocess.TimeoutExpired:
            child.kill()
            raise TarInvalid(f"layer {layer.blob_digest} took more than {UNPACK_WAIT:.0f} s to put in order") from None
    read_answer(answer, complaint, child.returncode, TarInvalid)


def _widen(pipe: IO[bytes]) -> None:
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
    except OSError:
        pass  # the user's pipes hold too much already: slower, nothing else


def _write(pipe: IO[bytes], data: bytes, layer: str) -> None:
    """Give a child bytes. Blocking, while it takes some. Raise StoreBroken when it takes none for UNPACK_WAIT."""
    view, room = memoryview(data), select.poll()
    room.register(pipe, select.POLLOUT)
    while view:
        if not room.poll(1000 * UNPACK_WAIT):
            raise StoreBroken(
                f"the process that unpacks layer {layer} has taken no byte for {UNPACK_WAIT:.0f} s: it was stopped, "
                "or the disk of the store hangs"
            )
        view = view[pipe.write(view) or 0 :]
