"""Files that a user names for traces: nothing else is read, nothing is overwritten unasked, nothing is half there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lazyfs.cli.trace_file import check_place, read_trace, write_trace
from lazyfs.digest import EMPTY
from lazyfs.errors import StoreBroken, TraceInvalid, UsageError
from lazyfs.format.trace import Trace, encode
from lazyfs.limits import MAX_TRACE

TRACE = Trace(EMPTY, (), ())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_trace(check_place(str(tmp_path / "t"), force=False), encode(TRACE), force=False)
    assert read_trace(str(tmp_path / "t")) == TRACE and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("force", [True, False])
def test_nobody_else_reads_the_command_line_in_it(tmp_path: Path, force: bool) -> None:
    before = os.umask(0o022)
    try:
        write_trace(tmp_path / "t", b"ours", force=force)
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("links", [True, False], ids=["", "no hard links"])
def test_a_file_that_appeared_meanwhile_stays(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    place = check_place(str(tmp_path / "t"), force=False)
    place.write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="is there already"):
        write_trace(place, b"ours", force=False)
    assert place.read_bytes() == b"somebody's"
    write_trace(place, b"ours", force=True)
    write_trace(tmp_path / "other", b"ours", force=False)
    assert place.read_bytes() == b"ours" and sorted(os.listdir(tmp_path)) == ["other", "t"]


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreBroken, match="No space left"):
        write_trace(tmp_path / "t", b"ours", force=False)
    assert os.listdir(tmp_path) == []


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("", str(tmp_path), str(tmp_path / "none/t"), "/dev/null"):
        with pytest.raises(UsageError, match="no place for a file"):
            check_place(name, force=True)
    with pytest.raises(UsageError, match="is there already"):
        check_place(str(tmp_path / "dangling"), force=False)


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", MAX_TRACE + 1)
    for name, error in (("none", UsageError), ("fifo", UsageError), ("a\0b", UsageError), ("huge", TraceInvalid)):
        with pytest.raises(error, match=name.partition("\0")[0]):
            read_trace(str(tmp_path / name))
