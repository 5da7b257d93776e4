"""Sizes and times for people, both ways. Sizes are bytes; MB is 10**6 and MiB is 2**20 everywhere in lazyfs."""

from __future__ import annotations

import re

from lazyfs.errors import UsageError

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096  # bytes; the grid on which files lie in a layer's data space

_SCALE = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": KiB, "mib": MiB, "gib": GiB, "tib": 1 << 40,
}  # fmt: skip
_SPANS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # seconds


def parse_size(text: str) -> int:
    """Return the bytes in "10GiB", "500M", "4096". Raise UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _SCALE:
        raise UsageError(f"{text!r} is not a size", hint="write 500M, 10GiB or a number of bytes")
    return int(float(match[1]) * _SCALE[match[2].lower()])


def parse_duration(text: str) -> float:
    """Return the seconds in "90m", "12h", "30d", "2w" or "45". Raise UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _SPANS:
        raise UsageError(f"{text!r} is not a time span", hint="write 90m, 12h, 30d or a number of seconds")
    return float(match[1]) * _SPANS[match[2].lower()]


def format_size(size: int) -> str:
    """Return a size in decimal units with three digits at most: "62.3 MB"."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def align(value: int, grid: int = PAGE) -> int:
    """Round `value` up to a multiple of `grid` (a power of two)."""
    return (value + grid - 1) & ~(grid - 1)
