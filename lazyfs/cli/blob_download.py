"""Blobs on their way from a registry into containerd's content store: resumed, verified, several side by side."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from lazyfs.containerd import gc_labels
from lazyfs.containerd.client import Client
from lazyfs.errors import DigestMismatch, Interrupted, LazyfsError, PushRejected, RegistryError
from lazyfs.oci import Descriptor
from lazyfs.reference import Reference
from lazyfs.registry.mirrored import read_again
from lazyfs.registry.repository import ByteStream, Repository

log = logging.getLogger(__name__)

_TRIES = 5  # of going on with a stream that broke off, without a byte between them
_PAUSE = 0.5  # seconds before the second try; twice as long before each further one
_END = 30.0  # seconds for ending a lease
_STOP = 2.0  # seconds for threads to see that they are to stop; a registry that is silent keeps them longer
_OTHER_BYTES = re.compile(r"unexpected commit digest (sha256:[0-9a-f]{64})")  # containerd's words
OnMoved = Callable[[int], None]  # told how many bytes further on in the blob we are


class BlobSource:
    """A blob of a repository as a file to read from, from any place on. One thread at a time; close it.

    A stream that breaks off is gone on with. `fetched` counts the bytes that came from the network.
    """

    def __init__(self, repository: Repository, blob: Descriptor, stop: threading.Event, moved: OnMoved) -> None:
        self.fetched = 0
        self._repository = repository
        self._blob = blob
        self._stop = stop
        self._moved = moved
        self._at = 0
        self._stream: ByteStream | None = None

    def seekable(self) -> bool:
        """True, always."""
        return True

    def tell(self) -> int:
        """Return the offset in the blob of the next byte."""
        return self._at

    def seek(self, offset: int, /) -> int:
        """Go on at `offset`; asks nothing yet."""
        if offset != self._at:
            self.close()
            self._moved(offset - self._at)
            self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """Return 1 to `size` bytes, b"" at the end. Blocking. Raise RegistryError, Interrupted."""
        if self._at >= self._blob.size:
            return b""
        failed = 0
        while True:
            if self._stop.is_set():
                raise Interrupted("the download was stopped")
            try:
                if self._stream is None:
                    self._stream = self._repository.fetch(self._blob.digest, self._at, self._blob.size - self._at)
                data = self._stream.read(size)
                break
            except RegistryError as error:
                self.close()
                failed += 1
                if not error.temporary or failed >= _TRIES:
                    raise
                self._stop.wait(_PAUSE * 2 ** (failed - 1))
        self._at += len(data)
        self.fetched += len(data)
        self._moved(len(data))
        return data

    def close(self) -> None:
        """Give the connection back."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class ContentFiller:
    """Writes what a registry has into one namespace's content store, under one lease. Thread-safe; blocking."""

    def __init__(self, client: Client, repository: Repository, origin: Reference, lease: str) -> None:
        self._client = client
        self._repository = repository
        self._origin = origin
        self.lease = lease
        self.began = False  # a blob was asked for

    def document(self, digest: str, raw: bytes, labels: dict[str, str]) -> None:
        """Store a document with the labels by which it keeps others. Raise LazyfsError."""
        first = {**self._labels({}), **labels}
        if not self._client.content.write(digest, len(raw), io.BytesIO(raw), labels=first, lease=self.lease):
            self.label(digest, labels)

    def blob(self, blob: Descriptor, stop: threading.Event, moved: OnMoved) -> int:
        """Have a blob in the store, and verified; return how many bytes were fetched for it. Raise LazyfsError."""
        self.began = True
        source = BlobSource(self._repository, blob, stop, moved)

        def write() -> None:
            source.seek(0)
            # The name of containerd's own downloads: where one is under way it is waited for, and gone on with.
            ref = f"layer-{blob.digest}"
            try:
                there = not self._client.content.write(
                    blob.digest, blob.size, source, labels=self._labels({}), lease=self.lease, ref=ref
                )
            except PushRejected as error:
                raise self._wrong(blob, error) from None
            if there:
                self.label(blob.digest, {})

        try:
            read_again(self._repository, blob.digest, write, (DigestMismatch,))
        finally:
            source.close()
        return source.fetched

    def keep(self, digest: str) -> None:
        """Have our lease hold a blob if it is there, although it isn't needed now."""
        self._client.leases.hold(self.lease, digest)
        if self._client.content.info(digest) is not None:
            self.label(digest, {})

    def label(self, digest: str, labels: dict[str, str]) -> None:
        """Add labels to a blob that is there, and that it is of this repository, too."""
        info = self._client.content.info(digest)
        present = info.labels if info is not None else {}
        missing = {key: value for key, value in labels.items() if present.get(key) != value}
        if added := {**missing, **self._labels(present)}:
            self._client.content.label(digest, added)

    def _labels(self, present: dict[str, str]) -> dict[str, str]:
        return gc_labels.origin(self._origin.host, self._origin.repository, present)

    def _wrong(self, blob: Descriptor, error: PushRejected) -> LazyfsError:
        found = _OTHER_BYTES.search(error.message)
        if found is None:
            return error
        return DigestMismatch(f"blob {blob.digest} of {self._repository.host}", blob.digest, found[1])


