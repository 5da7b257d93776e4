"""A Kubernetes node without Kubernetes: containerd with CRI, lazyfs-snapshotter, lazyfsd; and proof of nothing left.

    with PodNode(scratch, images) as node:
        node.cri.pull(images.reference("nginx"))
        pod = node.cri.run_pod("web")
        node.cri.start(pod, "nginx", images.reference("nginx"), nginx_command(port))
        node.kill_snapshotter()                      # restarted by hand, as systemd would do it

Leaving it removes pods and images, waits for the garbage collectors, and asserts that no mount, process, socket,
snapshot directory or byte of a layer is left. With snapshotter="overlayfs" it is the same node without lazyfs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.helpers import real
from tests.helpers.cri import Cri, CriFailed
from tests.helpers.daemon import until

GONE = 30.0  # seconds for the garbage collectors of both sides
ROOT = Path(__file__).parents[2]

# Fetched only what somebody reads, and every failure soon.
QUICK = {
    "BACKGROUND": "0",
    "CONNECT_TIMEOUT": "1",
    "ANSWER_TIMEOUT": "2",
    "READ_TIMEOUT": "10",
    "PREPARE_TIMEOUT": "10",
}

_V2 = """\
version = 2
root = "{place}/root"
state = "{place}/state"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
]
[grpc]
address = "{address}"
[plugins."io.containerd.internal.v1.opt"]
path = "{place}/opt"
{timeouts}[plugins."io.containerd.gc.v1.scheduler"]
deletion_threshold = 1
schedule_delay = "50ms"
startup_delay = "50ms"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
stream_server_port = "0"
stats_collect_period = 1
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{place}/cni"
conf_dir = "{place}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{place}/certs.d"
{proxy}"""

_V3 = """\
version = 3
root = "{place}/root"
state = "{place}/state"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs", "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
address = "{address}"
[plugins."io.containerd.internal.v1.opt"]
path = "{place}/opt"
{timeouts}[plugins."io.containerd.gc.v1.scheduler"]
deletion_threshold = 1
schedule_delay = "50ms"
startup_delay = "50ms"
[plugins."io.containerd.grpc.v1.cri"]
stream_server_port = "0"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dir = "{place}/cni"
conf_dir = "{place}/cni"
[plugins."io.containerd.cri.v1.images"]
stats_collect_period = 1
snapshotter = "{snapshotter}"
disable_snapshot_annotations = false
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{place}/certs.d"
{proxy}"""

# containerd gives a shim 2 s to tell a sandbox's state, then goes on with process number 0, and the container's start
# fails. A kubelet tries again; ten containers that start in one shim of a busy test machine need longer.
_TIMEOUTS = """\
[timeouts]
"io.containerd.timeout.task.state" = "60s"
"""
_PROXY = """\
[proxy_plugins.lazyfs]
type = "snapshot"
address = "{socket}"
"""
_EXPORTS = '[proxy_plugins.lazyfs.exports]\nroot = "{root}"\n'


class PodNode:
    """The three processes and their directories. `settings` are LAZYFS_… without the prefix, over QUICK.

    $LAZYFS_TEST_CONTAINERD is a directory of a containerd 2's programs (containerd, its shim, ctr), to be used instead.
    """

    def __init__(
        self,
        place: Path,
        pause: str,
        *,
        snapshotter: str = "lazyfs",
        **settings: str,
    ) -> None:
        self.place = place
        self.pause = pause
        self.snapshotter = snapshotter
        other = os.environ.get("LAZYFS_TEST_CONTAINERD")
        self.binaries = Path(other) if other else None
        self.settings = {**QUICK, **settings}
        self.root = place / "l"  # lazyfs's own, short: 128 directories of it go into one page of mount options
        self.run_dir = place / "r"
        self.address = place / "c.sock"
        self.socket = self.run_dir / "snapshotter" / "snapshotter.sock"
        self.logs = place / "logs"
        self.containerd: subprocess.Popen[bytes] | None = None
        self.plugin: subprocess.Popen[bytes] | None = None
        self.cri = Cri(self.address, self.logs)

    def __enter__(self) -> PodNode:
        self.logs.mkdir()
        self.trust(self.pause.partition("/")[0])
        try:
            if self.snapshotter == "lazyfs":
                self.start_snapshotter()
            self.start_containerd()
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.clear()
                self.check_given_back()
                self.stop()
                self.check_nothing_left()
        except BaseException:
            print(self.words())  # pytest shows it with the failure
            raise
        finally:
            if kind is not None:
                print(self.words())
            self._end_all()

    # -- the processes

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        ours = {f"LAZYFS_{name}": value for name, value in self.settings.items()}
        return {
            **kept,
            "LAZYFS_ROOT": str(self.root),
            "LAZYFS_RUN": str(self.run_dir),
            "LAZYFS_CONFIG": "/dev/null",
            "LAZYFS_CERTS_DIR": str(self.place / "certs.d"),
            "CONTAINERD_ADDRESS": str(self.address),
            "PYTHONPATH": str(ROOT),
            **ours,
        }

    def trust(self, host: str) -> None:
        """Let containerd speak plain HTTP to a loopback registry."""
        directory = self.place / "certs.d" / host
        directory.mkdir(parents=True, exist_ok=True)
        text = f'server = "http://{host}"\n[host."http://{host}"]\ncapabilities = ["pull", "resolve"]\n'
        (directory / "hosts.toml").write_text(text)

    def start_snapshotter(self) -> None:
        """Start lazyfs-snapshotter and wait until it listens."""
        self.plugin = self._spawn([sys.executable, "-m", "snapshotter.server"], "snapshotter.log")
        plugin = self.plugin
        until(lambda: self.listens() or plugin.poll() is not None, "lazyfs-snapshotter listens", real.START)
        assert plugin.poll() is None, f"lazyfs-snapshotter ended: {self.log('snapshotter')[-3000:]}"

    def listens(self) -> bool:
        """Whether somebody accepts connections at the snapshotter's socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    def connected(self) -> bool:
        """Whether containerd has found the snapshotter (again): it waits up to three seconds between attempts."""
        try:
            self.ctr("snapshots", "--snapshotter", self.snapshotter, "ls")
        except real.ToolFailed:
            return False
        return True

    def start_containerd(self) -> None:
        """Start containerd and wait until CRI answers."""
        config = self.place / "config.toml"
        config.write_text(self._config())
        program = str(self.binaries / "containerd") if self.binaries else real.tool("containerd")
        self.containerd = self._spawn([program, "--config", str(config)], "containerd.log")
        containerd = self.containerd

        def answers() -> bool:
            assert containerd.poll() is None, f"containerd ended: {self.log('containerd')[-3000:]}"
            try:
                self.cri.pods()
            except CriFailed:
                return False
            return True

        until(answers, "CRI answers", real.START)

    def kill_snapshotter(self) -> None:
        """kill -9. Nobody starts it again but start_snapshotter()."""
        assert self.plugin is not None
        self.plugin.kill()
        self.plugin.wait()

    def kill_containerd(self) -> None:
        """kill -9. The shims and their containers live on."""
        assert self.containerd is not None
        self.containerd.kill()
        self.containerd.wait()

    def daemons(self, module: bytes = b"lazyfs.mount.daemon") -> list[int]:
        """Return the lazyfsd processes of this node's store; with a holder standby and template are among them."""
        wanted = b"\0" + os.fsencode(self.root) + b"\0"
        found = []
        for pid, _ in real.processes_with(module):
            with contextlib.suppress(OSError):
                if wanted in Path("/proc", str(pid), "cmdline").read_bytes() and _lives(pid):
                    found.append(pid)
        return found

    def kill_daemon(self) -> None:
        """kill -9 of the one daemon."""
        (pid,) = self.daemons()
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in self.daemons(), "the killed daemon is gone")

    def stop_daemon(self) -> None:
        """Stop the one daemon as an operator does."""
        for pid in self.daemons():
            os.kill(pid, signal.SIGTERM)
        until(lambda: not self.daemons(), f"the daemon ends; its log: {self.log('lazyfsd')[-2000:]}")
        until(lambda: not self.daemons(b"lazyfs.mount.holder"), "its holder ends")

    @contextlib.contextmanager
    def daemon_stopped(self) -> Iterator[None]:
        """SIGSTOP for the time of the block: a daemon that is there and doesn't answer."""
        (pid,) = self.daemons()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    # -- commands and what they say

    def ctr(self, *words: str | Path, namespace: str = "k8s.io", timeout: float = real.RUN) -> str:
        """Run ctr and return its stdout. Raise ToolFailed."""
        program = str(self.binaries / "ctr") if self.binaries else "ctr"
        return real.call(program, "--address", self.address, "--namespace", namespace, *words, timeout=timeout)

    def lazyfs(self, *words: str | Path, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command of lazyfs on this node."""
        argv = [sys.executable, "-m", "lazyfs", *map(str, words)]
        return subprocess.run(
            argv, check=False, capture_output=True, text=True, env=self.environment, cwd="/", timeout=timeout
        )

    def status(self) -> dict[str, Any]:
        done = self.lazyfs("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def fetched(self) -> int:
        """Return the bytes that came over the network because somebody waited for them, or soon would."""
        counted = self.status()["bytes"]
        return int(counted["demand"]) + int(counted["prefetch"])

    def log(self, name: str) -> str:
        """Return a process's log: snapshotter, containerd, lazyfsd."""
        places = [
            self.place / f"{name}.log",
            self.run_dir / f"{name}.log",
            self.run_dir / "snapshotter" / f"{name}.log",
        ]
        return "".join(path.read_text(errors="replace") for path in places if path.exists())

    def words(self) -> str:
        """Return the ends of all logs, for a failure."""
        return "\n".join(f"--- {name}\n{self.log(name)[-4000:]}" for name in ("snapshotter", "lazyfsd", "containerd"))

    # -- giving back

    def clear(self) -> None:
        """Remove all pods, images and leases of broken pulls, in all namespaces, and run containerd's collector."""
        for pod in self.cri.pods():
            self.cri.remove_pod(pod)
        for namespace in self.ctr("namespaces", "ls", "-q").split():
            names = self.ctr("images", "ls", "-q", namespace=namespace).split()
            if names:
                self.ctr("images", "rm", *names, namespace=namespace)
            for lease in self.ctr("leases", "ls", "-q", namespace=namespace).split():
                self.ctr("leases", "delete", lease, namespace=namespace)
        self.collect()

    def collect(self) -> None:
        """Run containerd's garbage collector to its end, of all namespaces."""
        lease = self.ctr("leases", "create").strip()
        self.ctr("leases", "delete", "--sync", lease)

    def snapshots(self) -> list[str]:
        """Return the snapshot keys that containerd knows of, in all namespaces."""
        found = []
        for namespace in self.ctr("namespaces", "ls", "-q").split():
            lines = self.ctr("snapshots", "--snapshotter", self.snapshotter, "ls", namespace=namespace).splitlines()
            found += [f"{namespace}/{line.split()[0]}" for line in lines[1:] if line.strip()]
        return found

    def held(self) -> dict[str, list[str]]:
        """Return all that lazyfs holds on disk and in mounts for snapshots and images."""
        shown = [path for path in real.mounts_below(self.place) if path != str(self.run_dir / "mnt")]
        rows: list[str] = []
        own = self.root / "snapshotter"
        database = self.root / "snapshots.db"
        if not database.exists():
            database = own / "snapshots.db"
        if database.exists():
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as handle:
                rows = [str(row[0]) for row in handle.execute("SELECT key FROM snapshots")]
        return {
            "mounts": shown,
            "snapshots": rows,
            "directories": sorted(str(path) for top in (self.root, own) for path in (top / "s").glob("*")),
            "layers": sorted(str(path) for path in self.root.glob("layers/sha256/*")),
            "trees": sorted(str(path) for path in self.root.glob("trees/*")),
        }

    def check_given_back(self) -> None:
        """Assert that images which are gone left no snapshot, directory, mount or layer. Waits for the collectors."""
        if self.snapshotter != "lazyfs":
            return
        deadline = time.monotonic() + GONE
        while any(held := self.held().values()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not given back within {GONE:.0f} s: {dict(zip(self.held(), held, strict=True))}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End all processes as an operator does."""
        if self.containerd is not None:
            real.stop(self.containerd)
        if self.plugin is not None:
            real.stop(self.plugin)
            assert self.plugin.returncode == 0, self.log("snapshotter")[-3000:]
        self.stop_daemon()

    def check_nothing_left(self) -> None:
        """Assert that no mount, socket or process is left once all has been stopped."""
        assert real.mounts_below(self.place) == []
        marker = os.fsencode(self.place)
        assert [words for _, words in real.processes_with(marker) if str(self.place) in words] == []
        sockets = [path for path in self.place.rglob("*.sock") if path.parent != self.place]
        assert sockets == [], sockets
        for name in ("snapshotter", "lazyfsd"):
            assert "Traceback" not in self.log(name), self.log(name)[-6000:]

    def _end_all(self) -> None:
        self.cri.close()
        for process in (self.containerd, self.plugin):
            if process is not None and process.poll() is None:
                process.kill()
            if process is not None:
                process.wait()
        real.end_below(self.place)
        time.sleep(0.05)
        real.unmount_below(self.place)
        for name in ("root", "state"):
            shutil.rmtree(self.place / name, ignore_errors=True)

    def _spawn(self, words: list[str], log: str) -> subprocess.Popen[bytes]:
        environment = self.environment
        if self.binaries:
            environment["PATH"] = f"{self.binaries}:{environment['PATH']}"
        with (self.place / log).open("ab") as sink:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment, cwd="/")

    def _config(self) -> str:
        proxy = ""
        if self.snapshotter == "lazyfs":
            proxy = _PROXY.format(socket=self.socket)
            if self.binaries:
                proxy += _EXPORTS.format(root=self.root)
        text = _V3 if self.binaries else _V2
        return text.format(
            place=self.place,
            address=self.address,
            pause=self.pause,
            snapshotter=self.snapshotter,
            proxy=proxy,
            timeouts=_TIMEOUTS,
        )


def _lives(pid: int) -> bool:
    text = Path("/proc", str(pid), "stat").read_text(errors="replace")
    return text.rpartition(")")[2].split()[0] != "Z"


def eventually(check: Callable[[], Any], patience: float = 30.0) -> bool:
    """Tell whether `check` becomes true in time; exceptions count as not yet."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if check():
                return True
        time.sleep(0.05)
    return False


def answer(port: int) -> str:
    """Return what an HTTP server on a loopback port answers."""
    return real.call("curl", "--silent", "--fail", "--max-time", "10", f"http://127.0.0.1:{port}/")
