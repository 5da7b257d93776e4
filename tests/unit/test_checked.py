"""Files are hashed once, as long as nobody touches them; whatever is done to one, it is hashed again."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.errors import TableInvalid
from lazyfs.format import checked
from lazyfs.format.checked import Checked
from lazyfs.format.columns import Columns, write_columns

MAGIC = b"LZFTEST\0"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Checked:
    """A memory for which all files here are old."""
    found = Checked(lambda: time.time() + 60)
    monkeypatch.setattr("lazyfs.format.columns.CHECKED", found)
    return found


def written(path: Path) -> Path:
    write_columns(path, MAGIC, 1, {"numbers": array("I", range(5000))})
    return path


@pytest.fixture
def table(tmp_path: Path, memory: Checked) -> Path:
    """A sound file that the memory knows."""
    path = written(tmp_path / "table")
    Columns(path, MAGIC, 1).close()
    assert memory.knows(path.stat())
    return path


def flipped(raw: bytes) -> bytes:
    return raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]


def put_in_place(path: Path) -> None:
    raw = path.read_bytes()
    with open(path, "r+b") as handle:
        handle.write(flipped(raw))


def put_back_in_time(path: Path) -> None:
    before = path.stat()
    put_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_beside(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(flipped(path.read_bytes()))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [put_in_place, put_back_in_time, put_beside])
def test_a_changed_file_is_hashed_again(table: Path, change: Callable[[Path], None]) -> None:
    time.sleep(0.02)  # more than the clock of a file system stands still
    change(table)
    with pytest.raises(TableInvalid, match="damaged"):
        Columns(table, MAGIC, 1)


def test_an_unchanged_file_is_not_and_still_has_to_be_of_the_kind(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lazyfs.format.columns.file_checksum")
    opened = Columns(table, MAGIC, 1)
    assert opened.view("numbers", "I").tolist() == list(range(5000))
    opened.close()
    with pytest.raises(TableInvalid, match="another kind"):
        Columns(table, MAGIC, 2)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """It could change once more before its times do."""
    found = written(tmp_path / "table").stat()
    for age, known in ((-1.0, False), (0.05, False), (0.2, True)):
        memory = Checked(lambda age=age: found.st_ctime + age)  # type: ignore[misc]
        memory.note(found)
        assert memory.knows(found) == known


def test_the_memory_is_bounded(tmp_path: Path, memory: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "MAX_CHECKED", 2)
    files = [written(tmp_path / str(number)).stat() for number in range(3)]
    for found in files:
        memory.note(found)
    assert [memory.knows(found) for found in files] == [False, False, True]
