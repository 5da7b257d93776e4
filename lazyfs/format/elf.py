"""What an ELF program needs besides itself: its interpreter and its shared libraries. Pure, and trusting nothing.

Source: System V ABI, gABI chapters 4 and 5 (headers, program headers, dynamic section). Only what a loader reads before
the program's first instruction; whatever is odd means "nothing known", because this is used for a guess and no more.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lazyfs.limits import MAX_ELF_DYNAMIC, MAX_ELF_NEEDED, MAX_ELF_SEGMENTS, MAX_ELF_STRING

HEADER = 64  # bytes of the larger of the two file headers
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29


@dataclass(frozen=True, slots=True)
class Span:
    """A range of the file: offset and size in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a program's parts lie in its file. `loads`: (virtual address, offset, size) of what is mapped."""

    wide: bool  # 64 bit
    interpreter: Span | None
    dynamic: Span | None
    loads: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Needs:
    """Names of libraries, and directories to look in first, as they stand in the program."""

    libraries: tuple[bytes, ...]
    directories: tuple[bytes, ...]


def program_headers(header: bytes) -> Span | None:
    """Return where the program headers lie, from the file's first HEADER bytes; None: no little-endian ELF program."""
    if len(header) < HEADER or header[:4] != b"\x7fELF" or header[5] != 1 or header[4] not in (1, 2):
        return None
    if header[4] == 2:
        offset, entry, count = struct.unpack_from("<Q", header, 32)[0], *struct.unpack_from("<HH", header, 54)
    else:
        offset, entry, count = struct.unpack_from("<I", header, 28)[0], *struct.unpack_from("<HH", header, 42)
    if entry != (56 if header[4] == 2 else 32) or not 0 < count <= MAX_ELF_SEGMENTS:
        return None
    return Span(offset, entry * count)


def layout(header: bytes, segments: bytes) -> Layout:
    """Read the program headers (the bytes that `program_headers` names)."""
    wide = header[4] == 2
    interpreter = dynamic = None
    loads = []
    for at in range(0, len(segments) - (55 if wide else 31), 56 if wide else 32):
        if wide:
            kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", segments, at)
        else:
            kind, offset, address, _, size = struct.unpack_from("<IIIII", segments, at)
        if kind == _PT_INTERP and 0 < size <= MAX_ELF_STRING:
            interpreter = Span(offset, size)
        elif kind == _PT_DYNAMIC and 0 < size <= MAX_ELF_DYNAMIC:
            dynamic = Span(offset, size)
        elif kind == _PT_LOAD:
            loads.append((address, offset, size))
    return Layout(wide, interpreter, dynamic, tuple(loads))


def strings_at(found: Layout, dynamic: bytes) -> tuple[int, list[tuple[int, int]]] | None:
    """Return the file offset of the string table and the (tag, offset in it) pairs of names, or None."""
    code = "<qQ" if found.wide else "<iI"
    table = -1
    names: list[tuple[int, int]] = []
    for tag, value in struct.iter_unpack(
        code, dynamic[: len(dynamic) // struct.calcsize(code) * struct.calcsize(code)]
    ):
        if tag == 0:
            break
        if tag == _DT_STRTAB:
            table = next((value - a + o for a, o, size in found.loads if a <= value < a + size), -1)
        elif tag in (_DT_NEEDED, _DT_RPATH, _DT_RUNPATH) and len(names) < MAX_ELF_NEEDED:
            names.append((tag, value))
    return (table, names) if table >= 0 and names else None


def needs(names: list[tuple[int, int]], strings: bytes) -> Needs:
    """Return the names, from the pairs of `strings_at` and the string table's bytes from its start."""
    libraries, directories = [], []
    for tag, at in names:
        text = strings[at : at + MAX_ELF_STRING].partition(b"\0")[0] if at < len(strings) else b""
        if tag == _DT_NEEDED and text:
            libraries.append(text)
        elif text:
            directories += [part for part in text.split(b":") if part]
    return Needs(tuple(libraries), tuple(directories))
