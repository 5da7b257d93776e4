"""CRI's image service, passed through: what containerd says reaches kubelet unchanged; logins are read on the way."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from snapshotter import image_service
from snapshotter.node_logins import NodeLogins
from snapshotter.proto import cri_images_pb2 as messages

ROOT = Path(__file__).parents[2]
PULL, LIST = "/runtime.v1.ImageService/PullImage", "/runtime.v1.ImageService/ListImages"
SECRET = "hunter2-correct-horse"
Behaviour = Callable[[str, bytes, grpc.ServicerContext], bytes]


class Upstream(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """A containerd that does with each call what a test wants."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name: str = details.method
        if name.endswith("/Unheard"):
            return None
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self.behaviour(name, request, context))


class Told:
    """A daemon: the documents it was sent."""

    def __init__(self) -> None:
        self.documents: list[list[dict[str, str]]] = []

    def set_logins(self, logins: list[dict[str, str]]) -> None:
        self.documents.append(logins)


def serve(path: Path, *handlers: Any, threads: int = 4) -> grpc.Server:
    big = (("grpc.max_receive_message_length", 17 << 20), ("grpc.max_send_message_length", 17 << 20))
    server = grpc.server(ThreadPoolExecutor(threads), handlers=list(handlers), options=big)
    assert server.add_insecure_port(f"unix:{path}")
    server.start()
    return server


class Line:
    """kubelet, the snapshotter with one thread of its own, and containerd behind it."""

    def __init__(self, place: Path) -> None:
        self.behaviour: Behaviour = lambda name, request, context: request
        self.upstream_path = place / "c.sock"
        self.logins = NodeLogins(patience=2.0)
        self.daemon = Told()
        self.logins.greet(self.daemon)
        self.upstream = serve(self.upstream_path, Upstream(self._behave), threads=16)
        handlers = image_service.handlers(str(self.upstream_path), self.logins)
        self.front = serve(place / "s.sock", *handlers, threads=1)
        self.channel = grpc.insecure_channel(
            f"unix:{place / 's.sock'}",
            options=(("grpc.max_receive_message_length", 17 << 20), ("grpc.use_local_subchannel_pool", 1)),
        )

    def _behave(self, name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        return self.behaviour(name, request, context)

    def ask(self, name: str, request: bytes = b"", timeout: float | None = 10.0, **more: Any) -> bytes:
        answer: bytes = self.channel.unary_unary(name, bytes, bytes)(request, timeout=timeout, **more)
        return answer

    def start(self, name: str, request: bytes = b"", timeout: float = 10.0) -> Any:
        return self.channel.unary_unary(name, bytes, bytes).future(request, timeout=timeout)

    def close(self) -> None:
        self.channel.close()
        for server in (self.front, self.upstream):
            server.stop(0).wait(5)


@pytest.fixture
def line(scratch: Path) -> Iterator[Line]:
    one = Line(scratch)
    yield one
    one.close()


def pull_of(image: str, **auth: str) -> bytes:
    request = messages.PullImageRequest(
        image=messages.ImageSpec(image=image), auth=messages.AuthConfig(**auth) if auth else None
    )
    return request.SerializeToString()


def test_the_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    out, source = tmp_path / "set", ROOT / "snapshotter/proto/cri_images.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--descriptor_set_out={out}", str(source)]
    subprocess.run(command, check=True, timeout=60)
    (made,) = FileDescriptorSet.FromString(out.read_bytes()).file
    module = importlib.import_module("snapshotter.proto.cri_images_pb2")
    checked_in = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    for file in (made, checked_in):
        without_json_names(file.message_type)
    assert checked_in == made
    assert "runtime_version" not in source.with_name("cri_images_pb2.py").read_text()  # older protobufs take it


def without_json_names(types: Any) -> None:
    for message in types:
        for field in message.field:
            field.ClearField("json_name")
        without_json_names(message.nested_type)


# -- nothing is changed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["runtime.v1", "runtime.v1alpha2"])
@pytest.mark.parametrize("method", ["ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo", "New"])
def test_bytes_pass_through_whatever_the_method(line: Line, package: str, method: str) -> None:
    """\\xff is no message at all: it is containerd's to judge."""
    line.behaviour = lambda name, request, context: name.encode() + request
    name = f"/{package}.ImageService/{method}"
    assert line.ask(name, b"\xff\x00") == name.encode() + b"\xff\x00"


def test_messages_of_16_mib_pass_both_ways(line: Line) -> None:
    size = (16 << 20) - 100
    line.behaviour = lambda name, request, context: bytes(size) if request == bytes(size) else b""
    assert line.ask(LIST, bytes(size)) == bytes(size)


def test_metadata_passes_both_ways(line: Line) -> None:
    seen: list[Any] = []

    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.extend(context.invocation_metadata())
        context.send_initial_metadata((("first", "1"),))
        context.set_trailing_metadata((("last-bin", b"\x00\xff"),))
        return b""

    line.behaviour = behaviour
    call = line.channel.unary_unary(LIST, bytes, bytes)
    _, done = call.with_call(b"", timeout=10, metadata=(("traceparent", "00-a"), ("x-bin", b"\x01\xfe")))
    assert ("traceparent", "00-a") in seen and ("x-bin", b"\x01\xfe") in seen
    first: list[Any]
    last: list[Any]
    first, last = map(list, (done.initial_metadata(), done.trailing_metadata()))
    assert ("first", "1") in first and ("last-bin", b"\x00\xff") in last


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE])
def test_errors_keep_their_code_words_and_details(line: Line, code: grpc.StatusCode) -> None:
    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05"),))
        context.abort(code, "what containerd says: “no”")

    line.behaviour = behaviour
    with pytest.raises(grpc.RpcError) as caught:
        line.ask(PULL, pull_of("a.example/b"))
    assert (caught.value.code(), caught.value.details()) == (code, "what containerd says: “no”")
    trailing: list[Any] = list(caught.value.trailing_metadata())
    assert ("grpc-status-details-bin", b"\x08\x05") in trailing


