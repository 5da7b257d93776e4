"""Stores for one start: empty, gone behind it; what a killed command left goes, what a living one has stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from lazyfs.cli.cold_store import cold_store
from lazyfs.cli.output import Output
from lazyfs.config import Settings
from lazyfs.errors import UsageError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / "tmp"
    base.mkdir()
    monkeypatch.setenv("TMPDIR", str(base))
    return base


SETTINGS = Settings(Path("/none/store"), Path("/none/run"))


def left(base: Path, name: str) -> Path:
    """Make what a killed command leaves."""
    place = base / name
    (place / "store/blobs").mkdir(0o700, parents=True)
    place.chmod(0o700)
    (place / "store/blobs/chunks").write_bytes(b"bytes")
    return place


def test_it_is_empty_and_gone_afterwards(base: Path) -> None:
    with pytest.raises(ZeroDivisionError), cold_store(SETTINGS, Output()) as cold:
        assert cold.root.parent == cold.run.parent and cold.root.parent.parent == base
        assert os.listdir(cold.root.parent) == [] and cold.root.parent.stat().st_mode & 0o777 == 0o700
        cold.root.mkdir()
        (cold.root / "file").write_bytes(b"x")
        raise ZeroDivisionError
    assert os.listdir(base) == []


def test_what_nobody_holds_is_swept_and_nothing_else(base: Path, tmp_path: Path) -> None:
    dead = left(base, "lazyfs-cold-dead")
    living = left(base, "lazyfs-cold-living")
    others = left(base, "lazyfs-other"), left(tmp_path, "elsewhere")
    (base / "lazyfs-cold-link").symlink_to(others[1])
    (base / "lazyfs-cold-file").write_bytes(b"")
    anyone = left(base, "lazyfs-cold-anyone")
    anyone.chmod(0o777)
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with cold_store(SETTINGS, Output()) as cold:
        assert not dead.exists()
        with cold_store(SETTINGS, Output()) as another:  # beside it
            assert cold.root.parent.exists() and another.root.parent != cold.root.parent
        assert all((place / "store/blobs/chunks").exists() for place in (living, anyone, *others))
    os.close(lock)
    with cold_store(SETTINGS, Output()):
        assert not living.exists()


def test_a_new_one_that_somebody_sweeps_is_made_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(["lazyfs-cold-taken", "lazyfs-cold-gone", "lazyfs-cold-ours"])
    held = []

    def make(prefix: str, dir: Path) -> str:
        place = left(dir, next(made))
        if place.name == "lazyfs-cold-taken":
            held.append(os.open(place, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        if place.name == "lazyfs-cold-gone":
            place.rename(dir / "away")
        return str(place)

    monkeypatch.setattr("tempfile.mkdtemp", make)
    with cold_store(SETTINGS, Output()) as cold:
        assert cold.root.parent.name == "lazyfs-cold-ours"
    os.close(held[0])


def test_no_place_for_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/none/at/all")
    with pytest.raises(UsageError, match="no directory for a cold store"), cold_store(SETTINGS, Output()):
        pass
