"""One start of a workload on a node of its own, phase by phase, and the proof of what it found there.

The node is the tests' own: containerd with CRI, runc, the host's network; with lazyfs its snapshotter and daemon.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from perf import machine
from perf.shaper import Shaper
from perf.start import StartFailed, drop_caches
from perf.startup_images import Image, read_blobs
from perf.workloads import Answer, Exit, Line, Workload
from tests.helpers import real
from tests.helpers.cri import CriFailed, Pod
from tests.helpers.daemon import until
from tests.helpers.pods import PodNode

DEADLINE = 1800.0  # seconds for a start: 2 GB on the slowest link take some minutes
_LOOK = 0.005  # seconds between two looks whether it is ready
_ALIVE = 0.5  # seconds between two looks whether it still runs
_QUIET = 0.3  # seconds without a byte
_BUSY = 300.0  # seconds to wait for that
_WRITTEN = re.compile(rb"http\.response\.written=(\d+)")

_PROXY = '[proxy_plugins."{name}"]\ntype = "snapshot"\naddress = "{socket}"\n'


@dataclass(frozen=True, slots=True)
class Start:
    """One start. Seconds of each phase; `moved`: bytes that came from the registry until it was ready."""

    pull: float
    create: float
    start: float
    ready: float
    moved: int
    connections: int

    @property
    def total(self) -> float:
        """Seconds from the pull's beginning until it was ready."""
        return self.pull + self.create + self.start + self.ready

    @property
    def without_pull(self) -> float:
        return self.create + self.start + self.ready


class Road:
    """The way to the registry: through a shaper, or plain loopback, whose bytes the registry's own log tells."""

    def __init__(self, registry: real.DockerRegistry, shaper: Shaper | None) -> None:
        self._registry = registry
        self._shaper = shaper
        self.host = f"127.0.0.1:{shaper.port}" if shaper else registry.host

    def moved(self) -> tuple[int, int]:
        """Return the bytes that went to clients so far, and the connections (0 where nobody counts them)."""
        if self._shaper:
            traffic = self._shaper.traffic()
            return traffic.down, traffic.connections
        return sum(int(found[1]) for found in _WRITTEN.finditer(self._registry.log.read_bytes())), 0


@dataclass(frozen=True, slots=True)
class Scene:
    """What all starts of a workload over one link share. `proxies`: sockets of other snapshotters, by name."""

    directory: Path
    cache: Path
    workload: Workload
    image: Image
    road: Road
    proxies: dict[str, Path]

    def reference(self, lazy: bool) -> str:
        return self.image.reference(self.road.host, lazy)


class Node(PodNode):
    """A node that is thrown away as it is: the next start has another."""

    def __init__(self, place: Path, scene: Scene, snapshotter: str, **settings: str) -> None:
        super().__init__(place, f"{scene.road.host}/pause:1", snapshotter=snapshotter)
        self.settings = settings  # beside them lazyfs' own defaults: tests have less patience
        self._scene = scene
        self._names = itertools.count()
        self.pod: Pod | None = None

    def __enter__(self) -> Node:
        super().__enter__()
        try:
            if self.snapshotter == "lazyfs":  # its daemon runs, as on a node
                until(lambda: "bytes" in self.status(), "the snapshotter has its daemon", real.START)
        except BaseException:
            self._throw_away()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._throw_away()

    def new_pod(self) -> None:
        """Start a sandbox for the containers that come: a kubelet does so before it pulls."""
        self.pod = self.cri.run_pod(f"p{next(self._names)}")

    def show(self, image: str) -> None:
        """Have an image's files mounted for a container that is never started."""
        assert self.pod is not None
        self.cri.pull(image, timeout=DEADLINE)
        self.cri.create(self.pod, f"w{next(self._names)}", image, ["/bin/true"], timeout=DEADLINE)

    def run(self, image: str, *, pull: bool = True, created: Callable[[], None] = lambda: None) -> Start:
        """Start the workload until it is ready. `created` is called when the container's files are mounted.

        Raise StartFailed when the workload ends before it is ready, or is too late.
        """
        assert self.pod is not None
        workload, name, port = self._scene.workload, f"w{next(self._names)}", real.free_port()
        command = [word.replace("{port}", str(port)) for word in workload.command]
        before = self._scene.road.moved()
        times = [time.monotonic()]
        try:
            if pull:
                self.cri.pull(image, timeout=DEADLINE)
            times.append(time.monotonic())
            container = self.cri.create(self.pod, name, image, command, timeout=DEADLINE)
            created()
            times.append(time.monotonic())
            self.cri.start_created(container)
            times.append(time.monotonic())
            self._until_ready(container, name, port)
            times.append(time.monotonic())
        except CriFailed as error:
            raise StartFailed(f"{workload.name} on {self.snapshotter}: {error}; {self.words()}") from None
        after = self._scene.road.moved()
        pulled, created_in, started, ready = (later - earlier for earlier, later in itertools.pairwise(times))
        return Start(pulled, created_in, started, ready, after[0] - before[0], after[1] - before[1])

    def clear_containers(self) -> None:
        """Remove the containers that were started."""
        for container in self.cri.containers():
            self.cri.remove(container)

    def _until_ready(self, container: str, name: str, port: int) -> None:
        ready, deadline, look_at = self._scene.workload.ready, time.monotonic() + DEADLINE, 0.0
        log = self.logs / f"{name}.log"
        while True:
            if isinstance(ready, Line) and _said(log, ready.text):
                return
            if isinstance(ready, Answer) and _answers(port, ready):
                return
            if isinstance(ready, Exit) or time.monotonic() >= look_at:
                state = self.cri.state(container)
                look_at = time.monotonic() + _ALIVE
                if state.name == "EXITED":
                    if not state.exit_code and (isinstance(ready, Exit) or _said(log, getattr(ready, "text", ""))):
                        return
                    words = f"{state.exit_code}: {state.words} {self.cri.log(name)[-2000:]}"
                    raise StartFailed(f"{self._scene.workload.name} on {self.snapshotter} ended with {words}")
            if time.monotonic() > deadline:
                raise StartFailed(f"{self._scene.workload.name} on {self.snapshotter} was not ready: {self.words()}")
            time.sleep(_LOOK)

    def _config(self) -> str:
        name = self.snapshotter
        proxy = self._scene.proxies.get(name)
        return super()._config() + (_PROXY.format(name=name, socket=proxy) if proxy else "")

    def stop(self) -> None:
        """End the containers and all processes as an operator does."""
        self._remove_pods()
        super().stop()

    def _throw_away(self) -> None:
        if self.containerd is not None and self.containerd.poll() is None:
            with contextlib.suppress(CriFailed):
                self._remove_pods()
        self._end_all()
        shutil.rmtree(self.place, ignore_errors=True)

    def _remove_pods(self) -> None:
        for pod in self.cri.pods():
            self.cri.remove_pod(pod)


