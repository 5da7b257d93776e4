"""`lazyfs run` with a real runc, as root. The daemon is a stand-in; the image is a tree of this machine's programs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import small_image

_DEADLINE = 60.0  # seconds that a container may take on a busy machine
_ORDINARY = 1000


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with a few programs."""
    root = tmp_path_factory.mktemp("image") / "rootfs"
    small_image.make_tree(root)
    return root


class Lazyfs:
    """Runs the command line on a store of its own."""

    def __init__(self, place: Path, image: Path, wrapper: tuple[str, ...] = (), python: str = sys.executable) -> None:
        self.root = place / "store"
        self.run_dir = place / "run"
        self.image = str(image)
        self.wrapper = wrapper
        self.python = python
        self.config: dict[str, object] = {}

    def argv(self, *words: str) -> list[str]:
        return [*self.wrapper, self.python, "-m", "tests.helpers.stand_in", *words]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "LAZYFS_ROOT": str(self.root),
            "LAZYFS_RUN": str(self.run_dir),
            "STAND_IN_CONFIG": json.dumps(self.config),
        }

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv("run", *words),
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment(),
            timeout=_DEADLINE,
            check=False,
        )

    def sh(self, script: str, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.run(*options, self.image, "sh", "-c", script, stdin=stdin)

    def start(self, script: str, *options: str) -> subprocess.Popen[str]:
        """Start a container and wait until it has said "ready"."""
        process = subprocess.Popen(
            self.argv("run", *options, self.image, "sh", "-c", script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line == "ready\n", process.stderr.read()
        return process

    def left(self) -> list[str]:
        """What of containers is still there: directories, runtime state, mounts in our namespace."""
        places = (self.root / "containers", self.run_dir / "runtime")
        found = [str(path) for place in places if place.exists() for path in place.iterdir() if path.name != ".lock"]
        return found + [
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.root) in line
        ]


@pytest.fixture
def lazyfs(tmp_path: Path, image: Path) -> Iterator[Lazyfs]:
    command = Lazyfs(tmp_path, image)
    yield command
    assert command.left() == []


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=_DEADLINE)
    return process.returncode, out, err


def test_a_store_behind_a_symlink(tmp_path: Path, image: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to("disk")
    done = Lazyfs(tmp_path, image).sh("cat /etc/plain")
    assert (done.returncode, done.stdout) == (0, "no program\n"), done.stderr
    assert [path.name for path in tmp_path.glob("disk/containers/*")] in ([], [".lock"])


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_an_image_can_not_lead_the_runtime_to_the_host(tmp_path: Path, name: str) -> None:
    tree, victim = tmp_path / "tree", tmp_path / "victim"
    small_image.make_tree(tree)
    victim.mkdir()
    (tree / name).rmdir() if (tree / name).is_dir() else None
    (tree / name).symlink_to(victim)
    done = Lazyfs(tmp_path, tree).sh("true")
    assert (done.returncode, list(victim.iterdir())) == (125, [])
    assert f"/{name} of the image is not a directory" in done.stderr


def test_exit_status_is_the_containers(lazyfs: Lazyfs) -> None:
    assert lazyfs.sh("exit 7").returncode == 7


def test_second_sigterm_kills_and_the_status_says_so(lazyfs: Lazyfs) -> None:
    process = lazyfs.start("trap 'echo no' TERM; echo ready; while :; do read line; done", "-i")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "no\n"
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("command", "status"), [("nosuch", 127), ("/no/such", 127), ("/etc/plain", 126), ("/etc", 126)]
)
def test_command_that_cannot_run(lazyfs: Lazyfs, command: str, status: int) -> None:
    done = lazyfs.run(lazyfs.image, command)
    assert done.returncode == status
    assert repr(command) in done.stderr
    assert "Traceback" not in done.stderr


def test_own_failures_are_125_with_a_sentence(lazyfs: Lazyfs) -> None:
    for words, expected in (
        (["/no/such/image", "sh"], "not in the registry"),
        ([lazyfs.image], "names no command"),
        (["-u", "nobody", lazyfs.image, "sh"], "user 'nobody' is not in the image"),
        (["-v", "/no/such:/x", lazyfs.image, "sh"], "does not exist"),
        (["--runtime", "no-runtime", lazyfs.image, "sh"], "no-runtime is not installed"),
        (["-it", lazyfs.image, "sh"], "no terminal"),
    ):
        done = lazyfs.run(*words)
        assert (done.returncode, expected in done.stderr) == (125, True), done.stderr
        assert "Traceback" not in done.stderr


def test_environment_user_and_working_directory_of_the_image(lazyfs: Lazyfs) -> None:
    lazyfs.config = {"User": "web", "WorkingDir": "/not/there/yet", "Env": ["PATH=/bin", "A=image", "B=image"]}
    done = lazyfs.sh('echo "$A $B $HOME $PWD $PATH"; id', "-e", "A=flag")
    assert done.stdout.splitlines()[0] == "flag image /srv /not/there/yet /bin"
    assert "uid=33" in done.stdout and "gid=34" in done.stdout
    assert re.search(r"groups=34(\(web\))?,77", done.stdout)


def test_user_option_wins_over_the_image(lazyfs: Lazyfs) -> None:
    lazyfs.config = {"User": "web"}
    assert "uid=1234 gid=5" in lazyfs.sh("id", "-u", "1234:5").stdout


def test_other_users_can_open_their_standard_output(lazyfs: Lazyfs) -> None:
    assert lazyfs.sh("echo written >/proc/self/fd/1", "-u", "web").stdout == "written\n"


def test_entrypoint_and_command(lazyfs: Lazyfs) -> None:
    lazyfs.config = {"Entrypoint": ["/bin/sh", "-c", 'echo "$0 $1"'], "Cmd": ["zero", "one"]}
    assert lazyfs.run(lazyfs.image).stdout == "zero one\n"
    assert lazyfs.run(lazyfs.image, "a", "b").stdout == "a b\n"
    assert lazyfs.run("--entrypoint", "cat", lazyfs.image, "/etc/plain").stdout == "no program\n"


def test_volumes(lazyfs: Lazyfs, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "in").write_text("from the host\n")
    script = "cat /rw/in /one; touch /rw/out; touch /ro/no || echo refused"
    volumes = ("-v", f"{shared}:/rw", "-v", f"{shared}:/ro:ro", "-v", f"{shared}/in:/one:ro")
    done = lazyfs.sh(script, *volumes)
    assert done.stdout == "from the host\nfrom the host\nrefused\n"
    assert (shared / "out").exists()
    assert not (shared / "no").exists()


def test_read_only_volume_covers_the_mounts_below_it(lazyfs: Lazyfs, tmp_path: Path) -> None:
    inner = tmp_path / "shared" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", inner], check=True)
    try:
        done = lazyfs.sh("touch /ro/inner/no 2>/dev/null || echo refused", "-v", f"{inner.parent}:/ro:ro")
        assert done.stdout == "refused\n"
    finally:
        subprocess.run(["umount", inner], check=True)


def test_writes_stay_in_the_container(lazyfs: Lazyfs) -> None:
    assert lazyfs.sh("echo new > /etc/plain; touch /fresh; cat /etc/plain").stdout == "new\n"
    assert (Path(lazyfs.image) / "etc/plain").read_text() == "no program\n"
    assert not (Path(lazyfs.image) / "fresh").exists()


def test_read_only(lazyfs: Lazyfs) -> None:
    done = lazyfs.sh("touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo works", "--read-only")
    assert done.stdout == "refused\nworks\n"


def test_host_files_are_copies(lazyfs: Lazyfs) -> None:
    before = Path("/etc/hosts").read_bytes()
    assert lazyfs.sh("echo broken > /etc/hosts && cat /etc/hosts").stdout == "broken\n"
    assert Path("/etc/hosts").read_bytes() == before


def test_network_none_has_a_loopback_only(lazyfs: Lazyfs) -> None:
    done = lazyfs.sh("cat /proc/net/dev; cat /etc/hostname", "--network", "none", "--hostname", "alone")
    assert re.findall(r"^\s*(\w+):", done.stdout, re.M) == ["lo"]
    assert done.stdout.endswith("alone\n")


def test_standard_input_only_when_asked_for(lazyfs: Lazyfs) -> None:
    assert lazyfs.sh("cat", "-i", stdin="typed").stdout == "typed"
    assert lazyfs.sh("cat", stdin="typed").stdout == ""


def test_output_is_whole_and_in_its_stream(lazyfs: Lazyfs) -> None:
    done = lazyfs.sh("head -c 3000000 /dev/zero; echo problem >&2")
    assert len(done.stdout) == 3_000_000
    assert "problem" in done.stderr and "problem" not in done.stdout


def test_reader_that_goes_away_stops_the_writer(lazyfs: Lazyfs) -> None:
    words = " ".join(lazyfs.argv("run", lazyfs.image, "cat", "/dev/zero"))
    subprocess.run(f"{words} | head -c 10", shell=True, env=lazyfs.environment(), timeout=_DEADLINE, check=True)


def test_no_capabilities_beyond_dockers(lazyfs: Lazyfs) -> None:
    done = lazyfs.sh("while read a b; do echo $a $b; done < /proc/self/status")
    held = int(re.search(r"CapEff: ([0-9a-f]+)", done.stdout)[1], 16)  # type: ignore[index]
    assert held & ~0xA80425FB == 0


def test_chown_of_a_tree_is_seen(lazyfs: Lazyfs) -> None:
    assert lazyfs.sh("chown 33 /etc/plain; stat -c %u /etc/plain; cat /etc/plain").stdout == "33\nno program\n"


def test_signals_are_passed_on(lazyfs: Lazyfs) -> None:
    traps = "".join(f"trap 'echo {name}' {name};" for name in ("USR1", "USR2", "HUP", "INT", "QUIT"))
    process = lazyfs.start(traps + "trap 'exit 3' TERM; echo ready; while :; do read line; done", "-i")
    assert process.stdout is not None
    for name in ("USR1", "USR2", "HUP", "INT", "QUIT"):
        process.send_signal(signal.Signals["SIG" + name])
        assert process.stdout.readline() == name + "\n"
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 3


def test_sigterm_becomes_the_images_stop_signal(lazyfs: Lazyfs) -> None:
    lazyfs.config = {"StopSignal": "SIGUSR2"}
    process = lazyfs.start("trap 'exit 5' USR2; echo ready; while :; do read line; done", "-i")
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 5


def test_third_interrupt_kills(lazyfs: Lazyfs) -> None:
    process = lazyfs.start("trap 'echo no' INT; echo ready; while :; do read line; done", "-i")
    assert process.stdout is not None
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "no\n"
    process.send_signal(signal.SIGINT)
    assert _end(process)[0] == 128 + signal.SIGKILL


def test_killed_command_leaves_no_process_and_no_mount(lazyfs: Lazyfs) -> None:
    process = lazyfs.start("echo ready; exec sleep 1000.25")
    process.kill()
    _end(process)
    _until(lambda: not _processes(b"1000.25"))
    assert [line for line in lazyfs.left() if " - overlay " in line] == []
    assert len(lazyfs.left()) > 0  # the directory, which nobody was left to remove
    assert lazyfs.sh("true").returncode == 0
    assert lazyfs.left() == []  # swept by the next run


def test_running_container_is_not_swept(lazyfs: Lazyfs) -> None:
    process = lazyfs.start("echo ready; read line; echo still $line", "-i", "--name", "first")
    assert lazyfs.sh("true").returncode == 0
    taken = lazyfs.sh("true", "--name", "first")
    assert (taken.returncode, "'first' is there already" in taken.stderr) == (125, True)
    assert process.stdin is not None
    process.stdin.write("here\n")
    process.stdin.flush()
    assert _end(process)[:2] == (0, "still here\n")


def test_terminal(lazyfs: Lazyfs) -> None:
    script = "stty size; trap 'stty size' WINCH; while read line; do echo got $line; done; exit 4"
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, lazyfs.argv("run", "-it", lazyfs.image, "sh", "-c", script), lazyfs.environment())
    try:
        seen = _read_until(master, b"\r\n", "0 0")
        os.write(master, b"word\n")
        seen += _read_until(master, b"got word\r\n", "")
        assert b"lazyfs: warning" not in seen
        os.write(master, b"\x04")
        _read_until(master, None, "")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    finally:
        os.close(master)


