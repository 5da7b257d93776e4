"""Traces: what a start of an image read first, in order and by the clock, and how long it waited for that.

A trace is a hint. It names files by path and place, so that it holds for every form of its layers; nothing in it is
believed: what it leads to is verified like any other byte, and what does not exist is passed over.

As a file it is a zstd frame around one JSON object:

    {"version": 1, "manifest": "sha256:…", "layers": ["sha256:…"], "ready": MS, "command": ["…"],
     "paths": ["usr/bin/python3.11"], "reads": [[PATH, LAYER, OFFSET, SIZE, AT, WAITED]],
     "requests": [[LAYER, BLOB_OFFSET, SIZE, PRIORITY, BEGAN, FIRST, ENDED]]}

PATH and LAYER are places in the lists; offsets and sizes are bytes (in the file; in blob space), times milliseconds
behind the beginning of the start. `requests` are told by whoever recorded it on its node and are not passed on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec
import zstandard

from lazyfs.digest import is_digest
from lazyfs.errors import FrameInvalid, TarInvalid, TraceInvalid
from lazyfs.format.codec import FrameDecoder
from lazyfs.format.entry import clean_path
from lazyfs.units import MiB

VERSION = 1
MAX_TRACE = 1 * MiB  # bytes of the frame
MAX_READS = 50_000
MAX_REQUESTS = 50_000
MAX_LAYERS = 1024
_MAX_JSON = 16 * MiB  # bytes
_MAX_NUMBER = 1 << 62
_LEVEL = 9  # of zstd: a trace is written once and fetched often


@dataclass(frozen=True, slots=True)
class Read:
    """The first demand of a chunk: `size` bytes at `offset` of the file at `path` in a layer (its place in the image).

    `at`: when, `waited`: for how long nothing of it was there; seconds.
    """

    path: bytes
    layer: int
    offset: int
    size: int
    at: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One range that was fetched: bytes in blob space, priority (0 demand, 1 prefetch, 2 background).

    `began`, `first` (its first byte was there) and `ended` are seconds behind the start.
    """

    layer: int
    blob_offset: int
    size: int
    priority: int
    began: float
    first: float
    ended: float


@dataclass(frozen=True, slots=True)
class Trace:
    """A start of the image whose manifest has the digest `manifest`. `reads` are in order, each chunk once."""

    manifest: str
    layers: tuple[str, ...]  # blob digests, base first
    reads: tuple[Read, ...]
    requests: tuple[Request, ...] = ()
    ready: float = 0.0  # seconds until it was ready
    command: tuple[str, ...] = field(default=())


class _Document(msgspec.Struct):
    version: int
    manifest: str
    layers: list[str]
    paths: list[str]
    reads: list[tuple[int, int, int, int, int, int]]
    requests: list[tuple[int, int, int, int, int, int, int]] = []
    ready: int = 0
    command: list[str] = []


_DECODER = msgspec.json.Decoder(_Document)  # made here, where one thread imports: see toc.py


def encode(trace: Trace) -> bytes:
    """Return a trace as a file. Raise TraceInvalid when it is too large for one."""
    places: dict[bytes, int] = {}
    reads = [
        (places.setdefault(one.path, len(places)), one.layer, one.offset, one.size, _ms(one.at), _ms(one.waited))
        for one in trace.reads
    ]
    requests = [
        (one.layer, one.blob_offset, one.size, one.priority, _ms(one.began), _ms(one.first), _ms(one.ended))
        for one in trace.requests
    ]
    document = {
        "version": VERSION,
        "manifest": trace.manifest,
        "layers": list(trace.layers),
        "ready": _ms(trace.ready),
        "command": [_text(os.fsencode(word)) for word in trace.command],
        "paths": [_text(path) for path in places],
        "reads": reads,
        "requests": requests,
    }
    raw = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(msgspec.json.encode(document))
    if len(raw) > MAX_TRACE or len(reads) > MAX_READS or len(requests) > MAX_REQUESTS:
        raise TraceInvalid(f"a trace of {len(reads)} reads and {len(raw)} bytes is too large")
    return raw


def ensure_within(size: int, most: int, words: str) -> None:
    """Raise TraceInvalid where something of a trace is larger than allowed; `words` tell what, and its size."""
    if size > most:
        raise TraceInvalid(f"{words}, more than the {most} allowed")


