"""Where the files of a tar archive lie, found by its headers alone; and an archive file that is read by ranges.

Nothing is ever unpacked: a member is a name and a range of the archive's bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lazyfs.errors import DocumentInvalid, ManifestMissing, TarInvalid
from lazyfs.format.entry import MAX_PATH
from lazyfs.format.tar_headers import BLOCK, HEADER, ZERO_BLOCK, checksum_holds, decimal, number, pax_records
from lazyfs.format.tar_headers import pad as padding
from lazyfs.limits import MAX_ARCHIVE_LINKS, MAX_ARCHIVE_NAMES, MAX_EXTENSION, MAX_MEMBERS
from lazyfs.registry.local.files import OpenRange, fault
from lazyfs.registry.local.layout import open_regular
from lazyfs.registry.local.layout_read import Missing

_FILES = (b"0", b"\0", b"7")
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -d"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"\xfd7zXZ\0": ("xz", "xz -d"),
}

ReadAt = Callable[[int, int], bytes]  # (size, offset): that many bytes, fewer at the end of the file only


@dataclass(frozen=True, slots=True)
class Member:
    """A name in the archive. `offset` and `size` are the payload's, in the archive; `link` is where a symlink leads."""

    name: str
    is_file: bool
    is_directory: bool
    offset: int
    size: int
    link: str = ""


class _Names:
    """What extension headers say of the entry behind them."""

    def __init__(self) -> None:
        self.path: bytes | None = None
        self.link: bytes | None = None
        self.size: int | None = None

    def take(self, kind: bytes, payload: bytes) -> None:
        if kind == b"L":
            self.path = payload.partition(b"\0")[0]
        elif kind == b"K":
            self.link = payload.partition(b"\0")[0]
        elif kind == b"x":
            records = pax_records(payload)
            if any(key.startswith(b"GNU.sparse.") for key in records):
                raise TarInvalid("it is sparse")
            self.path = records.get(b"path", self.path)
            self.link = records.get(b"linkpath", self.link)
            if b"size" in records:
                self.size = decimal(records[b"size"], "its size")


def find_members(read_at: ReadAt, total: int) -> dict[str, Member]:
    """Return all members of a tar of `total` bytes by name. Reads headers only, at most MAX_MEMBERS.

    Raise TarInvalid: damage, an end that is missing, a name twice or one that leads out, a sparse member, too many.
    """
    found: dict[str, Member] = {}
    at, count, room, names = 0, 0, MAX_ARCHIVE_NAMES, _Names()
    while at < total:
        block = read_at(BLOCK, at)
        if len(block) < BLOCK:
            raise TarInvalid("it is cut short in a header")
        if block == ZERO_BLOCK:
            break
        count += 1
        if count > MAX_MEMBERS:
            raise TarInvalid(f"it has more than {MAX_MEMBERS} members")
        name, _, size_field, _, checksum, kind, link, middle, tail = HEADER.unpack(block)
        if not checksum_holds(memoryview(block), checksum):
            raise TarInvalid("a header's checksum is wrong" if at else "it is no tar archive")
        size = number(size_field)
        at += BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if not 0 <= size <= MAX_EXTENSION:
                raise TarInvalid(f"an extension header claims {size} bytes")
            payload = read_at(size, at)
            if len(payload) < size:
                raise TarInvalid("it is cut short in a header")
            names.take(kind, payload)
            at += size + padding(size)
            continue
        member = _member(name, size, kind, link, middle, tail, names, at)
        if member.is_file or kind not in (b"1", b"2", b"3", b"4", b"5", b"6"):
            if at + member.size > total:
                raise TarInvalid("it is cut short in this member", os.fsencode(member.name))
            at += member.size + padding(member.size)
        room -= len(member.name) + len(member.link)
        if room < 0:
            raise TarInvalid(f"its names have more than {MAX_ARCHIVE_NAMES} bytes together")
        old = found.get(member.name)
        if old is not None and not (old.is_directory and member.is_directory):
            raise TarInvalid("two members have this name", os.fsencode(member.name))
        found[member.name] = member
        names = _Names()
    return found


