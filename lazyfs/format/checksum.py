"""The checksum that a cache file of ours carries in its own header, to tell a damaged one from a whole one.

XXH3 with 128 bits, twenty times as fast as sha256: a file of half a million entries is checked in the time of a page
fault or two more. It guards against disks, torn writes and other programs, like any checksum that lies beside what it
covers: whoever may write the file could write a sha256 that fits as well. What comes from outside is held against the
sha256 that was promised for it before it gets into such a file.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

SIZE = 16  # bytes


def checksum(parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return the checksum of these bytes, one after another. Blocks about 0.1 ms a megabyte."""
    whole = xxhash.xxh3_128()
    for part in parts:
        whole.update(part)
    return whole.digest()
