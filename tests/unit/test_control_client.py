"""Starting a daemon from the client's side, where it can't start."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lazyfs import config, control_client
from lazyfs.errors import DaemonUnreachable, FuseUnavailable


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


def test_a_daemon_that_ends_at_once_points_to_its_log(broken: config.Settings) -> None:
    with pytest.raises(DaemonUnreachable) as caught, control_client.open_daemon(broken):
        pass
    assert (caught.value.message, caught.value.hint) == (
        "lazyfsd did not start", f"see {broken.run / 'lazyfsd.log'}",
    )  # fmt: skip
