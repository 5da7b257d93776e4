"""What files of the tests hold. Apart from all else: programs that read them start with this alone."""

from __future__ import annotations

import random


def pattern(size: int, seed: int = 1) -> bytes:
    """Return bytes that don't compress and differ by `seed`."""
    return random.Random(seed).randbytes(size)
