"""Layers without a TOC, unpacked whole by a child process: what comes out, what is refused, and what it may cost."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from lazyfs import reference
from lazyfs.chunks import plain
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.cut import CHUNK
from lazyfs.chunks.plain import PlainLayer, unpack_plain
from lazyfs.chunks.store import Store
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DiffIdMismatch,
    DigestMismatch,
    FrameInvalid,
    LazyfsError,
    StoreBroken,
    StoreFull,
    TarInvalid,
)
from lazyfs.format.entry import Kind
from lazyfs.format.table import FORM_PLAIN, LayerTable
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.faults.cases import NOTHING_SHOWN, Area, Case, shows
from tests.helpers import tars
from tests.helpers.blobs import scan
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.odd import odd_tar
from tests.helpers.registry_faults import Fault


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def frames(data: bytes) -> bytes:
    """Several zstd frames, a skippable one in between."""
    half = len(data) // 2
    return zstd(data[:half]) + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd(data[half:])


def members(data: bytes) -> bytes:
    """Several gzip members, zeros behind the last."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(100)


def as_it_is(data: bytes) -> bytes:
    return data


@contextmanager
def repository(registry: FakeRegistry) -> Iterator[Repository]:
    opened = open_repository(reference.parse(f"{registry.host}/app:1"), OpenOptions())
    try:
        yield opened
    finally:
        opened.close()


def unpack(registry: FakeRegistry, place: Path, blob: bytes, tar: bytes, **changes: object) -> list[int]:
    """Publish a blob and unpack it in `place`; return the sizes that were reported."""
    registry.add_blob(blob)
    seen: list[int] = []
    values = {"blob_digest": digest(blob), "blob_size": len(blob), "diff_id": digest(tar), **changes}
    layer = PlainLayer(data=place / "data.new", table=place / "table", **values)  # type: ignore[arg-type]
    with repository(registry) as opened:
        unpack_plain(opened, layer, seen.append)
    return seen


def expected(tar: bytes) -> dict[bytes, bytes]:
    """Content of each regular file in a tar, the last one of a name."""
    out = {}
    for item in scan(tar):
        data = io.BytesIO(tar[item.payload : item.payload + item.stored])
        if item.entry.kind is Kind.REG:
            runs = [(0, item.stored)] if item.sparse is None else item.sparse
            out[item.entry.path] = tars.expand([(offset, data.read(size)) for offset, size in runs], item.entry.size)
    return out


def read_back(place: Path, blob: bytes) -> dict[bytes, bytes]:
    """Read all files through a store that takes over what was unpacked."""
    root = place / "root"
    root.mkdir(mode=0o700)
    catalog = Catalog(root / "catalog.db")
    store = Store(root, 1 << 30, catalog)
    directory = store.path(digest(blob))
    for name in ("data.new", "table"):
        os.rename(place / name, directory / name)
    table = LayerTable(directory / "table")
    layer = store.open_layer(digest(blob), table)
    layer.adopt("data.new")
    assert layer.complete
    out = {}
    for row in range(table.rows):
        if table.kind[row] == Kind.REG:
            parts = []
            for run in table.places(row, 0, table.size[row]):
                data = layer.read(run.chunk)
                assert data is not None
                parts.append(data[run.offset : run.offset + run.size])
            out[table.path_of(row)] = b"".join(parts)
    layer.close()
    store.close()
    table.close()
    catalog.close()
    return out


@pytest.mark.parametrize("pack", [as_it_is, gzip.compress, members, zstd, frames])
def test_a_layer_reads_like_its_tar(registry: FakeRegistry, tmp_path: Path, pack: object) -> None:
    tar = odd_tar()
    blob = pack(tar)  # type: ignore[operator]
    seen = unpack(registry, tmp_path, blob, tar)
    assert sum(seen) == len(blob)
    table = LayerTable(tmp_path / "table")
    assert (table.form, table.blob_size, table.frame_count) == (FORM_PLAIN, len(blob), 0)
    row = table.find(b"third-name")
    assert row is not None and table.path_of(table.inode(row)) == b"bin/su" and table.nlink[row] == 3
    table.close()
    want = expected(tar)
    want[b"keeps-the-old"] = b"the old content"
    assert read_back(tmp_path, blob) == want


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_of_every_dialect(registry: FakeRegistry, tmp_path: Path, form: tars.Sparseness) -> None:
    size = 3 * CHUNK + 5000
    runs = {
        "holes": ((100, b"a" * 600), (CHUNK - 10, b"b" * 20), (size - 3, b"end")),
        "ends with a hole": ((0, b"start"), (2 * CHUNK, b"c" * 1000)),
        "only a hole": (),
        "many": tuple((i * 30_000, b"%04d" % i) for i in range(100)),
    }
    tar = tars.tar_of(*(tars.sparse(name, data, size, form) for name, data in runs.items()), tars.file("after", b"x"))
    blob = zstd(tar)
    unpack(registry, tmp_path, blob, tar)
    assert (tmp_path / "data.new").stat().st_blocks * 512 < 10 * CHUNK
    want = {name.encode(): tars.expand(data, size) for name, data in runs.items()}
    assert read_back(tmp_path, blob) == {**want, b"after": b"x"}


