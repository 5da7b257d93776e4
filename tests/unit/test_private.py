"""What lies in our directories is ours: no link is followed there, whoever put it, and nothing behind it changes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from indexer.work import WorkDirectory
from lazyfs import config, control_client, private
from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.census import Census
from lazyfs.chunks.clear import Clearing, Goal
from lazyfs.chunks.store import Store
from lazyfs.config import Settings
from lazyfs.container import attached, directory, sweep
from lazyfs.container.attached import Attached
from lazyfs.errors import DaemonUnreachable, StoreBroken, UsageError
from lazyfs.mount import planting
from snapshotter.sockets import make_room

SOMEBODY = 54321  # a user id


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(tmp_path / "root", tmp_path / "run")
    made.root.mkdir(mode=0o700)
    control_client.prepare_run(made)
    return made


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A directory with files that look as ours would: a writable layer of an earlier boot, a dead container."""
    place = tmp_path / "precious"
    for name in ("one", "two"):
        (place / name).mkdir(parents=True)
        (place / name / "boot").write_text("earlier")
        (place / name / "lock").touch()
    for number in range(10):
        (place / f"file{number}").touch()
    return place


def content(place: Path) -> set[str]:
    return {os.fspath(path.relative_to(place)) for path in place.rglob("*")}


def _attach(settings: Settings) -> None:
    attached.remember(settings, Attached("/mnt", "ro", "1", "", attached.boot_id(), "0:1"))


def _make_room(settings: Settings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planting, "MAX_TREES", 1)
        planting._make_room(settings.root / "trees")


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("root/containers", lambda settings: directory.create(settings, "")),
        ("root/containers", lambda settings: list(directory.leftovers(settings))),
        ("root/rw", attached.new_state),
        ("root/rw", attached.stale_states),
        ("root/trees", _make_room),
        ("run/attached", _attach),
    ],
)
def test_a_link_in_the_place_of_a_directory_is_refused(
    tmp_path: Path, settings: Settings, precious: Path, name: str, use: Callable[[Settings], object]
) -> None:
    before = content(precious)
    (tmp_path / name).symlink_to(precious)
    with pytest.raises(StoreBroken, match="is a symbolic link"):
        use(settings)
    assert content(precious) == before


def test_sweeping_and_clearing_remove_nothing_behind_a_link(settings: Settings, precious: Path) -> None:
    before = content(precious)
    for name in ("containers", "rw", "trees"):
        (settings.root / name).symlink_to(precious)
    assert sweep.sweep(settings) == 0

    class Nobody:
        def layers(self) -> frozenset[str]:
            return frozenset()

        def trees(self) -> frozenset[str]:
            return frozenset()

        def mounts(self) -> dict[str, list[str]]:
            return {}

    catalog = Catalog(settings.root / "catalog.db")
    store = Store(settings.root, 1 << 30, catalog)
    Clearing(Census(store, catalog, Nobody())).prune(Goal(everything=True))
    store.close()
    catalog.close()
    assert content(precious) == before


@pytest.mark.parametrize("name", ["runs", "layers"])
def test_the_converters_work_directory_leads_nowhere_else(tmp_path: Path, precious: Path, name: str) -> None:
    before = content(precious)
    work = tmp_path / "work"
    work.mkdir(mode=0o700)
    (work / name).symlink_to(precious)
    with pytest.raises(StoreBroken, match="is a symbolic link"), WorkDirectory(work):
        pass
    assert content(precious) == before


@pytest.mark.parametrize("name", ["mnt", "erofs", "attached", "lazyfsd.sock", "lazyfsd.log.1"])
def test_a_run_directory_with_a_link_in_it_is_not_used(settings: Settings, precious: Path, name: str) -> None:
    (settings.run / name).symlink_to(precious)
    with pytest.raises(DaemonUnreachable, match=f"{name} is a symbolic link"):
        control_client.prepare_run(settings)


def test_a_link_in_the_place_of_a_file_is_not_written_through(settings: Settings, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (settings.run / "attached").mkdir(mode=0o700)
    _attach(settings)
    (written,) = (settings.run / "attached").iterdir()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    written.with_suffix(".new").symlink_to(target)
    with pytest.raises(StoreBroken):
        _attach(settings)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(OSError):
        private.write_text(link, "x")
    assert not target.exists()


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_directory_that_others_may_write_to_is_not_used(settings: Settings, mode: int) -> None:
    place = settings.root / "containers"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(StoreBroken, match="written by others"):
        directory.create(settings, "")
    settings.root.chmod(mode)
    with pytest.raises(StoreBroken, match="written by others"):
        Catalog(settings.root / "catalog.db")
    assert not (settings.root / "catalog.db").exists()


def test_another_users_directory_is_not_used(settings: Settings) -> None:
    place = settings.root / "containers"
    place.mkdir(mode=0o700)
    os.chown(place, SOMEBODY, SOMEBODY)
    with pytest.raises(StoreBroken, match="belongs to another user"):
        directory.create(settings, "")


@pytest.mark.parametrize("below", ["", "lazyfs"])
def test_another_users_link_does_not_lead_the_run_directory_away(tmp_path: Path, precious: Path, below: str) -> None:
    # As /tmp/lazyfs-UID, made before its owner came: the kernel would not follow it, realpath does.
    link = tmp_path / "planted"
    link.symlink_to(precious)
    asked = {"root": tmp_path / "root", "run": link / below}
    assert config.load(asked).run == precious / below  # a link of one's own, or root's, is a choice
    os.lchown(link, SOMEBODY, SOMEBODY)
    with pytest.raises(UsageError, match="another user's symbolic link") as caught:
        config.load(asked)
    assert caught.value.hint == "set LAZYFS_RUN"


def test_the_snapshotters_socket_lies_where_nobody_else_can_put_another_one(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "ours").mkdir(parents=True, mode=0o700)
    shared.chmod(0o777)
    with pytest.raises(UsageError, match="in other users' hands"):
        make_room(shared / "ours" / "snapshotter.sock")
    shared.chmod(0o700)
    make_room(shared / "ours" / "snapshotter.sock").close()
    link = tmp_path / "link"
    link.symlink_to(shared / "ours")
    os.lchown(link, SOMEBODY, SOMEBODY)
    with pytest.raises(UsageError, match="in other users' hands"):
        make_room(link / "snapshotter.sock")
