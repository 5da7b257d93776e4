"""The file of `convert --report`: about this conversion, however it ended, and never in a device's place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lazyfs.cli import main as frame
from lazyfs.cli.report_file import ReportFile
from lazyfs.errors import StoreFull, UsageError


def report_of(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (frame.Terminated(), "Terminated", 143),
        (KeyboardInterrupt(), "Interrupted", 130),
        (StoreFull("no room", hint="make some"), "StoreFull", 9),
        (KeyError("spam"), "KeyError", 1),
    ],
)
def test_the_code_in_the_report_is_the_one_of_the_process(
    error: BaseException, kind: str, code: int, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(type(error)), ReportFile(str(path), "from:1", "to:1").on_failure():
        raise error
    told = report_of(path)
    assert told["status"] == "failed" and (told["source"], told["destination"]) == ("from:1", "to:1")
    assert told["error"]["class"] == kind and told["error"]["exit_code"] == code and told["error"]["message"]


def test_a_failure_before_anything_was_read_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"status": "converted"}')
    assert (
        frame.main(["convert", "--report", str(path), "--prefetch", str(tmp_path / "none"), "oci:x:y", "oci:z:y"]) == 2
    )
    assert report_of(path)["status"] == "failed" and report_of(path)["error"]["class"] == "UsageError"
    capsys.readouterr()


def test_an_earlier_report_is_gone_whatever_happens(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"status": "converted"}')
    with ReportFile(str(path), "from:1", "to:1").on_failure():
        assert not path.exists()  # as a kill would leave it


def test_only_a_file_is_written(tmp_path: Path) -> None:
    fifo, directory, link, target = (tmp_path / name for name in ("fifo", "directory", "link", "target"))
    os.mkfifo(fifo)
    directory.mkdir()
    for name in (fifo, directory, tmp_path / "none/report", "/dev/null", ""):
        with pytest.raises(UsageError, match="no place for a file"):
            ReportFile(str(name), "a", "b")
    assert fifo.is_fifo()
    link.symlink_to(target)
    ReportFile(str(link), "a", "b").write({"schema": 1})
    assert link.is_symlink() and report_of(target)["schema"] == 1


@pytest.mark.parametrize("flag", ["--report", "--prefetch", "--cache-repo", "--work-dir"])
def test_a_flag_whose_variable_is_empty_is_not_passed_over(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["convert", flag, "", "oci:x:y", "oci:z:y"]) == 2
    assert capsys.readouterr().err


def test_containerd_takes_no_referrers(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["convert", "--copy-referrers", "oci:x:y", "containerd:z"]) == 2
    assert "containerd keeps no referrers" in capsys.readouterr().err
