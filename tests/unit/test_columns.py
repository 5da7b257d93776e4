"""Files of columns: what was written comes back, and anything else is refused."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.errors import StoreBroken, StoreFull, TableInvalid
from lazyfs.format.columns import Columns, write_columns

MAGIC = b"TESTCOLS"
COLUMNS = {
    "bytes": b"\1\2\3",
    "shorts": array("H", [0, 65535, 7]),
    "words": array("I", [1, 2**32 - 1]),
    "longs": array("Q", [2**64 - 1]),
    "signed": array("q", [-1, 2**62]),
    "none": array("Q"),
}
CODES = {"bytes": "B", "shorts": "H", "words": "I", "longs": "Q", "signed": "q", "none": "Q"}


def test_columns_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS)
    columns = Columns(path, MAGIC, 3)
    for name, column in COLUMNS.items():
        view = columns.view(name, CODES[name])
        assert view.tolist() == list(column)
        assert view.readonly
    assert os.listdir(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600
    columns.close()
    with pytest.raises(ValueError, match="released"):
        view.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("HIQ"), st.lists(st.integers(0, 2**16 - 1), max_size=20)), max_size=12))
def test_any_columns_come_back(tmp_path_factory: pytest.TempPathFactory, lists: list[tuple[str, list[int]]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    write_columns(path, MAGIC, 1, {str(i): array(code, values) for i, (code, values) in enumerate(lists)})
    columns = Columns(path, MAGIC, 1)
    assert [columns.view(str(i), code).tolist() for i, (code, _) in enumerate(lists)] == [v for _, v in lists]
    columns.close()


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(TableInvalid):
                Columns(path, MAGIC, 3)


REST = {"names": b"abc", "more": array("I", range(100))}


def test_what_lies_behind_the_front_is_checked_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS, REST)
    whole = path.read_bytes()
    late = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        try:
            columns = Columns(path, MAGIC, 3)
        except TableInvalid:
            continue
        late += 1
        assert [columns.view(name, CODES[name]).tolist() for name in COLUMNS] == [list(c) for c in COLUMNS.values()]
        assert (columns.length("names", "B"), columns.length("more", "I")) == (3, 100)
        with pytest.raises(TableInvalid, match="damaged"):
            columns.view("names", "B")
        assert not path.exists()  # whoever opens it next makes it again
        with pytest.raises(TableInvalid):
            columns.view("more", "I")
        columns.close()
    assert late >= 3 + 400  # the bytes of the two columns


def test_a_file_that_took_the_place_of_a_damaged_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS, REST)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\xee")
    columns = Columns(path, MAGIC, 3)
    write_columns(path, MAGIC, 3, COLUMNS, REST)
    with pytest.raises(TableInvalid):
        columns.ensure_rest()
    columns.close()
    again = Columns(path, MAGIC, 3)
    assert bytes(again.view("names", "B")) == b"abc"
    assert again.view("more", "I").tolist() == list(range(100))
    again.close()


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, {}, REST)
    before = len(os.listdir("/proc/self/fd"))
    columns = Columns(path, MAGIC, 3)
    columns.ensure_rest()
    columns.close()
    assert len(os.listdir("/proc/self/fd")) == before
    Columns(path, MAGIC, 3)  # dropped, not closed
    assert len(os.listdir("/proc/self/fd")) == before


def test_any_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(TableInvalid):
            Columns(path, MAGIC, 3)
    path.write_bytes(whole + b"\0")
    with pytest.raises(TableInvalid):
        Columns(path, MAGIC, 3)


def test_other_kinds_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS)
    for magic, version in ((b"OTHERCOL", 3), (MAGIC, 2), (MAGIC, 4)):
        with pytest.raises(TableInvalid):
            Columns(path, magic, version)


def test_a_missing_column_or_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS)
    columns = Columns(path, MAGIC, 3)
    for name, code in (("absent", "B"), ("bytes", "H"), ("longs", "q")):
        with pytest.raises(TableInvalid):
            columns.view(name, code)
    columns.close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    write_columns(tmp_path / "real", MAGIC, 3, COLUMNS)
    (tmp_path / "link").symlink_to("real")
    for name in ("absent", "link", "."):
        with pytest.raises(TableInvalid):
            Columns(tmp_path / name, MAGIC, 3)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_columns(path, MAGIC, 3, COLUMNS)
    before = path.read_bytes()
    planted = tmp_path / f".file.{os.getpid()}"
    planted.symlink_to("elsewhere")  # where the temporary file would go: not followed
    with pytest.raises(StoreBroken):
        write_columns(path, MAGIC, 3, {"bytes": b"new"})
    assert path.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(StoreBroken):
        write_columns(tmp_path / "absent" / "file", MAGIC, 3, COLUMNS)


def test_a_full_disk_is_told_apart() -> None:
    with pytest.raises(StoreFull):
        _write_to_full()


def _write_to_full() -> None:
    """/dev/full can't be renamed over, so the error comes from a stand-in for open(2)'s file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyfs.format.columns._private", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
        write_columns(Path("file"), MAGIC, 3, COLUMNS)
