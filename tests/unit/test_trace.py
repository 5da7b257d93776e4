"""Traces: written and read back, merged, and nothing believed of one that somebody else has written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.errors import TraceInvalid
from lazyfs.format import trace as traces
from lazyfs.format.trace import Read, Request, Span, Trace, decode, encode, fitting, merged, stripped

MANIFEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
LAYERS = ("sha256:" + "1" * 64, "sha256:" + "2" * 64)

paths = st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=3).map(
    lambda parts: b"/".join(b"x" + part.replace(b"/", b"-").replace(b"\0", b"-") for part in parts)
)
numbers = st.integers(0, 1 << 40)
times = st.integers(0, 10**7).map(lambda ms: ms / 1000)
reads = st.builds(Read, paths, st.integers(0, 1), numbers, numbers, times, times)
requests = st.builds(Request, st.integers(0, 1), numbers, numbers, st.integers(0, 2), times, times, times)
spans = st.builds(Span, st.integers(0, 1), numbers, numbers)
every = st.builds(
    Trace,
    st.just(MANIFEST),
    st.just(LAYERS),
    st.lists(reads, max_size=8).map(tuple),
    st.lists(requests, max_size=4).map(tuple),
    times,
    st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF)), max_size=3).map(tuple),
    st.lists(spans, max_size=4).map(tuple),
)


@given(every)
def test_what_is_written_is_read_back(trace: Trace) -> None:
    assert decode(encode(trace)) == trace


@given(every, every)
def test_a_merged_trace_has_the_earliest_demand_of_each_chunk_in_order(one: Trace, other: Trace) -> None:
    found = merged([one, other])
    assert found is not None
    both = (*one.reads, *other.reads)
    assert {(r.layer, r.path, r.offset) for r in found.reads} == {(r.layer, r.path, r.offset) for r in both}
    assert [r.at for r in found.reads] == sorted(r.at for r in found.reads)
    assert found.spans == (one.spans or other.spans)
    for read in found.reads:
        key = read.layer, read.path, read.offset
        assert read.at == min(r.at for r in both if (r.layer, r.path, r.offset) == key)


def test_nothing_of_another_image_is_merged_in() -> None:
    mine = Trace(MANIFEST, LAYERS, (Read(b"a", 0, 0, 1),))
    other = Trace(OTHER, LAYERS, (Read(b"b", 0, 0, 1),))
    found = merged([mine, other])
    assert found is not None and traces.paths(found) == [b"a"]
    assert merged([]) is None


def test_what_is_passed_on_tells_nothing_of_this_node() -> None:
    trace = Trace(
        MANIFEST, LAYERS, (Read(b"a", 0, 0, 1, 2.0, 3.0),), (Request(0, 0, 1, 0, 0, 1, 2),), 4.0, ("sh", "-c")
    )
    assert stripped(trace) == replace(trace, reads=(Read(b"a", 0, 0, 1, 2.0),), requests=(), command=())


def test_files_come_in_the_order_of_their_first_demand() -> None:
    assert traces.paths(Trace(MANIFEST, LAYERS, (Read(b"b", 0, 0, 1), Read(b"a", 1, 0, 1), Read(b"b", 0, 9, 1)))) == [
        b"b",
        b"a",
    ]


def changed(**changes: Any) -> bytes:
    document = {
        "version": 1, "manifest": MANIFEST, "layers": list(LAYERS), "paths": ["a"],
        "reads": [[0, 0, 0, 1, 0, 0]], "requests": [],
    }  # fmt: skip
    return zstandard.compress(json.dumps({**document, **changes}).encode())


def test_the_plain_document_is_read() -> None:
    assert decode(changed()).reads == (Read(b"a", 0, 0, 1),)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": 2}, "version 2"),
        ({"manifest": "latest"}, "sha256 digests"),
        ({"layers": ["sha256:x"]}, "sha256 digests"),
        ({"layers": [LAYERS[0]] * 1025}, "length <= 1024"),
        ({"paths": ["../etc/passwd"]}, "leads out of the root"),
        ({"paths": ["a\0b"]}, "NUL"),
        ({"paths": ["\0\u0100"]}, "stands for no bytes"),
        ({"reads": [[1, 0, 0, 1, 0, 0]]}, "does not name"),
        ({"reads": [[0, 2, 0, 1, 0, 0]]}, "does not name"),
        ({"reads": [[0, 0, -1, 1, 0, 0]]}, ">= 0"),
        ({"reads": [[0, 0, 0, 1 << 62, 0, 0]]}, "int. <= "),
        ({"reads": [[0, 0, 0, 1, 1 << 41, 0]]}, "int. <= "),
        ({"requests": [[2, 0, 0, 0, 0, 0, 0]]}, "does not name"),
        ({"spans": [[2, 0, 0]]}, "does not name"),
        ({"spans": [[0, -1, 0]]}, ">= 0"),
        ({"spans": [[0, 0, 1]] * 257}, "length <= 256"),
        ({"ready": -1}, ">= 0"),
        ({"reads": [[0, 0, 0, 1, 0]]}, "can't be decoded"),
        ({"reads": [[0, 0, 0, 1, 0, 0]] * 50_001}, "length <= 50000"),
        ({"requests": [[0, 0, 0, 1, 0, 0, 0]] * 50_001}, "length <= 50000"),
        ({"paths": ["a"] * 50_001}, "length <= 50000"),
        ({"command": ["a"] * 1001}, "length <= 1000"),
        ({"reads": [[0, 0, 0, 1, 0, 0]] * 200_000}, "more than 50000 reads"),
        ({"paths": [""] * 200_000}, "more than 50000 reads or files"),
        ({"paths": "a"}, "can't be decoded"),
    ],
)  # fmt: skip
def test_what_no_recorder_writes_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TraceInvalid, match=complaint):
        decode(changed(**changes))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", zstandard.compress(b"[" * 100_000), zstandard.compress(bytes(20 << 20)), bytes(2 << 20)],
    ids=["empty", "no frame", "deep", "bomb", "large"],
)
def test_no_trace_at_all_is_refused(raw: bytes) -> None:
    with pytest.raises(TraceInvalid):
        decode(raw)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(raw: bytes) -> None:
    for data in (raw, zstandard.compress(raw)):
        with pytest.raises(TraceInvalid):
            decode(data)


def test_what_is_much_too_much_is_not_even_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of 1.5 KB held the interpreter for seconds."""
    monkeypatch.setattr(traces, "_DECODER", None)
    for changes in ({"paths": [""] * 200_000}, {"reads": [[0] * 6] * 200_000}, {"command": ["x" * 9_000_000]}):
        with pytest.raises(TraceInvalid):
            decode(changed(**changes))