@contextlib.contextmanager
def filling(
    client: Client, repository: Repository, origin: Reference, labels: dict[str, str] | None = None
) -> Iterator[ContentFiller]:
    """Give a filler with a lease of its own, which ends with the block. Raise LazyfsError.

    What an interruption, or a failure that passes, leaves of downloads is kept for another try: that lease stays, and
    expires in a day. `labels` are the lease's.
    """
    filler = ContentFiller(client, repository, origin, client.leases.create(labels=labels))
    failed, keep = True, False
    try:
        yield filler
        failed = False
    except BaseException as error:
        passing = error.temporary if isinstance(error, LazyfsError) else True
        keep = passing and filler.began
        raise
    finally:
        if not keep:
            try:
                client.leases.delete(filler.lease, collect=failed, deadline=time.monotonic() + _END)
            except LazyfsError as error:
                log.warning("a lease of containerd's stays until it expires: %s", error)


class Downloads:
    """Blobs being fetched side by side, in the order in which they were asked for. Used by one thread.

    Its threads are daemons: a command that is interrupted ends at once.
    """

    def __init__(self, fetch: Callable[[Descriptor, threading.Event], int], jobs: int) -> None:
        self._fetch = fetch
        self._jobs = jobs
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[Descriptor] = []
        self._results: dict[str, Future[int]] = {}
        self._threads: list[threading.Thread] = []

    def start(self, blobs: Sequence[Descriptor]) -> None:
        """Begin to fetch; blobs that were asked for before are not fetched again."""
        with self._lock:
            for blob in blobs:
                if blob.digest not in self._results:
                    self._results[blob.digest] = Future()
                    self._waiting.append(blob)
            wanted = min(self._jobs - len(self._threads), len(self._waiting))
            new = [threading.Thread(target=self._run, daemon=True, name="lazyfs-blob") for _ in range(wanted)]
            self._threads += new
        for thread in new:
            thread.start()

    def wait(self, digest: str) -> int:
        """Return the bytes fetched for a blob once it is there. Raise the LazyfsError that kept it away."""
        return self._results[digest].result()

    def stop(self) -> None:
        """Let what is under way break off, to be gone on with another time; waits a little for that."""
        self._stop.set()
        with self._lock:
            threads = list(self._threads)
        until = time.monotonic() + _STOP
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._stop.is_set() or not self._waiting:
                    self._threads.remove(threading.current_thread())
                    return
                blob = self._waiting.pop(0)
            try:
                self._results[blob.digest].set_result(self._fetch(blob, self._stop))
            except BaseException as error:  # whoever waits for it gets it, whatever it is
                self._results[blob.digest].set_exception(error)
