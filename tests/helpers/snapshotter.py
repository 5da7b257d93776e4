"""A lazyfs-snapshotter of a test's own, and a client that speaks to its socket as containerd does.

    with serving(scratch) as client:  # in this process
        client.prepare("key", "")
    with Node(scratch) as node:  # a process of its own, that can be killed
        node.client.prepare("key", "")

Neither starts a lazyfsd. `Client` raises Refused with gRPC's code. Mounts are made with mount(2) by the test itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from lazyfs.config import Settings
from lazyfs.container import mounts
from lazyfs.containerd.proto import snapshots_pb2 as messages
from snapshotter.collaborators import Connect, no_collaborators
from snapshotter.model import Kind, Mount, Usage
from snapshotter.server import build

START = 30.0  # seconds until a started snapshotter must listen
CALL = 30.0  # seconds for a call
_SERVICE = "/containerd.services.snapshots.v1.Snapshots/"
ROOT = Path(__file__).parents[2]


class Refused(Exception):
    """The snapshotter's answer was an error."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


class Info:
    """A snapshot as clients see it. Times are nanoseconds."""

    def __init__(self, info: messages.Info) -> None:
        self.name = info.name
        self.parent = info.parent
        self.kind = Kind(info.kind)
        self.labels = dict(info.labels)
        self.created = info.created_at.seconds * 10**9 + info.created_at.nanos
        self.updated = info.updated_at.seconds * 10**9 + info.updated_at.nanos

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Info) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"Info({vars(self)})"


class Client:
    """A client of a snapshotter's socket. Close it."""

    def __init__(self, address: Path) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "localhost"))
        self._channel = grpc.insecure_channel(f"unix:{address}", options=options)

    def close(self) -> None:
        self._channel.close()

    def _ask(self, name: str, question: Any, answer: Any) -> Any:
        call = self._channel.unary_unary(_SERVICE + name, type(question).SerializeToString, answer.FromString)
        try:
            return call(question, timeout=CALL, wait_for_ready=False)
        except grpc.RpcError as error:
            raise Refused(error.code(), error.details() or "") from None

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        question = messages.PrepareSnapshotRequest(snapshotter="lazyfs", key=key, parent=parent, labels=labels)
        return _mounts(self._ask("Prepare", question, messages.PrepareSnapshotResponse))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        question = messages.ViewSnapshotRequest(snapshotter="lazyfs", key=key, parent=parent, labels=labels)
        return _mounts(self._ask("View", question, messages.ViewSnapshotResponse))

    def mounts(self, key: str) -> list[Mount]:
        return _mounts(self._ask("Mounts", messages.MountsRequest(key=key), messages.MountsResponse))

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        self._ask("Commit", messages.CommitSnapshotRequest(name=name, key=key, labels=labels, parent=parent), Empty)

    def remove(self, key: str) -> None:
        self._ask("Remove", messages.RemoveSnapshotRequest(key=key), Empty)

    def stat(self, key: str) -> Info:
        return Info(self._ask("Stat", messages.StatSnapshotRequest(key=key), messages.StatSnapshotResponse).info)

    def update(self, key: str, labels: Mapping[str, str], *paths: str, parent: str = "") -> Info:
        info = messages.Info(name=key, labels=labels, parent=parent)
        question = messages.UpdateSnapshotRequest(info=info, update_mask=FieldMask(paths=paths))
        return Info(self._ask("Update", question, messages.UpdateSnapshotResponse).info)

    def usage(self, key: str) -> Usage:
        answer = self._ask("Usage", messages.UsageRequest(key=key), messages.UsageResponse)
        return Usage(answer.size, answer.inodes)

    def cleanup(self) -> None:
        self._ask("Cleanup", messages.CleanupRequest(), Empty)

    def batches(self, *filters: str) -> Iterator[list[Info]]:
        """Yield what List sends, message by message."""
        call = self._channel.unary_stream(
            _SERVICE + "List",
            messages.ListSnapshotsRequest.SerializeToString,
            messages.ListSnapshotsResponse.FromString,
        )
        try:
            for answer in call(messages.ListSnapshotsRequest(filters=filters), timeout=CALL):
                yield [Info(info) for info in answer.info]
        except grpc.RpcError as error:
            raise Refused(error.code(), error.details() or "") from None

    def list(self, *filters: str) -> dict[str, Info]:
        return {info.name: info for batch in self.batches(*filters) for info in batch}