def reading(number: int, length: int = 5, first: int = 0, at: float = 0.0) -> Trace:
    """A start that reads as many files with paths of so many bytes."""
    rest = ((b"/" + b"x" * 199) * 20)[: length - 5]
    return Trace(
        MANIFEST, LAYERS, tuple(Read(b"%05d" % place + rest, 0, 0, 1, at) for place in range(first, first + number))
    )


def test_the_largest_start_of_files_with_usual_paths_fits() -> None:
    text = traces._json(
        Trace(
            MANIFEST,
            LAYERS,
            tuple(replace(read, offset=10**11, size=1 << 22, at=59.999) for read in reading(50_000, 63).reads),
            (Request(0, 10**10, 1 << 22, 2, 59.9, 59.9, 59.9),) * 50_000,
        )
    )
    assert len(traces._parsed(text).reads) == 50_000


@pytest.mark.parametrize(
    "trace",
    [
        reading(50_001),
        reading(2300, 3900),  # a few KB as a frame, 9 MB behind it
        replace(reading(1), requests=(Request(0, 0, 1, 0, 0.0, 0.0, 0.0),) * 50_001),
        replace(reading(1), command=("word",) * 1001),
    ],
    ids=["reads", "long paths", "requests", "command"],
)
def test_too_large_a_trace_is_not_written_and_is_cut_to_fit(trace: Trace) -> None:
    with pytest.raises(TraceInvalid):
        encode(trace)
    small = fitting(trace)
    assert decode(encode(small)) == small
    assert small.reads == trace.reads[: len(small.reads)] and len(small.reads) >= min(len(trace.reads), 1900)