def decode(raw: bytes) -> Trace:
    """Check a file and return its trace. Pure; blocks some milliseconds at most. Raise TraceInvalid."""
    ensure_within(len(raw), MAX_TRACE, f"the trace has {len(raw)} bytes")
    try:
        found = _DECODER.decode(FrameDecoder().decode(raw, _MAX_JSON))
    except (FrameInvalid, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceInvalid(f"the trace can't be decoded: {str(error)[:200]}") from None
    if found.version != VERSION:
        raise TraceInvalid(f"the trace is of version {found.version}, not {VERSION}")
    if len(found.reads) > MAX_READS or len(found.requests) > MAX_REQUESTS or len(found.layers) > MAX_LAYERS:
        raise TraceInvalid(f"the trace has more than {MAX_READS} reads or requests, or {MAX_LAYERS} layers")
    if not is_digest(found.manifest) or not all(map(is_digest, found.layers)):
        raise TraceInvalid("the trace names its image by something else than sha256 digests")
    try:
        paths = [clean_path(_bytes(path), TarInvalid) for path in found.paths]
    except TarInvalid as error:
        raise TraceInvalid(f"the trace names no path of an image: {error.message}") from None
    numbers = [number for one in (*found.reads, *found.requests) for number in one]
    if any(not 0 <= number < _MAX_NUMBER for number in (*numbers, found.ready)):
        raise TraceInvalid("the trace has a number that no start could give")
    if any(one[0] >= len(paths) or one[1] >= len(found.layers) for one in found.reads) or any(
        one[0] >= len(found.layers) for one in found.requests
    ):
        raise TraceInvalid("the trace tells of a file or layer that it does not name")
    return Trace(
        found.manifest,
        tuple(found.layers),
        tuple(Read(paths[a], b, c, d, e / 1000, f / 1000) for a, b, c, d, e, f in found.reads),
        tuple(Request(a, b, c, d, e / 1000, f / 1000, g / 1000) for a, b, c, d, e, f, g in found.requests),
        found.ready / 1000,
        tuple(os.fsdecode(_bytes(word)) for word in found.command),
    )


def stripped(trace: Trace) -> Trace:
    """Return what others may know of a start: which chunks, in which order and when, not how this node fared."""
    reads = tuple(replace(read, waited=0.0) for read in trace.reads)
    return replace(trace, reads=reads, requests=(), command=())


def fitting(trace: Trace) -> Trace:
    """Return as much of a trace as a file takes: first its requests are left out, then its last reads.

    Blocking, as `encode`. Raise TraceInvalid for one that is too large without any.
    """
    while True:
        try:
            encode(trace)
            return trace
        except TraceInvalid:
            if trace.requests:
                trace = replace(trace, requests=trace.requests[: len(trace.requests) // 2])
            elif trace.reads:
                trace = replace(trace, reads=trace.reads[: len(trace.reads) * 3 // 4])
            else:
                raise


def merged(traces: Iterable[Trace]) -> Trace | None:
    """Return the trace of all that these starts of one image read, in the order of the earliest demand; None of none.

    Those of another image than the first one's are left out, and what is beyond MAX_READS.
    """
    given = list(traces)
    if not given:
        return None
    first = given[0]
    found: dict[tuple[int, bytes, int], Read] = {}
    for trace in given:
        if (trace.manifest, trace.layers) != (first.manifest, first.layers):
            continue
        for read in trace.reads:
            key = read.layer, read.path, read.offset
            known = found.get(key)
            if known is None or read.at < known.at:
                found[key] = read
    reads = sorted(found.values(), key=lambda read: read.at)[:MAX_READS]
    ready = max(trace.ready for trace in given)
    return Trace(first.manifest, first.layers, tuple(reads), (), ready)


def paths(trace: Trace) -> list[bytes]:
    """Return the files of a trace in the order of their first demand, each once."""
    return list(dict.fromkeys(read.path for read in trace.reads))


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _text(data: bytes) -> str:
    """Return bytes as text that JSON takes: each byte a character where they are no UTF-8, behind a NUL to tell."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\0" + data.decode("latin-1")


def _bytes(text: str) -> bytes:
    try:
        return text[1:].encode("latin-1") if text.startswith("\0") else text.encode()
    except UnicodeEncodeError:
        raise TraceInvalid("the trace has a path that stands for no bytes") from None
