"""A layer that is being served: its table, its place on disk, where its bytes come from, and whether it may be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from lazyfs.chunks.data_reads import DataReads
from lazyfs.chunks.layer_store import LayerStore
from lazyfs.chunks.spool import Spool
from lazyfs.chunks.whole import WholeCheck
from lazyfs.chunks.witness import Witness
from lazyfs.errors import LayerQuarantined, LazyfsError
from lazyfs.format.table import FORM_PLAIN, NO_FRAME, LayerTable
from lazyfs.limits import MAX_OTHER_SOURCES
from lazyfs.oci import Descriptor
from lazyfs.registry.health import Health
from lazyfs.registry.mirrored import MirroredRepository
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository

_serials = count()


class Check:
    """The whole check of a layer in progress: extents are fed in blob order, what comes early waits in the spool.

    Not thread-safe: one thread at a time feeds it.
    """

    def __init__(self, begin: Callable[[], WholeCheck], spool: Spool) -> None:
        self._begin = begin
        self._whole: WholeCheck | None = None
        self.spool = spool
        self.next = 0  # the extent that the check wants now
        self.restarts = 0

    def prepare(self) -> None:
        """Make the check itself, which takes milliseconds and 24 bytes a file. What is only mounted needs none."""
        if self._whole is None:
            self._whole = self._begin()

    @property
    def whole(self) -> WholeCheck:
        """The check itself, made now if it was not."""
        self.prepare()
        assert self._whole is not None
        return self._whole

    @property
    def blob_offset(self) -> int:
        """Blob offset of the next byte to feed."""
        return 0 if self._whole is None else self._whole.blob_offset

    def restart(self) -> None:
        """Begin again with nothing: the spool's disk may be what was wrong, and that is no reason to damn a layer."""
        self.spool.clear()
        self._whole = None
        self.next = 0
        self.restarts += 1


@dataclass(eq=False, slots=True)
class ServedLayer:
    """One layer of the node. Mutable; owned by the trio loop, but for `check`, which has a lock of its own.

    `repository` is asked for afresh at each fetch, so that a layer can be moved to another source.
    """

    number: int  # the layer number of node ids
    descriptor: Descriptor
    diff_id: str
    table: LayerTable
    store: LayerStore
    repository: Repository
    origin: str  # the repository as the reference names it, for `lazy_from`
    check: Check | None = None  # None: the layer has passed, or nobody promised a diff ID
    verified: bool = False
    quarantine: str = ""  # why nothing may be read any more
    users: int = 0  # trees that hold the layer
    collected: int = 0  # who want all of it in the store, whatever has to make room: `lazyfs fetch`
    dropped: bool = False  # nobody holds it any more: its number may be that of another table of the blob from now on
    # What chunks and frames in memory and on their way are known by: unlike `number` no other layer ever has it.
    serial: int = field(default_factory=_serials.__next__, init=False)
    bytes_by_priority: list[int] = field(default_factory=lambda: [0, 0, 0])  # compressed bytes fetched
    others: list[Repository] = field(default_factory=list)  # where else the blob is, as other images say
    refill: Callable[[], object] | None = None  # fetches a plain layer again, whole; blocking
    trouble: LazyfsError | None = None  # why the last request failed; None: bytes came since
    data_reads: DataReads = field(default_factory=DataReads, init=False)
    witnesses: tuple[Witness, ...] = ()  # who records what is read of it; nobody, most of the time

    @property
    def digest(self) -> str:
        return self.descriptor.digest

    @property
    def is_plain(self) -> bool:
        """Whether the blob has no frames to fetch: it is unpacked whole."""
        return self.table.form == FORM_PLAIN

    @property
    def host(self) -> str:
        """The host that the next fetch goes to: that of a mirror while one is well."""
        return host_of(self.repository)

    # -- sources: mirrors and the origin

    @property
    def sources(self) -> int:
        """How many hosts the layer's bytes may come from."""
        repository = self.repository
        return len(repository.hosts) if isinstance(repository, MirroredRepository) else 1

    def come_from(self, repository: Repository, origin: str) -> None:
        """Take the blob from where whoever mounts it now takes it. The source before stays for when this one fails."""
        before = [self.repository, *self.others]
        self.others = [
            one
            for one in before
            if (one.host, one.name) != (repository.host, repository.name) and not isinstance(one, OfflineRepository)
        ][:MAX_OTHER_SOURCES]
        self.repository, self.origin = repository, origin

    def turn(self, failed: Repository) -> bool:
        """Turn to where else the blob is, after a failure of `failed`. False: there is nowhere else.

        Images of several registries share a layer: one that does not answer must not stop those of the others.
        """
        if not self.others:
            return False
        if failed is self.repository:  # else somebody has turned already
            self.others.append(self.repository)
            self.repository = self.others.pop(0)
        return True

    def limited_for(self) -> float:
        """Return for how many seconds the host wants to be left alone by whoever can wait, 0 when it doesn't say so."""
        return limited_for(self.repository)

    def blame(self, reason: str) -> list[str]:
        """Tell that the blob was wrong as a whole. Return the hosts that sent it, as far as that is known."""
        repository = self.repository
        return repository.blame(self.digest, reason) if isinstance(repository, MirroredRepository) else []

    def agreed(self) -> bool:
        """Tell whether every source has sent the same part of the blob wrong, or all of it alone: then it is false."""
        repository = self.repository
        if not isinstance(repository, MirroredRepository):
            return True
        return repository.health.all_condemned(self.digest, repository.hosts)

    def pardon(self) -> None:
        """Take back what was said against the sources, if they all agree: then it was not their doing."""
        if isinstance(self.repository, MirroredRepository):
            self.repository.health.pardon(self.digest, self.repository.hosts)

    def reopen(self) -> None:
        """Look at the blob anew, whatever its sources sent before."""
        if isinstance(self.repository, MirroredRepository):
            self.repository.health.reopen(self.digest)

    def ensure_readable(self) -> None:
        """Raise LayerQuarantined when a check found the layer false."""
        if self.quarantine:
            raise LayerQuarantined(self.digest, self.quarantine)

    # -- extents: the blob cut at the frames that the TOC names. 0 lies before the first, the last is TOC and footer.

    @property
    def extents(self) -> int:
        return self.table.frame_count + 2

    def extent(self, number: int) -> tuple[int, int]:
        """Return (blob_offset, size) of an extent. Some are empty."""
        table, frames = self.table, self.table.frame_count
        if number == 0:
            return 0, table.frame_blob_offset[0] if frames else table.payload_end
        if number <= frames:
            start = table.frame_blob_offset[number - 1]
            return start, table.frame_blob_end[number - 1] - start
        return table.payload_end, table.blob_size - table.payload_end

    def frame_missing(self, frame: int) -> bool:
        """Tell whether any chunk of a frame is not in the store."""
        chunks = self.table.frame_chunks(frame)
        return any(self.table.chunk_frame[chunk] != NO_FRAME for chunk in self.store.missing(chunks.start, chunks.stop))

    def __repr__(self) -> str:
        return f"<ServedLayer {self.number} {self.digest[:19]}>"


def host_of(repository: Repository) -> str:
    """Return the host that a repository's next request goes to: that of a mirror while one is well."""
    return repository.link if isinstance(repository, MirroredRepository) else repository.host


def limited_for(repository: Repository) -> float:
    """Return for how many seconds that host wants to be left alone by whoever can wait, 0 when it doesn't say so."""
    health = getattr(repository, "health", None)
    return health.limited_for(host_of(repository)) if isinstance(health, Health) else 0.0
