"""A lazyfsd with its holder, killed again and again, and readers who must not notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lazyfs.control_client import Daemon, connect
from lazyfs.errors import DaemonUnreachable
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

FILES = {f"f{number}": 300_000 + 4096 * number for number in range(6)}  # names and sizes; contents: pattern(size)

# Reads what `kind` says until its input ends, and prints: reads, what went wrong, reads of more than 2 ms (when they
# began on the machine's monotonic clock, how long they took; seconds).
_READER = """
import json, mmap, os, random, select, sys, time
sys.path.insert(0, sys.argv[4])
from tests.helpers.pattern import pattern
kind, root, files = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
want = {name: pattern(size) for name, size in files.items()}
flags = os.O_RDONLY | (os.O_DIRECT if kind == "direct" else 0)
held = {name: os.open(os.path.join(root, name), flags) for name in want}
count, wrong, slow = 0, [], []
print("reading", flush=True)
while not select.select([0], [], [], 0)[0]:
    name = random.choice(list(want))
    at = random.randrange(0, len(want[name]) // 4096) * 4096
    expected = want[name][at : at + 65536]
    began = time.monotonic()
    try:
        if kind == "held":
            got = os.pread(held[name], 65536, at)
        elif kind == "direct":
            page = mmap.mmap(-1, 65536)
            got = page[: os.preadv(held[name], [page], at)]
        elif kind == "mmap":
            with mmap.mmap(held[name], len(want[name]), prot=mmap.PROT_READ) as mapped:
                got = mapped[at : at + 65536]
        elif kind == "names":
            got, expected = sorted(os.listdir(root)), sorted(want)
            assert os.lstat(os.path.join(root, name)).st_size == len(want[name])
        else:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            got = os.pread(fd, 65536, at)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        if got != expected:
            wrong.append(f"{name} at {at}: {len(got)} bytes that are not its")
    except (OSError, AssertionError) as error:
        wrong.append(f"{name} at {at}: {error!r}")
    took = time.monotonic() - began
    if took > 0.002 and len(slow) < 100_000:
        slow.append((began, took))
    count += 1
    time.sleep(float(sys.argv[5]))
print(json.dumps([count, wrong[:5], slow]))
"""
KINDS = ("held", "direct", "mmap", "opened", "names")
# For `sabotaged`: who is silent for 20 s is ended, instead of a minute.
IMPATIENT = """
import os, sys, time
import lazyfs.limits
lazyfs.limits.HUNG_AFTER = 20.0
if "lazyfs.mount.daemon" in sys.orig_argv:
    import lazyfs.mount.held
    lazyfs.mount.held._BEAT = 0.5
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader says at its end; see _READER."""

    kind: str
    count: int
    wrong: list[str]
    slow: list[tuple[float, float]]


class Held:
    """A node's daemon, started as systemd does."""

    def __init__(self, node: Node, process: subprocess.Popen[bytes]) -> None:
        self.node = node
        self.process = process  # the holder

    def call(self) -> Daemon:
        """Return a connection to the daemon that serves, once one does."""

        def reach() -> Daemon | None:
            try:
                return connect(self.node.run_dir / "lazyfsd.sock")
            except DaemonUnreachable:
                return None

        found: Daemon = until(reach, "a daemon listens", 30)
        return found

    def pid(self) -> int:
        """Return the process that serves."""
        with self.call() as daemon:
            return int(daemon.greeting["pid"])

    def standby(self) -> int:
        """Return the process that takes over next, once it has planted all that is shown. Something must be."""

        def warm() -> int | None:
            serving, found = self.pid(), self.node.processes()
            return next((pid for pid in found if pid != serving and self._has_planted(pid)), None)

        found: int = until(warm, "a standby is warm", 30)
        return found

    def _has_planted(self, pid: int) -> bool:
        try:
            return str(self.node.root / "trees") in Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            return False

    def kill_all_at_once(self) -> None:
        """Kill all but the holder: nobody is left to take over at once."""
        for pid in self.node.processes():
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> int:
        """Kill the daemon that serves, and wait for the next one. Return its process."""
        before = self.pid()
        os.kill(before, signal.SIGKILL)
        found: int = until(lambda: (after := self.pid()) != before and after, "another daemon serves", 30)
        return found


@contextlib.contextmanager
def held(node: Node, **environment: str) -> Iterator[Held]:
    """Run a node's daemon with a holder; at the end nothing of both is there."""
    node.run_dir.mkdir(exist_ok=True, mode=0o700)
    words = ["-m", "lazyfs.mount.daemon", "--hold", "--root", str(node.root), "--run", str(node.run_dir)]
    patient = {"LAZYFS_READ_TIMEOUT": "60", "LAZYFS_ANSWER_TIMEOUT": "10"}  # a busy machine is no fault of the daemon's
    told = [f"{name}={value}" for name, value in (patient | environment).items()]
    with open(node.run_dir / "lazyfsd.log", "ab") as log:
        process = node.spawn(["env", *told, sys.executable, *words], out=log)
    try:
        ours = Held(node, process)
        ours.pid()
        yield ours
    finally:
        process.terminate()
        process.wait(30)
        until(lambda: not node.processes(), "no daemon is left")


def sabotaged(node: Node, place: Path, code: str) -> AbstractContextManager[Held]:
    """Run a node's daemon with a holder; each of its processes runs `code` when it starts."""
    (place / "sitecustomize.py").write_text(code)
    return held(node, PYTHONPATH=f"{place}:{Path(__file__).parents[2]}")


def image_of(registry: FakeRegistry, **more: bytes) -> AddedImage:
    """Put an image of what readers read, and of `more` files, into a registry."""
    files = {**contents(), **more}
    return add(registry, "one", zstd_chunked_layer(tar_of(*(file(name, data) for name, data in files.items()))))


@contextlib.contextmanager
def readers(node: Node, root: Path, kinds: tuple[str, ...] = KINDS, *, pause: float = 0.01) -> Iterator[list[Reading]]:
    """Have a reader of each kind at work, `pause` seconds between reads; at the end the list has what they say."""
    arguments = [str(root), json.dumps(FILES), str(Path(__file__).parents[2]), str(pause)]
    started = [node.spawn([sys.executable, "-c", _READER, kind, *arguments], feed=True) for kind in kinds]
    results: list[Reading] = []
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == b"reading\n"
        yield results
        for kind, one in zip(kinds, started, strict=True):
            out, err = one.communicate(timeout=60)
            assert one.returncode == 0, (kind, err.decode())
            results.append(Reading(kind, *json.loads(out)))
    finally:
        for one in started:
            one.kill()
            one.wait(30)


def contents() -> dict[str, bytes]:
    """Return what the files hold that readers read."""
    return {name: pattern(size) for name, size in FILES.items()}
