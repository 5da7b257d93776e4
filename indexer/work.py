"""The work directory: converted layers that outlive a run, so that an interrupted conversion goes on where it was.

    DIR/lock              held while the directory is tidied
    DIR/layers/<key>      a converted layer's blob, until it is at a destination
    DIR/layers/<key>.json what it is; stays when the blob has gone
    DIR/runs/<name>/      a run's own files and its lock; swept when nobody holds that any more

<key> is the sha256 of the layer's key (source digest and everything that decides the bytes). A run has files of its own
(hard links), so that tidying up takes nothing away from it. Believed as far as its owner is: 0700, one user's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lazyfs import digest as digests
from lazyfs import oci, private
from lazyfs.errors import FormatError, StoreBroken
from lazyfs.limits import MAX_WORK_RECORD, MAX_WORK_RECORDS, MAX_WORK_SIZE, WORK_LOCK_TIMEOUT

log = logging.getLogger(__name__)

VERSION = 1  # of the records
BLOB_AGE = 7 * 86_400.0  # seconds that a blob waits for its run to be taken up again
RECORD_AGE = 90 * 86_400.0  # seconds


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted layer: its descriptor with all annotations, and its diff ID."""

    descriptor: oci.Descriptor
    diff_id: str


class WorkDirectory:
    """One run's use of a work directory. Use it in a `with`; thread-safe.

    Without `keep` it is a directory for one run that leaves nothing behind.
    """

    def __init__(self, path: Path, *, keep: bool = True, max_size: int = MAX_WORK_SIZE) -> None:
        self._path = path
        self._keep = keep
        self._max_size = max_size
        self._layers = path / "layers"
        self._run = path / "runs" / f"{os.getpid()}-{secrets.token_hex(6)}"
        self._lease = -1
        self._files = itertools.count()

    def __enter__(self) -> WorkDirectory:
        try:
            self._make()
            with self._locked():
                self._run.mkdir(0o700)
                self._lease = os.open(self._run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sweep()
                self._bound()
        except OSError as error:
            raise StoreBroken(
                f"the work directory {self._path} can't be used: {error.strerror or error}",
                hint="name another with --work-dir",
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._run, ignore_errors=True)
        if self._lease >= 0:
            os.close(self._lease)
            self._lease = -1
        if not self._keep:
            shutil.rmtree(self._path, ignore_errors=True)

    def new_file(self, digest: str) -> Path:
        """Return where this run makes a blob from the source's blob `digest`, another file each time.

        One blob may be wanted twice: converted as an image's layer, and as it is for something that is kept.
        """
        return self._run / f"{digests.hex_of(digest)}.{next(self._files)}"

    def keep(self, key: str, layer: Converted, blob: Path) -> None:
        """Keep a layer that was converted and verified. Never raises: then the next run converts it again.

        Nothing is flushed to the disk: what a crash of the machine spoils, `blob` finds by its digest.
        """
        if not self._keep:
            return
        name = _name(key)
        record = {"version": VERSION, "key": key, "diff_id": layer.diff_id, "descriptor": layer.descriptor.to_json()}
        with self._best_effort("keep"):
            self._replace(self._layers / name, lambda temporary: os.link(blob, temporary))
            self._replace(
                self._layers / f"{name}.json", lambda temporary: temporary.write_bytes(oci.canonical_json(record))
            )

    def find(self, key: str) -> Converted | None:
        """Return what was converted before under `key`, None when that is not known. Its blob may be gone."""
        if not self._keep:
            return None
        try:
            path = self._layers / f"{_name(key)}.json"
            with path.open("rb") as file:
                document = oci.load_json(file.read(MAX_WORK_RECORD), "record")
            if document.get("version") != VERSION or document.get("key") != key:
                return None
            diff_id = document["diff_id"]
            digests.parse(diff_id, "diff ID")
            return Converted(oci.parse_descriptor(document["descriptor"], "converted layer"), diff_id)
        except (OSError, FormatError, KeyError):
            return None

    def blob(self, key: str, layer: Converted) -> Path | None:
        """Return a file of this run with the blob of a layer found, verified. Blocks for hashing. None: it is gone."""
        if not self._keep:
            return None
        own = self._run / f"{digests.hex_of(layer.descriptor.digest)}.kept"
        try:
            with contextlib.suppress(FileExistsError):
                os.link(self._layers / _name(key), own)
            with own.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == layer.descriptor.digest[7:]:
                    return own
            own.unlink()
            (self._layers / _name(key)).unlink()
        except OSError:
            pass
        return None

    def arrived(self, key: str) -> None:
        """Note that a layer is at its destination now: its blob is not needed here any more."""
        with self._best_effort("tidy up"):
            (self._layers / _name(key)).unlink(missing_ok=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise StoreBroken(
                f"the work directory {self._path} belongs to another user, or others may write to it",
                hint="name one of your own with --work-dir",
            )
        private.make_directory(self._layers)
        private.make_directory(self._run.parent)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _flock(descriptor, time.monotonic() + WORK_LOCK_TIMEOUT)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove the files of runs that are dead, however they died."""
        for run in self._run.parent.iterdir():
            if run == self._run:
                continue
            try:
                descriptor = os.open(run / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                shutil.rmtree(run, ignore_errors=True)  # made without its lock: killed in between
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(run, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)

    def _bound(self) -> None:
        """Keep the directory within its bounds, oldest first."""
        now, size, records = time.time(), 0, 0
        found: list[tuple[float, int, Path]] = []
        for path in self._layers.iterdir():
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, path))
        for changed, length, path in sorted(found, reverse=True, key=lambda each: each[0]):
            if path.suffix == ".json":
                records += 1
                drop = now - changed > RECORD_AGE or records > MAX_WORK_RECORDS
            else:
                size += length
                drop = now - changed > BLOB_AGE or size > self._max_size
            if drop:
                path.unlink(missing_ok=True)

    def _replace(self, path: Path, make: Callable[[Path], object]) -> None:
        """Have `path` appear whole: made beside it in the run's directory, then renamed."""
        temporary = self._run / f"{path.name}.{secrets.token_hex(4)}"
        try:
            make(temporary)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _best_effort(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.info("can't %s a converted layer in %s: %s", what, self._path, error)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _flock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreBroken("the work directory is locked by another process") from None
            time.sleep(0.02)
