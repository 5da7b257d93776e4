"""Traces: written and read back, merged, and nothing believed of one that somebody else has written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import TraceInvalid
from lazyfs.format import trace as traces
from lazyfs.format.trace import Read, Request, Trace, decode, encode, merged, stripped

MANIFEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
LAYERS = ("sha256:" + "1" * 64, "sha256:" + "2" * 64)

paths = st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=3).map(
    lambda parts: b"/".join(b"x" + part.replace(b"/", b"-").replace(b"\0", b"-") for part in parts)
)
numbers = st.integers(0, 1 << 40)
times = st.integers(0, 10**7).map(lambda ms: ms / 1000)
reads = st.builds(Read, paths, st.integers(0, 1), numbers, numbers, times, times)
requests = st.builds(Request, st.integers(0, 1), numbers, numbers, st.integers(0, 2), times, times, times)
every = st.builds(
    Trace,
    st.just(MANIFEST),
    st.just(LAYERS),
    st.lists(reads, max_size=8).map(tuple),
    st.lists(requests, max_size=4).map(tuple),
    times,
    st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF)), max_size=3).map(tuple),
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
        ({"layers": [LAYERS[0]] * 1025}, "1024 layers"),
        ({"paths": ["../etc/passwd"]}, "leads out of the root"),
        ({"paths": ["a\0b"]}, "NUL"),
        ({"paths": ["\0\u0100"]}, "stands for no bytes"),
        ({"reads": [[1, 0, 0, 1, 0, 0]]}, "does not name"),
        ({"reads": [[0, 2, 0, 1, 0, 0]]}, "does not name"),
        ({"reads": [[0, 0, -1, 1, 0, 0]]}, "no start could give"),
        ({"reads": [[0, 0, 0, 1 << 63, 0, 0]]}, "no start could give"),
        ({"requests": [[2, 0, 0, 0, 0, 0, 0]]}, "does not name"),
        ({"ready": -1}, "no start could give"),
        ({"reads": [[0, 0, 0, 1, 0]]}, "can't be decoded"),
        ({"reads": [[0, 0, 0, 1, 0, 0]] * 50_001}, "more than 50000 reads"),
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


def test_too_large_a_trace_is_not_written() -> None:
    read = Read(b"a", 0, 0, 1)
    with pytest.raises(TraceInvalid, match="too large"):
        encode(Trace(MANIFEST, LAYERS, tuple(replace(read, offset=n) for n in range(50_001))))