# What encode takes, decode gives back: also of what no recorder makes.
odd_paths = st.one_of(paths, st.sampled_from([b"", b"/a", b"a/../b", b"a\0", b"a//b", b"\0x", b"y" * 256, b"\xff"]))
odd_numbers = st.one_of(numbers, st.sampled_from([-1, (1 << 62) - 1, 1 << 62, 1 << 70]))
odd_times = st.one_of(times, st.sampled_from([-0.0, float("nan"), float("inf"), float(1 << 31), float(1 << 50)]))
odd = st.builds(
    Trace,
    st.sampled_from([MANIFEST, MANIFEST, MANIFEST, "latest"]),
    st.sampled_from([LAYERS, LAYERS, LAYERS[:1], (*LAYERS, "x"), LAYERS * 513]),
    st.lists(st.builds(Read, odd_paths, odd_numbers, odd_numbers, numbers, odd_times, times), max_size=2).map(tuple),
    st.lists(st.builds(Request, odd_numbers, numbers, numbers, numbers, times, times, odd_times), max_size=1).map(
        tuple
    ),
    odd_times,
    st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), st.just("\ud800"))).map(tuple),
)


@settings(max_examples=60)
@given(st.one_of(odd, every))
def test_what_can_be_written_can_be_read(trace: Trace) -> None:
    try:
        raw = encode(trace)
    except TraceInvalid:
        return
    assert decode(raw) == trace


@settings(deadline=None, max_examples=30)
@given(
    number=st.one_of(st.integers(0, 4), st.sampled_from([49_999, 60_000])),
    text=st.sampled_from(['""', '"a"', "[0,0,0,0,0,0]", "[0,0,0,0,0,0,0]", "[]", "{}", "0"]),
    name=st.sampled_from(["paths", "reads", "requests", "command", "layers", "others"]),
    tail=st.sampled_from([b"", b" " * 9_000_000]),
)
def test_decoding_gives_a_bounded_number_of_things(number: int, text: str, name: str, tail: bytes) -> None:
    whole = {"version": "1", "manifest": f'"{MANIFEST}"', "layers": f'["{LAYERS[0]}"]', "paths": '["a"]', "reads": "[]"}
    whole[name] = f"[{','.join([text] * number)}]"
    document = "{" + ",".join(f'"{key}":{value}' for key, value in whole.items()) + "}"
    try:
        trace = decode(zstandard.compress(document.encode() + tail))
    except TraceInvalid:
        return
    assert not tail and len(trace.reads) <= 50_000 and len(trace.requests) <= 50_000
    assert len(trace.command) <= 1000 and len(trace.layers) <= 1024


def test_who_comes_first_has_the_room_and_the_last_word() -> None:
    """50,000 invented reads, all at the very beginning: none of ours is lost, nor made another read."""
    ours = replace(reading(800, first=60_000, at=1.0), ready=1.0)
    invented = replace(ours, reads=(replace(ours.reads[0], size=0, at=0.0), *reading(50_000).reads))
    known = merged([ours, invented])
    assert known is not None and len(known.reads) == 50_000
    assert {*ours.reads[1:], replace(ours.reads[0], at=0.0)} <= set(known.reads)
    again = merged([known, ours])
    assert again == known


def test_what_does_not_fit_is_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replace(reading(3000, 201, first=60_000, at=1.0), command=("a",))
    theirs = reading(3000, 3901)
    whole = merged([ours, theirs])
    assert whole is not None
    small = fitting(whole, ours)
    assert set(ours.reads) < set(small.reads) and len(small.reads) > 4000
    monkeypatch.setattr(traces, "MAX_TRACE", len(encode(ours)) * 9 // 10)
    small = fitting(whole, ours)
    assert small.reads == ours.reads[: len(small.reads)] and len(small.reads) > 2000
