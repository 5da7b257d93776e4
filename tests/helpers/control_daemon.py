"""A lazyfsd of words alone on a real control socket: it answers as a test says, hangs, and dies.

    with ControlDaemon(path) as daemon:
        daemon.answers["chains"] = lambda args: {"chains": []}

`calls` is what was asked, in order. It keeps chains and layers as the real one does, as far as a snapshotter sees.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazyfs.answer import encode_error
from lazyfs.control_client import PROTOCOL
from lazyfs.errors import LazyfsError

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class ControlDaemon:
    """Listens while the `with` lasts. `greets`: without it, it is as one that was stopped (SIGSTOP)."""

    def __init__(self, path: Path, *, greets: bool = True) -> None:
        self.path = path
        self.greets = greets
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0
        self.chains: dict[str, list[str]] = {}
        self.kept: dict[str, str] = {}
        self.removed: list[str] = []
        self.answers: dict[str, Answer] = {}
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ControlDaemon:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "an answer hangs still"

    def die(self) -> None:
        """End as by a kill: every connection is cut, and nobody listens."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the arguments of the calls of that name."""
        return [args for call, args in self.calls if call == name]

    def _begin(self, job: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=job, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with self._lock:
                self._open.add(connection)
            self._begin(self._converse, connection)

    def _converse(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rwb") as file:
            if self.greets:
                _send(file, {"lazyfsd": "0", "protocol": PROTOCOL, "pid": 1})
            for line in file:
                asked = json.loads(line)
                self.calls.append((asked["call"], asked["args"]))
                try:
                    answer = {"ok": self._answer(asked["call"], asked["args"])}
                except LazyfsError as error:
                    answer = {"error": encode_error(error)}
                _send(file, {"id": asked["id"], **answer})
        with self._lock:
            self._open.discard(connection)

    def _answer(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        if name in self.answers:
            return self.answers[name](args)
        match name:
            case "mount_chain":
                digests = [layer["digest"] for layer in args["layers"]]
                chain = "-".join(digest[7:11] for digest in digests)
                self.chains[chain] = digests
                root = {"mode": 0o755, "uid": 0, "gid": 0}
                return {"chain": chain, "lowerdirs": [f"/trees/{chain}"], "root": root}
            case "unmount_chain":
                self.chains.pop(args["chain"], None)
            case "chains":
                return {"chains": [{"chain": name, "layers": layers} for name, layers in self.chains.items()]}
            case "remove_layers":
                shown = {digest for layers in self.chains.values() for digest in layers}
                kept = {one: "it is in use" for one in args["digests"] if one in shown} | {
                    one: why for one, why in self.kept.items() if one in args["digests"]
                }
                gone = [one for one in args["digests"] if one not in kept]
                self.removed += gone
                return {"removed": gone, "kept": kept, "freed": 10 * len(gone)}
        return {}


def _send(file: Any, message: dict[str, Any]) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()
