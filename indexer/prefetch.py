"""The list of `--prefetch`: the files that a start reads, in order.

Three spellings are read: a path a line (blank lines and those that begin with "#" are ignored), the record files of
stargz's optimizer, a JSON object a line with "path" (specs: estargz.md, section 3), and traces, which a zstd frame's
first bytes tell.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from lazyfs.errors import FormatError, TarInvalid, TraceInvalid, UsageError
from lazyfs.format import trace
from lazyfs.format.entry import clean_path
from lazyfs.limits import MAX_PATHS, MAX_PREFETCH_LIST

_ZSTD = b"\x28\xb5\x2f\xfd"


def read_prefetch(path: Path) -> tuple[bytes, ...]:
    """Return the cleaned paths of a prefetch list, in order, each once. Blocking (one file).

    Raise UsageError with the line's number for a line that is no path, and for a list that is too long or can't be
    read.
    """
    return parse_prefetch(_read(path), str(path))


def parse_prefetch(raw: bytes, name: str) -> tuple[bytes, ...]:
    """Parse a prefetch list; `name` stands for it in errors. See `read_prefetch`."""
    if raw.startswith(_ZSTD):
        return _of_trace(raw, name)
    found: dict[bytes, None] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        try:
            cleaned = clean_path(_path_of(line), TarInvalid)
        except FormatError as error:
            raise UsageError(f"line {number} of {name} is no path of an image: {error.message}") from None
        except ValueError as error:
            raise UsageError(
                f"line {number} of {name} is no path of an image: {error}",
                hint='write one path a line, or JSON objects with "path"',
            ) from None
        found.setdefault(cleaned)
        if len(found) > MAX_PATHS:
            raise UsageError(f"{name} names more than {MAX_PATHS} paths")
    return tuple(found)


def _of_trace(raw: bytes, name: str) -> tuple[bytes, ...]:
    """Return the files of a trace in the order of their first demand. Raise UsageError."""
    try:
        return tuple(path for path in trace.paths(trace.decode(raw)) if path)
    except TraceInvalid as error:
        raise UsageError(f"{name} begins like a trace and is none: {error.message}") from None


def _path_of(line: bytes) -> bytes:
    """Return the path in a line. Raise ValueError for what is none."""
    if line.startswith(b"{"):
        import json

        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("it begins with { but is not JSON") from None
        path = record.get("path")
        if not isinstance(path, str):
            raise ValueError('it has no "path"')
        line = path.encode("utf-8", "surrogatepass")
    if not line.strip(b"/."):
        raise ValueError("it names the root, which is no file")
    return line


def _read(path: Path) -> bytes:
    try:
        # O_NONBLOCK: a FIFO would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(f"the prefetch list {path} is no regular file")
            raw = file.read(MAX_PREFETCH_LIST + 1)
    except OSError as error:
        raise UsageError(f"the prefetch list {path} can't be read: {error.strerror}") from None
    if len(raw) > MAX_PREFETCH_LIST:
        raise UsageError(f"the prefetch list {path} has more than {MAX_PREFETCH_LIST} bytes")
    return raw
