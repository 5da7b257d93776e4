"""The waterfall of a start as values: what it read, what was fetched for it, and how long it waited, row by row.

Text, page and pictures draw the same rows. Pure. Nothing of a trace is believed: paths come out as harmless text, times
that contradict each other as spans of no length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lazyfs.cli.output import count, printable
from lazyfs.format.trace import Read, Request, Trace
from lazyfs.units import format_size

PRIORITIES = ("demand", "prefetch", "background")
_OTHER = "other"  # a number that no recorder of today writes
Span = tuple[float, float]  # from, to; seconds behind the start


@dataclass(frozen=True, slots=True)
class FileUse:
    """What a start read of one file, in the order of its demand."""

    path: bytes
    reads: tuple[Read, ...]

    @property
    def waited(self) -> float:
        """Seconds, the waits of its chunks added up."""
        return sum(read.waited for read in self.reads)

    @property
    def size(self) -> int:
        """Bytes that were demanded."""
        return sum(read.size for read in self.reads)

    @property
    def stalls(self) -> int:
        """How many of its chunks were waited for."""
        return sum(read.waited > 0 for read in self.reads)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the waterfall, of a file or request or of several in succession. Spans are in order, without overlap.

    `head` and `name` are its label (printable): of a label that is too long the beginning of `name` can be missed best.
    """

    head: str
    name: str
    detail: str  # what else there is to say (printable)
    kind: str  # "file", or the priority of a request; "" of requests with several
    waits: tuple[Span, ...]  # nothing of it was there
    flows: tuple[Span, ...] = ()  # its bytes came
    marks: tuple[float, ...] = ()  # it was demanded, and was there
    took: float = 0.0  # seconds, added up: what files were waited for, or how long requests took


@dataclass(frozen=True, slots=True)
class Summary:
    """A start in figures. Sizes are bytes, times seconds."""

    ready: float
    files: int
    chunks: int
    demanded: int
    stalled: float  # all waits added up; they may have been side by side
    stalled_by_clock: float  # while anything waited
    requests: dict[str, tuple[int, int]]  # by priority: how many, and their bytes
    longest: tuple[FileUse, ...]  # the files that waited longest, the longest first

    def to_json(self) -> dict[str, Any]:
        """Return what `lazyfs trace show --json` says of it."""
        return {
            "ready": self.ready,
            "files": self.files,
            "chunks": self.chunks,
            "demanded": self.demanded,
            "stalled": round(self.stalled, 3),
            "stalled_by_clock": round(self.stalled_by_clock, 3),
            "requests": {name: {"count": many, "size": size} for name, (many, size) in self.requests.items()},
            "longest": [
                {
                    "path": file.path.decode("utf-8", "surrogateescape"),
                    "waited": round(file.waited, 3),
                    "chunks": len(file.reads),
                    "stalls": file.stalls,
                    "demanded": file.size,
                }
                for file in self.longest
            ],
        }


def summarise(trace: Trace, longest: int) -> Summary:
    """Return a start's figures, with the `longest` files that waited at all and waited longest."""
    used = files(trace)
    requests: dict[str, tuple[int, int]] = {}
    for request in sorted(trace.requests, key=lambda request: request.priority):
        many, size = requests.get(priority(request), (0, 0))
        requests[priority(request)] = many + 1, size + request.size
    waits = joined((read.at, read.at + read.waited) for read in trace.reads if read.waited > 0)
    return Summary(
        ready=trace.ready,
        files=len(used),
        chunks=len(trace.reads),
        demanded=sum(read.size for read in trace.reads),
        stalled=sum(read.waited for read in trace.reads),
        stalled_by_clock=sum(end - begin for begin, end in waits),
        requests=requests,
        longest=tuple(sorted((file for file in used if file.waited > 0), key=lambda file: -file.waited)[:longest]),
    )


def files(trace: Trace) -> list[FileUse]:
    """Return the files of a start in the order of their first demand."""
    found: dict[bytes, list[Read]] = {}
    for read in trace.reads:
        found.setdefault(read.path, []).append(read)
    return [FileUse(path, tuple(reads)) for path, reads in found.items()]


def drawn_until(trace: Trace) -> float:
    """Return where the picture ends, in seconds: when it was ready and had all that it read.

    What is fetched in the background goes on for long, and would press the start itself into a corner.
    """
    end = max((trace.ready, *(read.at + read.waited for read in trace.reads)))
    return end or max((request.ended for request in trace.requests), default=0.0)


def file_rows(trace: Trace, limit: int) -> list[Row]:
    """Return at most `limit` rows: those that waited longest on their own, those between them as one each."""
    used = files(trace)
    return [_file_row(used[part]) for part in folded([file.waited for file in used], limit)]


