"""containerd's client where there is no containerd: its messages, its addresses, and servers that don't answer."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from lazyfs import reference as references
from lazyfs.containerd.address import namespace_name, socket_path
from lazyfs.containerd.client import Client, connect
from lazyfs.containerd.proto import content_pb2 as messages
from lazyfs.digest import of
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    RegistryError,
    RegistryFault,
    RegistryTimeout,
    RegistryUnreachable,
    ToolMissing,
    Unauthorized,
    UsageError,
)
from lazyfs.registry.local.open_local import check_destination
from lazyfs.registry.open import OpenOptions, open_repository

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "lazyfs" / "containerd" / "proto"
D = of(b"x")


# -- generated code --------------------------------------------------------------------------------------------------


def test_the_generated_messages_are_those_of_the_proto_files(tmp_path: Path) -> None:
    """Compared as descriptors: another protoc writes other Python, and the same messages."""
    out = tmp_path / "set"
    files = sorted(PROTO.glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--descriptor_set_out={out}", *map(str, files)],
        check=True,
        timeout=60,
    )
    made = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    assert sorted(made) == [str(path.relative_to(ROOT)) for path in files] and files
    for name, file in made.items():
        module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        checked_in = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        for one in (file, checked_in):
            _without_json_names(one.message_type)
        assert checked_in == file, f"{name} was changed: generate {module.__name__} again"


def _without_json_names(types: Any) -> None:
    for message in types:
        for field in message.field:
            field.ClearField("json_name")
        _without_json_names(message.nested_type)


def test_the_generated_code_asks_for_no_newer_protobuf() -> None:
    """What newer protocs generate refuses older libraries; these files run with all that pyproject.toml allows."""
    for path in PROTO.glob("*_pb2.py"):
        assert "runtime_version" not in path.read_text(), path


# -- where it is -----------------------------------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_that_over_the_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINERD_ADDRESS", raising=False)
    monkeypatch.delenv("CONTAINERD_NAMESPACE", raising=False)
    assert (socket_path(), namespace_name()) == ("/run/containerd/containerd.sock", "default")
    monkeypatch.setenv("CONTAINERD_ADDRESS", "unix:///run/k3s/c.sock")
    monkeypatch.setenv("CONTAINERD_NAMESPACE", "k8s.io")
    assert (socket_path(), namespace_name()) == ("/run/k3s/c.sock", "k8s.io")
    assert (socket_path("/other.sock"), namespace_name("mine")) == ("/other.sock", "mine")


@pytest.mark.parametrize("address", ["tcp://h:1", "@abstract", "/" + "x" * 110])
def test_an_address_that_is_no_socket(address: str) -> None:
    with pytest.raises(UsageError):
        socket_path(address)


def test_a_digest_is_no_name_to_write_to() -> None:
    with pytest.raises(UsageError):
        check_destination(references.parse(f"containerd:app@{D}"))
    check_destination(references.parse("containerd:app"))


def test_without_grpc_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lazyfs.containerd.")]:
        if name.rpartition(".")[2] in ("calls", "content", "diff", "images", "leases", "snapshots"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ToolMissing, match="grpcio") as caught:
        open_repository(references.parse("containerd:app"))
    assert "lazyfs[containerd]" in caught.value.hint


def test_other_transports_need_no_grpc() -> None:
    code = "import sys, lazyfs.cli.main, lazyfs.registry.open, lazyfs.cli.convert; assert 'grpc' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# -- servers that fail -----------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "c.sock")


def failing(address: str, timeout: float = 5.0) -> RegistryError:
    """Ask for a manifest and return the error; no longer than the timeout, and a bit."""
    options = OpenOptions(total_timeout=timeout)
    repository = open_repository(references.parse(f"containerd:app?address={address}"), options)
    began = time.monotonic()
    try:
        with pytest.raises(RegistryError) as caught:
            repository.manifest("app")
    finally:
        repository.close()
    assert time.monotonic() - began < timeout + 3
    return caught.value


def test_no_socket(address: str) -> None:
    error = failing(address)
    assert isinstance(error, RegistryUnreachable) and "there is no containerd" in error.message
    assert "--containerd-address" in error.hint


def test_nobody_listens(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
    error = failing(address)
    assert isinstance(error, RegistryUnreachable) and error.temporary and "does not answer" in error.message


def test_a_socket_that_is_not_ours(address: str) -> None:
    """As another user; root may do everything."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.chmod(address, 0o600)
        code = (
            "import os\nfrom lazyfs.containerd.client import connect\n"
            f"client = connect({address!r}, 'default', timeout=5)\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "try: client.images.get('x')\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        directory = Path(address).parent
        for path in (directory, *list(directory.parents)[:3]):
            if path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o055)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
        )
    assert done.stdout.startswith("Unauthorized you may not talk to containerd"), done


