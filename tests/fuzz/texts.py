"""Targets that come as text: hosts.toml, the control protocol from both of its sides, labels."""

from __future__ import annotations

import inspect
import json
import socket
from typing import Any

import trio
import trio.testing

from lazyfs.config import Settings
from lazyfs.control_client import PROTOCOL, Daemon
from lazyfs.errors import LazyfsError, UsageError
from lazyfs.limits import MAX_LINE
from lazyfs.mount.chain_calls import ChainCalls
from lazyfs.mount.control import ControlServer, Say
from lazyfs.mount.mounted import Mounted
from lazyfs.mount.stock_calls import StockCalls
from lazyfs.registry.config import hosts_toml, registries_conf
from lazyfs.registry.config.config_files import read_section
from lazyfs.registry.config.node_logins import NodeLogins
from snapshotter import labels as told
from tests.fuzz.target import Target, place

_DIGEST = "sha256:" + "ab" * 32


# -- hosts.toml and its like


def hosts(data: bytes) -> None:
    """A node's hosts.toml; and the same bytes as podman's registries.conf."""
    directory = place() / "host"
    directory.mkdir(exist_ok=True)
    file = directory / "hosts.toml"
    file.write_bytes(data)
    for read in (
        lambda: hosts_toml.find_host_rules(directory.parent, "host"),
        lambda: registries_conf.read_registries_conf((file,)),
    ):
        try:
            found = read()
        except UsageError as error:
            assert str(file) in error.message
            continue
        if isinstance(found, hosts_toml.HostRules):
            for rule in found.rules:
                assert not set(rule.api) & set(" \r\n\t#?@") and ".." not in rule.api.split("/")
                assert not any(set(name + value) & set("\r\n\0") for name, value in rule.headers)
    read_section(file)


def _hosts() -> list[bytes]:
    return [
        b'server = "https://r.example"\n[host."https://m.example/v2/x"]\ncapabilities = ["pull", "resolve"]\n'
        b'ca = "ca.crt"\nclient = [["a.cert", "a.key"]]\nskip_verify = true\n'
        b'dial_timeout = "3s"\noverride_path = true\n'
        b'[host."https://m.example/v2/x".header]\nx-key = ["a", "b"]\n',
        b'unqualified-search-registries = ["docker.io"]\n[[registry]]\nprefix = "*.example"\nlocation = "a.example/x"\n'
        b'insecure = true\n[[registry.mirror]]\nlocation = "m.example"\npull-from-mirror = "digest-only"\n',
    ]


# -- control protocol


class _Nobody:
    """Stands for all that a call would set to work."""

    def __getattr__(self, name: str) -> Any:
        def work(*_: object, **__: object) -> Any:
            raise UsageError("the work would begin here")

        return work


class _Images(_Nobody):
    node_logins = NodeLogins()


class _Chains:
    """What `Mounted` knows of the chains' service."""

    def __init__(self) -> None:
        nobody: Any = _Nobody()
        self.chains = nobody
        stock = StockCalls(nobody, nobody)
        self.calls = ChainCalls(nobody.work, nobody, nobody, nobody, nobody, nobody, nobody, stock)


class _Calls:
    """The daemon's calls with nobody behind them."""

    def __init__(self) -> None:
        known: dict[str, Any] = {
            "settings": Settings(root=place(), run=place()),
            "images": _Images(),
            "chains": _Chains(),
            "status": _refuse,
            "metrics": _refuse,
            "stop": _stop,
        }
        needed = inspect.signature(Mounted).parameters
        self._mounted = Mounted(**{name: known.get(name, _Nobody()) for name in needed})

    async def handle(self, name: str, args: dict[str, Any], connection: object, say: Say) -> dict[str, Any]:
        say("x", done=1, total=2)
        return await self._mounted.handle(name, args, connection, say)

    async def hung_up(self, connection: object) -> None:
        await self._mounted.hung_up(connection)


async def _refuse(*_: object) -> dict[str, Any]:
    raise UsageError("the work would begin here")


def _stop() -> None:
    pass


def control(data: bytes) -> None:
    """What a client sends, in pieces: each line gets one answer, and nothing that it says is a bug of the daemon."""
    trio.run(_converse, data)


async def _converse(data: bytes) -> None:
    theirs, ours = trio.testing.memory_stream_pair()
    server = ControlServer(place() / "none.sock", _Calls())
    received = bytearray()

    async def listen() -> None:
        async for part in theirs:
            received.extend(part)

    async def talk() -> None:
        for at in range(0, len(data), 1000):
            await theirs.send_all(data[at : at + 1000])
        if not data.endswith(b"\n"):
            await theirs.send_all(b"\n")
        await trio.testing.wait_all_tasks_blocked()
        while received.count(b'"id"') < data.count(b"\n") + (not data.endswith(b"\n")):
            await trio.sleep(0)
        await theirs.send_eof()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            nursery.start_soon(talk)
            await server._converse(ours)  # type: ignore[arg-type]
            await ours.aclose()
    answers = [json.loads(line) for line in bytes(received).splitlines()[1:]]
    answers = [answer for answer in answers if "event" not in answer]
    assert all(("error" in answer) != ("ok" in answer) for answer in answers)
    broken = [answer for answer in answers if answer.get("error", {}).get("class") == "DaemonFault"]
    assert not broken, broken