@contextlib.contextmanager
def serving(place: Path, connect: Connect = no_collaborators) -> Iterator[Client]:
    """Serve from this process, by default ordinary snapshots alone, and yield a client."""
    server = build(Settings(place / "r", place / "run"), connect)
    client = Client(server.address)
    try:
        server.start()
        yield client
    finally:
        client.close()
        server.close(0)


def _mounts(answer: Any) -> list[Mount]:
    return [Mount(m.type, m.source, tuple(m.options), m.target) for m in answer.mounts]


class Node:
    """A root, a run directory and the snapshotter on them. Leaving it ends the process."""

    def __init__(self, place: Path) -> None:
        self.root = place / "r"
        self.run = place / "run"
        self.address = self.run / "s.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    def __enter__(self) -> Node:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.stop()

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.address)
        return self._client

    def spawn(self, *options: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a snapshotter with this node's directories; later options win."""
        words = ["--root", self.root, "--run", self.run, "--address", self.address, "--wait-for-daemon", *options]
        return subprocess.Popen(
            [sys.executable, "-m", "snapshotter.server", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env={**os.environ, "LAZYFS_CONFIG": "/dev/null", "PYTHONPATH": str(ROOT), **environment},
        )

    def start(self) -> None:
        """Start it and wait until it answers. Raise AssertionError with its words."""
        self._process = self.spawn()
        deadline = time.monotonic() + START
        while True:
            assert self._process.poll() is None, self._said()
            assert time.monotonic() < deadline, "the snapshotter does not listen"
            if self.address.exists():
                with contextlib.suppress(Refused):
                    self.client.list("name==none")
                    return
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        assert self._process is not None
        process, self._process = self._process, None
        if self._client is not None:
            self._client.close()
            self._client = None
        process.send_signal(number)
        return self._end(process)

    def stop_by_another_thread(self) -> int:
        """Send SIGTERM to one thread of the process that is not its first; else as `stop`."""
        assert self._process is not None
        process, self._process = self._process, None
        thread = max(int(name) for name in os.listdir(f"/proc/{process.pid}/task"))
        assert thread != process.pid
        assert ctypes.CDLL(None).tgkill(process.pid, thread, int(signal.SIGTERM)) == 0
        return self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return process.returncode

    def kill(self) -> None:
        """Kill it."""
        self.stop(signal.SIGKILL)

    def _said(self) -> str:
        assert self._process is not None
        return self._process.communicate()[1].decode(errors="replace")

    def refused(self, *options: str | Path) -> str:
        """Start one that must not start, and return the one line that it says."""
        process = self.spawn(*options)
        try:
            _, said = process.communicate(timeout=START)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        lines = said.decode().strip().splitlines()
        assert process.returncode == 1 and len(lines) == 1, (process.returncode, lines)
        return lines[0]


def attach(what: Sequence[Mount], target: Path) -> None:
    """Mount as containerd does, at an existing directory."""
    flags = {"ro": mounts.MS_RDONLY, "rbind": mounts.MS_BIND | mounts.MS_REC, "rw": 0}
    for mount in what:
        place = os.fsencode(target / mount.target.lstrip("/"))
        bits = sum(flags[option] for option in mount.options if option in flags)
        data = ",".join(option for option in mount.options if option not in flags).encode()
        mounts.mount(os.fsencode(mount.source), place, mount.type, bits, data)
        if bits & mounts.MS_BIND and bits & mounts.MS_RDONLY:
            mounts.mount(b"none", place, flags=mounts.MS_REMOUNT | bits)


@contextlib.contextmanager
def mounted(what: Sequence[Mount], work: Path) -> Iterator[Path]:
    """Show mounts at a new directory below `work`."""
    target = Path(tempfile.mkdtemp(prefix="m", dir=work))
    attach(what, target)
    try:
        yield target
    finally:
        mounts.umount(os.fsencode(target))
        target.rmdir()