def test_sizes_around_chunks_and_blocks(registry: FakeRegistry, tmp_path: Path) -> None:
    sizes = (0, 1, 511, 512, 513, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 513)
    tar = tars.tar_of(*(tars.file(f"f{size}", os.urandom(size)) for size in sizes))
    unpack(registry, tmp_path, tar, tar)
    assert read_back(tmp_path, tar) == expected(tar)


@pytest.mark.parametrize("blob", [b"", bytes(1024)])
def test_layers_of_nothing(registry: FakeRegistry, tmp_path: Path, blob: bytes) -> None:
    unpack(registry, tmp_path, blob, blob)
    table = LayerTable(tmp_path / "table")
    assert (table.rows, table.data_size) == (1, 0)
    table.close()


# -- trust


def test_a_blob_with_another_digest_is_refused(registry: FakeRegistry, tmp_path: Path) -> None:
    """Damaged bytes rarely decode: whatever else is wrong with them, the digest is what is told."""
    tar = odd_tar()
    for pack in (as_it_is, gzip.compress, zstd):
        blob = pack(tar)
        for position in (5, len(blob) // 2, len(blob) - 1):
            registry.add_blob(blob)
            registry.clear_faults()
            registry.fault(Fault.FLIP, path="/blobs/", at=position)
            with pytest.raises(DigestMismatch):
                unpack(registry, tmp_path, blob, tar)
            assert not (tmp_path / "table").exists()


def test_another_diff_id_is_refused(registry: FakeRegistry, tmp_path: Path) -> None:
    tar = odd_tar()
    with pytest.raises(DiffIdMismatch):
        unpack(registry, tmp_path, gzip.compress(tar), tar, diff_id=digest(b"other"))
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("pack", [gzip.compress, as_it_is])
def test_a_blob_cut_short_by_its_maker(registry: FakeRegistry, tmp_path: Path, pack: object) -> None:
    tar = tars.tar_of(tars.file("f", os.urandom(100_000)))
    blob = pack(tar)[:50_000]  # type: ignore[operator]
    with pytest.raises((FrameInvalid, TarInvalid), match="end"):
        unpack(registry, tmp_path, blob, tar[:50_000])


def test_a_tar_that_is_none(registry: FakeRegistry, tmp_path: Path) -> None:
    for bad in (b"no tar at all" * 100, tars.tar_of(tars.file("../out"))):
        with pytest.raises(TarInvalid):
            unpack(registry, tmp_path, gzip.compress(bad), bad)
    bad = tars.tar_of(tars.file("f"), tars.file("f/x"))
    with pytest.raises(TarInvalid, match="f/x"):
        unpack(registry, tmp_path, bad, bad)


# -- the network


def test_a_broken_transfer_is_resumed(registry: FakeRegistry, tmp_path: Path) -> None:
    tar = tars.tar_of(tars.file("f", os.urandom(300_000)))
    rule = registry.fault(Fault.RESET, path="/blobs/", at=100_000, times=1)
    seen = unpack(registry, tmp_path, tar, tar)
    assert rule.hits == 1
    assert sum(seen) == len(tar)
    assert read_back(tmp_path, tar) == expected(tar)


def test_transfers_that_always_break_give_up(registry: FakeRegistry, tmp_path: Path) -> None:
    tar = tars.tar_of(tars.file("f", os.urandom(300_000)))
    registry.fault(Fault.TRUNCATE, path="/blobs/", at=0)
    with pytest.raises(LazyfsError):
        unpack(registry, tmp_path, tar, tar)


def test_a_missing_blob(registry: FakeRegistry, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        unpack(registry, tmp_path, b"x", b"x", blob_digest=digest(b"absent"))


# -- cost


def bomb(raw: int) -> bytes:
    """Return gzip members of a tar with one file of zeros."""
    piece = 16 << 20
    zeros = gzip.compress(bytes(piece), 9)
    size = raw // piece * piece
    return gzip.compress(tars.declared("zeros", size)) + zeros * (size // piece) + gzip.compress(bytes(1024))


@shows(
    Case(
        "input-plain-bomb",
        Area.INPUT,
        "a layer without a TOC that unpacks to a thousand times its size",
        "zeros, as holes",
        "nothing: it takes neither memory nor disk",
    ),
)
def test_a_bomb_takes_neither_memory_nor_disk(registry: FakeRegistry, tmp_path: Path) -> None:
    raw = 1 << 30
    blob = bomb(raw)
    assert len(blob) < raw // 900
    registry.add_blob(blob)
    # In a process of its own, whose only child is the one whose memory is to be measured.
    code = f"""
import resource
from pathlib import Path
from lazyfs import reference
from lazyfs.chunks.plain import PlainLayer, unpack_plain
from lazyfs.registry.open import open_repository
place = Path({str(tmp_path)!r})
layer = PlainLayer({digest(blob)!r}, {len(blob)}, "", place / "data.new", place / "table")
unpack_plain(open_repository(reference.parse("docker://{registry.host}/app")), layer, lambda size: None)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert (tmp_path / "data.new").stat().st_size == raw
    assert (tmp_path / "data.new").stat().st_blocks * 512 < CHUNK
    assert int(told.stdout) < 400 << 10  # kibibytes


@shows(
    Case(
        "input-plain-bomb-cpu",
        Area.INPUT,
        "the same of twenty gigabytes",
        NOTHING_SHOWN,
        "“it took more processor time to read than any layer may”",
    ),
)
def test_a_bomb_is_given_up_in_time(registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "UNPACK_CPU", 2)
    blob = bomb(20 << 30)
    monkeypatch.setattr(plain, "UNPACK_CPU_RATE", len(blob) + 1)
    started = time.monotonic()
    with pytest.raises(TarInvalid, match="processor time"):
        unpack(registry, tmp_path, blob, b"", diff_id="")
    assert time.monotonic() - started < 60
    assert not (tmp_path / "table").exists()


def test_a_wide_zstd_window_is_refused(registry: FakeRegistry, tmp_path: Path) -> None:
    tar = tars.tar_of(tars.file("f", b"x"))
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = packer.compress(tar) + packer.flush()
    with pytest.raises(FrameInvalid, match="zstd"):
        unpack(registry, tmp_path, blob, tar)


def test_a_full_disk_is_told(registry: FakeRegistry, scratch: Path) -> None:
    small = scratch / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "lazyfs-test", str(small)], check=True)
    tar = tars.tar_of(tars.file("f", os.urandom(3 << 20)))
    try:
        with pytest.raises(StoreFull):
            unpack(registry, small, gzip.compress(tar, 1), tar)
        assert not (small / "table").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_killed_child_is_an_error(registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tars.tar_of(tars.file("f", os.urandom(3 << 20)))
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*words: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(real(*words, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(plain.subprocess, "Popen", popen)
    registry.add_blob(tar)
    layer = PlainLayer(digest(tar), len(tar), digest(tar), tmp_path / "data.new", tmp_path / "table")
    with repository(registry) as opened, pytest.raises(TarInvalid, match="status -9"):
        unpack_plain(opened, layer, lambda size: started[0].send_signal(signal.SIGKILL))
    assert started[0].returncode == -signal.SIGKILL
    assert not (tmp_path / "table").exists()


@shows(
    Case(
        "processes-unpacker-stopped",
        Area.PROCESSES,
        "the process that unpacks a plain layer is stopped",
        NOTHING_SHOWN,
        "“… has taken no byte for 60 s: it was stopped, or the disk of the store hangs”",
    ),
)
def test_a_child_that_takes_nothing_is_given_up(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, or in the hands of a disk that hangs: it would hold a thread and a connection for ever."""
    monkeypatch.setattr(plain, "UNPACK_WAIT", 0.5)
    tar = tars.tar_of(tars.file("f", os.urandom(6 << 20)))
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*words: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(real(*words, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(plain.subprocess, "Popen", popen)
    registry.add_blob(tar)
    layer = PlainLayer(digest(tar), len(tar), digest(tar), tmp_path / "data.new", tmp_path / "table")
    with repository(registry) as opened, pytest.raises(StoreBroken, match="has taken no byte"):
        unpack_plain(opened, layer, lambda size: started[0].send_signal(signal.SIGSTOP))
    assert started[0].returncode == -signal.SIGKILL


def test_an_error_of_the_caller_ends_the_child(registry: FakeRegistry, tmp_path: Path) -> None:
    """What `on_bytes` raises (a cancelled mount, say) comes out, and no process stays behind."""

    def stop(size: int) -> None:
        raise BadAnswer("here", "stop", hint="") if size < 0 else KeyboardInterrupt

    tar = tars.tar_of(tars.file("f", os.urandom(1 << 20)))
    registry.add_blob(tar)
    layer = PlainLayer(digest(tar), len(tar), digest(tar), tmp_path / "data.new", tmp_path / "table")
    with repository(registry) as opened, pytest.raises(KeyboardInterrupt):
        unpack_plain(opened, layer, stop)
    assert not (tmp_path / "table").exists()


def test_places_that_can_not_be_written(registry: FakeRegistry, tmp_path: Path) -> None:
    tar = tars.tar_of(tars.file("f", b"x"))
    with pytest.raises(StoreBroken):
        unpack(registry, tmp_path / "absent", tar, tar)
    (tmp_path / "data.new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreBroken):
        unpack(registry, tmp_path, tar, tar)
    assert not (tmp_path / "elsewhere").exists()


def test_a_child_that_can_not_be_started(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "command", lambda module, *words: ["/absent/python"])
    with pytest.raises(StoreBroken, match="can't be started"):
        unpack(registry, tmp_path, b"x", b"x")