def test_unknown_methods_and_services(line: Line) -> None:
    for name in ("/runtime.v1.ImageService/Unheard", "/runtime.v1.RuntimeService/Version"):
        with pytest.raises(grpc.RpcError) as caught:
            line.ask(name)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_deadline_and_the_end_of_the_caller_reach_containerd(line: Line) -> None:
    left: list[float] = []
    ended = threading.Event()

    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        left.append(context.time_remaining())
        context.add_callback(ended.set)
        ended.wait(10)
        return b""

    line.behaviour = behaviour
    with pytest.raises(grpc.RpcError) as caught:
        line.ask(LIST, timeout=1.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ended.wait(5) and left[0] < 3  # gRPC rounds what it sends
    ended.clear()
    call = line.start(PULL, pull_of("a.example/b"), timeout=3600)
    while len(left) < 2:
        time.sleep(0.01)
    assert 3500 < left[1] < 3700
    call.cancel()
    assert ended.wait(5), "containerd goes on with a pull that nobody wants"


def test_a_call_without_a_deadline_gets_none(line: Line) -> None:
    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        left.append(context.time_remaining())
        return b"done"

    left: list[float] = []
    line.behaviour = behaviour
    assert line.ask(PULL, pull_of("a.example/b"), timeout=None) == b"done"
    assert left[0] is None or left[0] > 1e9


def test_without_containerd_there_is_one_sentence(line: Line) -> None:
    line.upstream.stop(0).wait(5)
    line.upstream_path.unlink(missing_ok=True)
    for name in (LIST, PULL):
        with pytest.raises(grpc.RpcError) as caught:
            line.ask(name)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        words = f"containerd does not answer at {line.upstream_path}: No such file or directory"
        assert caught.value.details() == words
    line.upstream = serve(line.upstream_path, Upstream(lambda name, request, context: b"back"))

    def answered() -> bool:
        try:
            return line.ask(LIST) == b"back"
        except grpc.RpcError:
            time.sleep(0.05)
            return False

    deadline = time.monotonic() + 10
    while not answered():
        assert time.monotonic() < deadline, "containerd is back, and nobody notices"


def test_pulls_leave_the_servers_threads_to_the_snapshots(line: Line) -> None:
    """A pull waits for Prepare: with the pulls in the threads of the snapshots' service neither would end."""
    release = threading.Event()

    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        if name == PULL:
            release.wait(10)
        return b"done"

    line.behaviour = behaviour
    calls = [line.start(PULL, pull_of("a.example/b"), timeout=20) for _ in range(8)]
    assert line.ask(LIST) == b"done"
    release.set()
    assert [call.result() for call in calls] == [b"done"] * 8


# -- logins ------------------------------------------------------------------------------------------------------------


def test_the_daemon_knows_the_login_before_containerd_knows_of_the_pull(
    line: Line, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("snapshotter"), "propagate", True)  # another test may have set up logging
    caplog.set_level(logging.DEBUG, "snapshotter")
    known: list[list[dict[str, str]]] = []

    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        known.append(line.daemon.documents[-1])
        assert messages.PullImageRequest.FromString(request).auth.password == SECRET
        return messages.PullImageResponse(image_ref="sha256:1").SerializeToString()

    line.behaviour = behaviour
    line.ask(PULL, pull_of("a.example:5000/team/app:1", username="alice", password=SECRET))
    line.ask(PULL.replace("v1", "v1alpha2"), pull_of("debian", username="bob", password=SECRET))
    alice = {"host": "a.example:5000", "repository": "team/app", "username": "alice", "password": SECRET}
    bob = {"host": "docker.io", "repository": "library/debian", "username": "bob", "password": SECRET}
    none = {"identity_token": "", "registry_token": ""}
    assert known == [[{**alice, **none}], [{**alice, **none}, {**bob, **none}]]
    line.behaviour = lambda name, request, context: b""
    line.ask(PULL, pull_of("debian"))
    assert line.logins.document() == known[-1], "a pull without a login took one away"
    assert SECRET not in caplog.text and "a.example:5000" in caplog.text
    assert SECRET not in repr(line.logins) + repr(vars(line.logins))


def test_a_login_whose_pull_fails_takes_no_good_ones_place(line: Line) -> None:
    def behaviour(name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        password = messages.PullImageRequest.FromString(request).auth.password
        both.append([entry["password"] for entry in line.daemon.documents[-1]])
        if password == "bad":
            context.abort(grpc.StatusCode.UNKNOWN, "401 Unauthorized")
        return b""

    both: list[list[str]] = []
    line.behaviour = behaviour
    for password in ("good", "bad", "newer"):
        try:
            line.ask(PULL, pull_of("a.example/app", username="u", password=password))
        except grpc.RpcError as error:
            assert password == "bad" and error.details() == "401 Unauthorized"
    assert both == [["good"], ["bad", "good"], ["newer", "good"]], "the older one goes on while the new one is tried"
    deadline = time.monotonic() + 5
    while [entry["password"] for entry in line.daemon.documents[-1]] != ["newer"]:
        assert time.monotonic() < deadline, line.daemon.documents[-1]
        time.sleep(0.01)