def request_rows(trace: Trace, limit: int) -> list[Row]:
    """Return the rows of the requests that began in the picture, by their beginning: demand and long ones on their own.

    At most `limit`, as for files.
    """
    end = drawn_until(trace)
    shown = sorted((one for one in trace.requests if one.began <= end), key=lambda one: one.began)
    weights = [(one.priority == 0, one.ended - one.began) for one in shown]
    return [_request_row(shown[part]) for part in folded(weights, limit)]


def later_requests(trace: Trace) -> int:
    """Return how many requests began behind the end of the picture."""
    end = drawn_until(trace)
    return sum(one.began > end for one in trace.requests)


def folded(weights: Sequence[Any], limit: int) -> list[slice]:
    """Cut a list into at most `limit` pieces (1 or more), in order: single ones, and runs of those that weigh least."""
    alone = [False] * (len(weights) + 2)  # with a neighbour at either end, so that both have one
    alone[0] = alone[-1] = True
    rows = min(1, len(weights))
    for place in sorted(range(len(weights)), key=lambda place: weights[place], reverse=True):
        # A run becomes this one and what is left of it on each side.
        more = (not alone[place]) + (not alone[place + 2])
        if rows + more > limit:
            break
        alone[place + 1] = True
        rows += more
    pieces: list[slice] = []
    for place in range(len(weights)):
        if pieces and not alone[place + 1] and not alone[place]:
            pieces[-1] = slice(pieces[-1].start, place + 1)
        else:
            pieces.append(slice(place, place + 1))
    return pieces


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return spans in order, with those that touch made one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, max(begin, end)))
    return tuple(found)


def harmless(path: bytes) -> str:
    """Return a path of an image on one line, with what is no text and what steers terminals escaped."""
    return printable(path.decode("utf-8", "backslashreplace")).replace("\n", "\\n").replace("\t", "\\t") or "/"


def command(trace: Trace) -> str:
    """Return the command of a start on one line, harmless; "" when it is not told."""
    return " ".join(harmless(word.encode("utf-8", "surrogateescape")) for word in trace.command)


def seconds(value: float) -> str:
    """Return a time, to the millisecond while that counts: "0.314 s", "12.41 s"."""
    if not value:
        return "0 s"
    for digits, bound in ((3, 10.0), (2, 100.0), (0, 1e5)):
        if value < bound:
            return f"{value:.{digits}f} s"
    return f"{value:.1e} s"


def priority(request: Request) -> str:
    """Return the name of a request's priority."""
    return PRIORITIES[request.priority] if request.priority < len(PRIORITIES) else _OTHER


def _file_row(used: Sequence[FileUse]) -> Row:
    reads = [read for file in used for read in file.reads]
    stalls = sum(file.stalls for file in used)
    size = format_size(sum(file.size for file in used))
    detail = f"{stalls} of {count(len(reads), 'chunk')} waited for, {size} demanded"
    head, name = "", harmless(used[0].path)
    if len(used) > 1:
        shared = _directory([file.path for file in used])
        head, name = f"{len(used)} files" + (" in " if shared else ""), harmless(shared) if shared else ""
    return Row(
        head=head,
        name=name,
        detail=detail,
        kind="file",
        waits=joined((read.at, read.at + read.waited) for read in reads if read.waited > 0),
        marks=tuple(sorted({read.at for read in reads if read.waited <= 0})),
        took=sum(file.waited for file in used),
    )


def _request_row(requests: Sequence[Request]) -> Row:
    names = sorted({(one.priority, priority(one)) for one in requests})
    letters = "".join(dict.fromkeys(name[0].upper() for _, name in names))
    size = sum(one.size for one in requests)
    if len(requests) == 1:
        (one,) = requests
        head, name = f"layer {one.layer} {letters} ", f"{one.blob_offset}+{one.size}"
    else:
        head, name = f"{len(requests)} requests {letters} ", format_size(size)
    return Row(
        head=head,
        name=name,
        detail=f"{', '.join(dict.fromkeys(name for _, name in names))}, {format_size(size)}",
        kind=names[0][1] if len(names) == 1 else "",
        waits=joined((one.began, one.first) for one in requests),
        flows=joined((max(one.began, one.first), one.ended) for one in requests),
        took=sum(max(0.0, one.ended - one.began) for one in requests),
    )


def _directory(paths: Sequence[bytes]) -> bytes:
    """Return the directory that all of them are in, b"" for the root."""
    first, last = min(paths).split(b"/")[:-1], max(paths).split(b"/")[:-1]  # all others are between these two
    common = 0
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    return b"/".join(first[:common])
