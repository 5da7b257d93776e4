"""Which pages of files are in memory, by mincore(2)."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

PAGE = mmap.PAGESIZE
_ONE = bytes(byte & 1 for byte in range(256))  # the other bits of mincore mean nothing


def regular_files(root: Path) -> list[Path]:
    """Return the regular files below a directory that have bytes, sorted."""
    found = []
    for path, _, names in os.walk(root):
        for name in names:
            file = Path(path, name)
            if not file.is_symlink() and file.is_file() and file.stat().st_size:
                found.append(file)
    return sorted(found)


def resident_bytes(files: Iterable[Path]) -> int:
    """Return the bytes of the pages of `files` that are in memory. Reads none."""
    return sum(sum(resident_pages(path)) for path in files) * PAGE


def resident_pages(path: Path) -> bytes:
    """Return a byte for each page of a file that has bytes: 1 where it is in memory, 0 where not. Reads none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fd = os.open(path, os.O_RDONLY)
    size = ctypes.c_size_t(os.fstat(fd).st_size)
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    os.close(fd)
    found = ctypes.create_string_buffer(-(-size.value // PAGE))
    failed = libc.mincore(ctypes.c_void_p(at), size, found)
    error = ctypes.get_errno()
    libc.munmap(ctypes.c_void_p(at), size)
    if failed:
        raise OSError(error, f"{path}: its pages are not known")
    return found.raw.translate(_ONE)
