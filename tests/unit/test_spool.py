"""The spool gives back what it got or nothing, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.chunks import spool as spool_module
from lazyfs.chunks.spool import Spool


def test_extent_comes_back_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.put(3, 1 << 33, b"late")
    assert spool.put(1, 5, b"early")
    assert spool.has(3)
    assert not spool.has(2)
    assert spool.take(1) == b"early"
    assert spool.take(1) is None
    assert spool.take(3) == b"late"
    assert spool.take(2) is None
    spool.close()


def test_nothing_is_left_in_the_directory(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(0, 0, b"x" * 10_000)
    assert list(tmp_path.iterdir()) == []
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_disk_space_comes_back_with_each_extent(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    size = 1 << 20
    for extent in range(4):
        assert spool.put(extent, extent * size, os.urandom(size))
    assert spool._file is not None
    assert os.fstat(spool._file.number).st_blocks * 512 >= 4 * size
    for extent in range(4):
        assert spool.take(extent) is not None
    assert os.fstat(spool._file.number).st_blocks * 512 <= size // 4
    spool.close()


def test_tiny_extents_are_kept_together_and_come_back_one_by_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    run = [(number, 100 + 7 * number, b"%07d" % number) for number in range(1000)]
    spool.put_run([*run, (2000, 1 << 20, b"far")])
    assert [spool.take(number) for number, _, _ in run] == [data for _, _, data in run]
    assert spool.take(2000) == b"far"
    spool.close()


def test_disk_that_failed_once_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    assert not spool.put(0, 0, b"a")
    monkeypatch.undo()
    assert not spool.works
    assert not spool.put(0, 0, b"a")
    spool.close()


def test_closed_and_cleared_spools_find_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(0, 0, b"a")
    spool.clear()
    assert spool.take(0) is None
    assert spool.put(0, 0, b"a")
    spool.close()
    assert not spool.has(0)
    assert spool.take(0) is None
    assert not spool.put(0, 0, b"a")
    spool.close()


def test_directory_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "missing")
    assert not spool.put(0, 0, b"a")
    assert spool.take(0) is None
    spool.close()


def test_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert not spool.put(0, 0, b"a")
    assert not spool.has(0)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 1)
    assert not spool.put(0, 0, b"short")
    spool.close()


def test_disk_that_changes_bytes_gives_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(0, 100, b"content")
    assert spool._file is not None
    os.pwrite(spool._file.number, b"X", 103)
    assert spool.take(0) is None
    spool.close()


def test_file_system_without_holes_still_gives_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    a, b = os.urandom(1 << 20), os.urandom(1 << 20)
    spool.put(0, 0, a)
    spool.put(1, 1 << 20, b)
    refused = []

    def refuse(fd: int, offset: int, size: int) -> None:
        refused.append(offset)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(spool_module, "punch_hole", refuse)
    assert spool.take(0) == a
    assert spool.take(1) == b
    assert refused == [0]  # and is not asked again
    spool.close()


def test_close_beside_a_write_never_reaches_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    inside, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        inside.set()
        assert go_on.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    writer = threading.Thread(target=spool.put, args=(0, 0, b"belongs to the spool"))
    writer.start()
    assert inside.wait(10)
    spool.close()
    others = [os.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT) for i in range(20)]
    go_on.set()
    writer.join(10)
    for i, fd in enumerate(others):
        os.close(fd)
        assert (tmp_path / str(i)).read_bytes() == b""
    assert not spool.has(0)


@given(st.lists(st.tuples(st.sampled_from("ptc"), st.integers(0, 5), st.binary(min_size=1, max_size=50)), max_size=40))
def test_spool_is_a_dictionary_that_forgets_what_it_gave(steps: list[tuple[str, int, bytes]]) -> None:
    spool, model = Spool(Path("/var/tmp")), dict[int, bytes]()
    for what, extent, data in steps:
        if what == "p":
            assert spool.put(extent, extent * 50, data)
            model[extent] = data
        elif what == "t":
            assert spool.take(extent) == model.pop(extent, None)
        else:
            spool.clear()
            model.clear()
        assert [spool.has(i) for i in range(6)] == [i in model for i in range(6)]
    spool.close()
