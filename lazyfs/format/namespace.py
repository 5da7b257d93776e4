"""What a sequence of archive entries leaves behind when it is unpacked in order, worked out without unpacking.

Last wins; a directory replaced by a file takes its subtree with it; a parent that is a symlink is followed inside the
root (as a full unpack does); hard links bind to the inode that their target names at that moment. The converter uses
it to list only living entries in a TOC, the table builder to make the tree of a layer.

Every step costs time in proportion to the names of the input; what symlinks add to that has a budget of its own.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import MAX_PATH, WHITEOUT_PREFIX, Entry, Kind

T = TypeVar("T")

MAX_ENTRIES = 4_000_000  # parents made on the way included; bounds the memory of converter and table builder
_MAX_SYMLINKS = 40  # the kernel's own limit for one path
_MAX_FOLLOWED = 10_000_000  # parts of symlinks' targets walked for one layer: seconds, where sane layers need none
_ROOT = b""
_DIR, _HARDLINK = Kind.DIR, Kind.HARDLINK  # an attribute of an enumeration takes longer to find than all else here
_NO_WHITEOUTS = frozenset({WHITEOUT_PREFIX, WHITEOUT_PREFIX + b".", WHITEOUT_PREFIX + b".."})


class Live(NamedTuple, Generic[T]):
    """An entry that survived, rewritten where needed, with the tag that came with its content."""

    entry: Entry
    tag: T


class _Dir:
    """A directory as it is now. A child that is no directory is the sequence number of its entry."""

    __slots__ = ("children", "number", "path")

    def __init__(self, path: bytes, number: int = -1) -> None:
        self.path = path
        self.number = number  # of its last entry; -1: nothing but a parent of others
        self.children: dict[bytes, _Dir | int] = {}


class Namespace(Generic[T]):
    """Collect entries with `add`, then take the survivors with `finish`. Not thread-safe; raises TarInvalid."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []  # by sequence number
        self._tags: list[T] = []
        self._root = _Dir(_ROOT)
        self._parents: dict[bytes, _Dir] = {_ROOT: self._root}  # directory as written -> what it leads to now
        self._implied = 0  # directories that were made because something lies in them
        self._followed = 0
        self._inode: dict[int, int] = {}  # hard link -> the entry that carries the inode
        self._unbound: dict[int, None] = {}  # hard links whose target had not been seen yet, in order

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry, tag: T) -> None:
        """Unpack one more entry. `tag` is kept with it untouched (chunks, usually). Raise TarInvalid."""
        number = len(self._entries)
        if number + self._implied >= MAX_ENTRIES:
            raise TarInvalid(f"more than {MAX_ENTRIES} entries", entry.path)
        if not entry.path:
            if entry.kind is not Kind.DIR:
                raise TarInvalid("the root is not a directory", b"/")
            self._root.number = number
        else:
            entry = self._place(entry, number)
        self._entries.append(entry)
        self._tags.append(tag)

    def _place(self, entry: Entry, number: int) -> Entry:
        """Put an entry where its path leads now. Return it with that path."""
        written, _, name = entry.path.rpartition(b"/")
        if name in _NO_WHITEOUTS:
            raise TarInvalid("is a whiteout of nothing that can be removed", entry.path)
        here = self._parents.get(written)
        if here is None:
            here = self._make_parent(written, entry)
        if here.path != written:
            path = here.path + b"/" + name if here.path else name
            if len(path) >= MAX_PATH:
                raise TarInvalid("lies deeper than a file system takes, symbolic links followed", entry.path)
            entry = replace(entry, path=path)
        before = here.children.get(name)
        if entry.kind is _HARDLINK:
            self._bind(entry, number, here, name)
        if entry.kind is not _DIR:
            if before is not None and (isinstance(before, _Dir) or self._leads_on(before)):
                self._forget_parents()
            here.children[name] = number
        elif isinstance(before, _Dir):
            before.number = number
        else:
            if before is not None and self._leads_on(before):
                self._forget_parents()
            here.children[name] = _Dir(entry.path, number)
        return entry

    def finish(self) -> list[Live[T]]:
        """Return the survivors in the order of their content in the stream. Raise TarInvalid for hard links that lead
        nowhere or in a circle."""
        self._bind_late()
        alive = self._alive()
        entries, tags = self._entries, self._tags
        if not self._inode:
            return [Live(entries[number], tags[number]) for number in alive]
        lives = bytearray(len(entries))
        for number in alive:
            lives[number] = 1
        names: dict[int, int] = {}  # inode -> the entry with its first living name
        order: list[tuple[int, int]] = []  # (where the content is, whose name it is)
        for number in alive:
            inode = self._inode.get(number, number)
            # The target's own name may come later in the sequence than a link to it only if it is alive itself.
            carrier = names.setdefault(inode, inode if lives[inode] else number)
            order.append((inode if carrier == number else number, number))
        order.sort()
        return [self._survivor(number, names) for _, number in order]

    def _alive(self) -> list[int]:
        """Return the sequence numbers of all that is left, in order."""
        found = []
        todo = [self._root]
        while todo:
            here = todo.pop()
            if here.number >= 0:
                found.append(here.number)
            for child in here.children.values():
                if isinstance(child, _Dir):
                    todo.append(child)
                else:
                    found.append(child)
        return sorted(found)

    def _survivor(self, number: int, names: dict[int, int]) -> Live[T]:
        entry = self._entries[number]
        inode = self._inode.get(number)
        if inode is None:
            return Live(entry, self._tags[number])
        carrier = names[inode]
        if carrier != number:
            return Live(replace(entry, link=self._entries[carrier].path), self._tags[number])
        return Live(replace(self._entries[inode], path=entry.path), self._tags[inode])

    # -- parents

    def _leads_on(self, number: int) -> bool:
        """Tell whether other paths may lead through an entry that is no directory."""
        return self._entries[self._inode.get(number, number)].kind in (Kind.SYMLINK, Kind.HARDLINK)

    def _forget_parents(self) -> None:
        self._parents.clear()
        self._parents[_ROOT] = self._root

    def _make_parent(self, written: bytes, entry: Entry) -> _Dir:
        """Return the directory that `written` leads to, made where it is missing (an unpack's mkdir -p)."""
        here, missing = self._walk(written, entry)
        for part in missing:
            path = here.path + b"/" + part if here.path else part
            if len(path) >= MAX_PATH:
                raise TarInvalid("lies deeper than a file system takes, symbolic links followed", entry.path)
            if part in here.children:
                raise TarInvalid(f"lies below {path[:200]!r}, which is not a directory", entry.path)
            self._implied += 1
            if len(self._entries) + self._implied > MAX_ENTRIES:
                raise TarInvalid(f"more than {MAX_ENTRIES} entries", entry.path)
            made = here.children[part] = _Dir(path)
            here = made
        self._parents[written] = here
        return here

    def _find(self, path: bytes, entry: Entry) -> tuple[_Dir, bytes] | None:
        """Return the directory and the name that `path` leads to, its last part not followed; None: no such parent."""
        written, _, name = path.rpartition(b"/")
        here = self._parents.get(written)
        if here is None:
            here, missing = self._walk(written, entry)
            if missing:
                return None
            self._parents[written] = here
        return here, name

    def _walk(self, written: bytes, entry: Entry) -> tuple[_Dir, list[bytes]]:
        """Follow a directory's path inside the root. Return how far it leads, and what is missing behind that."""
        trail = [self._root]
        missing: list[bytes] = []
        todo = written.split(b"/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if missing:
                    missing.pop()
                elif len(trail) > 1:  # above the root is the root, as in a chroot
                    trail.pop()
                continue
            if part.startswith(WHITEOUT_PREFIX):
                raise TarInvalid("lies below a whiteout", entry.path)
            found = None if missing else trail[-1].children.get(part)
            if isinstance(found, _Dir):
                trail.append(found)
                continue
            link = None if found is None else self._entries[self._inode.get(found, found)]
            if link is None or link.kind is not Kind.SYMLINK:
                missing.append(part)
                continue
            links += 1
            parts = link.link.split(b"/")
            self._followed += len(parts)
            if links > _MAX_SYMLINKS:
                raise TarInvalid("lies below a cycle of symbolic links", entry.path)
            if self._followed > _MAX_FOLLOWED:
                raise TarInvalid("is one of too many below symbolic links", entry.path)
            if parts[0] == b"":
                del trail[1:]
            todo.extend(reversed(parts))
        return trail[-1], missing

    # -- hard links

    def _bind(self, entry: Entry, number: int, here: _Dir, name: bytes) -> None:
        """Bind a hard link that is about to come to `name` in `here`, or note it for later."""
        target = self._target(entry)
        if target == (here, name):
            raise TarInvalid("is a hard link to itself", entry.path)
        found = target[0].children.get(target[1]) if target is not None else None
        if found is None or found in self._unbound:
            self._unbound[number] = None
            return
        if isinstance(found, _Dir):
            raise TarInvalid("is a hard link to a directory", entry.path)
        if target is not None and target[0].path.startswith(entry.path) and isinstance(here.children.get(name), _Dir):
            above = target[0].path
            if above == entry.path or above[len(entry.path)] == ord("/"):
                raise TarInvalid("is a hard link to a name below the directory that it replaces", entry.path)
        self._inode[number] = self._inode.get(found, found)

    def _target(self, entry: Entry) -> tuple[_Dir, bytes] | None:
        target = self._find(entry.link, entry)
        if target is not None and target[1].startswith(WHITEOUT_PREFIX):
            raise TarInvalid("is a hard link to a whiteout", entry.path)
        return target

    def _bind_late(self) -> None:
        """Bind links that came before their target; TOCs may hold such, and a link to nothing is found here."""
        for number in self._unbound:
            inode = number
            walked: dict[int, None] = {}
            while inode in self._unbound and inode not in self._inode:
                if inode in walked:
                    raise TarInvalid("is part of a cycle of hard links", self._entries[number].path)
                walked[inode] = None
                inode = self._late_target(inode)
            inode = self._inode.get(inode, inode)
            for link in walked:
                self._inode[link] = inode

    def _late_target(self, number: int) -> int:
        entry = self._entries[number]
        target = self._target(entry)
        found = target[0].children.get(target[1]) if target is not None else None
        if found is None:
            shown = entry.link[:200].decode("utf-8", "backslashreplace")
            raise TarInvalid(f"is a hard link to {shown!r}, which is not in this layer", entry.path)
        if isinstance(found, _Dir):
            raise TarInvalid("is a hard link to a directory", entry.path)
        return found
