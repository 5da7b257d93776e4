"""Traces: what a start of an image read first, in order and by the clock, and how long it waited for that.

A trace is a hint. It names files by path and place, so that it holds for every form of its layers; nothing in it is
believed: what it leads to is verified like any other byte, and what does not exist is passed over.

As a file it is a zstd frame around one JSON object:

    {"version": 1, "manifest": "sha256:…", "layers": ["sha256:…"], "ready": MS, "command": ["…"],
     "paths": ["usr/bin/python3.11"], "reads": [[PATH, LAYER, OFFSET, SIZE, AT, WAITED]],
     "requests": [[LAYER, BLOB_OFFSET, SIZE, PRIORITY, BEGAN, FIRST, ENDED]], "spans": [[LAYER, BLOB_OFFSET, SIZE]]}

PATH and LAYER are places in the lists; offsets and sizes are bytes (in the file; in blob space), times milliseconds
behind the beginning of the start. `requests` are told by whoever recorded it on its node and are not passed on. `spans`
are where the first of the reads lie in the blobs: they can be fetched before the layers' TOCs are here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Annotated

import msgspec
import zstandard
from msgspec import Meta

from lazyfs.digest import is_digest
from lazyfs.errors import FrameInvalid, TarInvalid, TraceInvalid
from lazyfs.format.codec import FrameDecoder
from lazyfs.format.entry import clean_path
from lazyfs.limits import MAX_COMMAND, MAX_READS, MAX_REQUESTS, MAX_SPANS, MAX_TRACE, MAX_TRACE_JSON, MAX_TRACE_LAYERS

VERSION = 1
# What takes the interpreter's time is how many things there are: so these are counted before any is made. Few names
# have a bracket or a quote in them.
_MAX_BRACKETS = MAX_READS + MAX_REQUESTS + MAX_SPANS + 16
_MAX_QUOTES = 2 * (MAX_READS + MAX_TRACE_LAYERS + MAX_COMMAND + 16)
_MAX_NUMBER = (1 << 62) - 1
_MAX_TIME = 1 << 40  # milliseconds
_LEVEL = 9  # of zstd: a trace is written once and fetched often
_NEARLY = 0.95  # of the room that is left, so that a guess fits


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
class Span:
    """Neighbouring compressed bytes of a layer (its place in the image), in blob space."""

    layer: int
    blob_offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A start of the image whose manifest has the digest `manifest`. `reads` are in order, each chunk once."""

    manifest: str
    layers: tuple[str, ...]  # blob digests, base first
    reads: tuple[Read, ...]
    requests: tuple[Request, ...] = ()
    ready: float = 0.0  # seconds until it was ready
    command: tuple[str, ...] = field(default=())
    spans: tuple[Span, ...] = ()  # what was read first, in about its order


_Number = Annotated[int, Meta(ge=0, le=_MAX_NUMBER)]
_Time = Annotated[int, Meta(ge=0, le=_MAX_TIME)]
_Read = tuple[_Number, _Number, _Number, _Number, _Time, _Time]
_Request = tuple[_Number, _Number, _Number, _Number, _Time, _Time, _Time]
_Span = tuple[_Number, _Number, _Number]


class _Document(msgspec.Struct):
    version: int
    manifest: str
    layers: Annotated[list[str], Meta(max_length=MAX_TRACE_LAYERS)]
    paths: Annotated[list[str], Meta(max_length=MAX_READS)]
    reads: Annotated[list[_Read], Meta(max_length=MAX_READS)]
    requests: Annotated[list[_Request], Meta(max_length=MAX_REQUESTS)] = []
    ready: _Time = 0
    command: Annotated[list[str], Meta(max_length=MAX_COMMAND)] = []
    spans: Annotated[list[_Span], Meta(max_length=MAX_SPANS)] = []


_DECODER = msgspec.json.Decoder(_Document)  # made here, where one thread imports: see toc.py


def encode(trace: Trace) -> bytes:
    """Return a trace as a file, which `decode` takes. Blocking, some tenths of a second for the largest.

    Raise TraceInvalid when it is too large for one, or tells of what no start could read.
    """
    text = _json(trace)
    found = _parsed(text)
    if {read.path for read in found.reads} != {read.path for read in trace.reads}:
        raise TraceInvalid("the trace has a path that is not as an image has it")
    raw = _packed(text)
    ensure_within(len(raw), MAX_TRACE, f"a trace of {len(trace.reads)} reads is too large: it has {len(raw)} bytes")
    return raw