def _requests() -> list[bytes]:
    layer = {"digest": _DIGEST, "size": 5, "media_type": "x", "annotations": {"a": "b"}, "diff_id": _DIGEST}
    access = {"login": ["u", "p"], "client": ["a", "b"], "environment": {"A": "b"}, "ca": ["/x"], "auth_files": ["/y"]}
    login = {"host": "r.example", "repository": "a/b", "username": "u", "password": "p", "identity_token": "",
             "registry_token": ""}  # fmt: skip
    image = {"image": "r.example/a:b", "platform": "linux/amd64", "plain_http": None, "access": access, "pull": "newer"}
    chain = {"image": "r.example/a:b", "manifest_digest": _DIGEST, "deadline": 3.5, "access": None}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("mount_image", {**image, "lease": True, "command": ["ls"], "entrypoint": "/x", "driver": "fuse"}),
        ("mount_image", {**image, "trace": True}),
        ("attach", {"mount": "m", "dir": "/d", "kind": "rw", "state_dir": "/s"}),
        ("trace_end", {"mount": "m", "ready": 1.5}),
        ("find", {"dir": "/d"}), ("status", {}), ("metrics", {}), ("release", {"mount": "m"}),
        ("fetch_image", {**image, "pin": True}), ("image_state", image), ("cache_images", {"after": ""}),
        ("cache_remove", {"names": ["a"], "force": True}),
        ("cache_prune", {"size": 5, "age": 1.5, "everything": False}),
        ("cache_verify", {"names": []}), ("cache_unpin", {"names": ["a"]}),
        ("resolve_chain", {**chain, "small": 5, "until": _DIGEST}), ("mount_chain", {**chain, "layers": [layer]}),
        ("unmount_chain", {"chain": "c"}), ("chains", {"after": ""}), ("layer_usage", {"digests": [_DIGEST]}),
        ("remove_layers", {"digests": [_DIGEST]}), ("set_logins", {"logins": [login]}),
    ]  # fmt: skip
    lines = [json.dumps({"id": n, "call": call, "args": args}).encode() + b"\n" for n, (call, args) in enumerate(calls)]
    return [*lines, b"".join(lines[9:14])]


def answers(data: bytes) -> None:
    """What something that is no daemon answers a client with."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        theirs.setblocking(False)
        try:
            theirs.sendall(data[:MAX_LINE])
        except BlockingIOError:
            return  # more than a socket holds
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(5)
        Daemon(ours, {}).call("status", on_event=_hear, on_progress=_take)


def _hear(text: str) -> None:
    """Take a remark as a terminal does."""
    assert isinstance(text, str)


def _take(done: int, total: int) -> None:
    """Take a progress as a bar does."""
    assert isinstance(done, int) and isinstance(total, int)


def _answers() -> list[bytes]:
    return [
        b'{"lazyfsd":"1","protocol":%d,"pid":5}\n{"id":1,"event":{"text":"x"}}\n' % PROTOCOL
        + b'{"id":1,"event":{"done":1,"total":5}}\n{"id":1,"ok":{"a":[1]}}\n',
        b'{"id":1,"error":{"class":"ManifestMissing","message":"m","hint":"h"}}\n',
    ]


# -- labels


def labels(data: bytes) -> None:
    """The labels of an extraction: lines of a name's number, and its value."""
    found: dict[str, str] = {}
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        if line:
            found[_LABELS[ord(line[0]) % len(_LABELS)]] = line[1:]
    told.is_extraction(found)
    for parent in ("", _DIGEST):
        asked = told.read(found, parent)
        if isinstance(asked, told.Asked):
            assert asked.image.startswith("docker://") and asked.chain_id == found[told.SNAPSHOT_REF]
        else:
            assert asked.reason and len(asked.reason) < 10_000


_LABELS = (
    told.SNAPSHOT_REF, told.IMAGE_REF, told.MANIFEST_DIGEST, told.LAYER_DIGEST, told.STARGZ_REF, told.STARGZ_DIGEST,
    told.PARENT_CHAIN, told.MAX_SIZE, told.IMAGE_LAYERS, told.DIFF_ID,
)  # fmt: skip


def _labels() -> list[bytes]:
    values = (_DIGEST, "docker.io/library/a:b", _DIGEST, _DIGEST, f"r.example:5000/x@{_DIGEST}", _DIGEST, _DIGEST, "9")
    return [
        "\n".join(f"{chr(ord('P') + n)}{value}" for n, value in enumerate(values)).encode(),  # "P": 80, the first label
        f"P{_DIGEST}\nTr.example/a\nU{_DIGEST}".encode(),
    ]


_TOML_WORDS = tuple(
    word.encode()
    for word in (
        "server = ", "[host.", "capabilities = ", "ca = ", "client = ", "skip_verify = ", "override_path = ",
        "dial_timeout = ", ".header]", "[[registry]]", "[[registry.mirror]]", "prefix = ", "location = ", "blocked = ",
        "a.b.c = 1\n", "server = 5", "ca = [1]", "client = [[]]", "header = 1", 'capabilities = ["x"]',
        'dial_timeout = "1h"',
        "[", "]", "{", "}", '"""', "'''", "1979-05-27T07:32:00Z", "0x", "inf", "nan", "\\u0000", "https://", "[::1]",
    )
)  # fmt: skip

TARGETS = (
    Target("hosts", hosts, _hosts, (UsageError,), _TOML_WORDS),
    Target("control", control, _requests, (), json=True),
    Target("answers", answers, _answers, (LazyfsError,), json=True),  # whichever the answer names
    Target("labels", labels, _labels, (), (b"docker.io/", b"sha256:", b"@", b":", b"oci:", b"[::1]", b"?address=")),
)