def test_interrupt_typed_at_a_terminal_reaches_the_program_once(lazyfs: Lazyfs) -> None:
    script = "trap 'echo caught' INT; echo ready; read line; read line; exit 6"
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, lazyfs.argv("run", "-it", lazyfs.image, "sh", "-c", script), lazyfs.environment())
    try:
        _read_until(master, b"ready\r\n", "")
        os.write(master, b"\x03")
        _read_until(master, b"caught\r\n", "")
        os.write(master, b"a\nb\n")
        rest = _read_until(master, None, "")
        assert b"caught" not in rest
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    finally:
        os.close(master)


@pytest.fixture
def ordinary(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Lazyfs]:
    """The command as a user without rights, on a copy of the image that is his, as a squashed mount shows it."""
    place = Path(os.path.realpath(f"/tmp/lazyfs-test-{os.getpid()}"))
    place.mkdir(mode=0o755)
    try:
        subprocess.run(["cp", "-a", image, place / "image"], check=True)
        (place / "home").mkdir()
        subprocess.run(["chown", "-R", f"{_ORDINARY}:{_ORDINARY}", place], check=True)
        user = (
            "setpriv",
            f"--reuid={_ORDINARY}",
            f"--regid={_ORDINARY}",
            "--clear-groups",
            "env",
            f"HOME={place}/home",
        )
        # The interpreter of the tests may lie where only root can go.
        usable = subprocess.run([*user, sys.executable, "-c", ""], capture_output=True, check=False).returncode == 0
        command = Lazyfs(place / "home", place / "image", user, sys.executable if usable else "/usr/bin/python3")
        yield command
        assert command.left() == []
    finally:
        shutil.rmtree(place)


