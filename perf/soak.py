"""Random images, mounts, reads, kills, faults and evictions, for hours: is every byte right, is anything left?

    python -m perf.soak --minutes 60 [--seed 1] [--calm]

One node with a holder and a store too small for its images, a registry that fails now and then. Every read is compared;
one that fails where the registry would have answered in time counts as failed. Each round ends with all images
unmounted: what is left then (mounts, processes, files in the run directory, layers that `lazyfs cache ls` does not
know) and what holder and daemon have (memory, open files, threads) is noted. With --calm nothing is killed, so
that the daemon's own drift shows, once it has been quiet for so long that what it freed is given back: how much of that
there is in the midst of work says nothing. The holder's shows always, for it outlives them all. Prints a JSON line a
round and one at the end, with the machine. Exits with 1 when a read was wrong or failed, something was left, nothing
was evicted, there were too few rounds to tell a drift, or from the first third of the rounds to the last the memory of
the holder grew by more than 5 % or its open files or threads by more than two; with --calm those of daemon and spares
too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lazyfs.container import mounts
from perf import machine
from perf.start import scratch
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.registry_faults import Fault
from tests.helpers.takeover import Held, held
from tests.helpers.tars import dir_, file, tar_of

DRIFT = 0.05  # of a process's memory, promised
SLACK = 2.0  # open files, or threads
ROUNDS = 6  # without so many there are no thirds to compare
_OF_A_DAEMON = frozenset({"mnt", "erofs", "attached", "lazyfsd.sock", "lazyfsd.log", "holder.lock"})
_IMAGES = 6
_FILES = 8  # of an image
_LARGEST = 400_000  # bytes of a file
_MOUNTED = 4  # images at once
_ACTIONS = 25  # of a round
_QUIET = 8.0  # seconds: a daemon looks every three whether it has been quiet (lazyfs.mount.heap)
_SETTINGS = {
    "STORE_SIZE": "3MiB", "MEMORY_SIZE": "4MiB", "READ_TIMEOUT": "60", "ANSWER_TIMEOUT": "2", "BACKGROUND": "1",
    "DAEMON_LINGER": "600",
}  # fmt: skip
# What a registry does for a moment and a reader must not notice. Wrong bytes are no such thing: the host is distrusted.
_FAULTS: tuple[tuple[Fault, dict[str, Any]], ...] = (
    (Fault.REFUSE, {}), (Fault.RESET, {}), (Fault.TRUNCATE, {}), (Fault.STATUS, {"status": 503}),
    (Fault.STATUS, {"status": 429, "retry_after": "1"}), (Fault.DELAY, {"seconds": 0.3}), (Fault.STALL, {}),
)  # fmt: skip
_READ = """
import json, os, random, sys
sys.path.insert(0, sys.argv[4])
from tests.helpers.pattern import pattern
root, files, rng = sys.argv[1], json.loads(sys.argv[2]), random.Random(int(sys.argv[3]))
count = size = 0
wrong = []
for _ in range(30):
    name = rng.choice(list(files))
    want = pattern(files[name])
    at = rng.randrange(len(want))
    length = rng.choice((1, 4096, 70_000, len(want)))
    try:
        with open(os.path.join(root, name), "rb", buffering=0) as handle:
            got = os.pread(handle.fileno(), length, at)
            if rng.random() < 0.3:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if got != want[at : at + length]:
            wrong.append(f"{name} at {at}: {len(got)} bytes that are not its")
    except OSError as error:
        wrong.append(f"{name} at {at}: {error}")
    count, size = count + 1, size + length
