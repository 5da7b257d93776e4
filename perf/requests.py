"""What does a request cost in our loop, beside pyfuse3's own?

    python -m perf.requests [--reads 4000] [--rounds 5]

Two servers of one file of zeros that lies in memory: pyfuse3's loop, and `lazyfs.mount.connection` with what it mounts
by. Reads of 4 KiB, 128 KiB and 1 MiB with O_DIRECT, so that each is a request; both servers in turns, in a shuffled
order. Prints a JSON line a size: microseconds a read takes, and of the server's processor time, medians; the ratios of
ours to pyfuse3's. Exits with 1 when ours takes longer. Method: perf/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from lazyfs.mount import wire
from lazyfs.mount.connection import Answer
from lazyfs.mount.forest import Attributes
from lazyfs.mount.session import Session
from lazyfs.mount.wire import Op
from perf import machine
from perf.pairs import shuffled
from perf.start import scratch
from tests.helpers import real

_NAME, _NODE = b"file", 2
_SIZE = 64 << 20  # bytes of the file
_SIZES = (4 << 10, 128 << 10, 1 << 20)  # bytes of a read
_FOREVER = 3600  # seconds
_DATA = bytes(1 << 20)
_ALLOWED = 1.0
_PATIENCE = 30.0  # seconds for a server to mount, or to end
OURS, PLAIN = "lazyfs", "pyfuse3"


def _attributes(node: int) -> Attributes:
    if node == _NODE:
        return Attributes(node, 0o100644, 1, 0, 0, _SIZE, 0, 0)
    return Attributes(node, 0o040755, 2, 0, 0, 0, 0, 0)


class Handler:
    """One file, as `Connection` asks for it."""

    def handle(self, opcode: int, node: int, body: memoryview) -> Answer:
        if opcode == Op.READ:
            return 0, _DATA[: wire.read_in(body)[2]]
        if opcode == Op.LOOKUP:
            return 0, wire.entry_out(_attributes(_NODE), _FOREVER, _FOREVER)
        if opcode == Op.GETATTR:
            return 0, wire.attr_out(_attributes(node), _FOREVER)
        if opcode in (Op.OPEN, Op.OPENDIR):
            return 0, wire.open_out(node, 0)
        if opcode == Op.STATFS:
            return 0, wire.statfs_out(block=4096, blocks=1, files=1, name_length=255)
        return 0, b""


class Plain(pyfuse3.Operations):
    """The same file, as pyfuse3 asks for it."""

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return await self.getattr(_NODE, ctx)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        found, entry = _attributes(inode), pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_size, entry.st_nlink = inode, found.mode, found.size, found.nlink
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        return entry

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return _DATA[:size]


def serve(which: str, directory: Path) -> None:
    """Serve until somebody unmounts."""
    if which == OURS:
        session = Session(Handler(), directory, allow_other=True)
        session.open()
        trio.run(session.run)
    else:
        pyfuse3.init(Plain(), os.fspath(directory), {*pyfuse3.default_options, "fsname=plain", "ro"})
        trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)


@contextlib.contextmanager
def serving(which: str, directory: Path) -> Iterator[int]:
    """Run a server; yield its process."""
    directory.mkdir()
    with subprocess.Popen([sys.executable, "-m", "perf.requests", "--serve", which, os.fspath(directory)]) as process:
        try:
            until = time.monotonic() + _PATIENCE
            while not os.path.ismount(directory):
                assert process.poll() is None and time.monotonic() < until, f"{which} does not mount"
                time.sleep(0.05)
            yield process.pid
        finally:
            real.unmount_below(directory.parent)
            process.wait(_PATIENCE)


def read_all(path: Path, size: int, count: int, pid: int) -> tuple[float, float]:
    """Read `count` times; return seconds a read, and the server's processor time for one."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, size)
        before, began = _server_seconds(pid), time.monotonic()
        for number in range(count):
            assert os.preadv(fd, [buffer], number * size % _SIZE) == size
        return (time.monotonic() - began) / count, (_server_seconds(pid) - before) / count
    finally:
        os.close(fd)


def _server_seconds(pid: int) -> float:
    # Of the main thread, in nanoseconds: clock ticks are too coarse.
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def measure(place: Path, reads: int, rounds: int) -> list[dict[str, Any]]:
    """Return a result a size; see the module."""
    taken: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with serving(OURS, place / OURS) as ours, serving(PLAIN, place / PLAIN) as plain:
        servers = {OURS: ours, PLAIN: plain}
        for order in shuffled([(size, which) for size in _SIZES for which in servers], rounds):
            for size, which in order:
                count = max(200, reads * 4096 // max(4096, size // 8))
                found = read_all(place / which / os.fsdecode(_NAME), size, count, servers[which])
                taken.setdefault((size, which), []).append(found)
    out = []
    for size in _SIZES:
        result: dict[str, Any] = {"what": "requests", "bytes": size}
        for place_of, what in enumerate(("us_a_read", "server_us_a_read")):
            medians = {
                which: statistics.median(found[place_of] for found in taken[size, which]) for which in (OURS, PLAIN)
            }
            result[what] = {which: round(seconds * 1e6, 1) for which, seconds in medians.items()}
            result[f"{what}_ratio"] = round(medians[OURS] / medians[PLAIN], 3)
        out.append(result)
    return out


def main() -> int:
    """Print the results; return 1 when our loop costs more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reads", type=int, default=4000, help="of 4 KiB, a round; of larger ones there are fewer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("WHICH", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], Path(args.serve[1]))
        return 0
    good = True
    with scratch() as place:
        for result in measure(place, args.reads, args.rounds):
            print(json.dumps(result | machine.facts()), flush=True)
            good &= result["us_a_read_ratio"] <= _ALLOWED
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
