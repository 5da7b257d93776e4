"""A full unpack by real system calls, the measure for what `Namespace`, tables and trees work out without one.

Rules: what is there makes room for what comes, but a directory for a directory; missing parents are made; symlinks on
the way are followed inside the root; whiteouts take effect when they come. The owner of each node is the number of the
entry that it came from, so a test can tell which one won. Needs root, for the owners.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from lazyfs.format.entry import OPAQUE_MARKER, WHITEOUT_PREFIX, Entry, Kind

_MAX_LINKS = 40
IMPLICIT = 0  # the owner of directories that no entry names; entries count from 1


class Refused(Exception):
    """What a real unpack would not do."""


class Ambiguous(Exception):
    """Where real unpackers differ, because what a layer does depends on the order within it and on lower layers."""


@dataclass
class Unpacker:
    """Unpacks layers over one another into `root`, an empty directory."""

    root: bytes
    count: int = 0  # entries so far
    lower: set[bytes] = field(default_factory=set)  # real paths that lower layers left
    _made: set[bytes] = field(default_factory=set)  # real paths of this layer's entries
    _parents: set[bytes] = field(default_factory=set)  # real paths in which this layer's entries lie
    _cleared: set[bytes] = field(default_factory=set)  # lower directories that something else has replaced
    _through: list[tuple[bytes, bytes]] = field(default_factory=list)  # (lower symlink followed, where it led)

    def layer(self, entries: Iterable[Entry]) -> None:
        """Unpack one layer. Raise Refused or Ambiguous; then the tree is of no use."""
        self.lower = set(self._paths())
        self._made, self._parents, self._cleared, self._through = set(), set(), set(), []
        for entry in entries:
            self.count += 1
            try:
                self._one(entry)
            except OSError as error:
                raise Refused(f"{entry.path!r}: {error}") from None
        self._settle()

    def _settle(self) -> None:
        """Refuse to judge layers that write through a lower symlink and touch the symlink or its target otherwise."""
        for link, real in self._through:
            for made in self._made:
                if (made != real and (_within(made, real) or _within(real, made))) or _within(link, made):
                    raise Ambiguous(link)

    def _paths(self) -> list[bytes]:
        out = []
        for directory, names, files in os.walk(self.root):
            out += [os.path.relpath(os.path.join(directory, name), self.root) for name in (*names, *files)]
        return out

    def _at(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def _one(self, entry: Entry) -> None:
        if not entry.path:
            if entry.kind is not Kind.DIR:
                raise Refused("the root is a directory")
            self._own(b"", entry)
            return
        parent, _, name = entry.path.rpartition(b"/")
        parent = self._resolve(parent)
        self._make_parents(parent)
        path = parent + b"/" + name if parent else name
        if name == OPAQUE_MARKER:
            self._parents.add(parent)
            for child in os.listdir(self._at(parent)):
                self._hide_lower(parent + b"/" + child if parent else child)
            return
        if name.startswith(WHITEOUT_PREFIX):
            gone = parent + b"/" + name[len(WHITEOUT_PREFIX) :] if parent else name[len(WHITEOUT_PREFIX) :]
            self._hide_lower(gone)
            self._parents.add(parent)
            return
        found = self._kind(path)
        if found is not None and not (found is Kind.DIR and entry.kind is Kind.DIR):
            if found is Kind.DIR and path in self.lower:
                self._cleared.add(path)
            self._remove(path)
            found = None
        if entry.kind is Kind.DIR and path in self._cleared:
            raise Ambiguous(path)
        self._parents.add(parent)
        self._make(entry, path, found)
        if any(real == path and path in self._made for _, real in self._through):
            raise Ambiguous(path)
        self._made.add(path)

    def _make(self, entry: Entry, path: bytes, found: Kind | None) -> None:
        at = self._at(path)
        if entry.kind is Kind.HARDLINK:
            directory, _, name = entry.link.rpartition(b"/")
            target = self._resolve(directory) + b"/" + name if directory else name
            if target.lstrip(b"/") not in self._made:
                raise Refused("a hard link out of its layer")
            os.link(self._at(target.lstrip(b"/")), at, follow_symlinks=False)
            return
        if entry.kind is Kind.DIR:
            if found is None:
                os.mkdir(at)
        elif entry.kind is Kind.SYMLINK:
            os.symlink(entry.link, at)
        elif entry.kind is Kind.FIFO:
            os.mkfifo(at)
        else:
            with open(at, "xb"):
                pass
        self._own(path, entry)

    def _own(self, path: bytes, entry: Entry) -> None:
        os.chown(self._at(path), self.count, self.count, follow_symlinks=False)
        if entry.kind is not Kind.SYMLINK:
            os.chmod(self._at(path), entry.mode)

    def _kind(self, path: bytes) -> Kind | None:
        try:
            mode = os.lstat(self._at(path)).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Kind.DIR if stat.S_ISDIR(mode) else Kind.SYMLINK if stat.S_ISLNK(mode) else Kind.REG

    def _hide_lower(self, path: bytes) -> None:
        if any(_within(link, path) for link, _ in self._through):
            raise Ambiguous(path)  # a whiteout before what went through the symlink would have stopped that
        self._hide(path)

    def _hide(self, path: bytes) -> None:
        if any(_within(one, path) for one in (*self._parents, *self._made)):
            raise Ambiguous(path)  # a whiteout behind what it would hide or not hide
        self._remove(path)

    def _remove(self, path: bytes) -> None:
        if self._kind(path) is Kind.DIR:
            shutil.rmtree(self._at(path))
        elif self._kind(path) is not None:
            os.unlink(self._at(path))
        for known in [one for one in self._made if _within(one, path)]:
            self._made.discard(known)

    def _make_parents(self, path: bytes) -> None:
        here = b""
        for part in path.split(b"/") if path else ():
            here = here + b"/" + part if here else part
            if self._kind(here) is None:
                os.mkdir(self._at(here))
                os.chmod(self._at(here), 0o755)
                os.chown(self._at(here), IMPLICIT, IMPLICIT)
            elif self._kind(here) is not Kind.DIR:
                raise Refused(f"{here!r} is not a directory")

    def _resolve(self, path: bytes) -> bytes:
        todo = path.split(b"/")[::-1]
        here: list[bytes] = []
        links = 0
        lower_link = b""
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del here[-1:]
                continue
            if part.startswith(WHITEOUT_PREFIX):
                raise Refused("below a whiteout")
            at = b"/".join([*here, part])
            if self._kind(at) is Kind.SYMLINK:
                links += 1
                if links > _MAX_LINKS:
                    raise Refused("a cycle of symlinks")
                if at in self.lower and at not in self._made:
                    lower_link = lower_link or at
                target = os.readlink(self._at(at))
                if target.startswith(b"/"):
                    here = []
                todo.extend(target.split(b"/")[::-1])
            else:
                here.append(part)
        real = b"/".join(here)
        if lower_link:
            self._through.append((lower_link, real))
        return real


def _within(path: bytes, above: bytes) -> bool:
    return not above or path == above or path.startswith(above + b"/")


@dataclass(frozen=True)
class Seen:
    """What can be compared of a name: kind, mode, the entry that it came from, target, all names of its inode."""

    kind: Kind
    mode: int
    owner: int
    link: bytes
    names: tuple[bytes, ...]


def seen_on_disk(root: bytes) -> dict[bytes, Seen]:
    """Read an unpacked tree back."""
    stats = {b"": os.lstat(root)}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            at = os.path.join(directory, name)
            stats[os.path.relpath(at, root)] = os.lstat(at)
    groups: dict[int, list[bytes]] = {}
    for path, status in stats.items():
        groups.setdefault(status.st_ino, []).append(path)
    out = {}
    for path, status in stats.items():
        mode = status.st_mode
        kind = next(
            kind
            for test, kind in (
                (stat.S_ISDIR, Kind.DIR),
                (stat.S_ISLNK, Kind.SYMLINK),
                (stat.S_ISFIFO, Kind.FIFO),
                (stat.S_ISREG, Kind.REG),
            )
            if test(mode)
        )
        link = os.readlink(os.path.join(root, path)) if kind is Kind.SYMLINK else b""
        shown = 0 if kind is Kind.SYMLINK else stat.S_IMODE(mode)
        names = groups[status.st_ino]
        assert kind is Kind.DIR or len(names) == status.st_nlink
        out[path] = Seen(kind, shown, status.st_uid, link, tuple(sorted(names)))
    return out
