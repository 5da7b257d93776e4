"""Which mounts a snapshot gets, and the directories that they name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazyfs.errors import DaemonFault, SnapshotInvalid, StoreBroken, StoreFull, UsageError
from snapshotter.directories import Directories, Owner
from snapshotter.disk_usage import disk_usage
from snapshotter.model import GID_LABEL, UID_LABEL, Kind, LazyImage, LazyLayer, LazyPlace, Mount, Snapshot
from snapshotter.overlay import Overlay, kernel_options, mapped_root
from tests.helpers.daemon import tmpfs

LAYER = LazyLayer("sha256:" + "1" * 64, 1, "m", {}, "sha256:" + "2" * 64, "sha256:" + "3" * 64)
MAPPED = {UID_LABEL: "0:666:65536", GID_LABEL: "0:777:65536"}


def snapshot(kind: Kind, labels: dict[str, str] | None = None, *, staged: bool = False) -> Snapshot:
    place = LazyPlace(LazyImage(1, "r", "d", (LAYER,)), 0) if staged else None
    return Snapshot("k", "", kind, labels or {}, 1, 1, 9, place)


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    return Overlay(Directories(tmp_path), ("index=off",))


def fs(overlay: Overlay, number: int) -> str:
    return f"{overlay.directories.top}/{number}/fs"


def test_without_parents_it_is_a_bind(overlay: Overlay) -> None:
    mine = fs(overlay, 9)
    assert overlay.mounts(snapshot(Kind.ACTIVE), []) == [Mount("bind", mine, ("rw", "rbind"))]
    assert overlay.mounts(snapshot(Kind.VIEW), []) == [Mount("bind", mine, ("ro", "rbind"))]


def test_a_view_of_one_directory_is_a_bind_of_it(overlay: Overlay) -> None:
    assert overlay.mounts(snapshot(Kind.VIEW), [4]) == [Mount("bind", fs(overlay, 4), ("ro", "rbind"))]
    assert overlay.mounts(snapshot(Kind.VIEW), [], ["/run/t"]) == [Mount("bind", "/run/t", ("ro", "rbind"))]


def test_else_it_is_an_overlay_with_the_lazy_tree_lowest(overlay: Overlay) -> None:
    lower = f"lowerdir={fs(overlay, 5)}:{fs(overlay, 4)}:/run/lazyfs/mnt/t"
    work, upper = f"workdir={overlay.directories.work(9)}", f"upperdir={fs(overlay, 9)}"
    found = overlay.mounts(snapshot(Kind.ACTIVE), [5, 4], ["/run/lazyfs/mnt/t"])
    assert found == [Mount("overlay", "overlay", (work, upper, lower, "index=off"))]
    found = overlay.mounts(snapshot(Kind.VIEW), [5, 4], ["/run/lazyfs/mnt/t"])
    assert found == [Mount("overlay", "overlay", (lower, "index=off"))]


def test_a_staged_layer_is_read_only_so_that_the_client_leaves_it_alone(overlay: Overlay) -> None:
    found = overlay.mounts(snapshot(Kind.ACTIVE, staged=True), [])
    assert found == [Mount("bind", fs(overlay, 9), ("ro", "rbind"))]


def test_a_user_namespaces_ids_are_told(overlay: Overlay) -> None:
    for parents in ([], [4]):
        options = overlay.mounts(snapshot(Kind.ACTIVE, MAPPED), parents)[0].options
        assert options[:2] == ("uidmap=0:666:65536", "gidmap=0:777:65536")
    assert mapped_root(MAPPED) == (666, 777)
    assert mapped_root({UID_LABEL: "5:5:1,0:9:1", GID_LABEL: "0:3:1"}) == (9, 3)
    assert mapped_root({}) is None


@pytest.mark.parametrize("value", ["", "0:1", "x:1:1", "1:0:5", "0:1:0", "0:99999999999:1", "0:4294967295:1", "0:-1:1"])
def test_ids_that_make_no_sense(value: str) -> None:
    with pytest.raises(SnapshotInvalid):
        mapped_root({UID_LABEL: value, GID_LABEL: "0:1:1"})


@pytest.mark.parametrize("directory", ["relative", "/a:b", "/a,upperdir=/etc", "/a\\b", "/a\nb"])
def test_what_the_daemon_says_gets_no_further_option_in(overlay: Overlay, directory: str) -> None:
    with pytest.raises(DaemonFault):
        overlay.mounts(snapshot(Kind.ACTIVE), [], [directory])


def test_128_directories_of_seven_digits_fit_one_page() -> None:
    directories = object.__new__(Directories)
    directories.top = Path("/var/lib/lazyfs/s")
    found = Overlay(directories, ("userxattr", "index=off")).mounts(
        snapshot(Kind.ACTIVE, MAPPED), range(9_999_999, 9_999_872, -1)
    )
    assert len(",".join(found[0].options)) <= 4095


def test_options_of_this_kernel(tmp_path: Path) -> None:
    assert set(kernel_options(tmp_path)) <= {"index=off", "userxattr"}
    assert list(tmp_path.iterdir()) == []


# -- directories -----------------------------------------------------------------------------------------------------


def test_a_directory_has_its_owner_and_mode_before_it_shows(tmp_path: Path) -> None:
    directories = Directories(tmp_path)
    before = os.umask(0o077)
    try:
        made = directories.make(Owner(0o1777, 5, 6), work=True)
    finally:
        os.umask(before)
    directories.settle(made, 3)
    assert directories.owner(3) == Owner(0o1777, 5, 6)
    assert sorted(path.name for path in (directories.top / "3").iterdir()) == ["fs", "work"]
    assert directories.names() == ["3"]


def test_what_no_record_names_is_a_stray_but_not_what_is_being_made(tmp_path: Path) -> None:
    dead, directories = Directories(tmp_path), Directories(tmp_path)
    dead.make(Owner(), work=True)
    made = [directories.make(Owner(), work=False) for _ in range(3)]
    directories.settle(made[0], 1)
    directories.settle(made[1], 2)
    names = directories.names()
    strays = directories.strays(names, {1})
    assert "2" in strays and "1" not in strays and made[2] not in strays and len(strays) == 2


def test_a_directory_whose_record_was_lost_makes_room(tmp_path: Path) -> None:
    """After a transaction that failed its number is given out again."""
    directories = Directories(tmp_path)
    for _ in range(2):
        directories.settle(directories.make(Owner(), work=True), 1)
    names = directories.names()
    assert len(names) == 2 and len(directories.strays(names, {1})) == 1


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b"])
def test_a_root_that_overlayfs_can_not_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Directories(tmp_path / name)


def test_a_root_that_others_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    with pytest.raises(StoreBroken):
        Directories(tmp_path)


def test_a_full_disk_leaves_nothing_behind(scratch: Path) -> None:
    with tmpfs(scratch / "disk", 64 << 10) as disk:
        directories = Directories(disk)
        (disk / "filler").write_bytes(b"")
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(b"x" * 4096)
        for _ in range(100):
            try:
                directories.make(Owner(), work=True)
            except StoreFull as error:
                assert "free some space" in str(error)
                break
        assert all((directories.top / name / "work").is_dir() for name in directories.names())


# -- usage -----------------------------------------------------------------------------------------------------------


def test_usage_counts_hard_links_once_and_follows_no_link(tmp_path: Path) -> None:
    top = tmp_path / "fs"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "file").write_bytes(b"x" * 10000)
    os.link(top / "a" / "file", top / "a" / "b" / "same")
    os.symlink("/", top / "everything")
    usage = disk_usage(str(top))
    size = sum(path.lstat().st_blocks * 512 for path in (top, top / "a", top / "a" / "b", top / "a" / "file"))
    assert usage.inodes == 5 and usage.size - size in (0, (top / "everything").lstat().st_blocks * 512)


def test_usage_of_a_tree_deeper_than_any_path(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d" * 20, dir_fd=here)
        there = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(here)
    assert 400 < disk_usage(str(tmp_path)).inodes <= 601


def test_usage_of_what_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StoreBroken):
        disk_usage(str(tmp_path / "none"))