def test_a_server_that_says_nothing_is_given_up_in_time(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        error = failing(address, timeout=1.0)
    assert isinstance(error, RegistryTimeout | RegistryUnreachable) and error.temporary


def test_a_server_that_is_no_containerd(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        error = failing(address, timeout=2.0)
        thread.join()
    assert isinstance(error, RegistryTimeout | RegistryUnreachable | RegistryFault)


class Scripted(grpc.GenericRpcHandler):
    """A content store whose Read does as the test says."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        assert dict(details.invocation_metadata)["containerd-namespace"] == "ns"
        if not details.method.endswith("/Read"):
            return None
        return grpc.unary_stream_rpc_method_handler(
            self._read, messages.ReadContentRequest.FromString, messages.ReadContentResponse.SerializeToString
        )


@pytest.fixture
def scripted(address: str) -> Iterator[Any]:
    """Return a function that starts a server with the given Read and gives a client of it."""
    servers: list[grpc.Server] = []
    clients: list[Client] = []

    def start(read: Any) -> Client:
        server = grpc.server(ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((Scripted(read),))
        server.add_insecure_port(f"unix:{address}")
        server.start()
        servers.append(server)
        clients.append(connect(address, "ns", timeout=5))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for server in servers:
        server.stop(None).wait()


def test_ranges_come_in_pieces_of_any_size(scripted: Any) -> None:
    data = bytes(range(256)) * 40

    def read(request: Any, context: Any) -> Iterator[messages.ReadContentResponse]:
        part = data[request.offset : request.offset + request.size]
        for at in range(0, len(part), 1000):
            yield messages.ReadContentResponse(offset=request.offset + at, data=part[at : at + 1000])
            yield messages.ReadContentResponse(data=b"")

    client = scripted(read)
    with client.content.read(D, 77, 5000) as stream:
        assert b"".join(iter(lambda: stream.read(333), b"")) == data[77:5077]
        assert stream.read(1) == b""
    with client.content.read(D, 0, 0) as stream:  # to containerd a size of 0 means all
        assert stream.read(100) == b""


def test_a_large_blob_has_more_time_than_a_small_one(scripted: Any) -> None:
    left: list[float] = []

    def read(request: Any, context: Any) -> Iterator[messages.ReadContentResponse]:
        left.append(context.time_remaining())
        yield messages.ReadContentResponse(data=b"x")

    client = scripted(read)
    for size in (1, 64 << 20):
        with client.content.read(D, 0, size) as stream:
            stream.read(1)
    assert left[0] < 6 and 1000 < left[1] < 1100


def test_too_little_and_too_much_are_bad_answers(scripted: Any) -> None:
    def read(request: Any, context: Any) -> Iterator[messages.ReadContentResponse]:
        yield messages.ReadContentResponse(data=b"x" * 100)

    client = scripted(read)
    with client.content.read(D, 0, 50) as stream, pytest.raises(BadAnswer, match="more"):
        stream.read(50)
    with client.content.read(D, 0, 150) as stream:
        assert stream.read(150) == b"x" * 100
        with pytest.raises(BadAnswer, match="50 bytes shorter"):
            stream.read(50)


@pytest.mark.parametrize(
    ("code", "kind", "temporary"),
    [
        (grpc.StatusCode.NOT_FOUND, BlobMissing, False),
        (grpc.StatusCode.OUT_OF_RANGE, BadAnswer, True),
        (grpc.StatusCode.UNAVAILABLE, RegistryUnreachable, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, RegistryTimeout, True),
        (grpc.StatusCode.PERMISSION_DENIED, Unauthorized, False),
        (grpc.StatusCode.INTERNAL, RegistryFault, True),
        (grpc.StatusCode.UNIMPLEMENTED, RegistryFault, False),
        (grpc.StatusCode.INVALID_ARGUMENT, RegistryFault, False),
    ],
)
def test_what_containerd_says_is_translated(
    scripted: Any, code: grpc.StatusCode, kind: type[RegistryError], temporary: bool
) -> None:
    def read(request: Any, context: grpc.ServicerContext) -> Iterator[messages.ReadContentResponse]:
        yield messages.ReadContentResponse(data=b"begun")
        context.abort(code, "its own words")

    client = scripted(read)
    with client.content.read(D, 0, 100) as stream:
        assert stream.read(100) == b"begun"
        with pytest.raises(kind) as caught:
            stream.read(100)
    assert caught.value.temporary == temporary


def test_a_stream_that_stalls_ends_at_its_deadline(scripted: Any) -> None:
    release = threading.Event()

    def read(request: Any, context: Any) -> Iterator[messages.ReadContentResponse]:
        yield messages.ReadContentResponse(data=b"begun")
        release.wait(30)

    client = scripted(read)
    try:
        with client.content.read(D, 0, 100, deadline=time.monotonic() + 0.5) as stream:
            assert stream.read(100) == b"begun"
            with pytest.raises(RegistryTimeout):
                stream.read(100)
    finally:
        release.set()
