"""The parts that plain layers are unpacked with: threads in a row, cutting and writing, turns, the child's memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.child import command
from lazyfs.chunks import unpack
from lazyfs.chunks.cut import CHUNK, PieceWriter
from lazyfs.chunks.lines import Lines
from lazyfs.chunks.stages import Ahead, Channel, Sink
from lazyfs.chunks.unpack import Unpacker
from lazyfs.format import inflate
from lazyfs.format.entry import Kind
from lazyfs.format.table import LayerTable

# -- threads in a row


def test_a_channel_keeps_order_and_bound() -> None:
    channel: Channel[int] = Channel(2)
    sent: list[int] = []

    def send() -> None:
        for number in range(100):
            channel.put(number)
            sent.append(number)
        channel.close()

    thread = threading.Thread(target=send)
    thread.start()
    got = []
    for number in channel:
        got.append(number)
        assert len(sent) <= len(got) + 2
    thread.join()
    assert got == list(range(100))


def test_what_a_source_raises_comes_behind_its_items() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise ValueError("four")

    got = []
    with pytest.raises(ValueError, match="four"):
        for item in Ahead(items(), 1):
            got.append(item)
    assert got == [1, 2, 3]


def test_a_dropped_source_is_left_or_exhausted() -> None:
    for to_the_end in (False, True):
        seen: list[int] = []

        def items(seen: list[int] = seen) -> Iterator[int]:
            for number in range(50):
                seen.append(number)
                yield number

        ahead = Ahead(items(), 2, to_the_end=to_the_end)
        ahead.drop()
        ahead.wait()
        assert (len(seen) == 50) == to_the_end


def test_a_sink_that_failed_says_so_and_blocks_nobody() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise OSError(28, "full")

    sink = Sink(work, 1)
    with pytest.raises(OSError, match="full"):
        for number in range(1000):
            sink.put(number)
    with pytest.raises(OSError, match="full"):
        sink.finish()


# -- turns


def test_the_largest_layer_comes_first_and_hosts_do_not_wait_for_each_other() -> None:
    lines = Lines(8, processors=1)
    order: list[int] = []
    first = [lines.place("a", 1) for _ in range(2)]
    for place in first:
        place.__enter__()
    inside = threading.Event()

    def unpacking(size: int) -> None:
        with lines.place("a", size):
            order.append(size)
            inside.wait(0.05)

    threads = [threading.Thread(target=unpacking, args=(size,)) for size in (10, 30, 20)]
    for thread in threads:
        thread.start()
    with lines.place("b", 1):
        pass
    while len(lines._waiting["a"]) < 3:
        inside.wait(0.005)
    first[0].__exit__(None, None, None)
    for thread in threads:
        thread.join()
    first[1].__exit__(None, None, None)
    assert order == [30, 20, 10]


def test_who_gives_up_waiting_leaves_the_queue() -> None:
    lines = Lines(8, processors=1)

    def gone() -> None:
        raise InterruptedError

    with lines.place("a", 1), lines.place("a", 1):
        with pytest.raises(InterruptedError), lines.place("a", 5, gone):
            pass
        assert lines._waiting["a"] == []
    with lines.place("a", 1):
        pass


def test_a_host_keeps_two_connections_for_its_readers() -> None:
    lines = Lines(8)
    with lines.place("a", 1):
        assert [lines.take("a") for _ in range(7)] == [True] * 5 + [False] * 2
        assert lines.take("b")
        lines.give_back("a")
        lines.set_readers("a", waiting=True)
        assert not lines.take("a")
        lines.set_readers("a", waiting=False)
        assert lines.take("a")


# -- any tar, any compression, any cuts: what a full unpack has


def gzip_members(data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join(gzip.compress(data[a:b], 1) for a, b in pairwise(edges))


def zstd_frames(data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join(zstandard.compress(data[a:b], 1) for a, b in pairwise(edges))


def as_it_is(data: bytes, cuts: list[int]) -> bytes:
    return data


def tar_with(files: list[tuple[int, int]]) -> tuple[bytes, dict[bytes, bytes]]:
    """Return a tar of files of these (size, seed), and their contents; every seventh is zeros."""
    out, contents = io.BytesIO(), {}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, (size, seed) in enumerate(files):
            name = f"d{seed % 3}/f{number}"
            pattern = hashlib.sha256(bytes([seed])).digest()
            data = bytes(size) if seed % 7 == 0 else (pattern * (size // 32 + 1))[:size]
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(data))
            contents[name.encode()] = data
    return out.getvalue(), contents


SIZES = st.one_of(
    st.integers(0, 5000), st.sampled_from([4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4097])
)


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.tuples(SIZES, st.integers(0, 255)), max_size=12),
    pack=st.sampled_from([gzip_members, zstd_frames, as_it_is]),
    cuts=st.lists(st.integers(0, 1 << 22), max_size=4),
    blocks=st.sampled_from([700, 4096, 100_000, 1 << 20]),
)
def test_whatever_the_cuts_the_files_come_out(
    files: list[tuple[int, int]],
    pack: Callable[[bytes, list[int]], bytes],
    cuts: list[int],
    blocks: int,
) -> None:
    tar, contents = tar_with(files)
    packed = pack(tar, cuts)
    pieces = (packed[at : at + blocks] for at in range(0, len(packed), blocks))
    unpacker = Unpacker()
    with tempfile.TemporaryFile() as target:
        writer = PieceWriter(target.fileno())
        for block in unpack._joined(inflate.decompress(pieces)):
            writer.write(unpacker.feed(block))
        unpacker.finish()
        os.ftruncate(target.fileno(), unpacker.data_size)
        found = {}
        for live in unpacker.pairs.finish():
            parts = [os.pread(target.fileno(), chunk.size, chunk.blob_offset + chunk.offset) for chunk in live.tag]
            for part, chunk in zip(parts, live.tag, strict=True):
                assert hashlib.sha256(part).digest() == chunk.digest
                assert chunk.size <= CHUNK
            if live.entry.kind is Kind.REG:
                found[live.entry.path] = b"".join(parts)
        assert found == contents


@pytest.mark.parametrize("size", [1, 3, 700])
def test_files_in_tiny_blocks_have_few_parts(tmp_path: Path, size: int) -> None:
    """Views of single bytes would take a hundred times the memory, and a write takes 1,024 parts at most."""
    tar, contents = tar_with([(60_000, 1), (10, 2), (CHUNK if size > 3 else 2000, 3)])
    unpacker = Unpacker()
    with (tmp_path / "data").open("w+b") as target:
        writer = PieceWriter(target.fileno())
        for at in range(0, len(tar), size):
            pieces = unpacker.feed(tar[at : at + size])
            assert all(len(piece.parts) <= 600 for piece in pieces)
            writer.write(pieces)
        unpacker.finish()
        for live in unpacker.pairs.finish():
            got = b"".join(os.pread(target.fileno(), c.size, c.blob_offset + c.offset) for c in live.tag)
            assert got == contents[live.entry.path]


@pytest.mark.parametrize("without", [False, True])
def test_both_inflaters_give_the_same(monkeypatch: pytest.MonkeyPatch, without: bool) -> None:
    if without:
        monkeypatch.setitem(sys.modules, "zlib_ng", None)
        monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    data = os.urandom(3 << 20) + bytes(5 << 20)
    packed = gzip_members(data, [1, 2 << 20, 6 << 20]) + bytes(512)
    pieces = list(inflate.decompress(packed[at : at + 1000] for at in range(0, len(packed), 1000)))
    assert b"".join(pieces) == data and max(map(len, pieces)) <= inflate.STEP
    flipped = packed[:4000] + bytes([packed[4000] ^ 0xFF]) + packed[4001:]
    for bad in (packed[:-520], flipped, packed + b"rubbish"):
        with pytest.raises(inflate.FrameInvalid):
            list(inflate.decompress([bad]))


def test_the_child_takes_little_memory_whatever_the_layer(tmp_path: Path) -> None:
    """64 MB that don't compress, as one gzip member: blocks on their way, no more."""
    tar, _ = tar_with([(64 << 20, 1)])
    tar = tar[:512] + os.urandom(64 << 20) + tar[512 + (64 << 20) :]
    blob = gzip.compress(tar, 1)
    job = {
        "blob_digest": "sha256:" + hashlib.sha256(blob).hexdigest(), "blob_size": len(blob), "seconds": 60,
        "diff_id": "sha256:" + hashlib.sha256(tar).hexdigest(),
        "data": str(tmp_path / "data"), "table": str(tmp_path / "table"),
    }  # fmt: skip
    (tmp_path / "blob").write_bytes(blob)
    words = command("lazyfs.chunks.unpack", json.dumps(job))
    code = (
        "import resource, subprocess, sys; "
        f"done = subprocess.run({words!r}, stdin=open({str(tmp_path / 'blob')!r}, 'rb'), stdout=2, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(told.stderr) == {"ok": True}
    assert int(told.stdout) < 128 << 10  # kibibytes
    table = LayerTable(tmp_path / "table")
    assert table.data_size == 64 << 20
    table.close()


def test_a_child_whose_parent_died_leaves_nothing(tmp_path: Path) -> None:
    """The pipe ends early: the rest of a layer is dropped by whoever unpacked it."""
    tar, _ = tar_with([(1 << 20, 1)])
    job = {
        "blob_digest": "sha256:" + hashlib.sha256(tar).hexdigest(), "blob_size": len(tar), "diff_id": "",
        "seconds": 60, "data": str(tmp_path / "data"), "table": str(tmp_path / "table"),
    }  # fmt: skip
    words = command("lazyfs.chunks.unpack", json.dumps(job))
    told = subprocess.run(words, input=tar[:700_000], capture_output=True, check=True, timeout=60)
    assert b"DigestMismatch" in told.stdout
    assert os.listdir(tmp_path) == []
