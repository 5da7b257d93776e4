"""Whether a mount can be idmapped is found out by trying it on that mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazyfs.cli import host_checks, idmapped
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


def test_a_mount_of_the_driver_erofs_is_tried_where_the_daemon_has_chosen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(tmp_path / "store", tmp_path / "run")
    settings.session.mkdir(parents=True)
    mounts.bind(b"/proc/self", os.fsencode(settings.session))  # which can't be idmapped, as FUSE
    try:
        assert idmapped.problem(settings) == "this file system can't be idmapped"
        monkeypatch.setattr(idmapped, "_driver", lambda settings: "erofs")
        assert idmapped.problem(settings) == ""
    finally:
        mounts.umount(os.fsencode(settings.session))