def _json(trace: Trace) -> bytes:
    """Return the document of a trace, however large. Raise TraceInvalid for what can't be written at all."""
    places: dict[bytes, int] = {}
    try:
        reads = [
            (places.setdefault(one.path, len(places)), one.layer, one.offset, one.size, _ms(one.at), _ms(one.waited))
            for one in trace.reads
        ]
        requests = [
            (one.layer, one.blob_offset, one.size, one.priority, _ms(one.began), _ms(one.first), _ms(one.ended))
            for one in trace.requests
        ]
        return msgspec.json.encode(
            {
                "version": VERSION,
                "manifest": trace.manifest,
                "layers": list(trace.layers),
                "ready": _ms(trace.ready),
                "command": [_text(os.fsencode(word)) for word in trace.command],
                "paths": [_text(path) for path in places],
                "reads": reads,
                "requests": requests,
                "spans": [(one.layer, one.blob_offset, one.size) for one in trace.spans],
            }
        )
    except (ValueError, OverflowError) as error:  # half a surrogate pair, or no number
        raise TraceInvalid(f"the trace can't be written: {str(error)[:200]}") from None


def _packed(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(text)


def ensure_within(size: int, most: int, words: str) -> None:
    """Raise TraceInvalid where something of a trace is larger than allowed; `words` tell what, and its size."""
    if size > most:
        raise TraceInvalid(f"{words}, more than the {most} allowed")


def decode(raw: bytes) -> Trace:
    """Check a file and return its trace. Pure. Raise TraceInvalid.

    Blocking, some tenths of a second for the largest that may be: in a thread, and then others get their turns, but for
    some 50 ms in which the JSON is taken apart.
    """
    ensure_within(len(raw), MAX_TRACE, f"the trace has {len(raw)} bytes")
    try:
        text = FrameDecoder().decode(raw, MAX_TRACE_JSON)
    except FrameInvalid as error:
        raise TraceInvalid(f"the trace can't be decoded: {str(error)[:200]}") from None
    return _parsed(text)


def _parsed(text: bytes) -> Trace:
    """Check a document and return its trace. Raise TraceInvalid."""
    if _excess(text) > 1:
        raise TraceInvalid(
            f"the trace is too large: more than {MAX_READS} reads or files, {MAX_REQUESTS} requests, or "
            f"{MAX_TRACE_JSON} bytes of JSON"
        )
    try:
        found = _DECODER.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceInvalid(f"the trace can't be decoded: {str(error)[:200]}") from None
    if found.version != VERSION:
        raise TraceInvalid(f"the trace is of version {found.version}, not {VERSION}")
    if not is_digest(found.manifest) or not all(map(is_digest, found.layers)):
        raise TraceInvalid("the trace names its image by something else than sha256 digests")
    try:
        paths = [clean_path(_bytes(path), TarInvalid) for path in found.paths]
    except TarInvalid as error:
        raise TraceInvalid(f"the trace names no path of an image: {error.message}") from None
    if (
        max(map(itemgetter(0), found.reads), default=-1) >= len(paths)
        or max(map(itemgetter(1), found.reads), default=-1) >= len(found.layers)
        or max(map(itemgetter(0), found.requests), default=-1) >= len(found.layers)
        or max(map(itemgetter(0), found.spans), default=-1) >= len(found.layers)
    ):
        raise TraceInvalid("the trace tells of a file or layer that it does not name")
    return Trace(
        found.manifest,
        tuple(found.layers),
        tuple(Read(paths[a], b, c, d, e / 1000, f / 1000) for a, b, c, d, e, f in found.reads),
        tuple(Request(a, b, c, d, e / 1000, f / 1000, g / 1000) for a, b, c, d, e, f, g in found.requests),
        found.ready / 1000,
        tuple(os.fsdecode(_bytes(word)) for word in found.command),
        tuple(Span(a, b, c) for a, b, c in found.spans),
    )


def _excess(text: bytes) -> float:
    """Return how many times as large as allowed a document is, at least, as far as that can be told unread. Quick."""
    if len(text) > MAX_TRACE_JSON:
        return len(text) / MAX_TRACE_JSON
    return max(text.count(b"[") / _MAX_BRACKETS, text.count(b'"') / _MAX_QUOTES)


def stripped(trace: Trace) -> Trace:
    """Return what others may know of a start: which chunks, in which order and when, not how this node fared."""
    reads = tuple(replace(read, waited=0.0) for read in trace.reads)
    return replace(trace, reads=reads, requests=(), command=())


def fitting(trace: Trace, first: Trace | None = None) -> Trace:
    """Return as much of a trace as a file takes.

    What goes: its last requests, its command, the last of the reads that `first` does not tell of, and in the end the
    last of all; spans are few and stay. Blocking, about a second for the largest. Raise TraceInvalid where not even a
    trace without reads fits.
    """
    own = None if first is None else {_key(read) for read in first.reads}
    mine: list[int] = []  # places of reads
    others: list[int] = []
    for place, read in enumerate(trace.reads):
        (mine if own is None or _key(read) in own else others).append(place)
    del mine[MAX_READS:]
    del others[MAX_READS - len(mine) :]

    def some(places: list[int]) -> Trace:
        return replace(trace, reads=tuple(trace.reads[place] for place in sorted(places)))

    trace = replace(trace, requests=trace.requests[:MAX_REQUESTS], command=trace.command[:MAX_COMMAND])
    while True:
        fitted = some(mine + others)
        excess = _part_of_file(fitted)
        if excess <= 1:
            return fitted
        if trace.requests:
            trace = replace(trace, requests=trace.requests[: len(trace.requests) // 2])
        elif trace.command:
            trace = replace(trace, command=())
        elif others:
            alone = _part_of_file(some(mine))
            part = _NEARLY * (1 - alone) / (excess - alone) if alone < 1 else 0
            del others[int(len(others) * part) :]
        elif mine:
            del mine[int(len(mine) * _NEARLY / excess) :]
        else:
            raise TraceInvalid("the trace is too large even without what was read")


def _part_of_file(trace: Trace) -> float:
    """Return how large a trace is; 1: as large as a file may be. Blocking."""
    text = _json(trace)
    excess = _excess(text)
    return excess if excess > 1 else max(excess, len(_packed(text)) / MAX_TRACE)


def merged(traces: Iterable[Trace]) -> Trace | None:
    """Return the trace of all that these starts of one image read, in the order of the earliest demand; None of none.

    Those of another image than the first one's are left out. An earlier one counts for more: where they tell of more
    than MAX_READS chunks, its reads stay, and what it says of a chunk but when. Spans are those of the first that has
    some.
    """
    given = list(traces)
    if not given:
        return None
    first = given[0]
    found: dict[tuple[int, bytes, int], Read] = {}
    given = [trace for trace in given if (trace.manifest, trace.layers) == (first.manifest, first.layers)]
    for trace in given:
        for read in trace.reads:
            key = _key(read)
            known = found.get(key)
            if known is None:
                if len(found) < MAX_READS:
                    found[key] = read
            elif read.at < known.at:
                found[key] = replace(known, at=read.at)
    reads = sorted(found.values(), key=lambda read: read.at)
    ready = max(trace.ready for trace in given)
    spans = next((trace.spans for trace in given if trace.spans), ())
    return Trace(first.manifest, first.layers, tuple(reads), (), ready, spans=spans)


def _key(read: Read) -> tuple[int, bytes, int]:
    """Return which chunk was read."""
    return read.layer, read.path, read.offset


def paths(trace: Trace) -> list[bytes]:
    """Return the files of a trace in the order of their first demand, each once."""
    return list(dict.fromkeys(read.path for read in trace.reads))


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _text(data: bytes) -> str:
    """Return bytes as text that JSON takes: each byte a character where they are no UTF-8, behind a NUL to tell."""
    try:
        if not data.startswith(b"\0"):
            return data.decode()
    except UnicodeDecodeError:
        pass
    return "\0" + data.decode("latin-1")


def _bytes(text: str) -> bytes:
    try:
        return text[1:].encode("latin-1") if text.startswith("\0") else text.encode()
    except UnicodeEncodeError:
        raise TraceInvalid("the trace has a path that stands for no bytes") from None
