"""The small parts of running a container: the mount table, container directories, records, runtime messages."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lazyfs.config import Settings
from lazyfs.container import attached, directory, mounts, runtime, sweep
from lazyfs.errors import StoreBroken, ToolMissing, UsageError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "store", tmp_path / "run")


def test_mount_table_lines() -> None:
    raw = (
        b"22 27 0:21 / /proc rw,relatime - proc proc rw\n"
        b"broken line\n"
        b"36 27 0:40 /sub /a\\040b\\134c rw,nosuid shared:1 master:2 - overlay over\\011lay rw,lowerdir=/x\n"
    )
    first, second = mounts.parse_mountinfo(raw)
    assert (first.dir, first.kind, first.device) == (b"/proc", "proc", "0:21")
    assert (second.dir, second.root, second.source) == (b"/a b\\c", b"/sub", b"over\tlay")
    assert second.options == "rw,lowerdir=/x"


def test_this_machines_mounts() -> None:
    assert mounts.top_at(b"/proc") is not None
    assert mounts.top_at(b"/proc/no/such") is None
    assert [entry.dir for entry in mounts.below(b"/proc")][-1] == b"/proc"


def test_overlay_options_escape_separators() -> None:
    found = mounts.overlay_options(b"/a:b,c\\d", b"/u:p,p", b"/w", extra=b"volatile")
    assert found == b"lowerdir=/a\\:b\\,c\\\\d,upperdir=/u:p\\,p,workdir=/w,volatile"


def test_living_containers_are_no_leftovers(settings: Settings) -> None:
    living = directory.create(settings, "")
    dead = directory.create(settings, "dead")
    os.close(dead.lock)
    (dead.path / "upper" / "file").touch()
    assert sweep.sweep(settings) == 1
    assert not dead.path.exists()
    assert living.path.is_dir()
    directory.remove(living)
    assert sweep.sweep(settings) == 0


def test_sweep_of_a_fresh_store(settings: Settings) -> None:
    assert sweep.sweep(settings) == 0
    assert not settings.root.exists()


def test_directory_without_a_lock_file_is_a_leftover(settings: Settings) -> None:
    (directory.home(settings) / "old").mkdir(parents=True)
    assert sweep.sweep(settings) == 1


def test_name_in_use(settings: Settings) -> None:
    first = directory.create(settings, "web")
    with pytest.raises(UsageError, match="'web' is there already"):
        directory.create(settings, "web")
    directory.remove(first)
    directory.remove(directory.create(settings, "web"))


def test_store_that_is_no_directory(settings: Settings) -> None:
    settings.root.write_text("")
    with pytest.raises(StoreBroken):
        directory.create(settings, "")


def test_removing_follows_no_links(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    made = directory.create(settings, "")
    (made.path / "upper/link").symlink_to(tmp_path / "precious")
    directory.remove(made)
    assert (tmp_path / "precious/file").exists()


def test_records_of_mounts(settings: Settings) -> None:
    record = attached.Attached("/mnt/a b", "rw", "7", "/state", attached.boot_id(), "0:9")
    attached.remember(settings, record)
    assert attached.recall(settings, "/mnt/a b") == record
    assert attached.recall(settings, "/mnt") is None
    attached.forget(settings, "/mnt/a b")
    attached.forget(settings, "/mnt/a b")
    assert attached.recall(settings, "/mnt/a b") is None


@pytest.mark.parametrize("change", [{"boot": "another"}, {"kind": "other"}, {"dir": "/etc"}])
def test_records_that_do_not_count(settings: Settings, change: dict[str, str]) -> None:
    attached.remember(settings, attached.Attached("/mnt", "ro", "7", "", attached.boot_id(), "0:9"))
    (path,) = (settings.run / "attached").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert attached.recall(settings, "/mnt") is None
    for damaged in ("", "[]", "{}", "\x00"):
        path.write_text(damaged)
        assert attached.recall(settings, "/mnt") is None


def test_writable_layers_of_earlier_boots_are_swept(settings: Settings) -> None:
    current, old = attached.new_state(settings), attached.new_state(settings)
    (old / "boot").write_text("an earlier one")
    sweep.sweep(settings)
    assert current.is_dir() and not old.exists()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ('runc run failed: unable to start container process: exec: "x": executable file not found in $PATH', 127),
        ('unable to start container process: exec: "/x": stat /x: no such file or directory', 127),
        ('unable to start container process: exec: "/etc": is a directory', 126),
        ('unable to start container process: exec: "/etc/passwd": permission denied', 126),
        ("executable file `x` not found in $PATH: No such file or directory", 127),
        ("open executable: Permission denied", 126),
        ("error mounting /x to rootfs: no such file or directory", 125),
        ("cgroup: permission denied", 125),
    ],
)
def test_runtime_messages(tmp_path: Path, message: str, status: int) -> None:
    log = tmp_path / "log.json"
    lines = [{"level": "warning", "msg": 'exec: "y": permission denied'}, {"level": "error", "msg": message}]
    log.write_text("no json\n" + "\n".join(map(json.dumps, lines)))
    failure = runtime.failure(str(log), "x")
    assert (failure.status, message in str(failure)) == (status, True)


def test_runtime_without_a_log(tmp_path: Path) -> None:
    assert runtime.failure(str(tmp_path / "none"), "x").status == 125


def test_finding_a_runtime() -> None:
    expected = shutil.which("true")
    assert runtime.find("true") == expected
    assert runtime.find(str(expected)) == expected
    for missing in ("no-such-runtime", "/no/such", "/etc"):
        with pytest.raises(ToolMissing, match="is not installed"):
            runtime.find(missing)