@contextlib.contextmanager
def fresh(scene: Scene, snapshotter: str, traces: Path | None = None, **settings: str) -> Iterator[Node]:
    """Yield a node that never saw the image, with the machine's caches dropped. Raise StartFailed when it did see it.

    `traces` is what an earlier node learned, and all that this one knows.
    """
    place = scene.directory / f"n{next(_NUMBERS)}"
    place.mkdir()
    if traces is not None:
        (place / "l").mkdir(mode=0o700)
        shutil.copytree(traces, place / "l/traces")
    with Node(place, scene, snapshotter, **settings) as node:
        check_empty(node, scene.image)
        until_quiet(scene.road)
        forget(scene)
        node.new_pod()
        yield node


def until_quiet(road: Road) -> None:
    """Wait until nothing comes over the link: another snapshotter may still fetch what an earlier start left it with.

    Raise StartFailed when it doesn't end.
    """
    deadline, before = time.monotonic() + _BUSY, -1
    while (now := road.moved()[0]) != before:
        if time.monotonic() > deadline:
            raise StartFailed(f"somebody else's bytes come over the link for {_BUSY:.0f} s already")
        before = now
        time.sleep(_QUIET)


def forget(scene: Scene) -> None:
    """Drop the machine's caches, and read again what the registry will send. Raise StartFailed if none was dropped."""
    before = machine.caches_dropped()
    drop_caches()
    if machine.caches_dropped() == before:
        raise StartFailed("the kernel dropped no caches: a cold start can't be measured here")
    read_blobs(scene.cache, scene.image)


def check_empty(node: Node, image: Image) -> None:
    """Raise StartFailed when a fresh node has a blob of a workload's image already."""
    for digest in image.blobs:
        name = digest.removeprefix("sha256:")
        for place in (node.root / "layers/sha256", node.place / "root/io.containerd.content.v1.content/blobs/sha256"):
            if (place / name).exists():
                raise StartFailed(f"a fresh node of {node.snapshotter} has {digest} already: this is no cold start")


def check_cold(start: Start, least: int, what: str) -> Start:
    """Return a start that moved `least` bytes or more. Raise StartFailed for one that found something warm."""
    if start.moved < least:
        raise StartFailed(f"{what}: {start.moved} bytes came over the link, not the {least} of a cold start")
    return start


_NUMBERS = itertools.count()


def _said(log: Path, text: str) -> bool:
    try:
        words = log.read_text(errors="replace")
    except OSError:
        return False
    return any(line.split(" ", 3)[-1] == text for line in words.splitlines())


def _answers(port: int, wanted: Answer) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5.0) as link:
            link.sendall(wanted.question)
            return link.recv(64).startswith(wanted.expected)
    except OSError:
        return False