def test_ordinary_user(ordinary: Lazyfs) -> None:
    done = ordinary.sh("id -u; echo changed > /etc/plain; cat /etc/plain; touch /new; exit 9", "-e", "PATH=/bin")
    assert (done.returncode, done.stdout) == (9, "0\nchanged\n"), done.stderr


def test_ordinary_user_without_subordinate_ids_is_told(ordinary: Lazyfs) -> None:
    done = ordinary.sh("true", "-u", "web")
    assert done.returncode == 125
    assert "subordinate ids" in done.stderr


def test_ordinary_users_killed_command(ordinary: Lazyfs) -> None:
    process = ordinary.start("mkdir -p /a/b; echo ready; exec sleep 1000.75")
    process.kill()
    _end(process)
    _until(lambda: not _processes(b"1000.75"))
    assert ordinary.sh("true").returncode == 0


def _processes(word: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word in (entry / "cmdline").read_bytes().split(b"\0")[:2]:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _read_until(master: int, wanted: bytes | None, skip: str) -> bytes:
    """Read a terminal until `wanted` appears; None: until its end."""
    seen = b""
    deadline = time.monotonic() + _DEADLINE
    while wanted is None or wanted not in seen:
        assert select.select([master], [], [], deadline - time.monotonic())[0], seen
        try:
            block = os.read(master, 4096)
        except OSError:
            block = b""
        if not block:
            assert wanted is None, seen
            break
        seen += block
    return seen
