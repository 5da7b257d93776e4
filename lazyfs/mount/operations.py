"""What each request of the kernel is answered: requests to forest and reader, and nothing else.

Here is the one wrapper of every handler: whatever one raises becomes an errno, or a client would wait for ever.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any, Protocol

from lazyfs.errors import LazyfsError
from lazyfs.format.entry import Kind
from lazyfs.mount import wire
from lazyfs.mount.errno_map import errno_of
from lazyfs.mount.forest import PROBE_GOOD, PROBE_ID, Attributes, Forest, NoSuchName
from lazyfs.mount.wire import Op
from lazyfs.stats import READ_BOUNDS, Histogram

log = logging.getLogger(__name__)

# Layers never change, so the kernel may keep names, absences and attributes for as long as it has memory for them.
FOREVER = 10 * 365 * 86400  # seconds
_NAME_MAX = 255

Data = bytes | bytearray | memoryview
Rest = Coroutine[Any, Any, Data]  # what the answer still has to wait for
Answer = tuple[int, Data]  # an errno, or 0 and the body


class FileReader(Protocol):
    """What READ needs: verified bytes of a row of a layer, or of its data space, or what will have them."""

    def begin(self, layer: Any, row: int, offset: int, size: int) -> Data | Rest: ...

    def begin_data(self, layer: Any, data_offset: int, size: int) -> Data | Rest: ...


class Operations:
    """Handlers of one session. Since the start: `calls` by kind, `failures` by class, `reads` by time."""

    def __init__(self, forest: Forest, reader: FileReader) -> None:
        self._forest = forest
        self._reader = reader
        self.calls: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.reads = Histogram(READ_BOUNDS)  # how long they took
        handlers: dict[Op, Callable[[int, memoryview], Data | Rest]] = {
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.READLINK: self._readlink,
            Op.OPEN: self._open,
            Op.READ: self._read,
            Op.STATFS: self._statfs,
            Op.RELEASE: _nothing,
            Op.GETXATTR: self._getxattr,
            Op.LISTXATTR: self._listxattr,
            Op.OPENDIR: self._opendir,
            Op.READDIR: self._readdir,
            Op.RELEASEDIR: _nothing,
            Op.ACCESS: _nothing,  # asked only without default_permissions; what may be read is on the reader's account
            Op.READDIRPLUS: self._readdirplus,
        }
        self._handlers = {int(op): (op.name.lower(), handler) for op, handler in handlers.items()}

    def handle(self, opcode: int, node: int, body: memoryview) -> Answer | Coroutine[Any, Any, Answer]:
        """Answer a request, or return what will. Never blocks, never raises; `body` is not used after the return."""
        known = self._handlers.get(opcode)
        if known is None:
            return (
                errno.ENOSYS,
                b"",
            )  # which the kernel remembers for the life of the connection
        name, handler = known
        self.calls[name] += 1
        try:
            answer = handler(node, body)
        except Exception as error:
            return self._refuse(name, node, error)
        return (0, answer) if isinstance(answer, (bytes, bytearray, memoryview)) else self._later(name, node, answer)

    async def _later(self, name: str, node: int, rest: Rest) -> Answer:
        try:
            return 0, await rest
        except Exception as error:
            return self._refuse(name, node, error)

    def _refuse(self, name: str, node: int, error: Exception) -> Answer:
        if isinstance(error, NoSuchName):
            return error.errno, b""
        self.failures[type(error).__name__] += 1
        if isinstance(error, LazyfsError):
            log.warning("%s failed: node=%#x error=%s", name, node, error)
            return errno_of(error), b""
        log.error("%s broke: node=%#x", name, node, exc_info=error)
        return errno.EIO, b""

    # -- names and attributes

    def _lookup(self, parent: int, body: memoryview) -> bytes:
        forest = self._forest
        name = wire.name_in(body)
        if name == b".":
            return self._entry(parent, FOREVER)
        if name == b"..":
            return self._entry(forest.parent_of(parent), FOREVER)
        try:
            node = forest.lookup(parent, name)
        except NoSuchName as absent:
            if absent.errno != errno.ENOENT or forest.is_list(parent):
                raise
            return wire.absent_out(FOREVER)
        return self._entry(node, self._timeout(parent))

    def _timeout(self, directory: int) -> int:
        """Seconds for which the kernel may keep a directory's names: the list of trees changes, nothing else does."""
        return 0 if self._forest.is_list(directory) else FOREVER

    def _entry(self, node: int, entry_timeout: int) -> bytes:
        # a directory's link count changes with its names
        return wire.entry_out(self._forest.attributes(node), entry_timeout, self._timeout(node))

    def _getattr(self, node: int, body: memoryview) -> bytes:
        return wire.attr_out(self._forest.attributes(node), self._timeout(node))

    def _readlink(self, node: int, body: memoryview) -> bytes:
        return self._forest.link(node)

    def _getxattr(self, node: int, body: memoryview) -> bytes:
        room, name = wire.xattr_in(body)
        value = self._forest.xattrs(node).get(name)
        if value is None:
            raise NoSuchName(errno.ENODATA)
        return wire.value_out(value, room)

    def _listxattr(self, node: int, body: memoryview) -> bytes:
        room, _ = wire.xattr_in(body)
        return wire.value_out(b"".join(name + b"\0" for name in self._forest.xattrs(node)), room)

    def _statfs(self, node: int, body: memoryview) -> bytes:
        layers = self._forest.layers()
        return wire.statfs_out(
            block=4096,
            blocks=sum(layer.table.data_size for layer in layers) // 4096,
            files=sum(layer.table.rows for layer in layers),
            name_length=_NAME_MAX,
        )

    # -- directories

    def _opendir(self, node: int, body: memoryview) -> bytes:
        # The handle is the node's id: the next daemon can serve it too. The kernel keeps what it listed once.
        return wire.open_out(node, 0 if self._forest.is_list(node) else wire.KEEP_CACHE | wire.CACHE_DIR)

    def _readdir(self, node: int, body: memoryview) -> bytes:
        return self._list(body, plus=False)

    def _readdirplus(self, node: int, body: memoryview) -> bytes:
        return self._list(body, plus=True)

    def _list(self, body: memoryview, *, plus: bool) -> bytes:
        forest = self._forest
        directory, start, room = wire.read_in(body)
        timeout = self._timeout(directory)
        listing = wire.Listing(room, plus=plus)
        for name, node, cookie in forest.list_from(directory, start):
            found: Attributes = forest.attributes(node)
            if not listing.add(name, found, cookie, timeout, self._timeout(node)):
                break
        return listing.encode()

    # -- files

    def _open(self, node: int, body: memoryview) -> bytes:
        if node == PROBE_ID or self._forest.data_layer(node) is not None:
            # EROFS keeps the pages. A second copy here would cost memory and half of the speed (measured), and its
            # read-ahead would go on beyond the end of the file that is read.
            return wire.open_out(node, wire.DIRECT_IO)
        layer, row = self._forest.source(node)
        if layer.table.kind[row] != Kind.REG:
            raise NoSuchName(errno.EINVAL)
        return wire.open_out(node, wire.KEEP_CACHE)

    def _read(self, node: int, body: memoryview) -> Data | Rest:
        handle, offset, size = wire.read_in(body)
        if handle == PROBE_ID:
            return _read_probe(offset, size)
        began = perf_counter()
        data = self._forest.data_layer(handle)
        if data is not None:
            # The whole range always, also behind the end: of a shorter answer the kernel makes zeros.
            found = self._reader.begin_data(data, offset, size)
        else:
            layer, row = self._forest.source(handle)
            found = self._reader.begin(layer, row, offset, size)
        if not isinstance(found, (bytes, bytearray, memoryview)):
            return self._timed(found, began)
        self.reads.note(perf_counter() - began)
        return found

    async def _timed(self, rest: Rest, began: float) -> Data:
        try:
            return await rest
        finally:
            self.reads.note(perf_counter() - began)


def _nothing(node: int, body: memoryview) -> bytes:
    return b""


def _read_probe(offset: int, size: int) -> bytes:
    """Answer the self-test, which wants to see a read fail in its midst: 0xff bytes, or an error."""
    if offset + size > PROBE_GOOD:
        raise NoSuchName(errno.EIO)
    return b"\xff" * size
