"""The real parts that lazyfs works beside, each with directories and addresses of its own.

Debian's registry, containerd, skopeo, umoci: tests, the demo and the measurements share them.

Everything is a context manager that stops what it started, by its process id. Programs that fail raise ToolFailed with
the end of what they said. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START = 30.0  # seconds for a daemon to answer
RUN = 300.0  # seconds for a program to end


class ToolFailed(Exception):
    """A real part that did not do what it was asked, with the end of its own words."""


def tool(name: str) -> str:
    """Return the program's path; sbin counts even when the PATH lacks it. Raise ToolFailed when it isn't installed."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise ToolFailed(f"{name} is not installed: run `make debs`")
    return path


def have(*names: str) -> bool:
    """Tell whether all the programs are installed."""
    try:
        return all(tool(name) for name in names)
    except ToolFailed:
        return False


def call(*command: str | Path, cwd: Path | None = None, timeout: float = RUN) -> str:
    """Run a program to its end and return its stdout. Raise ToolFailed for any status but 0, or too late."""
    words = [tool(str(command[0])), *(str(word) for word in command[1:])]
    try:
        done = subprocess.run(
            words,
            check=False,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ToolFailed(f"{' '.join(words[:4])} … did not end within {timeout:.0f} s") from None
    if done.returncode:
        raise ToolFailed(f"{' '.join(words)} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process of ours: SIGTERM, and SIGKILL after `patience` seconds. Blocks until it is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


# -- Debian's registry -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DockerRegistry:
    """A running docker-registry. `host` is "127.0.0.1:PORT"; `log` its access log; `pid` its process."""

    host: str
    port: int
    log: Path
    pid: int

    def image(self, repository: str, tag: str = "latest") -> str:
        """Return the reference docker://HOST/REPOSITORY:TAG."""
        return f"docker://{self.host}/{repository}:{tag}"


@contextlib.contextmanager
def docker_registry(directory: Path, blobs: Path | None = None, extra: str = "") -> Iterator[DockerRegistry]:
    """Run Debian's docker-registry on a free loopback port, its blobs below `directory` or in `blobs`.

    Several may serve the same blobs, as long as one of them at most is written to. `extra` is appended to its config
    (YAML).
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "registry.log"
    for _ in range(5):  # another process may take the port between our look and the registry's
        port = free_port()
        config = directory / "registry.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: info, accesslog: {disabled: false}}\n"
            f"storage: {{filesystem: {{rootdirectory: {blobs or directory / 'blobs'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '127.0.0.1:{port}'}}\n" + extra
        )
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [tool("docker-registry"), "serve", str(config)], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        try:
            if _answers(process, f"http://127.0.0.1:{port}/v2/"):
                yield DockerRegistry(f"127.0.0.1:{port}", port, log, process.pid)
                return
        finally:
            stop(process)
    raise ToolFailed(f"docker-registry did not start: {log.read_text(errors='replace')[-2000:]}")


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(url, timeout=5):
                return True
        except (OSError, urllib.error.URLError):
            time.sleep(0.02)
    return False


# -- images ------------------------------------------------------------------------------------------------------------


def build_layout(layout: Path, tag: str, layers: list[Path], command: tuple[str, ...] = ("/bin/sh",)) -> str:
    """Make an image of uncompressed layer tars with umoci (gzip layers) and return its reference oci:LAYOUT:TAG."""
    image = f"{layout}:{tag}"
    if not layout.exists():
        call("umoci", "init", "--layout", layout)
    call("umoci", "new", "--image", image)
    for layer in layers:
        call("umoci", "raw", "add-layer", "--image", image, layer)
    words = [part for word in command for part in ("--config.cmd", word)]
    call("umoci", "config", "--image", image, "--created", "2000-01-01T00:00:00Z", "--no-history", *words)
    return f"oci:{image}"


def copy_image(source: str, destination: str, *options: str) -> None:
    """Copy an image with skopeo, without TLS on either side when that side is loopback."""
    flags = ["--insecure-policy", "copy", "--quiet", "--preserve-digests", *options]
    for side, reference in (("src", source), ("dest", destination)):
        if reference.startswith("docker://127.0.0.1:"):
            flags.append(f"--{side}-tls-verify=false")
    call("skopeo", *flags, source, destination)


# -- containerd --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd with directories of its own. References are written without docker://."""

    directory: Path
    address: Path
    log: Path
    pid: int

    def ctr(self, *words: str | Path, timeout: float = RUN) -> str:
        """Run `ctr` against this containerd and return its stdout. Raise ToolFailed."""
        return call("ctr", *self.words(*words)[1:], timeout=timeout)

    def words(self, *words: str | Path) -> list[str]:
        """Return the command line of a `ctr` call, to be started in another way."""
        return [tool("ctr"), "--address", str(self.address), "--namespace", "lazyfs", *(str(word) for word in words)]

    def pull(self, reference: str, snapshotter: str = "overlayfs") -> None:
        """Pull and unpack an image over plain HTTP."""
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, reference)

    @contextlib.contextmanager
    def mounted(self, reference: str, snapshotter: str = "overlayfs") -> Iterator[Path]:
        """Mount a pulled image read-only, the reference tree of a full unpack, and yield its directory."""
        target = self.directory / f"tree-{time.monotonic_ns():x}"
        target.mkdir()
        self.ctr("images", "mount", "--snapshotter", snapshotter, reference, target)
        try:
            yield target
        finally:
            self.ctr("images", "unmount", "--snapshotter", snapshotter, "--rm", target)
            target.rmdir()


@contextlib.contextmanager
def containerd(directory: Path, extra: str = "") -> Iterator[Containerd]:
    """Run containerd with its root, state and socket below `directory` (on a disk that can carry overlayfs).

    `extra` is appended to its config (TOML), for proxy snapshotters and the like. The directory's content is removed
    afterwards, and mounts that were left in it are taken off.
    """
    directory.mkdir(parents=True, exist_ok=True)
    address, log, config = directory / "c.sock", directory / "containerd.log", directory / "config.toml"
    if len(os.fsencode(address)) > 100:
        raise ToolFailed(f"{address} is too long for a Unix socket")
    config.write_text(
        f'version = 2\nroot = "{directory / "root"}"\nstate = "{directory / "state"}"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{address}"\n' + extra
    )
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [tool("containerd"), "--config", str(config)], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
    try:
        running = Containerd(directory, address, log, process.pid)
        wait_for_containerd(running, process)
        yield running
    finally:
        stop(process)
        end_below(directory)
        unmount_below(directory)
        for name in ("root", "state"):
            shutil.rmtree(directory / name, ignore_errors=True)


def wait_for_containerd(running: Containerd, process: subprocess.Popen[bytes]) -> None:
    """Return once it answers. Raise ToolFailed with its last words when it ended, or is too slow."""
    deadline = time.monotonic() + START
    while True:
        try:
            running.ctr("version", timeout=START)
            return
        except ToolFailed as error:
            if process.poll() is not None or time.monotonic() > deadline:
                words = running.log.read_text(errors="replace")[-2000:]
                raise ToolFailed(f"containerd did not start: {error}; {words}") from None
            time.sleep(0.05)


# -- what may be left behind -------------------------------------------------------------------------------------------


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points at or below `directory` in this mount namespace, deepest first."""
    prefix = os.path.realpath(directory)
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            point = line.split(" ")[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
            if point == prefix or point.startswith(prefix + "/"):
                found.append(point)
    return sorted(found, reverse=True)


def unmount_below(directory: Path) -> list[str]:
    """Detach every mount at or below `directory` and return what there was."""
    found = mounts_below(directory)
    for point in found:
        # By force: a dead daemon's thread may be in the kernel, waiting for what nobody answers; sync(2) would hang.
        subprocess.run([tool("umount"), "--lazy", "--force", point], check=False, capture_output=True)
    return found


def processes_with(marker: bytes) -> list[tuple[int, str]]:
    """Return (pid, command line) of processes, ourselves aside, whose arguments or environment hold `marker`."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            words = Path("/proc", entry, "cmdline").read_bytes()
            environment = Path("/proc", entry, "environ").read_bytes()
        except OSError:
            continue  # it ended, or belongs to another user
        if words and (marker in words or marker in environment):
            found.append((int(entry), words.replace(b"\0", b" ").decode(errors="replace").strip()))
    return found


def end_below(directory: Path) -> list[str]:
    """Kill the processes whose arguments name `directory` (containerd's shims, say) and return their command lines."""
    marker = os.fsencode(directory)
    ended = []
    for pid, words in processes_with(marker):
        if os.fsdecode(marker) not in words:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            ended.append(words)
    return ended
