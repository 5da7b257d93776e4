"""`lazyfs mount` and `lazyfs umount` as root. The daemon is a stand-in; binds and overlays are the kernel's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.container import mounts


class Lazyfs:
    """Runs the command line on a store of its own; `image` is a small tree, `dir` where it is to show."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.image = place / "image"
        self.dir = place / "dir"
        self.log = place / "calls"
        self.image.mkdir()
        self.dir.mkdir()
        (self.image / "file").write_text("content\n")
        (self.image / "file").chmod(0o4755)

    def run(self, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.helpers.stand_in", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                **os.environ,
                "LAZYFS_ROOT": str(self.place / "store"),
                "LAZYFS_RUN": str(self.place / "run"),
                "STAND_IN_LOG": str(self.log),
                **environment,
            },
        )

    def mount(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("mount", *options, self.image, self.dir, **environment)

    def calls(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def clean(self) -> bool:
        """Whether no mount, no record and no writable layer is left."""
        left = [*self.place.glob("run/attached/*"), *self.place.glob("store/rw/*")]
        return not mounts.below(os.fsencode(self.place)) and not left


@pytest.fixture
def lazyfs(tmp_path: Path) -> Iterator[Lazyfs]:
    command = Lazyfs(tmp_path)
    yield command
    left = mounts.below(os.fsencode(tmp_path))
    for entry in left:
        mounts.umount(entry.dir, lazy=True)
    assert left == []


def test_read_only_mount_and_umount(lazyfs: Lazyfs) -> None:
    done = lazyfs.mount()
    assert (done.returncode, "1 of 1 layers lazy" in done.stdout) == (0, True), done.stderr
    assert "fetched in full" in done.stderr
    assert (lazyfs.dir / "file").read_text() == "content\n"
    flags = os.statvfs(lazyfs.dir).f_flag
    assert flags & os.ST_RDONLY and not flags & (os.ST_NOSUID | os.ST_NODEV)
    assert lazyfs.run("umount", lazyfs.dir).returncode == 0
    assert lazyfs.clean()
    assert [call["call"] for call in lazyfs.calls()] == ["mount_image", "attach", "release"]
    attach = lazyfs.calls()[1]
    assert (attach["mount"], attach["dir"], attach["kind"], attach["state_dir"]) == ("7", str(lazyfs.dir), "ro", "")


def test_writable_mount_drops_its_writes(lazyfs: Lazyfs) -> None:
    assert lazyfs.mount("--rw").returncode == 0
    (lazyfs.dir / "file").write_text("changed\n")
    (lazyfs.dir / "fresh").touch()
    assert (lazyfs.image / "file").read_text() == "content\n"
    assert lazyfs.run("umount", lazyfs.dir).returncode == 0
    assert lazyfs.clean()
    assert list(lazyfs.dir.iterdir()) == []


def test_json(lazyfs: Lazyfs) -> None:
    told = json.loads(lazyfs.mount("--json").stdout)
    assert (told["dir"], told["kind"], told["mount"], told["driver"]) == (str(lazyfs.dir), "ro", "7", "fuse")
    assert json.loads(lazyfs.run("umount", "--json", lazyfs.dir).stdout)["dir"] == str(lazyfs.dir)


@pytest.mark.parametrize("refused", ["mount_image", "attach"])
@pytest.mark.parametrize("options", [(), ("--rw",)])
def test_failure_leaves_nothing(lazyfs: Lazyfs, refused: str, options: tuple[str, ...]) -> None:
    done = lazyfs.mount(*options, STAND_IN_FAILS=refused)
    assert (done.returncode, f"refuses {refused}" in done.stderr) == (3, True)
    assert lazyfs.clean()
    if refused == "attach":
        assert lazyfs.calls()[-1] == {"call": "release", "mount": "7"}


def test_mount_points_that_cannot_be(lazyfs: Lazyfs) -> None:
    plain = lazyfs.place / "plain"
    plain.touch()
    for path, reason in ((plain, "is not a directory"), (lazyfs.place / "missing", "does not exist")):
        done = lazyfs.run("mount", lazyfs.image, path)
        assert (done.returncode, reason in done.stderr) == (8, True), done.stderr
    assert not lazyfs.log.exists()  # the daemon was not even asked


def test_second_mount_on_the_same_directory(lazyfs: Lazyfs) -> None:
    link = lazyfs.place / "link"
    link.symlink_to(lazyfs.dir)
    assert lazyfs.mount().returncode == 0
    again = lazyfs.run("mount", lazyfs.image, link)
    assert (again.returncode, "mounted on it already" in again.stderr) == (8, True)
    assert lazyfs.run("umount", link).returncode == 0
    assert lazyfs.clean()


def test_busy_mount_and_lazy_umount(lazyfs: Lazyfs) -> None:
    assert lazyfs.mount().returncode == 0
    with (lazyfs.dir / "file").open() as handle:
        busy = lazyfs.run("umount", lazyfs.dir)
        assert (busy.returncode, "is in use" in busy.stderr, "--lazy" in busy.stderr) == (8, True, True)
        assert lazyfs.run("umount", "--lazy", lazyfs.dir).returncode == 0
        assert handle.read() == "content\n"
    assert lazyfs.clean()


def test_umount_with_a_dead_daemon(lazyfs: Lazyfs) -> None:
    assert lazyfs.mount("--rw").returncode == 0
    assert lazyfs.run("umount", lazyfs.dir, STAND_IN_DEAD="1").returncode == 0
    assert lazyfs.clean()


def test_umount_of_what_is_not_ours(lazyfs: Lazyfs) -> None:
    mounts.bind(os.fsencode(lazyfs.image), os.fsencode(lazyfs.dir))
    try:
        done = lazyfs.run("umount", lazyfs.dir)
        assert (done.returncode, "is no mount of lazyfs" in done.stderr) == (8, True)
        assert (lazyfs.dir / "file").exists()
    finally:
        mounts.umount(os.fsencode(lazyfs.dir))


def test_umount_spares_a_mount_over_ours(lazyfs: Lazyfs) -> None:
    assert lazyfs.mount("--rw").returncode == 0
    mounts.mount(b"none", os.fsencode(lazyfs.dir), "tmpfs")
    done = lazyfs.run("umount", lazyfs.dir)
    assert (done.returncode, "something else mounted over" in done.stderr) == (8, True)
    mounts.umount(os.fsencode(lazyfs.dir))
    assert lazyfs.run("umount", lazyfs.dir).returncode == 0
    assert lazyfs.clean()


def test_umount_after_somebody_else_unmounted(lazyfs: Lazyfs) -> None:
    assert lazyfs.mount("--rw").returncode == 0
    mounts.umount(os.fsencode(lazyfs.dir))
    assert lazyfs.run("umount", lazyfs.dir).returncode == 0
    assert lazyfs.clean()