print(json.dumps([count, size, wrong]))
"""


@dataclass
class Tally:
    """What has happened so far. Sizes in bytes."""

    rounds: int = 0
    mounts: int = 0
    refused: int = 0  # mounts that the registry's faults made fail
    reads: int = 0
    bytes: int = 0
    kills: int = 0
    upgrades: int = 0
    faults: int = 0
    evicted: int = 0  # bytes, by the daemon that evicted most
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Image:
    """One image: its reference, and the size of each file, which is also what its content is made from."""

    added: AddedImage
    files: dict[str, int]


class Soak:
    """One node and what is done to it."""

    def __init__(self, node: Node, daemon: Held, registry: FakeRegistry, rng: random.Random, *, calm: bool) -> None:
        self._node = node
        self._daemon = daemon
        self._registry = registry
        self._rng = rng
        self._calm = calm
        self._images = [self._image(number) for number in range(_IMAGES)]
        self._shown: dict[Path, Image] = {}
        self.tally = Tally()

    def _image(self, number: int) -> Image:
        layers, files = [], {}
        for part in range(self._rng.randint(1, 3)):
            members = []
            for index in range(_FILES):
                name, size = f"d{part}/f{index}", self._rng.randint(1, _LARGEST)
                files[name] = size
                members.append(file(name, pattern(size)))
            layers.append(zstd_chunked_layer(tar_of(dir_(f"d{part}"), *members)))
        return Image(add(self._registry, f"image{number}", *layers), files)

    def round(self) -> dict[str, Any]:
        """Do some of everything, and take all away again. Return what the processes have then."""
        for _ in range(_ACTIONS):
            self._rng.choice((self._mount, self._umount, self._read, self._read, self._fault, self._end))()
        self._calm_down()
        while self._shown:
            self._umount()
        self.tally.rounds += 1
        until(lambda: not self._node.status()["mounts"], "nothing is mounted", 30)
        # A spare is there again: how many there are is no drift.
        until(lambda: len(self._node.processes()) >= 3, "a standby is there", 30)
        self._look_for_rest()
        if self._calm:
            time.sleep(_QUIET)
        serving = self._daemon.pid()
        self._note_evicted()
        spares = [_has(pid) for pid in self._node.processes() if pid != serving]
        return {"holder": _has(self._daemon.process.pid), "daemon": _has(serving), "spares": _sum(spares)}

    def _mount(self) -> None:
        if len(self._shown) < _MOUNTED:
            image = self._rng.choice(self._images)
            driver = self._rng.choice(("fuse", "erofs"))
            where = self._node.new_dir()
            words = ("mount", "--driver", driver, image.added.reference, where)
            if self._node.lazyfs(*words).returncode != 0:
                # A command says what is wrong rather than wait; the next one finds a registry that is well.
                self._calm_down()
                done = self._node.lazyfs(*words)
                assert done.returncode == 0, done.stderr
                self.tally.refused += 1
            self._shown[where] = image
            self.tally.mounts += 1

    def _calm_down(self) -> None:
        self._registry.clear_faults()
        self._registry.release()

    def _umount(self) -> None:
        if self._shown:
            where = self._rng.choice(list(self._shown))
            del self._shown[where]
            self._node.umount(where)
            where.rmdir()

    def _read(self) -> None:
        if not self._shown:
            return self._mount()
        where, image = self._rng.choice(list(self._shown.items()))
        words = [str(where), json.dumps(image.files), str(self._rng.getrandbits(32)), str(Path(__file__).parents[1])]
        done = self._node.tool(sys.executable, "-c", _READ, *words, timeout=120)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        count, size, wrong = json.loads(done.stdout)
        self.tally.reads += count
        self.tally.bytes += size
        self.tally.wrong += wrong

    def _fault(self) -> None:
        kind, more = self._rng.choice(_FAULTS)
        self._registry.fault(kind, path="/blobs/", times=self._rng.randint(1, 3), **more)
        self.tally.faults += 1

    def _end(self) -> None:
        if self._calm:
            return
        self._note_evicted()
        if self._rng.random() < 0.8:
            self._daemon.kill()
            self.tally.kills += 1
        else:
            done = self._node.lazyfs("upgrade")
            assert done.returncode == 0, done.stderr
            self.tally.upgrades += 1

    def _note_evicted(self) -> None:
        with self._daemon.call() as daemon:
            evicted = daemon.call("status")["cache"]["store"]["evicted"]
        self.tally.evicted = max(self.tally.evicted, evicted)

    def _look_for_rest(self) -> None:
        node = self._node
        shown = {entry.dir for entry in mounts.below(os.fsencode(node.place))}
        shown.discard(os.fsencode(node.run_dir / "mnt"))
        self.tally.left += [f"mount {os.fsdecode(path)}" for path in shown]
        daemons = len(node.processes())
        if daemons > 3:  # the one that serves, the standby, and what forks them
            self.tally.left.append(f"{daemons} daemons")
        files = (Path(top, name) for top, _, names in os.walk(node.root) for name in names)
        self.tally.left += [f"file {path}" for path in files if path.suffix in (".new", ".tmp", ".again")]
        self.tally.left += [f"{path} in the run directory" for path in strangers(node.run_dir)]
        done = node.lazyfs("cache", "ls", "--json")
        assert done.returncode == 0, done.stderr
        known = {layer["digest"][7:] for layer in json.loads(done.stdout)["layers"]}
        stored = set(os.listdir(node.root / "layers" / "sha256"))
        self.tally.left += [f"layer {name} that `cache ls` does not know" for name in sorted(stored - known)]


def strangers(run_dir: Path) -> list[str]:
    """Return what is in a run directory and is not a daemon's that shows nothing."""
    found = [name for name in os.listdir(run_dir) if name not in _OF_A_DAEMON]
    for name in ("attached", "erofs"):  # a record for each mount, a directory for each tree that is shown
        if (run_dir / name).is_dir():
            found += [f"{name}/{each}" for each in os.listdir(run_dir / name)]
    return sorted(found)


