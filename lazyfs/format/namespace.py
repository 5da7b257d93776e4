"""What a sequence of archive entries leaves behind when it is unpacked in order, worked out without unpacking.

Last wins; a directory replaced by a file takes its subtree with it; a parent that is a symlink is followed inside the
root (as a full unpack does); hard links bind to the inode that their target names at that moment. The converter uses
it to list only living entries in a TOC, the table builder to make the tree of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import WHITEOUT_PREFIX, Entry, Kind

T = TypeVar("T")

MAX_ENTRIES = 4_000_000  # more is no image layer; bounds the memory of converter and table builder
_MAX_SYMLINKS = 40  # the kernel's own limit for one path


@dataclass(frozen=True, slots=True)
class Live(Generic[T]):
    """An entry that survived, rewritten where needed, with the tag that came with its content."""

    entry: Entry
    tag: T


class Namespace(Generic[T]):
    """Collect entries with `add`, then take the survivors with `finish`. Not thread-safe; raises TarInvalid."""

    def __init__(self) -> None:
        self._entries: list[Entry | None] = []  # by sequence number; None: an implicit parent directory
        self._tags: list[T | None] = []
        self._at: dict[bytes, int] = {}  # path -> sequence number of what is there
        self._killed: dict[bytes, int] = {}  # path -> when a directory there was last replaced by something else
        self._dirs: set[bytes] = set()  # paths known to be living directories: the fast way through `_parent`
        self._inode: dict[int, int] = {}  # hard link -> the entry that carries the inode
        self._unbound: dict[int, None] = {}  # hard links whose target had not been seen yet, in order

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry, tag: T) -> None:
        """Unpack one more entry. `tag` is kept with it untouched (chunks, usually). Raise TarInvalid."""
        if len(self._entries) >= MAX_ENTRIES:
            raise TarInvalid(f"more than {MAX_ENTRIES} entries", entry.path)
        if not entry.path:
            if entry.kind is not Kind.DIR:
                raise TarInvalid("the root is not a directory", b"/")
            self._put(entry, tag)
            return
        path = self._real_path(entry.path, entry)
        if path != entry.path:
            entry = replace(entry, path=path)
        if entry.kind is Kind.HARDLINK:
            self._bind(entry)
        elif entry.kind is Kind.DIR:
            self._dirs.add(path)
        before = self._current(path)
        if before is not None and entry.kind is not Kind.DIR and self._kind(before) is Kind.DIR:
            self._killed[path] = len(self._entries)
            self._dirs.clear()  # rare; the set only saves walks
        self._put(entry, tag)

    def finish(self) -> list[Live[T]]:
        """Return the survivors in the order of their content in the stream. Raise TarInvalid for hard links that lead
        nowhere or in a circle."""
        self._bind_late()
        alive = [
            number
            for number, entry in enumerate(self._entries)
            if entry is not None and self._at[entry.path] == number and self._alive(entry.path, number)
        ]
        names: dict[int, bytes] = {}  # inode -> path of its first living name
        order: list[tuple[int, int]] = []  # (where the content is, whose name it is)
        for number in alive:
            inode = self._inode.get(number, number)
            first = inode not in names
            if first:
                # The target's own name may come later in the sequence than a link to it only if it is alive itself.
                original = self._entries[inode]
                assert original is not None
                own_alive = self._at[original.path] == inode and self._alive(original.path, inode)
                names[inode] = original.path if own_alive else self._path(number)
            carries = names[inode] == self._path(number)
            order.append((inode if carries else number, number))
        order.sort()
        return [self._survivor(number, names) for _, number in order]

    def _survivor(self, number: int, names: dict[int, bytes]) -> Live[T]:
        entry = self._entries[number]
        assert entry is not None
        inode = self._inode.get(number)
        if inode is None:
            return Live(entry, self._tags[number])  # type: ignore[arg-type]
        if names[inode] != entry.path:
            return Live(replace(entry, link=names[inode]), self._tags[number])  # type: ignore[arg-type]
        original = self._entries[inode]
        assert original is not None
        return Live(replace(original, path=entry.path), self._tags[inode])  # type: ignore[arg-type]

    def _put(self, entry: Entry | None, tag: T | None, path: bytes = b"") -> None:
        self._at[entry.path if entry is not None else path] = len(self._entries)
        self._entries.append(entry)
        self._tags.append(tag)

    def _path(self, number: int) -> bytes:
        entry = self._entries[number]
        return entry.path if entry is not None else b""

    def _kind(self, number: int) -> Kind:
        entry = self._entries[self._inode.get(number, number)]
        return Kind.DIR if entry is None else entry.kind

    def _alive(self, path: bytes, number: int) -> bool:
        if not self._killed:
            return True
        cut = path.find(b"/")
        while cut >= 0:
            if self._killed.get(path[:cut], -1) > number:
                return False
            cut = path.find(b"/", cut + 1)
        return True

    def _current(self, path: bytes) -> int | None:
        number = self._at.get(path)
        return number if number is not None and self._alive(path, number) else None

    def _real_path(self, path: bytes, entry: Entry, *, create: bool = True) -> bytes:
        """Follow symlinks in the parents of `path`, making missing ones (an unpack's mkdir -p)."""
        parent, _, name = path.rpartition(b"/")
        if not parent or parent in self._dirs:
            return path
        todo = parent.split(b"/")[::-1]
        here: list[bytes] = []
        followed = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del here[-1:]  # above the root is the root, as in a chroot
                continue
            if part.startswith(WHITEOUT_PREFIX):
                raise TarInvalid("lies below a whiteout", entry.path)
            candidate = b"/".join([*here, part])
            number = self._current(candidate)
            if number is None:
                if create:
                    self._put(None, None, candidate)
                    self._dirs.add(candidate)
                here.append(part)
                continue
            kind = self._kind(number)
            if kind is Kind.SYMLINK:
                followed += 1
                if followed > _MAX_SYMLINKS:
                    raise TarInvalid("lies below a cycle of symbolic links", entry.path)
                link = self._entries[self._inode.get(number, number)]
                assert link is not None
                if link.link.startswith(b"/"):
                    here.clear()
                todo.extend(link.link.split(b"/")[::-1])
            elif kind is Kind.DIR:
                here.append(part)
            elif create:
                raise TarInvalid(f"lies below {candidate[:200]!r}, which is not a directory", entry.path)
            else:
                here.append(part)
        return b"/".join([*here, name])

    def _bind(self, entry: Entry) -> None:
        number = len(self._entries)
        target = self._real_path(entry.link, entry, create=False)
        if target == entry.path:
            raise TarInvalid("is a hard link to itself", entry.path)
        found = self._current(target)
        if found is None or found in self._unbound:
            self._unbound[number] = None
            return
        if self._kind(found) is Kind.DIR:
            raise TarInvalid("is a hard link to a directory", entry.path)
        self._inode[number] = self._inode.get(found, found)

    def _bind_late(self) -> None:
        """Bind links that came before their target; TOCs may hold such, and a link to nothing is found here."""
        for number in self._unbound:
            inode = number
            walked: dict[int, None] = {}
            while inode in self._unbound and inode not in self._inode:
                if inode in walked:
                    raise TarInvalid("is part of a cycle of hard links", self._path(number))
                walked[inode] = None
                inode = self._target_of(inode)
            inode = self._inode.get(inode, inode)
            if self._kind(inode) is Kind.DIR:
                raise TarInvalid("is a hard link to a directory", self._path(number))
            for link in walked:
                self._inode[link] = inode

    def _target_of(self, number: int) -> int:
        entry = self._entries[number]
        assert entry is not None
        found = self._current(self._real_path(entry.link, entry, create=False))
        if found is None:
            shown = entry.link[:200].decode("utf-8", "backslashreplace")
            raise TarInvalid(f"is a hard link to {shown!r}, which is not in this layer", entry.path)
        return found
