"""Fetching ahead of an exec: the program that is about to run, its interpreter and its libraries.

Between the mount and the container's first instruction lies the runtime's own set-up, a few hundred milliseconds in
which nobody reads. A loader then touches program, loader and libraries one after another, a round trip each; their
names are in the files themselves. So they are fetched side by side meanwhile, as prefetch. Nearly all of it would be
read anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from lazyfs.chunks.host import Priority
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.read import Reader
from lazyfs.chunks.remote import Remote
from lazyfs.errors import LazyfsError
from lazyfs.format import elf
from lazyfs.format.entry import Kind
from lazyfs.format.table import NO_FRAME
from lazyfs.limits import MAX_AHEAD, MAX_AHEAD_DEPTH, MAX_AHEAD_FILES, MAX_SYMLINKS
from lazyfs.mount.forest import Planted

log = logging.getLogger(__name__)

_WORDS = 3  # of the command line: `entrypoint.sh postgres` names two programs
_STRINGS = 64 << 10  # bytes of a string table that are looked at
_SEARCH = (b"lib", b"usr/lib", b"lib64", b"usr/lib64", b"usr/local/lib")
_TRIPLETS = (b"x86_64-linux-gnu", b"aarch64-linux-gnu", b"arm-linux-gnueabihf", b"i386-linux-gnu", b"riscv64-linux-gnu")
_ALWAYS = (b"etc/passwd", b"etc/group", b"etc/ld.so.cache", b"etc/nsswitch.conf")
# What glibc reads for nearly every program that asks for its locale or the time.
_GLIBC = (b"usr/lib/locale/C.utf8/LC_CTYPE", b"etc/localtime")
_GCONV = b"gconv/gconv-modules.cache"
_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(planted: Planted, path: bytes) -> tuple[ServedLayer, int] | None:
    """Return (layer, row) of the regular file at `path`, symlinks followed inside of the tree; None: no such file."""
    tree = planted.tree
    todo = path.split(b"/")[::-1]
    at, links = [0], 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            del at[1 if len(at) == 1 else -1 :]
            continue
        child = tree.child(at[-1], part)
        if child is None:
            return None
        if tree.kind[child] == Kind.SYMLINK:
            links += 1
            target = planted.layers[tree.layer[child]].table.link(tree.source[child])
            if links > MAX_SYMLINKS or len(todo) > 4096:
                return None
            if target.startswith(b"/"):
                del at[1:]
            todo.extend(target.split(b"/")[::-1])
        else:
            at.append(child)
    row = at[-1]
    if tree.kind[row] != Kind.REG:
        return None
    return planted.layers[tree.layer[row]], tree.source[row]


def command_of(config: dict[str, object], entrypoint: str | None, command: Sequence[str]) -> list[bytes]:
    """Return the words that a container of this image config will execute, with docker's rules."""

    def words(value: object) -> list[str]:
        return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []

    first = [entrypoint] if entrypoint else words(config.get("Entrypoint")) if entrypoint is None else []
    rest = list(command) or (words(config.get("Cmd")) if entrypoint is None else [])
    return [word.encode("utf-8", "surrogateescape") for word in (first + rest)[:_WORDS]]


class Ahead:
    """Fetch what an exec will read. Belongs to the trio loop; never raises, because it is only a guess."""

    def __init__(self, reader: Reader, remote: Remote) -> None:
        self._reader = reader
        self._remote = remote

    async def run(self, planted: Planted, words: Sequence[bytes], path: bytes = _PATH) -> None:
        """Fetch the programs that `words` name in `planted`, and what they load. A checkpoint."""
        job = _Job(self._reader, self._remote, planted)
        try:
            await trio.to_thread.run_sync(planted.ensure_names)
        except LazyfsError as error:
            log.info("fetching ahead gave up: %s", error)
            return
        try:
            async with trio.open_nursery() as nursery:
                for name in _ALWAYS:
                    nursery.start_soon(job.bring, name, MAX_AHEAD_DEPTH)
                for word in words:
                    for candidate in [word] if b"/" in word else [d + b"/" + word for d in path.split(b":")]:
                        if find(planted, candidate) is not None:
                            nursery.start_soon(job.bring, candidate, 0)
                            break
        except* LazyfsError as group:
            log.info("fetching ahead gave up: %s", group.exceptions[0])


