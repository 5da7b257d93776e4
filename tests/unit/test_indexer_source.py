"""The source of a layer: what is inside is told by content, resumed, bounded, and its digest known at the end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import threading
from collections.abc import Iterator

import pytest
import zstandard

from indexer.source import BlobSource, Pump, decompressed
from lazyfs import digest as digests
from lazyfs.errors import BadAnswer, BlobMissing, FrameInvalid, Interrupted, RegistryError
from lazyfs.oci import Descriptor
from lazyfs.registry.repository import Repository

DATA = b"".join(b"%09d\n" % i for i in range(300_000))


class Stream:
    """A blob's range that breaks after `limit` bytes."""

    def __init__(self, data: bytes, limit: int) -> None:
        self._file = io.BytesIO(data)
        self._limit = limit

    def read(self, size: int) -> bytes:
        if self._file.tell() >= self._limit:
            raise BadAnswer("test", "the connection broke")
        return self._file.read(min(size, self._limit - self._file.tell()))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Flaky:
    """A repository of one blob whose connections break after `limit` bytes each."""

    name = host = "test"

    def __init__(self, data: bytes, limit: int = 1 << 60) -> None:
        self.data, self.limit, self.fetches = data, limit, 0

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> Stream:
        self.fetches += 1
        assert deadline is not None
        if self.limit < 0:
            raise BlobMissing("test", "no such blob")
        return Stream(self.data[blob_offset : blob_offset + size], self.limit)


def source(data: bytes, limit: int = 1 << 60) -> BlobSource:
    repository: Repository = Flaky(data, limit)  # type: ignore[assignment]
    return BlobSource(repository, Descriptor("", digests.of(data), len(data)), lambda count: None)


def read(data: bytes) -> bytes:
    return b"".join(decompressed(source(data)))


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def skippable(data: bytes) -> bytes:
    return b"\x5a\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    "packed",
    [
        DATA,
        gzip.compress(DATA, mtime=0),
        gzip.compress(DATA[:1000], mtime=0) + gzip.compress(b"", mtime=0) + gzip.compress(DATA[1000:], mtime=0),
        zstd(DATA),
        zstd(DATA[:70_000]) + skippable(b"x" * 9) + zstd(DATA[70_000:]) + skippable(b""),
        skippable(b"first") + zstd(DATA),
    ],
    ids=["plain", "gzip", "members", "zstd", "frames", "skippable first"],
)
def test_what_is_inside_is_told_by_content(packed: bytes) -> None:
    blob = source(packed)
    assert b"".join(decompressed(blob)) == DATA
    assert blob.digest == digests.of(packed) and blob.size == len(packed)


def test_a_copy_is_kept_on_the_way() -> None:
    packed, copy = gzip.compress(DATA), io.BytesIO()
    assert b"".join(decompressed(source(packed), copy)) == DATA
    assert copy.getvalue() == packed


def test_short_blobs() -> None:
    assert read(b"") == b"" and read(b"ab") == b"ab"


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (gzip.compress(DATA, mtime=0)[:-20], "too early"),
        (gzip.compress(DATA, mtime=0)[:-4], "too early"),
        (gzip.compress(DATA, mtime=0) + b"rubbish", "damaged"),
        (gzip.compress(DATA, mtime=0)[:-8] + b"12345678", "damaged"),
        (zstd(DATA) + b"rubbish", "damaged"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "damaged"),
        (bz2.compress(DATA), "bzip2"),
        (lzma.compress(DATA), "xz"),
    ],
)
def test_damage(packed: bytes, reason: str) -> None:
    with pytest.raises(FrameInvalid, match=reason):
        read(packed)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_bomb_comes_in_small_pieces(pack: type[bytes]) -> None:
    packed = pack(bytes(200 << 20))
    assert len(packed) < 300_000
    sizes = [len(block) for block in decompressed(source(packed))]
    assert sum(sizes) == 200 << 20 and max(sizes) <= 1 << 20


def test_a_broken_connection_is_resumed_where_it_broke() -> None:
    repository = Flaky(DATA, 1_000_000)
    blob = BlobSource(repository, Descriptor("", "sha256:" + "0" * 64, len(DATA)), lambda count: None)  # type: ignore[arg-type]
    assert b"".join(blob.blocks()) == DATA
    assert blob.digest == digests.of(DATA) and repository.fetches == 3


def test_a_connection_that_gives_nothing_is_given_up() -> None:
    repository = Flaky(DATA, 0)
    blob = BlobSource(repository, Descriptor("", "sha256:" + "0" * 64, len(DATA)), lambda count: None)  # type: ignore[arg-type]
    with pytest.raises(BadAnswer):
        list(blob.blocks())
    assert repository.fetches == 6


def test_a_missing_blob_is_not_tried_again() -> None:
    with pytest.raises(RegistryError):
        list(source(DATA, -1).blocks())


def test_the_pump_hands_on_blocks_and_errors_in_order() -> None:
    def blocks() -> Iterator[bytes]:
        yield b"a"
        yield b"b"
        raise FrameInvalid("broken")

    got = []
    pump = Pump(blocks(), threading.Event())
    with pytest.raises(FrameInvalid, match="broken"):
        for block in pump:
            got.append(block)
    assert got == [b"a", b"b"]
    assert list(pump) == []  # asked again after its end, it must not wait for more


def test_a_cancelled_pump_ends_although_its_source_hangs() -> None:
    cancelled, release = threading.Event(), threading.Event()

    def blocks() -> Iterator[bytes]:
        yield b"a"
        release.wait(30)
        yield b"b"

    pump = iter(Pump(blocks(), cancelled))
    assert next(pump) == b"a"
    cancelled.set()
    with pytest.raises(Interrupted):
        next(pump)
    release.set()
