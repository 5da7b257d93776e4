"""Files of a tree locked in memory, so that what is measured as warm stays warm.

    python -m perf.locked ROOT...    (says "locked" when it is done, and holds them until its standard input ends)

A kernel may take away pages that nobody has read for a while even where memory abounds (DAMON does, on some virtual
machines), and reading those again is not what a warm read costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_MAP_LOCKED = 0x2000  # of mmap(2) on Linux, but for alpha, mips, powerpc and sparc


@contextlib.contextmanager
def locked(*roots: Path) -> Iterator[None]:
    """Read all files below `roots` and keep them in memory meanwhile."""
    words = [sys.executable, "-m", "perf.locked", *map(str, roots)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        try:
            if holder.stdout.readline() != "locked\n":
                raise SystemExit("the files can't be locked in memory")
            yield
        finally:
            holder.stdin.close()


def _lock(libc: ctypes.CDLL, path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    size = os.fstat(fd).st_size
    flags = mmap.MAP_SHARED | _MAP_LOCKED
    if size and libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, flags, fd, ctypes.c_long(0)) == -1:
        raise OSError(ctypes.get_errno(), f"{path} can't be locked")
    os.close(fd)


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_long
    for root in sys.argv[1:]:
        for path, _, names in os.walk(root):
            for name in names:
                if os.path.isfile(file := os.path.join(path, name)) and not os.path.islink(file):
                    _lock(libc, file)
    print("locked", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
