"""The three files that hold a layer's chunks: `data`, `chunks` (which are there) and `used` (when, for eviction).

They say where chunks would be, never that the bytes are right: `LayerStore` hashes whatever comes out of them. So each
may be lost, torn or replaced by garbage, and the worst is a miss. `chunks` and `used` are read once and written through
instead of being mapped: a mapping turns a truncated file or a failing disk into SIGBUS, an error return is a miss.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence

from lazyfs.chunks.health import DiskHealth
from lazyfs.chunks.holes import WrittenPages, punch_hole
from lazyfs.chunks.private_files import OwnedFd, open_file
from lazyfs.chunks.shape import Shape
from lazyfs.errors import StoreBroken, StoreLocked
from lazyfs.limits import MAX_LAYER_CHUNKS
from lazyfs.versions import is_readable, is_too_new

log = logging.getLogger(__name__)

TOUCH_EVERY = 5  # seconds for which a use that was noted will do for who must not wait for the disk
HEADER = 64  # bytes in front of `chunks` and `used`
VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")  # magic, version, segments, chunk count, data size
_CHUNKS_MAGIC = b"LZFCHUNK"
_USED_MAGIC = b"LZFUSED\0"
_RECORD = struct.Struct("<IIQ")  # last use (seconds since the epoch), first chunk, its data offset
_ONLY_FLAGS = bytes([0, 1]) + bytes(254)  # translation table: any byte that is no flag means absent
_NO_PUNCH = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def _pread(fd: OwnedFd | None, size: int, offset: int) -> bytes:
    """Return what is there of [offset, offset + size), nothing on an error. `size` may be a damaged file's claim."""
    try:
        if fd is None or offset + size > os.fstat(fd.number).st_size:
            return b""
        return os.pread(fd.number, size, offset)
    except OSError:
        return b""


