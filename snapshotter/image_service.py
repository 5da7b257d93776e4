"""CRI's image service, passed through to containerd byte by byte; on the way kubelet's logins are read, nothing else.

kubelet's --image-service-endpoint names the snapshotter's socket then. What a call says, how long it may take, its
metadata and what becomes of it stay as they are, whatever the method: newer ones need no newer lazyfs.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from lazyfs.limits import CONTAINERD_SOCKET_TIMEOUT, IMAGE_THREADS, MAX_GRPC_MESSAGE, PULL_THREADS
from snapshotter.node_logins import NodeLogins, Noted
from snapshotter.proto import cri_images_pb2 as messages

log = logging.getLogger(__name__)

# v1alpha2 has the same messages under another package's name.
SERVICES = ("runtime.v1.ImageService", "runtime.v1alpha2.ImageService")
_LONGEST = 10 * 365 * 86400.0  # seconds of a deadline that is one
_OURS = frozenset({"user-agent", "content-type", "te", "host", "grpc-status", "grpc-message"})  # of the connection

if TYPE_CHECKING:
    _Handler = grpc.GenericRpcHandler[bytes, bytes]
else:
    _Handler = grpc.GenericRpcHandler

Metadata = tuple[tuple[str, str | bytes], ...]


def handlers(
    upstream: str, node_logins: NodeLogins, note_pull: Callable[[str], None] = lambda code: None
) -> list[grpc.GenericRpcHandler[Any, Any]]:
    """Return what answers CRI's image service, for grpc.Server.add_generic_rpc_handlers. Connects to nothing yet.

    `upstream`: the path of containerd's socket ("unix://" may be before it). `note_pull` is told gRPC's name of how
    each pull ended. The server must let messages of MAX_GRPC_MESSAGE in.
    """
    return [_PassThrough(upstream.removeprefix("unix://"), node_logins, note_pull)]


class _PassThrough(_Handler):
    """Every method of the service, known or not."""

    def __init__(self, path: str, node_logins: NodeLogins, note_pull: Callable[[str], None]) -> None:
        self._path = path
        self._logins = node_logins
        self._note_pull = note_pull
        self._channel = grpc.insecure_channel(
            f"unix:{path}",
            options=(
                ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE),
                ("grpc.max_send_message_length", MAX_GRPC_MESSAGE),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),  # whoever calls decides whether to call again
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.default_authority", "localhost"),  # a path is none, and Go's servers refuse it
            ),
        )
        self._pulls = ThreadPoolExecutor(PULL_THREADS, "cri-pull")
        self._others = ThreadPoolExecutor(IMAGE_THREADS, "cri-image")

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return the handler of a method, None for those of other services."""
        name: str = handler_call_details.method
        service, _, method = name.removeprefix("/").partition("/")
        if service not in SERVICES:
            return None
        pulls = method == "PullImage"

        # One message there and any number back covers calls that answer once, too: on the wire they are the same.
        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._pull(name, request, context) if pulls else self._pass(name, request, context)

        answer.experimental_thread_pool = self._pulls if pulls else self._others  # type: ignore[attr-defined]
        return grpc.unary_stream_rpc_method_handler(answer)

    def _pull(self, name: str, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        noted = _note(self._logins, request)
        ended: list[grpc.StatusCode] = []
        try:
            yield from self._pass(name, request, context, ended.append)
        finally:
            self._note_pull((ended[-1] if ended else grpc.StatusCode.CANCELLED).name)
            if noted is not None:
                # None: nobody knows whether the login was a good one.
                self._logins.settle(noted, worked=_verdict(ended[-1]) if ended else None)

    def _pass(
        self,
        name: str,
        request: bytes,
        context: grpc.ServicerContext,
        tell: Callable[[grpc.StatusCode], None] = lambda code: None,
    ) -> Iterator[bytes]:
        """Call upstream, for as long as the caller waits; `tell` is told how it ended."""
        call = self._channel.unary_stream(name, bytes, bytes)(
            request, timeout=_remaining(context), metadata=_passed(context.invocation_metadata())
        )
        cancel: Callable[[], Any] = call.cancel
        if not context.add_callback(cancel):  # the caller has gone already
            cancel()
        try:
            first = _passed(call.initial_metadata())
            if first:
                context.send_initial_metadata(first)
            yield from call
            context.set_trailing_metadata(_passed(call.trailing_metadata()))
            tell(grpc.StatusCode.OK)
        except grpc.RpcError:
            code, details = call.code(), call.details()
            tell(code)
            if code is grpc.StatusCode.UNAVAILABLE and (why := _why_absent(self._path)):
                details = f"containerd does not answer at {self._path}: {why}"
            context.set_trailing_metadata(_passed(call.trailing_metadata()))
            context.abort(code, details or "")
        finally:
            cancel()


def _note(logins: NodeLogins, request: bytes) -> Noted | None:
    """Take the login out of a PullImageRequest and wait until it is where layers are fetched. Never raises."""
    try:
        question = messages.PullImageRequest.FromString(request)
    except DecodeError:
        log.warning("a request to pull an image could not be read; it is passed on all the same")
        return None
    auth = question.auth
    return logins.note(
        question.image.image,
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def _verdict(code: grpc.StatusCode) -> bool | None:
    """Whether a pull that ended so has proved its login good or bad; None: neither."""
    if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
        return None
    return code is grpc.StatusCode.OK


def _remaining(context: grpc.ServicerContext) -> float | None:
    """Seconds until the caller's deadline, None for a caller without one: kubelet's pulls take as long as they take."""
    seconds: float | None = context.time_remaining()
    return None if seconds is None or seconds > _LONGEST else seconds  # gRPC says centuries for none, and takes none


def _passed(metadata: Iterable[Any] | None) -> Metadata:
    """Metadata without what belongs to the connection that it came over."""
    return tuple((key, value) for key, value in metadata or () if key not in _OURS and not key.startswith(":"))


def _why_absent(path: str) -> str:
    """Tell why nobody can be reached at a socket; "" when somebody can: then the words are containerd's own."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONTAINERD_SOCKET_TIMEOUT)
        try:
            probe.connect(path)
        except OSError as error:
            return error.strerror or "no answer in time"
    return ""
