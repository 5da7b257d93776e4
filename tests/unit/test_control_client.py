"""Starting a daemon from the client's side, where it can't start."""

from __future__ import annotations

import importlib.util
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazyfs import config, control_client
from lazyfs.cli.umount import release
from lazyfs.errors import DaemonUnreachable, FuseUnavailable
from tests.helpers.control_daemon import ControlDaemon


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    """Settings of a store of its own, and daemons that end before they listen."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))
    return config.load({"root": str(tmp_path / "root"), "run": str(tmp_path / "run")})


def test_without_the_extra_one_sentence_says_what_to_install(
    broken: config.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name in ("pyfuse3", "lru") else known(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(FuseUnavailable) as caught, control_client.open_daemon(broken):
        pass
    assert caught.value.message == "run and mount need pyfuse3, lru-dict, not installed here"
    assert caught.value.hint == "pip install 'lazyfs[mount]'"


@pytest.mark.parametrize(("mode", "good"), [(0o777, False), (0o1777, True), (0o775, True)])
def test_a_directory_that_anyone_can_rename_in_is_not_used(
    tmp_path: Path, broken: config.Settings, mode: int, good: bool
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    settings = replace(broken, run=shared / "run")
    if good:
        control_client.prepare_run(settings)
        assert stat.S_IMODE(settings.run.stat().st_mode) == 0o700
    else:
        with pytest.raises(DaemonUnreachable, match="in other users' hands"):
            control_client.prepare_run(settings)


def test_a_daemon_that_ends_at_once_points_to_its_log(broken: config.Settings) -> None:
    with pytest.raises(DaemonUnreachable) as caught, control_client.open_daemon(broken):
        pass
    assert (caught.value.message, caught.value.hint) == (
        "lazyfsd did not start", f"see {broken.run / 'lazyfsd.log'}",
    )  # fmt: skip


def test_a_daemon_is_not_started_with_the_logins_of_a_command(
    broken: config.Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    for name in ("LAZYFS_CREDS", "LAZYFS_SRC_CREDS", "LAZYFS_DEST_CREDS"):
        monkeypatch.setenv(name, "alice:word")
    monkeypatch.setenv("LAZYFS_DRIVER", "fuse")
    with pytest.raises(DaemonUnreachable), control_client.open_daemon(broken):
        pass
    seen = (tmp_path / "seen").read_text()
    assert "LAZYFS_DRIVER=fuse" in seen and "alice" not in seen


def test_a_mount_is_released_by_the_next_daemon_where_one_dies_over_it(broken: config.Settings) -> None:
    dies = iter([True, False])

    def answer(args: dict[str, Any]) -> dict[str, Any]:
        if next(dies):
            raise ConnectionResetError
        return {}

    with ControlDaemon(broken.socket) as daemon:
        daemon.answers["release"] = answer
        release(broken, None, "m1")
        assert daemon.named("release") == [{"mount": "m1"}] * 2
    release(broken, None, "m1")  # no daemon: nothing to release