class LayerFiles:
    """The open files of one layer. Thread-safe; all methods block on the local disk at most.

    `lock` is held by whoever changes chunks and their flags together (a write, an eviction); readers take no lock.
    Processes that share a store see each other's flags through the file (`refresh`).
    """

    def __init__(
        self,
        digest: str,
        directory: OwnedFd,
        shape: Shape | None,
        health: DiskHealth,
        *,
        shared: bool = False,
        follows: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the files; with a `shape` make or begin anew those that are missing or don't fit it.

        Without one they are taken as found (eviction of a layer that nobody uses): `shape` stays None if that fails.
        `follows`: nothing is made or held until `take`. Raise StoreBroken for a newer version, StoreLocked when another
        process is just removing the layer.
        """
        self.digest = digest
        self.lock = threading.RLock()
        self.shape: Shape | None = None
        self.shared = shared
        self._follows = follows
        self._directory = directory
        self._health = health
        self._now = now
        self._written = WrittenPages()
        self._data: OwnedFd | None = None
        self._chunks: OwnedFd | None = None
        self._used_file: OwnedFd | None = None
        self._closed = False
        self.flags = bytearray()
        self._used = array("I")
        self._noted: dict[int, int] = {}  # segment → second in which this process noted a use of it
        self._open(create=shape is not None and not follows)
        self._hold()
        self._load()
        if shape is not None:
            self.ensure(shape)

    def _open(self, *, create: bool) -> None:
        try:
            self._chunks = self._chunks or open_file(self._directory, "chunks", create=create)
            self._used_file = self._used_file or open_file(self._directory, "used", create=create)
            self._data = self._data or open_file(self._directory, "data", create=create)
        except OSError as error:
            self._health.failed(error)

    def _hold(self) -> None:
        """Tell other processes that the layer is in use: the one that removes it wants this lock for itself."""
        if self._chunks is not None and not self._follows:
            try:
                fcntl.flock(self._chunks.number, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreLocked(f"layer {self.digest} is being removed from the store", hint="try again") from None
            except OSError as error:  # a file system without locks: its layers are as safe as one process makes them
                log.debug("layer %s can't be marked as in use: %s", self.digest, error)

    def _load(self) -> None:
        """Take over what the files say, as far as it makes sense."""
        magic, version, _, count, data_size = _HEAD.unpack(_pread(self._chunks, _HEAD.size, 0).ljust(_HEAD.size, b"\0"))
        if magic == _CHUNKS_MAGIC and is_too_new(version, VERSION):
            raise StoreBroken(
                f"layer {self.digest} in the store was written by a newer lazyfs",
                hint="use that version, or another --root",
            )
        if magic != _CHUNKS_MAGIC or not is_readable(version, VERSION) or count > MAX_LAYER_CHUNKS:
            return
        flags = _pread(self._chunks, count, HEADER)
        used = self._load_used(count, data_size)
        if len(flags) == count and used is not None:
            self.shape, self._used = used
            self.flags = bytearray(flags.translate(_ONLY_FLAGS))

    def _load_used(self, count: int, data_size: int) -> tuple[Shape, array[int]] | None:
        head = _pread(self._used_file, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
        magic, version, segments, its_count, its_size = _HEAD.unpack(head)
        if (magic, its_count, its_size) != (_USED_MAGIC, count, data_size) or not is_readable(version, VERSION):
            return None
        if segments > count:
            return None
        raw = _pread(self._used_file, segments * _RECORD.size, HEADER)
        if len(raw) != segments * _RECORD.size:
            return None
        columns = list(zip(*_RECORD.iter_unpack(raw), strict=True)) or [(), (), ()]
        shape = Shape(count, data_size, array("I", columns[1]), array("Q", columns[2]))
        ascending = all(a < b for a, b in zip(shape.first_chunk, shape.first_chunk[1:], strict=False)) and all(
            a < b for a, b in zip(shape.data_offset, shape.data_offset[1:], strict=False)
        )
        if not ascending or (segments and (shape.first_chunk[-1] >= count or shape.data_offset[-1] > data_size)):
            return None
        limit = int(self._now())  # a use in the future would never be evicted
        return shape, array("I", (second if second <= limit else 0 for second in columns[0]))

    def ensure(self, shape: Shape) -> None:
        """Begin anew, with nothing present, unless the files have this shape. Raise StoreBroken where we follow."""
        with self.lock:
            if self._follows and (self._data is None or self.shape != shape):
                raise StoreBroken(f"layer {self.digest} is not what another daemon serves")
            if self._data is None or self._chunks is None or self._used_file is None:
                self._open(create=True)
                self._hold()
            if self.shape != shape:
                self._reset(shape)

    def take(self) -> None:
        """Follow no more: whoever served the layer has ended. Its files may have been replaced, and are opened again.

        Raise StoreLocked when another process is just removing the layer.
        """
        with self.lock:
            shape, self.shape = self.shape, None
            self._follows = False
            self._data = self._chunks = self._used_file = None
            self._open(create=False)
            try:
                self._hold()
                self._load()
                if shape is not None:
                    self.ensure(shape)
            finally:
                self.shape = self.shape or shape

    def _reset(self, shape: Shape) -> None:
        self.flags = bytearray(shape.chunk_count)
        # What nobody has read yet counts as older than what is read this very second.
        self._used = array("I", [max(0, int(self._now()) - 1) & 0xFFFFFFFF]) * len(shape.first_chunk)
        self._noted.clear()
        self.shape = shape
        segments = len(shape.first_chunk)
        # Written out in full, not left sparse: setting a flag must not need a new block on a full disk.
        records = b"".join(map(_RECORD.pack, self._used, shape.first_chunk, shape.data_offset))
        numbers = (VERSION, segments, shape.chunk_count, shape.data_size)
        contents = (
            (self._data, b""),
            (self._used_file, _HEAD.pack(_USED_MAGIC, *numbers).ljust(HEADER, b"\0") + records),
            (self._chunks, _HEAD.pack(_CHUNKS_MAGIC, *numbers).ljust(HEADER, b"\0") + self.flags),
        )
        try:
            for fd, content in contents:
                if fd is not None:
                    os.ftruncate(fd.number, 0)
                    if os.pwrite(fd.number, content, 0) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._health.failed(error)

    # -- flags and clock

    def refresh(self, first: int, last: int) -> None:
        """Take over the flags of chunks [first, last) that another process may have set or cleared."""
        if self.shared:
            found = _pread(self._chunks, last - first, HEADER + first)
            if len(found) == last - first:
                with self.lock:
                    self.flags[first:last] = found.translate(_ONLY_FLAGS)

    def mark(self, first: int, last: int, value: int) -> None:
        """Set the flags of chunks [first, last) to 1 (present) or 0. The caller holds `lock`."""
        content = bytes([value]) * (last - first)
        self.flags[first:last] = content
        if self._chunks is not None and not self._follows:
            try:
                os.pwrite(self._chunks.number, content, HEADER + first)
            except OSError as error:
                self._health.failed(error)  # the file lags behind: after a restart that is a miss or a failed hash

    def touch(self, chunk: int) -> None:
        """Note a use of a chunk's segment now. One 4-byte write a second and segment at most."""
        if self.shape is None:
            return
        segment = bisect_right(self.shape.first_chunk, chunk) - 1
        second = int(self._now()) & 0xFFFFFFFF
        if segment < 0:
            return
        self._noted[segment] = second
        if self._used[segment] == second:
            return
        self._used[segment] = second
        if self._used_file is not None and not self._follows:
            try:
                os.pwrite(self._used_file.number, second.to_bytes(4, "little"), HEADER + segment * _RECORD.size)
            except OSError as error:  # a read must not count as a failed write, nor put off the next try
                log.debug("the use of layer %s is not noted: %s", self.digest, error)

    def is_touched(self, chunk: int) -> bool:
        """Tell whether `touch` was called for a chunk's segment in the last TOUCH_EVERY seconds. Doesn't block."""
        if self.shape is None:
            return False
        segment = bisect_right(self.shape.first_chunk, chunk) - 1
        return 0 <= (int(self._now()) & 0xFFFFFFFF) - self._noted.get(segment, -TOUCH_EVERY) < TOUCH_EVERY

    def touch_all(self, first: int, last: int) -> None:
        """Note a use of chunks [first, last) now, as `touch`."""
        while self.shape is not None and first < last:
            self.touch(first)
            first = self.shape.chunks(bisect_right(self.shape.first_chunk, first) - 1)[1]

    # -- data

    @property
    def data(self) -> OwnedFd | None:
        """The data file; keep the reference while using its number. None: it could not be opened, or was closed."""
        return self._data

    def write(self, first: int, last: int, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Write the bytes of chunks [first, last) at `offset` (data space) and mark them.

        Raise OSError, or StoreLocked when the files had to be opened again and another process
        is removing them. At most IOV_MAX buffers. The caller holds `lock`.
        """
        if self._follows:
            raise StoreLocked(f"layer {self.digest} is another daemon's")
        if self._closed:  # a fetch that ends late must not open them again: the layer may be on its way out
            raise StoreLocked(f"layer {self.digest} was given back")
        if self._data is None or self._chunks is None:
            self._open(create=True)
            self._hold()
            if self._data is None or self.shape is None:
                raise OSError(errno.EIO, "the layer's data file can't be opened")
        size = sum(map(len, buffers))
        if self._opened_read_only():
            self._data = self._chunks = self._used_file = None
            self._open(create=False)
            self._hold()
            if self._data is None or self._opened_read_only():
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if os.pwritev(self._data.number, buffers, offset) != size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a short write to a disk file means just that
        self.mark(first, last, 1)
        self._written.written(self._data.number, offset, size)

    def _opened_read_only(self) -> bool:
        """Whether the disk was read-only when the files were opened."""
        return any(
            fd is not None and fcntl.fcntl(fd.number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            for fd in (self._data, self._chunks, self._used_file)
        )

    def adopt(self, name: str) -> int:
        """Put the file `name` of the layer's directory, which holds every chunk, in the place of `data`.

        Return the bytes it takes on disk. Raise OSError. Readers inside a read keep the old file until they return.
        """
        with self.lock:
            if self._follows:
                raise OSError(errno.EBUSY, "the layer is another daemon's")
            new = open_file(self._directory, name, create=False)
            if new is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            os.rename(name, "data", src_dir_fd=self._directory.number, dst_dir_fd=self._directory.number)
            self._data = new
            self.mark(0, len(self.flags), 1)
            for chunk in self.shape.first_chunk if self.shape is not None else ():
                self.touch(chunk)  # or an eviction takes first what was fetched last
            return self.disk_usage()

    def disk_usage(self) -> int:
        """Return the bytes that `data` takes on disk."""
        data = self._data
        try:
            return os.fstat(data.number).st_blocks * 512 if data is not None else 0
        except OSError:
            return 0

    def segments_with_data(self) -> list[tuple[int, int]]:
        """Return (segment, last use) of the segments that take disk space. SEEK_DATA tells the truth, flags don't."""
        with self.lock:
            if self._data is None or self.shape is None:
                return []
            out: list[tuple[int, int]] = []
            at = 0
            try:
                for segment, use in enumerate(self._used):
                    start, end = self.shape.extent(segment)
                    if at < end:
                        at = max(at, os.lseek(self._data.number, max(start, at), os.SEEK_DATA))
                        if at < end:
                            out.append((segment, use))
                            at = end
            except OSError:
                return out  # ENXIO: no data behind this place
            return out

    def evict(self, segment: int) -> int:
        """Forget a segment's chunks, then free their blocks. Return the bytes freed. Never raises."""
        with self.lock:
            data, before = self._data, self.disk_usage()
            if data is None or self.shape is None or self._follows:
                return 0
            first, last = self.shape.chunks(segment)
            self.mark(first, last, 0)
            start, end = self.shape.extent(segment)
            try:
                punch_hole(data.number, start, end - start)
            except OSError as error:
                if error.errno in _NO_PUNCH:
                    return self.evict_all()  # a file system without holes gives back all or nothing
                self._health.failed(error)
            return before - self.disk_usage()

    def evict_all(self) -> int:
        """Forget all chunks and free their blocks. Return the bytes freed. Never raises."""
        with self.lock:
            before = self.disk_usage()
            self.mark(0, len(self.flags), 0)
            if self._data is not None and not self._follows:
                try:
                    os.ftruncate(self._data.number, 0)
                except OSError as error:
                    self._health.failed(error)
            return before - self.disk_usage()

    def last_use(self) -> int:
        """Return when a chunk of the layer was last used, in seconds since the epoch."""
        return max(self._used, default=0)

    def close(self) -> None:
        """Let the files go; a thread that is still inside a read keeps them until it returns."""
        with self.lock:
            self._closed = True
            self._data = self._chunks = self._used_file = None
