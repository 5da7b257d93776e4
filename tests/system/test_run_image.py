"""run, mount and umount of a converted image with the real daemon and a real runc, as root."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Area, Case, shows
from tests.helpers.command import DEADLINE, Command, converted_image
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return converted_image(tmp_path_factory.mktemp("images"), {"Cmd": ["cat", "/etc/plain"], "User": "web"})


class Lazyfs(Command):
    """The command line, and the daemon that it started."""

    def daemon(self) -> int:
        """Return the pid of the running daemon."""
        code, out, _ = self.run("status", "--json")
        pid = int(json.loads(out)["daemon"]["pid"])
        assert code == 0 and pid > 1  # 0 would mean our own process group to kill()
        return pid


@pytest.fixture
def lazyfs(tmp_path: Path) -> Iterator[Lazyfs]:
    command = Lazyfs(tmp_path)
    yield command
    command.until_nothing_is_left()


def test_run(lazyfs: Lazyfs, image: str) -> None:
    assert lazyfs.run("run", image)[:2] == (0, "no program\n")
    assert lazyfs.run("run", "--rm", image, "sh", "-c", "id -u; id-as-root -u; exit 3")[:2] == (3, "33\n0\n")


def test_a_layout_is_found_from_where_the_command_was_typed(
    lazyfs: Lazyfs, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, tag = image.removeprefix("oci:").rsplit(":", 1)
    monkeypatch.chdir(Path(layout).parent)
    relative = f"oci:{Path(layout).name}:{tag}"
    assert lazyfs.run("run", relative)[:2] == (0, "no program\n")
    target = tmp_path / "dir"
    target.mkdir()
    assert lazyfs.run("mount", relative, target)[0] == 0
    assert (target / "etc/plain").read_text() == "no program\n"
    assert lazyfs.run("umount", target)[0] == 0


def test_a_whole_image_runs_by_tag_with_no_network_at_all(lazyfs: Lazyfs, image: str) -> None:
    """Not even a loopback is there, and nobody said --offline; the daemon starts in there too."""
    with FakeRegistry() as registry:
        reference = f"{registry.host}/team/small:1"
        assert lazyfs.run("convert", image, reference)[0] == 0
        assert lazyfs.run("fetch", reference)[0] == 0
    lazyfs.until_idle()
    lazyfs.prefix = ("unshare", "--net")
    code, out, err = lazyfs.run("run", "--network", "none", reference)
    assert (code, out) == (0, "no program\n") and "the registry does not answer" in err


def test_status_names_a_running_container(lazyfs: Lazyfs, image: str) -> None:
    process = lazyfs.start("run", "-i", "--name", "web", image, "sh", "-c", "echo ready; cat")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate(timeout=DEADLINE)
    (mount,) = json.loads(lazyfs.run("status", "--json")[1])["mounts"]
    assert (mount["kind"], Path(mount["dir"]).name) == ("container", "web")
    assert (mount["driver"], mount["reason"]) == ("erofs", "its self-test passed")  # by default
    assert "in container web," in lazyfs.run("status")[1]
    process.communicate("", timeout=DEADLINE)
    assert process.returncode == 0


def test_missing_image_is_told(lazyfs: Lazyfs, image: str) -> None:
    code, _, err = lazyfs.run("run", image + "er", "true")
    assert (code, "Traceback" in err, err.startswith("lazyfs: ")) == (125, False, True)


@shows(
    Case(
        "processes-run-killed",
        Area.PROCESSES,
        "`lazyfs run` is killed (-9) while its container runs",
        "the container ends with it",
        "nothing is left: no container, mount or lease, and nobody has to run anything for that",
    )
)
def test_killed_command_ends_the_container_and_the_lease(lazyfs: Lazyfs, image: str) -> None:
    process = lazyfs.start("run", "-i", image, "sh", "-c", "echo ready; cat")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate(timeout=DEADLINE)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    containers = lazyfs.place / "store/containers"
    until(lambda: not [path for path in containers.glob("*") if path.name != ".lock"], "it is gone", DEADLINE)
    lazyfs.until_idle()  # nobody had to run anything for that


def test_mounts_and_containers_share_a_daemon(lazyfs: Lazyfs, image: str, tmp_path: Path) -> None:
    plain, writable = tmp_path / "plain", tmp_path / "writable"
    plain.mkdir()
    writable.mkdir()
    assert lazyfs.run("mount", image, plain)[0] == 0
    pid = lazyfs.daemon()
    assert lazyfs.run("mount", "--rw", image, writable)[0] == 0
    assert lazyfs.run("run", image)[:2] == (0, "no program\n")
    (writable / "etc/plain").write_text("changed\n")
    assert (plain / "etc/plain").read_text() == "no program\n"
    assert lazyfs.daemon() == pid
    assert lazyfs.run("umount", writable)[0] == 0
    assert lazyfs.run("umount", plain)[0] == 0
    assert list(writable.iterdir()) == []


@shows(
    Case(
        "processes-umount-daemon-killed",
        Area.PROCESSES,
        "lazyfsd without a holder is killed (-9) under a writable mount, which is then unmounted",
        "none is left: the mount is taken away",
        "`umount`: exit 0, and what was written over the image goes with it",
    )
)
def test_umount_after_the_daemon_was_killed(lazyfs: Lazyfs, image: str, tmp_path: Path) -> None:
    writable = tmp_path / "writable"
    writable.mkdir()
    assert lazyfs.run("mount", "--rw", image, writable)[0] == 0
    os.kill(lazyfs.daemon(), signal.SIGKILL)
    code, _, err = lazyfs.run("umount", writable)
    assert (code, err) == (0, "")
    assert list(tmp_path.glob("store/rw/*")) == []
    # The dead daemon's session stays mounted until the next daemon takes its place, and ends with that one.
    assert lazyfs.run("run", image)[0] == 0
