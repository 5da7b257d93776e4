"""The control socket against everything that a client may send: an error or a hang-up, and the daemon lives."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.control_client import connect
from lazyfs.errors import DaemonUnreachable
from lazyfs.mount.control import MAX_CLIENTS, MAX_LINE
from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, receive_line, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.tars import file, tar_of


def start(node: Node, registry: FakeRegistry) -> str:
    """Have a daemon that lives as long as its one mount; return the mount's id."""
    node.mount(add(registry, "one", zstd_chunked_layer(tar_of(file("f", b"content")))))
    found: str = node.status()["mounts"][0]["mount"]
    return found


def ask(sock: socket.socket, line: bytes) -> dict[str, Any]:
    sock.sendall(line + b"\n")
    answer: dict[str, Any] = json.loads(receive_line(sock))
    return answer


@shows(
    Case("users-garbage", Area.USERS, "garbage on the control socket", RIGHT, "an error for each line"),
)
def test_garbage_lines_are_answered(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    pid = node.pid()
    lines = [
        b"", b"garbage", b"\xff\xfe\x00", b"[]", b"null", b"7", b'"text"', b"{}", b'{"id":1}', b'{"call":7,"args":{}}',
        b'{"call":"status","args":[]}', b'{"call":"status","args":null}', b"[" * 5000, b'{"a":' * 5000,
        b'{"id":{"x":1},"call":"no such call"}', b'{"call":"mount_image"}', b"1e999999", b'{"id":1e999,"call":"find"}',
    ]  # fmt: skip
    with node.raw() as sock:
        for line in lines:
            error = ask(sock, line)["error"]
            assert error["class"] == "UsageError", (line[:50], error)
        assert ask(sock, b'{"id":5,"call":"status"}')["ok"]["daemon"]["pid"] == pid


def test_a_client_that_dies_before_it_attached_leaves_no_mount(node: Node, registry: FakeRegistry) -> None:
    kept = start(node, registry)
    with node.raw() as sock:
        request = {"id": 1, "call": "mount_image", "args": {"image": f"{registry.host}/one"}}
        answer = ask(sock, json.dumps(request).encode())["ok"]
        assert {mount["mount"] for mount in node.status()["mounts"]} == {kept, answer["mount"]}
    until(lambda: [mount["mount"] for mount in node.status()["mounts"]] == [kept], "what nobody attached is released")


def test_wrong_types_and_values(node: Node, registry: FakeRegistry) -> None:
    mount = start(node, registry)
    bad: list[tuple[str, dict[str, Any], set[str]]] = [
        ("mount_image", {"image": 7}, {"UsageError"}),
        ("mount_image", {"image": ""}, {"UsageError"}),
        ("mount_image", {"image": "docker://UPPER CASE"}, {"ReferenceInvalid"}),
        ("mount_image", {"image": "x", "platform": 5}, {"UsageError"}),
        ("mount_image", {"image": "x", "plain_http": "yes"}, {"UsageError"}),
        ("mount_image", {"image": f"{registry.host}/one", "command": "ls"}, {"UsageError"}),
        ("mount_image", {"image": f"{registry.host}/one", "platform": "plan9/mips"}, {"PlatformMissing", "UsageError"}),
        ("attach", {"mount": "unknown", "dir": "/x", "kind": "ro"}, {"MountPointInvalid"}),
        ("attach", {"mount": mount, "dir": "/x", "kind": "strange"}, {"UsageError"}),
        ("attach", {"mount": mount, "dir": 5, "kind": "ro"}, {"UsageError"}),
        ("attach", {"mount": mount, "dir": "/x", "kind": "rw", "state_dir": "/etc"}, {"UsageError"}),
        ("attach", {"mount": mount, "dir": "/x", "kind": "rw", "state_dir": f"{node.root}/../../etc"}, {"UsageError"}),
        ("attach", {"mount": mount, "dir": "/x", "kind": "rw", "state_dir": str(node.root)}, {"UsageError"}),
        ("release", {"mount": []}, {"UsageError"}),
        ("release", {"mount": "unknown"}, {"MountPointInvalid"}),
        ("find", {"dir": "/nowhere"}, {"MountPointInvalid"}),
        ("find", {}, {"UsageError"}),
        ("nonsense", {}, {"UsageError"}),
    ]
    with node.raw() as sock:
        for number, (call, arguments, classes) in enumerate(bad):
            answer = ask(sock, json.dumps({"id": number, "call": call, "args": arguments}).encode())
            assert answer["id"] == number
            assert answer["error"]["class"] in classes, (call, arguments, answer)
    assert [shown["dir"] for shown in node.status()["mounts"]] == [str(node.place / "mnt1")]


@shows(
    Case("users-endless-line", Area.USERS, "a line without end on the control socket", RIGHT, "the connection is cut"),
)
def test_a_line_without_end_is_cut_off(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    with node.raw() as sock:
        try:
            for _ in range(MAX_LINE // 65536 + 8):
                sock.sendall(b"x" * 65536)
            assert receive_line(sock) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert node.read(node.place / "mnt1" / "f") == b"content"
    assert node.status()["daemon"]["memory"] < 80_000_000


def test_half_a_line_then_silence_harms_nobody(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    with node.raw() as silent:
        silent.sendall(b'{"id":1,"call":"sta')
        with node.raw() as other:
            assert "ok" in ask(other, b'{"id":1,"call":"status"}')
        silent.sendall(b'tus"}\n')
        assert "ok" in json.loads(receive_line(silent))


def test_requests_sent_in_one_piece_are_answered_in_order(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    with node.raw() as sock:
        sock.sendall(b"".join(b'{"id":%d,"call":"status"}\n' % number for number in range(20)))
        with sock.makefile("rb") as lines:
            assert [json.loads(lines.readline())["id"] for _ in range(20)] == list(range(20))


def test_a_client_that_reads_nothing_stops_only_itself(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    with node.raw() as deaf:
        deaf.setblocking(False)
        try:
            while deaf.send(b'{"id":1,"call":"status"}\n' * 100):
                pass
        except BlockingIOError:
            pass
        with node.raw() as other:
            assert "ok" in ask(other, b'{"id":1,"call":"status"}')


@shows(
    Case(
        "users-connections",
        Area.USERS,
        "more connections to the control socket than allowed",
        RIGHT,
        "further ones are closed",
    ),
)
def test_more_connections_than_allowed(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    path = str(node.run_dir / "lazyfsd.sock")
    held: list[socket.socket] = []
    refused = 0
    try:
        for _ in range(MAX_CLIENTS + 44):
            sock = socket.socket(socket.AF_UNIX)
            held.append(sock)
            sock.settimeout(10)
            sock.connect(path)
            try:
                refused += receive_line(sock) == b""
            except ConnectionResetError:
                refused += 1
        assert refused == 44
    finally:
        for sock in held:
            sock.close()

    def answers() -> bool:
        try:
            with connect(node.run_dir / "lazyfsd.sock") as daemon:
                return bool(daemon.call("status"))
        except DaemonUnreachable:
            return False  # it has not noticed yet that the others hung up

    until(answers, "there is room again")
    assert node.read(node.place / "mnt1" / "f") == b"content"


def test_another_user_is_not_answered(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    code = """
import socket
os.setgroups([]); os.setgid(1000); os.setuid(1000)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(a[0])
    print(json.dumps("greeted" if sock.recv(100) else "hung up"))
except PermissionError:
    print(json.dumps("no permission"))
"""
    path = node.run_dir / "lazyfsd.sock"
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert node.python(code, path) == "no permission"
    os.chmod(node.run_dir, 0o755)
    os.chmod(path, 0o666)  # even so
    assert node.python(code, path) == "hung up"


def asks_nobody(arguments: dict[str, Any]) -> bool:
    return not isinstance(arguments.get("image"), str) or arguments["image"].startswith("oci:")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.sampled_from(["mount_image", "attach", "release", "find", "status"]) | st.text(max_size=10)
# An image named here is in an OCI layout that does not exist: no test may ask a registry of the real world.
ARGUMENTS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["image", "platform", "plain_http", "lease", "mount", "dir", "kind", "state_dir"]),
    VALUES | st.sampled_from(["oci:/nonexistent:x", "ro", "rw", "/", "..", "\0"]),
    max_size=5,
).filter(asks_nobody)
REQUESTS = st.fixed_dictionaries({}, optional={"id": VALUES, "call": CALLS | VALUES, "args": ARGUMENTS | VALUES})


def test_any_object_gets_an_answer_and_the_daemon_lives(node: Node, registry: FakeRegistry) -> None:
    start(node, registry)
    pid = node.pid()
    with node.raw() as sock:

        @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(REQUESTS.filter(lambda each: each.get("call") != "stop"))
        def fuzz(request: dict[str, Any]) -> None:
            answer = ask(sock, json.dumps(request).encode())
            assert ("error" in answer) != ("ok" in answer)
            assert answer.get("error", {}).get("class") != "DaemonFault", (request, answer)

        fuzz()
    assert node.pid() == pid
    assert node.read(node.place / "mnt1" / "f") == b"content"