def _has(pid: int) -> dict[str, int]:
    """Return a process's memory (bytes), open files and threads.

    Of the memory what no file has, shared with those that it was forked from or not: what is its alone grows whenever
    one of them writes a page, and is nobody's leak.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {
        "memory": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:")),
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def _sum(each: list[dict[str, int]]) -> dict[str, int]:
    """Return what standby and template have together: which of them is there varies from round to round."""
    return {name: sum(one[name] for one in each) for name in ("memory", "fds", "threads")}


def drift(values: list[int], what: str) -> tuple[float, float] | None:
    """Return the median of the first third of the values, and by how much that of the last is more.

    Files and threads come and go: connections are kept for a while, and so are the files of layers. Of those it is the
    least of the last third that is compared, which a leak raises too. None: the values are too few to tell.
    """
    if len(values) < ROUNDS:
        return None
    third = len(values) // 3
    before, last = statistics.median(values[:third]), values[-third:]
    return before, (statistics.median(last) if what == "memory" else min(last)) - before


def leaks(rounds: list[dict[str, Any]], *, calm: bool) -> list[str]:
    """Return what grew by more than it may, or that there were too few rounds to tell."""
    if len(rounds) < ROUNDS:
        return [f"nothing is known of any drift: {len(rounds)} rounds, and it takes {ROUNDS}"]
    found = []
    for who in ("holder", "daemon", "spares") if calm else ("holder",):
        for what in ("memory", "fds", "threads"):
            before, more = drift([one[who][what] for one in rounds], what) or (0.0, 0.0)
            if more > (before * DRIFT if what == "memory" else SLACK):
                found.append(f"{what} of {who}: {before:.0f} and {more:.0f} more")
    return found


def run(place: Path, seconds: float, seed: int, *, calm: bool) -> tuple[Tally, list[dict[str, Any]]]:
    """Soak for so long, one round at least. Return what happened, and what the processes had after each round."""
    until_then = time.monotonic() + seconds
    rounds: list[dict[str, Any]] = []
    with FakeRegistry() as registry, Node(place, (), **_SETTINGS) as node, held(node) as daemon:
        soak = Soak(node, daemon, registry, random.Random(seed), calm=calm)
        while not rounds or time.monotonic() < until_then:
            rounds.append(soak.round())
            print(json.dumps({"what": "round", **rounds[-1], "so_far": asdict(soak.tally)}), flush=True)
    return soak.tally, rounds


def main() -> int:
    """Soak, print, return 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--calm", action="store_true", help="kill and upgrade nothing")
    args = parser.parse_args()
    with scratch() as place:
        tally, rounds = run(place, args.minutes * 60, args.seed, calm=args.calm)
    grown = {
        f"{who}_{what}": drift([one[who][what] for one in rounds], what)
        for who in ("holder", "daemon", "spares")
        for what in ("memory", "fds", "threads")
    }
    grew = leaks(rounds, calm=args.calm)
    result = {"what": "soak", "seed": args.seed, "calm": args.calm, **asdict(tally), "drift": grown, "leaks": grew}
    print(json.dumps(result | machine.facts()), flush=True)
    return 1 if tally.wrong or tally.left or grew or not tally.evicted else 0


if __name__ == "__main__":
    os.environ.setdefault("LAZYFS_TEST_SESSION", "perf")
    sys.exit(main())
