"""What a sequence of archive entries leaves behind when it is unpacked in order, worked out without unpacking.

Last wins; a directory replaced by a file takes its subtree with it; a parent that is a symlink is followed inside the
root (as a full unpack does); hard links bind to the inode that their target names at that moment. The converter uses
`Namespace` to list only living entries in a TOC, the table builder `Survivors` to make the tree of a layer.

Every step costs time in proportion to the names of the input; what symlinks add to that has a budget of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from lazyfs.errors import TarInvalid
from lazyfs.format.entry import MAX_NAME, MAX_PATH, WHITEOUT_PREFIX, Entry, Kind
from lazyfs.limits import MAX_FOLLOWED, MAX_NAMES, MAX_SYMLINKS

T = TypeVar("T")

_ROOT = b""
_DIR, _HARDLINK = Kind.DIR, Kind.HARDLINK  # an attribute of an enumeration takes longer to find than all else here
_NO_LINKS: Mapping[int, bytes] = {}
_NO_WHITEOUTS = frozenset({WHITEOUT_PREFIX, WHITEOUT_PREFIX + b".", WHITEOUT_PREFIX + b".."})


class Live(NamedTuple, Generic[T]):
    """An entry that survived, rewritten where needed, with the tag that came with its content."""

    entry: Entry
    tag: T


class Directory:
    """A directory as it is now. A child that is no directory is the sequence number of its entry."""

    __slots__ = ("children", "flags", "number", "path", "row")

    def __init__(self, path: bytes, number: int = -1) -> None:
        self.path = path
        self.number = number  # of its last entry; -1: nothing but a parent of others
        self.children: dict[bytes, Directory | int] = {}
        self.row = self.flags = 0  # for who makes a table of it


class Survivors:
    """Unpack entries with `put`, then `settle`: `root` has what is left. Not thread-safe; raises TarInvalid."""

    def __init__(self) -> None:
        self.root = Directory(_ROOT)
        self.paths: list[bytes] = []  # by sequence number: where the entry came to
        self.inode: dict[int, int] = {}  # hard link -> the entry that carries the inode
        self.carrier: dict[int, int] = {}  # inode with hard links -> the entry with its first living name
        self._kinds: list[Kind] = []
        self._links: dict[int, bytes] = {}
        self._parents: dict[bytes, Directory] = {_ROOT: self.root}  # directory as written -> what it leads to now
        self._implied = 0  # directories that were made because something lies in them
        self._followed = 0
        self._unbound: dict[int, None] = {}  # hard links whose target had not been seen yet, in order

    def put(self, paths: Sequence[bytes], kinds: Sequence[Kind], links: Mapping[int, bytes]) -> None:
        """Unpack these entries; `links` has the targets of links by sequence number. Raise TarInvalid."""
        first = len(self.paths)
        room = MAX_NAMES - self._implied - first
        if len(paths) > room:
            raise TarInvalid(f"more than {MAX_NAMES} entries", paths[max(room, 0)])
        self.paths += paths
        self._kinds += kinds
        self._links.update(links)
        parents = self._parents
        for number, (path, kind) in enumerate(zip(paths, kinds, strict=True), first):
            written, _, name = path.rpartition(b"/")
            if name in _NO_WHITEOUTS:
                raise TarInvalid("is a whiteout of nothing that can be removed", path)
            here = parents.get(written)
            if here is None:
                here = self._make_parent(written, path)
            if not name:
                if kind is not _DIR:
                    raise TarInvalid("the root is not a directory", b"/")
                here.number = number
                continue
            if here.path != written:
                path = self.paths[number] = self._moved(here, name, path)
            before = here.children.get(name)
            if kind is _HARDLINK:
                self._bind(path, number, here, name)
            if kind is not _DIR:
                if before is not None and (isinstance(before, Directory) or self._leads_on(before)):
                    self._forget_parents()
                here.children[name] = number
            elif isinstance(before, Directory):
                before.number = number
            else:
                if before is not None and self._leads_on(before):
                    self._forget_parents()
                here.children[name] = Directory(path, number)

    def settle(self) -> None:
        """Bind what is not bound yet, and find a living name for each inode. Raise TarInvalid for hard links that lead
        nowhere or in a circle."""
        self._bind_late()
        if self.inode:
            lives = bytearray(len(self.paths))
            for number in self.alive():
                lives[number] = 1
            for number in sorted(self.inode):
                if lives[number]:
                    inode = self.inode[number]
                    # The target's own name may come later than a link to it only if it is alive itself.
                    self.carrier.setdefault(inode, inode if lives[inode] else number)

    def alive(self) -> list[int]:
        """Return the sequence numbers of all that is left, in order."""
        found = []
        todo = [self.root]
        while todo:
            here = todo.pop()
            if here.number >= 0:
                found.append(here.number)
            for child in here.children.values():
                if isinstance(child, Directory):
                    todo.append(child)
                else:
                    found.append(child)
        return sorted(found)

    # -- parents

    def _leads_on(self, number: int) -> bool:
        """Tell whether other paths may lead through an entry that is no directory."""
        kind = self._kinds[self.inode.get(number, number)]
        return kind is Kind.SYMLINK or kind is _HARDLINK

    def _moved(self, here: Directory, name: bytes, entry: bytes) -> bytes:
        """Return the path of an entry that symbolic links on its way bring elsewhere."""
        path = here.path + b"/" + name if here.path else name
        if len(path) >= MAX_PATH:
            raise TarInvalid("lies deeper than a file system takes, symbolic links followed", entry)
        return path

    def _forget_parents(self) -> None:
        self._parents.clear()
        self._parents[_ROOT] = self.root

    def _make_parent(self, written: bytes, entry: bytes) -> Directory:
        """Return the directory that `written` leads to, made where it is missing (an unpack's mkdir -p)."""
        here, missing = self._walk(written, entry)
        for part in missing:
            path = here.path + b"/" + part if here.path else part
            if len(part) > MAX_NAME:  # of a symlink's target, which nobody looked at until now
                raise TarInvalid(f"lies below {part[:80]!r}…, a name longer than a file system takes", entry)
            if len(path) >= MAX_PATH:
                raise TarInvalid("lies deeper than a file system takes, symbolic links followed", entry)
            if part in here.children:
                raise TarInvalid(f"lies below {path[:200]!r}, which is not a directory", entry)
            self._implied += 1
            if len(self.paths) + self._implied > MAX_NAMES:
                raise TarInvalid(f"more than {MAX_NAMES} entries", entry)
            made = here.children[part] = Directory(path)
            here = made
        self._parents[written] = here
        return here

    def _find(self, path: bytes, entry: bytes) -> tuple[Directory, bytes] | None:
        """Return the directory and the name that `path` leads to, its last part not followed; None: no such parent."""
        written, _, name = path.rpartition(b"/")
        here = self._parents.get(written)
        if here is None:
            here, missing = self._walk(written, entry)
            if missing:
                return None
            self._parents[written] = here
        return here, name

    def _walk(self, written: bytes, entry: bytes) -> tuple[Directory, list[bytes]]:
        """Follow a directory's path inside the root. Return how far it leads, and what is missing behind that."""
        trail = [self.root]
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
                raise TarInvalid("lies below a whiteout", entry)
            found = None if missing else trail[-1].children.get(part)
            if isinstance(found, Directory):
                trail.append(found)
                continue
            inode = -1 if found is None else self.inode.get(found, found)
            if inode < 0 or self._kinds[inode] is not Kind.SYMLINK:
                missing.append(part)
                continue
            links += 1
            parts = self._links.get(inode, b"").split(b"/")
            self._followed += len(parts)
            if links > MAX_SYMLINKS:
                raise TarInvalid("lies below a cycle of symbolic links", entry)
            if self._followed > MAX_FOLLOWED:
                raise TarInvalid("is one of too many below symbolic links", entry)
            if parts[0] == b"":
                del trail[1:]
            todo.extend(reversed(parts))
        return trail[-1], missing

    # -- hard links

    def _bind(self, path: bytes, number: int, here: Directory, name: bytes) -> None:
        """Bind a hard link that is about to come to `name` in `here`, or note it for later."""
        target = self._target(number)
        if target == (here, name):
            raise TarInvalid("is a hard link to itself", path)
        found = target[0].children.get(target[1]) if target is not None else None
        if found is None or found in self._unbound:
            self._unbound[number] = None
            return
        if isinstance(found, Directory):
            raise TarInvalid("is a hard link to a directory", path)
        if target is not None and target[0].path.startswith(path) and isinstance(here.children.get(name), Directory):
            above = target[0].path
            if above == path or above[len(path)] == ord("/"):
                raise TarInvalid("is a hard link to a name below the directory that it replaces", path)
        self.inode[number] = self.inode.get(found, found)

    def _target(self, number: int) -> tuple[Directory, bytes] | None:
        path = self.paths[number]
        target = self._find(self._links.get(number, b""), path)
        if target is not None and target[1].startswith(WHITEOUT_PREFIX):
            raise TarInvalid("is a hard link to a whiteout", path)
        return target

    def _bind_late(self) -> None:
        """Bind links that came before their target; TOCs may hold such, and a link to nothing is found here."""
        for number in self._unbound:
            inode = number
            walked: dict[int, None] = {}
            while inode in self._unbound and inode not in self.inode:
                if inode in walked:
                    raise TarInvalid("is part of a cycle of hard links", self.paths[number])
                walked[inode] = None
                inode = self._late_target(inode)
            inode = self.inode.get(inode, inode)
            for link in walked:
                self.inode[link] = inode

    def _late_target(self, number: int) -> int:
        target = self._target(number)
        found = target[0].children.get(target[1]) if target is not None else None
        if found is None:
            shown = self._links.get(number, b"")[:200].decode("utf-8", "backslashreplace")
            raise TarInvalid(f"is a hard link to {shown!r}, which is not in this layer", self.paths[number])
        if isinstance(found, Directory):
            raise TarInvalid("is a hard link to a directory", self.paths[number])
        return found


class Namespace(Generic[T]):
    """Collect entries with `add`, then take the survivors with `finish`. Not thread-safe; raises TarInvalid."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []  # by sequence number
        self.tags: list[T] = []
        self.survivors = Survivors()

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry, tag: T) -> None:
        """Unpack one more entry. `tag` is kept with it untouched (chunks, usually). Raise TarInvalid."""
        links = {len(self.entries): entry.link} if entry.link else _NO_LINKS
        self.survivors.put((entry.path,), (entry.kind,), links)
        self.entries.append(entry)
        self.tags.append(tag)

    def finish(self) -> list[Live[T]]:
        """Return the survivors in the order of their content in the stream. Raise TarInvalid as `Survivors.settle`."""
        self.survivors.settle()
        inode, carrier = self.survivors.inode, self.survivors.carrier
        order = alive = self.survivors.alive()
        if inode:  # (where the content is, whose name it is)
            places = sorted((self._content(number, inode, carrier), number) for number in alive)
            order = [number for _, number in places]
        return [self._survivor(number, inode, carrier) for number in order]

    @staticmethod
    def _content(number: int, inode: dict[int, int], carrier: dict[int, int]) -> int:
        at = inode.get(number, number)
        return at if carrier.get(at, number) == number else number

    def _survivor(self, number: int, inode: dict[int, int], carrier: dict[int, int]) -> Live[T]:
        paths = self.survivors.paths
        at = inode.get(number, number)
        named = carrier.get(at, number)
        if named != number:
            return Live(replace(self.entries[number], path=paths[number], link=paths[named]), self.tags[number])
        entry = self.entries[at]
        if entry.path != paths[number]:
            entry = replace(entry, path=paths[number])
        return Live(entry, self.tags[at])