def _member(
    name: bytes, size: int, kind: bytes, link: bytes, middle: bytes, tail: bytes, names: _Names, at: int
) -> Member:
    path = names.path
    if path is None:
        path = name.partition(b"\0")[0]
        if middle[:6] == b"ustar\0" and (prefix := tail.partition(b"\0")[0]):
            path = prefix + b"/" + path
    if kind == b"S":
        raise TarInvalid("it is sparse", path)
    if names.size is not None:
        size = names.size
    if size < 0:
        raise TarInvalid("its size is negative", path)
    target = names.link if names.link is not None else link.partition(b"\0")[0]
    is_file = kind in _FILES and not path.endswith(b"/")
    return Member(
        _clean(path),
        is_file,
        kind == b"5" or (kind in _FILES and not is_file),
        at,
        size if is_file or kind not in (b"1", b"2") else 0,
        os.fsdecode(target) if kind == b"2" else "",
    )


def _clean(path: bytes) -> str:
    """Return the name without "./" and doubled slashes. Raise TarInvalid for one that leads out of the archive."""
    if len(path) > MAX_PATH:
        raise TarInvalid(f"a name is longer than {MAX_PATH} bytes")
    words = [word for word in path.split(b"/") if word not in (b"", b".")]
    if path.startswith(b"/") or b".." in words or b"\0" in path:
        raise TarInvalid("its name leads out of the archive", path)
    return os.fsdecode(b"/".join(words))


def follow(members: dict[str, Member], name: str) -> Member | None:
    """Return the file that `name` means, through symlinks within the archive; None when there is none.

    Raise TarInvalid for links that lead out, or round in circles.
    """
    for _ in range(MAX_ARCHIVE_LINKS):
        member = members.get(_clean(os.fsencode(name)))
        if member is None or member.is_file:
            return member
        if not member.link:
            return None
        words = member.name.split("/")[:-1]
        if member.link.startswith("/"):
            raise TarInvalid("it is a link that leads out of the archive", os.fsencode(member.name))
        for word in member.link.split("/"):
            if word == "..":
                if not words:
                    raise TarInvalid("it is a link that leads out of the archive", os.fsencode(member.name))
                words.pop()
            elif word not in ("", "."):
                words.append(word)
        name = "/".join(words)
    raise TarInvalid("its links lead round in circles", os.fsencode(name))


Identity = tuple[int, int, int, int, int]


class ArchiveFile:
    """A tar file, opened for each read and indexed again whenever it is another one than before. Thread-safe.

    A file that is replaced or rewritten while somebody reads from it has other members, or other bytes, which their
    digests tell: readers get errors then and never bytes from the wrong place that nobody checks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.host = str(path)
        self._lock = threading.Lock()
        self._known: tuple[Identity, dict[str, Member]] | None = None

    def members(self) -> tuple[Identity, dict[str, Member]]:
        """Return what the file is now and its members. Blocking. Raise ManifestMissing, DocumentInvalid."""
        whole = self._open(ManifestMissing)
        try:
            return self._members(whole)
        finally:
            whole.close()

    def identity(self) -> Identity | None:
        """Return what file lies there now, None when there is none."""
        try:
            return _identity(os.stat(self.path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise fault(self.host, "the archive", error) from None

    def open(self, name: str, what: str, missing: Missing) -> OpenRange:
        """Return a member's bytes, symlinks followed. Raise `missing`, DocumentInvalid, RegistryFault."""
        whole = self._open(missing)
        try:
            _, members = self._members(whole)
            try:
                member = follow(members, name)
            except TarInvalid as error:
                raise DocumentInvalid(f"the archive {self.host} can't be read: {error.message}") from None
            if member is None or not member.is_file:
                raise missing(self.host, f"{self.host} has no {what}")
        except BaseException:
            whole.close()
            raise
        return OpenRange(whole.descriptor, member.offset, member.size)

    def _open(self, missing: Missing) -> OpenRange:
        return open_regular(self.path, self.host, "the archive", missing, f"there is no file {self.host}")

    def _members(self, whole: OpenRange) -> tuple[Identity, dict[str, Member]]:
        with self._lock:
            identity = _identity(os.fstat(whole.descriptor))
            if self._known is None or self._known[0] != identity:
                self._known = identity, self._index(whole)
            return self._known

    def _index(self, whole: OpenRange) -> dict[str, Member]:
        try:
            head = os.pread(whole.descriptor, BLOCK, 0)
            for magic, (name, command) in _COMPRESSED.items():
                if head.startswith(magic):
                    raise DocumentInvalid(
                        f"the archive {self.host} is compressed with {name}, and no range can be read from that",
                        hint=f"unpack it once: {command} FILE",
                    )
            return find_members(lambda size, at: os.pread(whole.descriptor, size, at), whole.size)
        except TarInvalid as error:
            raise DocumentInvalid(f"the archive {self.host} can't be read: {error.message}") from None
        except OSError as error:
            raise fault(self.host, "the archive", error) from None


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
