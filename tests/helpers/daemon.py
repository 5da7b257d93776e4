"""A lazyfsd of a test's own, driven by the real commands, and proof that nothing is left of it.

    with Node(scratch, READ_TIMEOUT="3") as node:
        tree = node.mount(image.reference)
        assert node.read(tree / "file") == b"content"

Nothing in here touches a mount from the test's own process: a reader that hangs inside a FUSE request can't even be
killed, so readers are processes with a deadline, and the daemon is killed to free them when it passes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lazyfs.container import mounts
from tests.helpers import real
from tests.helpers.blobs import LayerBlob
from tests.helpers.fake_registry import AddedImage, FakeRegistry

COMMAND = 60.0  # seconds for a command of ours
PATIENCE = 15.0  # seconds for a state to come about
_LOOK = 0.02  # seconds between looks

# Fetched only what a reader wants, and every failure soon.
QUICK = {
    "READ_TIMEOUT": "3",
    "CONNECT_TIMEOUT": "1",
    "ANSWER_TIMEOUT": "1",
    "BACKGROUND": "0",
    "PREFETCH": "0",
    "DAEMON_LINGER": "0.2",
    "HOLD": "0",  # what a daemon's death does without one; tests.helpers.takeover has a holder
}


both_drivers = pytest.mark.parametrize("driver", ["fuse", "erofs"])  # for tests of what a reader sees


class Hung(AssertionError):
    """A reader or a command that did not end in time."""


def until(check: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until `check()` is true and return what it returned. Raise AssertionError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}"
        time.sleep(_LOOK)
    return found


def add(registry: FakeRegistry, name: str, *layers: LayerBlob | bytes, **config: Any) -> AddedImage:
    """Store an image of lazy layers and plain blobs as NAME:latest."""
    parts = [
        layer if isinstance(layer, bytes) else (layer.blob, dict(layer.annotations), layer.media_type)
        for layer in layers
    ]
    return registry.add_image(name, "latest", parts, config or None)


class Node:
    """A store, a run directory and the daemon on them. `settings` are LAZYFS_… without the prefix, over QUICK.

    Leaving it unmounts all and asserts that no process, mount, socket or temporary file is left.
    """

    def __init__(self, place: Path, prefix: tuple[str, ...] = (), **settings: str) -> None:
        self.place = place
        self.root = place / "store"
        self.run_dir = place / "run"
        self.prefix = prefix  # words before every command, such as setpriv's
        self.settings = {**QUICK, **settings}
        self._dirs = 0
        self._killed = False

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.stop()
        except BaseException:
            self.kill_all()
            if kind is None:
                raise
        if kind is None:
            self.check_nothing_left()

    # -- commands

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        ours = {f"LAZYFS_{name}": value for name, value in self.settings.items()}
        return {
            **kept,
            "LAZYFS_ROOT": str(self.root),
            "LAZYFS_RUN": str(self.run_dir),
            "LAZYFS_CONFIG": "/dev/null",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **ours,
        }

    def words(self, *words: str | Path) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "lazyfs", *map(str, words)]

    def spawn(
        self, words: list[str], out: IO[bytes] | int = subprocess.PIPE, *, feed: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a program in this node's environment, away from the mounts; `out` gets what it says.

        With `feed` its input is a pipe.
        """
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=self.environment,
            cwd="/",
        )

    def finish(self, process: subprocess.Popen[bytes], timeout: float) -> subprocess.CompletedProcess[bytes]:
        """Wait for a program. Raise Hung after `timeout` seconds; then the daemon is dead too."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            self.kill_all()  # a process inside a FUSE request ends no earlier
            process.communicate(timeout=30)
            raise Hung(f"{process.args!r} did not end within {timeout:.0f} s") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def lazyfs(self, *words: str | Path, timeout: float = COMMAND) -> subprocess.CompletedProcess[str]:
        """Run a command of ours to its end."""
        done = self.finish(self.spawn(self.words(*words)), timeout)
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def refused(self, code: int, *words: str | Path, timeout: float = COMMAND) -> str:
        """Run a command that must fail with `code` and one sentence on stderr, perhaps with a hint; return both."""
        done = self.lazyfs(*words, timeout=timeout)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        lines = done.stderr.strip().splitlines()
        assert lines[0].startswith("lazyfs: "), done.stderr
        assert all(line.startswith("lazyfs: hint: ") for line in lines[1:]) and len(lines) <= 2, done.stderr
        return "\n".join(lines)

    def new_dir(self) -> Path:
        self._dirs += 1
        path = self.place / f"mnt{self._dirs}"
        path.mkdir()
        owner = self.place.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
        return path

    def mount(self, image: str | AddedImage, *options: str, at: Path | None = None) -> Path:
        """Mount an image and return where it shows."""
        directory = at or self.new_dir()
        reference = image if isinstance(image, str) else image.reference
        done = self.lazyfs("mount", *options, reference, directory)
        assert done.returncode == 0, done.stderr
        return directory

    def umount(self, directory: Path, *options: str) -> None:
        done = self.lazyfs("umount", *options, directory)
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, Any]:
        """Return what `lazyfs status --json` says."""
        done = self.lazyfs("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def fuse_calls(self) -> dict[str, int]:
        return dict(self.status()["fuse"])

    def layer(self, number: int = 0, mount: int = 0) -> dict[str, Any]:
        """Return what the status says of a layer of a mount."""
        found: dict[str, Any] = self.status()["mounts"][mount]["layers"][number]
        return found

    def until_verified(self, patience: float = PATIENCE) -> None:
        """Wait until every layer of every mount has passed its whole check and is complete."""

        def done() -> bool:
            layers = [layer for mount in self.status()["mounts"] for layer in mount["layers"]]
            return bool(layers) and all(layer["verified"] and layer["complete"] for layer in layers)

        until(done, "all layers are verified and complete", patience)

    # -- reading, in processes of their own

    def tool(self, *words: str | Path, timeout: float = 20.0) -> subprocess.CompletedProcess[bytes]:
        """Run a program that may touch the mount."""
        return self.finish(self.spawn([*self.prefix, *map(str, words)]), timeout)

    def read(self, path: Path, timeout: float = 20.0) -> bytes:
        """Return a file's content. Raise OSError-like AssertionError with cat's words when it can't be read."""
        done = self.tool("cat", "--", path, timeout=timeout)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def read_fails(self, path: Path, timeout: float = 20.0) -> str:
        """Read a file that must fail, with nothing read; return the words of the error."""
        done = self.tool("cat", "--", path, timeout=timeout)
        assert done.returncode != 0 and done.stdout == b"", (done.returncode, done.stdout[:100])
        return done.stderr.decode(errors="replace")

    def python(self, code: str, *arguments: str | Path, timeout: float = 20.0) -> Any:
        """Run Python in a process that may touch the mount; `a` is the list of arguments, `print`ed JSON comes back."""
        prelude = "import os, sys, json, stat, mmap, errno\na = sys.argv[1:]\n"
        done = self.tool(sys.executable, "-I", "-S", "-c", prelude + code, *arguments, timeout=timeout)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return json.loads(done.stdout) if done.stdout.strip() else None

    # -- the daemon

    def sockets(self) -> list[Path]:
        return sorted(self.run_dir.glob("*.sock"))

    def processes(self) -> list[int]:
        """Return the daemons of this store that live (zombies are not alive)."""
        wanted = b"\0--root\0" + os.fsencode(self.root) + b"\0"
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    words = Path("/proc", entry, "cmdline").read_bytes()
                    if b"lazyfs.mount.daemon" in words and wanted in words:
                        found.append(int(entry))
        return found

    def pid(self) -> int:
        """Return the one daemon's process."""
        found = self.processes()
        assert len(found) == 1, f"daemons: {found}"
        return found[0]

    def kill(self) -> None:
        """Kill the one daemon and wait until it is gone."""
        os.kill(self.pid(), signal.SIGKILL)
        self._killed = True
        until(lambda: not self.processes(), "the killed daemon is gone")

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            until(lambda: not self.processes(), "killed daemons are gone")
        real.unmount_below(self.place)

    def log(self) -> str:
        path = self.run_dir / "lazyfsd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @contextlib.contextmanager
    def raw(self) -> Iterator[socket.socket]:
        """Connect to the daemon's socket and take the greeting; the rest is the test's."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.run_dir / "lazyfsd.sock"))
            assert json.loads(receive_line(sock))["pid"] == self.pid()
            yield sock

    def shown(self) -> list[Path]:
        """Return the directories below `place` where something is mounted, the session left out."""
        found = [Path(os.fsdecode(entry.dir)) for entry in mounts.below(os.fsencode(self.place))]
        return [path for path in found if self.run_dir not in path.parents]

    def stop(self) -> None:
        """Unmount all and wait for the end of the daemons, as their users would."""
        for directory in self.shown():
            self.umount(directory, "--lazy")
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        until(lambda: not self.processes(), f"the daemon ends; its log: {self.log()[-3000:]}")

    def check_nothing_left(self) -> None:
        """Assert that no mount, socket, record or temporary file is left."""
        if self._killed:  # its socket and its dead session stay until the next one starts
            for entry in mounts.below(os.fsencode(self.run_dir)):
                mounts.umount(entry.dir, lazy=True)
            for path in self.sockets():
                path.unlink()
        assert mounts.below(os.fsencode(self.place)) == []
        assert self.sockets() == []
        left = [*self.run_dir.glob("attached/*"), *self.root.glob("rw/*")]
        names = (Path(top, name) for top, _, names in os.walk(self.root) for name in names)  # some go while we look
        left += [path for path in names if path.name.endswith((".new", ".tmp", ".again"))]
        assert left == [], left
        assert "Traceback" not in self.log(), self.log()[-6000:]


def receive_line(sock: socket.socket) -> bytes:
    """Return one line from a socket, b"" when it ends first."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = sock.recv(1 << 16)
        if not part:
            return b""
        data += part
    return bytes(data)


@contextlib.contextmanager
def tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes: a small disk."""
    directory.mkdir(exist_ok=True)
    mounts.mount(b"none", os.fsencode(directory), "tmpfs", options=b"size=%d,mode=700" % size)
    try:
        yield directory
    finally:
        mounts.umount(os.fsencode(directory), lazy=True)
