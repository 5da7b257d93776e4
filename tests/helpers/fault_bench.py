"""One daemon on which many images are broken at once, while a reader of another image watches that it stays well.

    with Bench(scratch, READ_TIMEOUT="2") as bench:
        victim = bench.victim("refused")
        bench.show(victim)
        victim.registry.fault(Fault.REFUSE, path="/blobs/")
        tried = bench.read_all([victim])

Each victim has a registry of its own, because the daemon's opinions are of hosts. Leaving asserts that the witness read
right bytes to the end, and that nothing is left.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lazyfs.control_client import Daemon, connect
from lazyfs.registry.config.access import Access
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

SIZE = 400_000  # bytes of each victim's file `data`
DRIVERS = ("fuse", "erofs")
_WATCHED = 64  # files of the witness
_WATCH = """
import hashlib, json, os, sys, time
tree, stop, names = sys.argv[1], sys.argv[2], json.load(sys.stdin)
print("watching", flush=True)
reads = wrong = failed = 0
slowest = 0.0
while not os.path.exists(stop):
    for name, digest in names.items():
        began = time.monotonic()
        try:
            with open(os.path.join(tree, name), "rb", buffering=0) as handle:
                wrong += hashlib.sha256(handle.readall()).hexdigest() != digest
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            failed += 1
        reads += 1
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
print(json.dumps({"reads": reads, "wrong": wrong, "failed": failed, "slowest": slowest}))
"""


@dataclass(slots=True)
class Victim:
    """An image that is to suffer, on a registry of its own."""

    name: str
    registry: FakeRegistry
    image: AddedImage
    reference: str
    content: bytes
    access: Access | None = None
    trees: dict[str, Path] = field(default_factory=dict)  # by driver


@dataclass(frozen=True, slots=True)
class Tried:
    """How a reader fared: what it got until it ended, and its words where that was an error."""

    data: bytes
    failed: bool
    words: str
    seconds: float


class Bench:
    """A node whose daemon has a witness from the start. `settings` as Node's; `prefix` too."""

    def __init__(self, place: Path, prefix: tuple[str, ...] = (), **settings: str) -> None:
        self.node = Node(place, prefix, **settings)
        self._stack = ExitStack()
        self._seed = 1000
        self._stop = place / "stop"
        self._watch: subprocess.Popen[bytes] | None = None
        self.control: Daemon

    def __enter__(self) -> Bench:
        with self._stack:  # what was begun ends where the start fails
            self._stack.enter_context(self.node)
            registry = self._stack.enter_context(FakeRegistry())
            contents = {f"w{number}": pattern(6000, number) for number in range(_WATCHED)}
            layer = zstd_chunked_layer(tar_of(*(file(name, data) for name, data in contents.items())), frame_size=0)
            self.witness = self.node.mount(add(registry, "witness", layer), "--driver", "fuse")
            self.control = self._stack.enter_context(connect(self.node.run_dir / "lazyfsd.sock"))
            self._begin_watch(contents)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self._stack:
            self._stop.touch()
            if self._watch is not None:
                said = self.node.finish(self._watch, 30)
                if kind is None:
                    self._check_witness(said)
            self.control.close()
            self._stack.pop_all().__exit__(kind, error, trace)

    def _begin_watch(self, contents: dict[str, bytes]) -> None:
        import hashlib

        words = [sys.executable, "-I", "-S", "-c", _WATCH, str(self.witness), str(self._stop)]
        self._watch = self.node.spawn(words, feed=True)
        assert self._watch.stdin is not None and self._watch.stdout is not None
        names = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        self._watch.stdin.write(json.dumps(names).encode())
        self._watch.stdin.close()
        self._watch.stdin = None  # or communicate() would flush it
        assert self._watch.stdout.readline() == b"watching\n"

    @staticmethod
    def _check_witness(said: subprocess.CompletedProcess[bytes]) -> None:
        assert said.returncode == 0, said.stderr
        seen = json.loads(said.stdout)
        assert seen["reads"] >= _WATCHED and (seen["wrong"], seen["failed"]) == (0, 0), seen
        assert seen["slowest"] < 5, seen  # seconds; a machine that runs other tests too is that slow, a hang is slower

    # -- victims

    def victim(self, name: str, layer: LayerBlob | None = None, content: bytes = b"", **registry: Any) -> Victim:
        """Add an image with a file `data` on a registry of its own; `registry`: what FakeRegistry takes."""
        self._seed += 1
        content = content or pattern(SIZE, self._seed)
        layer = layer or zstd_chunked_layer(tar_of(file("data", content)), chunk_size=1 << 17, frame_size=0)
        host = self._stack.enter_context(FakeRegistry(**registry))
        image = add(host, "victim", layer)
        return Victim(name, host, image, image.reference, content)

    def show(self, victim: Victim, drivers: tuple[str, ...] = DRIVERS) -> list[str]:
        """Have the daemon show the image with each driver, as long as the bench lasts. Raise the daemon's error.

        Return of each layer why it is not lazy, "" of one that is.
        """
        reasons: list[str] = []
        for driver in drivers:
            shown = self.control.call(
                "mount_image",
                image=victim.reference,
                platform=None,
                plain_http=None,
                access=victim.access.to_json() if victim.access else None,
                lease=True,
                driver=driver,
                timeout=60,
            )
            assert shown["driver"] == driver, shown["reason"]
            victim.trees[driver] = Path(shown["path"])
            reasons = [layer["reason"] for layer in shown["layers"]]
        return reasons

    # -- what readers, users and metrics see

    def read_all(self, victims: list[Victim], bound: float) -> dict[str, list[Tried]]:
        """Read all victims' files at once, by each driver. Raise Hung where one takes longer than `bound` seconds."""
        began = time.monotonic()
        readers = [
            (victim.name, self.node.spawn(["cat", str(tree / "data")]))
            for victim in victims
            for tree in victim.trees.values()
        ]
        found: dict[str, list[Tried]] = {victim.name: [] for victim in victims}
        for name, reader in readers:
            done = self.node.finish(reader, max(0.1, bound - (time.monotonic() - began)))
            words = done.stderr.decode(errors="replace")
            found[name].append(Tried(done.stdout, done.returncode != 0, words, time.monotonic() - began))
        return found

    def until_right(self, victims: list[Victim], patience: float = 20.0) -> None:
        """Wait until all victims can be read, and assert that the bytes are right."""
        left = list(victims)

        def all_read() -> bool:
            tried = self.read_all(left, patience)
            for victim in left:
                for each in tried[victim.name]:
                    assert victim.content.startswith(each.data), f"{victim.name}: wrong bytes"
            left[:] = [victim for victim in left if any(each.failed for each in tried[victim.name])]
            return not left

        until(all_read, f"{[victim.name for victim in left]} are read again", patience)

    def forget_pages(self, victim: Victim) -> None:
        """Have the kernel ask the daemon for the victim's file again."""
        code = "os.posix_fadvise(os.open(a[0], os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)"
        for tree in victim.trees.values():
            self.node.python(code, tree / "data")

    def errors(self) -> dict[str, float]:
        """Return the daemon's counted errors by class."""
        return {label: value for (name, label), value in self.metrics().items() if name == "lazyfsd_errors_total"}

    def metrics(self) -> dict[tuple[str, str], float]:
        """Return the daemon's metrics, see `metrics_of`."""
        return metrics_of(self.node)


def metrics_of(node: Node) -> dict[tuple[str, str], float]:
    """Return a daemon's metrics by name and the value of their (first) label, "" where they have none."""
    with connect(node.run_dir / "lazyfsd.sock") as daemon:
        text = daemon.call("metrics", timeout=10)["text"]
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }
