"""Whether a mount can be idmapped is found out by trying it on that mount."""

from __future__ import annotations

import os
from pathlib import Path

from lazyfs.cli import host_checks
from lazyfs.config import Settings
from lazyfs.container import idmap, mounts


def test_a_file_system_that_can_and_one_that_can_not(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    mounts.mount(b"none", os.fsencode(scratch), "tmpfs")
    try:
        assert idmap.problem(os.fsencode(scratch)) == ""
    finally:
        mounts.umount(os.fsencode(scratch))
    assert idmap.problem(b"/proc") == "this file system can't be idmapped"
    assert mounts.below(os.fsencode(tmp_path)) == []


def test_no_directory(tmp_path: Path) -> None:
    assert "No such file" in idmap.problem(os.fsencode(tmp_path / "none"))


def test_doctor_tells_it(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "store", tmp_path / "run")
    assert "not known" in host_checks._idmapped(settings).text
    settings.session.mkdir(parents=True)
    mounts.mount(b"none", os.fsencode(settings.session), "tmpfs")
    try:
        assert "remap-ids" in host_checks._idmapped(settings).text
    finally:
        mounts.umount(os.fsencode(settings.session))
