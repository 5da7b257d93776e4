"""A layer's tar in another order: what a start reads first, a landmark behind it, then the rest as it was.

The order of a tar is known only at its end, so the tar is kept in a temporary file and read again. An entry is moved
only where that can't change the unpacked tree: not when its path, or one that it needs, comes twice or is whited out in
the same layer, and none at all when names lead through symlinks of the layer. Source: specs/estargz.md section 3.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from indexer.rewrite import regular_header
from lazyfs.errors import Interrupted, StoreBroken
from lazyfs.format.entry import LANDMARK, LANDMARK_CONTENT, NO_LANDMARK, WHITEOUT_PREFIX, Entry, Kind
from lazyfs.format.tar import TarItem, TarScanner
from lazyfs.format.tar_headers import pad
from lazyfs.limits import MAX_SYMLINKS
from lazyfs.units import MiB

_BLOCK = MiB  # bytes read back at once


class SpooledTar:
    """A tar in a temporary file, and where its entries lie. Use it in a `with`; one thread's.

    Entering reads all of `blocks`; it blocks on them, and raises what they raise, TarInvalid, and StoreBroken when the
    disk doesn't take them. Memory: some 300 bytes a name.
    """

    def __init__(
        self,
        blocks: Iterable[bytes],
        prefetch: tuple[bytes, ...],
        scratch: Path | None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.source_diff_id = ""
        self.found: tuple[bytes, ...] = ()  # of the paths asked for, those that the layer holds and that were moved
        self._blocks = blocks
        self._prefetch = prefetch
        self._scratch = scratch
        self._cancelled = cancelled
        self._file: BinaryIO
        self._size = 0
        self._starts, self._ends = array("Q"), array("Q")
        self._kinds = array("B")
        self._rows: dict[bytes, int] = {}
        self._links: dict[int, bytes] = {}
        self._twice: set[bytes] = set()
        self._order: list[int] = []

    def __enter__(self) -> SpooledTar:
        try:
            self._file = tempfile.TemporaryFile(prefix="layer-", dir=self._scratch)
        except OSError as error:
            raise StoreBroken(f"a temporary file can't be made: {error.strerror}") from None
        try:
            self._fill()
            self._find()
        except BaseException:
            with suppress(OSError):
                self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[bytes]:
        """Yield the tar again: in the new order when any path was found, else as it came. Blocks on the disk."""
        if not self._order:
            yield from self._range(0, self._size)
            return
        for row in self._order:
            yield from self._range(self._starts[row], self._ends[row])
        yield landmark_entry()
        left_out = {*self._order, *(self._rows[name] for name in (LANDMARK, NO_LANDMARK) if name in self._rows)}
        for row in range(len(self._starts)):
            if row not in left_out:
                yield from self._range(self._starts[row], self._ends[row])
        if self._ends[-1] < self._size:
            yield from self._range(self._ends[-1], self._size)

    def _fill(self) -> None:
        scanner, total = TarScanner(), hashlib.sha256()
        for block in self._blocks:
            for item in scanner.feed(block):
                self._add(item)
            total.update(block)
            self._size += len(block)
            try:
                self._file.write(block)
            except OSError as error:
                raise StoreBroken(f"a temporary file can't be written: {error.strerror}") from None
        try:
            self._file.flush()
        except OSError as error:
            raise StoreBroken(f"a temporary file can't be written: {error.strerror}") from None
        scanner.finish()
        self.source_diff_id = "sha256:" + total.hexdigest()

    def _add(self, item: TarItem) -> None:
        entry, row = item.entry, len(self._starts)
        self._starts.append(item.start)
        self._ends.append(item.end)
        self._kinds.append(entry.kind)
        if self._rows.setdefault(entry.path, row) != row:
            self._twice.add(entry.path)
        if entry.kind is Kind.SYMLINK or entry.kind is Kind.HARDLINK:
            self._links[row] = entry.link

    def _find(self) -> None:
        if self._leads_through_links():
            return
        order: dict[int, None] = {}
        found = []
        for path in self._prefetch:
            needed: dict[int, None] = {}
            if self._gather(path, needed):
                found.append(path)
                order.update(needed)
        if found:
            root = self._rows.get(b"")
            self._order = [*([] if root is None or b"" in self._twice else [root]), *(n for n in order if n != root)]
        self.found = tuple(found)

    def _leads_through_links(self) -> bool:
        links = {path for path, row in self._rows.items() if self._kinds[row] == Kind.SYMLINK} | self._twice
        clean: set[bytes] = {b""}
        for path in self._rows:
            above = path.rpartition(b"/")[0]
            passed = []
            while above not in clean:
                if above in links and self._kinds[self._rows[above]] != Kind.DIR:
                    return True
                passed.append(above)
                above = above.rpartition(b"/")[0]
            clean.update(passed)
        return False

    def _gather(self, path: bytes, needed: dict[int, None], depth: int = 0) -> bool:
        """Collect, in order, what must be there for `path`: directories, links on the way, targets, itself."""
        steps = path.split(b"/")[::-1]
        here, links = b"", 0
        while steps:
            part = steps.pop()
            parent, here = here, here + b"/" + part if here else part
            whiteout = (parent + b"/" if parent else b"") + WHITEOUT_PREFIX + part
            if here in self._twice or whiteout in self._rows:
                return False
            row = self._rows.get(here)
            if row is None:
                if not steps:
                    return False
                continue
            if self._kinds[row] == Kind.HARDLINK and (
                depth > MAX_SYMLINKS or not self._gather(self._links[row], needed, depth + 1)
            ):
                return False
            needed[row] = None
            if self._kinds[row] == Kind.SYMLINK:
                links += 1
                whole = _joined(parent, self._links[row])
                if links > MAX_SYMLINKS or whole is None:
                    return False
                if not steps and self._rows.get(b"/".join(whole)) is None:
                    return True  # the target is in another layer, or nowhere
                steps += whole[::-1]
                here = b""
        return True

    def _range(self, start: int, end: int) -> Iterator[bytes]:
        try:
            self._file.seek(start)
            while start < end:
                if self._cancelled is not None and self._cancelled.is_set():
                    raise Interrupted("the conversion was cancelled")
                block = self._file.read(min(_BLOCK, end - start))
                if not block:
                    yield bytes(end - start)  # the padding that the last entry of a tar may lack
                    return
                start += len(block)
                yield block
        except OSError as error:
            raise StoreBroken(f"a temporary file can't be read back: {error.strerror}") from None


def landmark_entry() -> bytes:
    """Return the landmark as a tar entry, header and content."""
    entry = Entry(LANDMARK, Kind.REG, 0, 0, 0, 0, len(LANDMARK_CONTENT))
    return regular_header(entry) + LANDMARK_CONTENT + bytes(pad(len(LANDMARK_CONTENT)))


def _joined(parent: bytes, target: bytes) -> list[bytes] | None:
    """Return the parts of a symlink's target seen from the root; None when it leads out of it."""
    parts = [] if target.startswith(b"/") else parent.split(b"/") if parent else []
    for part in target.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return parts
