"""The FUSE adapter: kernel requests to forest and reader, and nothing else. Here is the one wrapper of every handler.

In pyfuse3 an exception other than FUSEError ends the main loop and leaves every client in an unkillable wait. So no
handler is without `_guarded`.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Protocol, TypeVar

import pyfuse3

from lazyfs.errors import LazyfsError
from lazyfs.format.entry import Kind
from lazyfs.mount.errno_map import errno_of
from lazyfs.mount.forest import PROBE_GOOD, PROBE_ID, Attributes, Forest, NoSuchName
from lazyfs.stats import READ_BOUNDS, Histogram

log = logging.getLogger(__name__)

# Layers never change, so the kernel may keep names, absences and attributes for as long as it has memory for them.
FOREVER = 10 * 365 * 86400  # seconds
_BLOCK = 512  # bytes of an st_blocks unit
_NAME_MAX = 255

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


class FileReader(Protocol):
    """What `read` needs: bytes of a row of a layer, or of its data space, verified."""

    async def read(self, layer: Any, row: int, offset: int, size: int) -> bytes | memoryview: ...

    async def read_data(self, layer: Any, data_offset: int, size: int) -> bytes | bytearray | memoryview: ...


def _guarded(handler: Handler) -> Handler:
    """Turn everything that a handler can raise into an errno, and count the calls."""
    name = handler.__name__

    @functools.wraps(handler)
    async def wrapper(self: Operations, *args: Any) -> Any:
        self.calls[name] += 1
        try:
            return await handler(self, *args)
        except NoSuchName as absent:
            raise pyfuse3.FUSEError(absent.errno) from None
        except LazyfsError as error:
            self.failures[type(error).__name__] += 1
            log.warning("%s failed: args=%s error=%s", name, args[:1], error)
            raise pyfuse3.FUSEError(errno_of(error)) from None
        except pyfuse3.FUSEError:
            raise
        except Exception as bug:
            self.failures[type(bug).__name__] += 1
            log.exception("%s broke: args=%s", name, args[:1])
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapper  # type: ignore[return-value,unused-ignore]


class Operations(pyfuse3.Operations):
    """Handlers of one session. Since the start: `calls` by kind, `failures` by class, `reads` by time."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, forest: Forest, reader: FileReader) -> None:
        super().__init__()
        self._forest = forest
        self._reader = reader
        self.calls: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.reads = Histogram(READ_BOUNDS)  # how long they took

    # -- names and attributes

    @_guarded
    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        forest = self._forest
        if name == b".":
            return self._entry(forest.attributes(parent))
        if name == b"..":
            return self._entry(forest.attributes(forest.parent_of(parent)))
        try:
            node = forest.lookup(parent, name)
        except NoSuchName as absent:
            if absent.errno != errno.ENOENT or forest.is_list(parent):
                raise
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = 0  # a negative entry: the kernel remembers that there is no such name
            missing.entry_timeout = FOREVER
            return missing
        return self._entry(forest.attributes(node), self._name_timeout(parent))

    def _name_timeout(self, directory: int) -> float:
        """Seconds for which the kernel may keep a directory's names: the list of trees changes, nothing else does."""
        return 0 if self._forest.is_list(directory) else FOREVER

    @_guarded
    async def getattr(self, node: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._entry(self._forest.attributes(node))

    def _entry(self, found: Attributes, entry_timeout: float = FOREVER) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = found.node
        entry.generation = 0
        entry.entry_timeout = entry_timeout
        entry.attr_timeout = self._name_timeout(found.node)  # a directory's link count changes with its names
        entry.st_mode = found.mode
        entry.st_nlink = found.nlink
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_rdev = found.rdev
        entry.st_size = found.size
        entry.st_blksize = 4096
        entry.st_blocks = (found.size + _BLOCK - 1) // _BLOCK
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = found.mtime_ns
        return entry

    @_guarded
    async def readlink(self, node: int, ctx: object) -> bytes:
        return self._forest.link(node)

    @_guarded
    async def getxattr(self, node: int, name: bytes, ctx: object) -> bytes:
        value = self._forest.xattrs(node).get(name)
        if value is None:
            raise NoSuchName(errno.ENODATA)
        return value

    @_guarded
    async def listxattr(self, node: int, ctx: object) -> list[bytes]:
        return list(self._forest.xattrs(node))

    @_guarded
    async def access(self, node: int, mode: int, ctx: object) -> bool:
        return True  # asked only without default_permissions; what may be read is on the reader's own account

    @_guarded
    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        layers = self._forest.layers()
        data.f_blocks = sum(layer.table.data_size for layer in layers) // 4096
        data.f_bfree = data.f_bavail = 0
        data.f_files = sum(layer.table.rows for layer in layers)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = _NAME_MAX
        return data

    # -- directories

    @_guarded
    async def opendir(self, node: int, ctx: object) -> int:
        return node  # fh = node id: the next daemon can serve it too

    @_guarded
    async def readdir(self, fh: int, start: int, token: Any) -> None:
        forest = self._forest
        timeout = self._name_timeout(fh)
        for name, node, cookie in forest.list_from(fh, start):
            entry = self._entry(forest.attributes(node), timeout)
            if not pyfuse3.readdir_reply(token, name, entry, cookie):
                return

    @_guarded
    async def releasedir(self, fh: int) -> None:
        return None

    # -- files

    @_guarded
    async def open(self, node: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        if node == PROBE_ID or self._forest.data_layer(node) is not None:
            # EROFS keeps the pages. A second copy here would cost memory and half of the speed (measured), and its
            # read-ahead would go on beyond the end of the file that is read.
            return pyfuse3.FileInfo(fh=node, direct_io=True)
        layer, row = self._forest.source(node)
        if layer.table.kind[row] != Kind.REG:
            raise NoSuchName(errno.EINVAL)
        return pyfuse3.FileInfo(fh=node, keep_cache=True)

    @_guarded
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        if fh == PROBE_ID:
            return _read_probe(offset, size)
        began = perf_counter()
        data = self._forest.data_layer(fh)
        try:
            if data is not None:
                # The whole range always, also behind the end: of a shorter answer the kernel makes zeros.
                return await self._reader.read_data(data, offset, size)  # type: ignore[return-value]
            layer, row = self._forest.source(fh)
            # pyfuse3 takes any contiguous buffer; its annotation knows bytes only
            return await self._reader.read(layer, row, offset, size)  # type: ignore[return-value]
        finally:
            self.reads.note(perf_counter() - began)

    @_guarded
    async def flush(self, fh: int) -> None:
        return None

    @_guarded
    async def release(self, fh: int) -> None:
        return None

    async def forget(self, inode_list: Any) -> None:
        """Nothing is counted: any id resolves at any time."""


def _read_probe(offset: int, size: int) -> bytes:
    """Answer the self-test, which wants to see a read fail in its midst: 0xff bytes, or an error."""
    if offset + size > PROBE_GOOD:
        raise NoSuchName(errno.EIO)
    return b"\xff" * size