class _Job:
    """One exec's files: each once, within bounds."""

    def __init__(self, reader: Reader, remote: Remote, planted: Planted) -> None:
        self._reader = reader
        self._remote = remote
        self._planted = planted
        self._seen: set[tuple[int, int]] = set()
        self._left = MAX_AHEAD

    async def bring(self, path: bytes, depth: int) -> None:
        """Fetch the file at `path`, and side by side what it needs in turn."""
        found = find(self._planted, path)
        if found is None:
            return
        layer, row = found
        size = layer.table.size[row]
        if (layer.number, row) in self._seen or len(self._seen) >= MAX_AHEAD_FILES or not 0 < size <= self._left:
            return
        self._seen.add((layer.number, row))
        self._left -= size
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch, layer, row)
            if depth < MAX_AHEAD_DEPTH:
                for name in await self._needs(layer, row, path):
                    nursery.start_soon(self.bring, name, depth + 1)

    async def _fetch(self, layer: ServedLayer, row: int) -> None:
        """Bring the missing frames of a file, neighbours in one request."""
        table = layer.table
        frames = sorted({table.chunk_frame[c] for c in table.file_chunks(row)} - {NO_FRAME})
        at = 0
        while at < len(frames):
            first = stop = frames[at]
            while at < len(frames) and frames[at] == stop and layer.frame_missing(stop):
                stop, at = stop + 1, at + 1
            if stop > first:
                # What is further on is looked at afterwards: readers may have fetched it by then.
                await self._remote.bring(layer, first, stop, Priority.PREFETCH)
            else:
                at += 1

    async def _read(self, layer: ServedLayer, row: int, span: elf.Span) -> bytes:
        parts = []
        last = layer.table.file_chunks(row)[-1]
        for place in layer.table.places(row, span.offset, span.size):
            data = await self._reader.chunk(layer, place.chunk, Priority.PREFETCH, last)
            parts.append(data[place.offset : place.offset + place.size])
        return b"".join(parts)

    async def _needs(self, layer: ServedLayer, row: int, path: bytes) -> list[bytes]:
        """Return the paths that a loader will open for this file; of a library several, most of which don't exist."""
        header = await self._read(layer, row, elf.Span(0, 256))
        if header.startswith(b"#!"):
            return [word for word in header[2:].partition(b"\n")[0].split()[:2] if word.startswith(b"/")]
        segments = elf.program_headers(header)
        if segments is None:
            return []
        found = elf.layout(header, await self._read(layer, row, segments))
        paths = []
        if found.interpreter is not None:
            paths.append((await self._read(layer, row, found.interpreter)).rstrip(b"\0"))
            if b"ld-linux" in paths[0]:
                paths += [*_GLIBC, *(b"usr/lib/" + triplet + b"/" + _GCONV for triplet in _TRIPLETS)]
        names = elf.strings_at(found, await self._read(layer, row, found.dynamic)) if found.dynamic else None
        if names is not None:
            needed = elf.needs(names[1], await self._read(layer, row, elf.Span(names[0], _STRINGS)))
            paths += self._search(needed, path)
        return paths

    def _search(self, needed: elf.Needs, path: bytes) -> list[bytes]:
        """Return where the loader will find each library: the first place that has it."""
        origin = path.rpartition(b"/")[0]
        places = [each.replace(b"$ORIGIN", origin).replace(b"${ORIGIN}", origin) for each in needed.directories]
        for base in _SEARCH:
            places += [base + b"/" + triplet for triplet in _TRIPLETS] + [base]
        out = []
        for library in needed.libraries:
            candidates = [library] if b"/" in library else [place + b"/" + library for place in places]
            out += [each for each in candidates if find(self._planted, each) is not None][:1]
        return out
