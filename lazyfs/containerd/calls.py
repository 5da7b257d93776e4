"""Calls to containerd over its Unix socket: deadlines, the namespace header, and gRPC's errors translated once.

Importing this takes grpcio; `lazyfs.containerd.client.connect` says so in a sentence where it is absent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from lazyfs.errors import LazyfsError, RegistryFault, RegistryTimeout, RegistryUnreachable, StoreFull, Unauthorized
from lazyfs.limits import MAX_CONTAINERD_WORDS, MAX_GRPC_MESSAGE

_FULL = ("no space left on device", "disk quota exceeded")  # ENOSPC and EDQUOT, in Go's words


class Message(Protocol):
    """What a generated message class can do."""

    def SerializeToString(self) -> bytes: ...

    @classmethod
    def FromString(cls, s: bytes, /) -> Self: ...


Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, A]):
    """A call of a service: "/PACKAGE.SERVICE/NAME" and its two messages."""

    path: str
    question: type[Q]
    answer: type[A]


class Refused(Exception):
    """containerd's own answer was an error. `code` is gRPC's name for it. Stays within this package."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class Calls:
    """A channel to one containerd, in one namespace. Thread-safe. Connects with the first call, again after a loss.

    `address` is the socket's path. `timeout` bounds each call, in seconds, where no deadline is given.
    """

    def __init__(self, address: str, namespace: str, timeout: float) -> None:
        self.address = address
        self.namespace = namespace
        self.timeout = timeout
        self._channel: grpc.Channel | None = None
        self._lock = threading.Lock()

    def one(self, method: Method[Q, A], question: Q, *, lease: str = "", deadline: float | None = None) -> A:
        """Ask one question and return its answer. Blocking. Raise Refused."""
        call = self._open().unary_unary(method.path, method.question.SerializeToString, method.answer.FromString)
        try:
            answer: A = call(question, timeout=self._seconds(deadline), metadata=self._headers(lease))
        except grpc.RpcError as error:
            raise refused(error) from None
        return answer

    def answers(self, method: Method[Q, A], question: Q, *, deadline: float | None = None) -> Any:
        """Return the gRPC call that gives a stream of answers; iterate with `following`, end with its cancel()."""
        call = self._open().unary_stream(method.path, method.question.SerializeToString, method.answer.FromString)
        return call(question, timeout=self._seconds(deadline), metadata=self._headers(""))

    def exchange(
        self, method: Method[Q, A], questions: Iterator[Q], *, lease: str = "", deadline: float | None = None
    ) -> Any:
        """Return the gRPC call that takes a stream of questions, in a thread of gRPC's, and gives one of answers."""
        call = self._open().stream_stream(method.path, method.question.SerializeToString, method.answer.FromString)
        return call(questions, timeout=self._seconds(deadline), metadata=self._headers(lease))

    def fault(self, what: str, error: Refused) -> LazyfsError:
        """Return what `error` is for callers: a RegistryError, or StoreFull. `what` says what was being done."""
        detail = f": {error.detail[:MAX_CONTAINERD_WORDS]}" if error.detail else ""
        here = f"containerd at {self.address}"
        if any(words in error.detail for words in _FULL):
            return StoreFull(f"the disk of {here} is full: {what}{detail}")
        if error.code == "UNAVAILABLE":
            return self._unreachable(detail)
        if error.code == "UNIMPLEMENTED":
            old = RegistryFault(self.address, f"{here} can't do this: {what}{detail}", status=0)
            old.temporary = False
            old.hint = "it is too old, or runs without that service; containerd 1.6 or later is needed"
            return old
        if error.code == "DEADLINE_EXCEEDED":
            return RegistryTimeout(self.address, f"{here} did not answer in time: {what}")
        if error.code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            return Unauthorized(self.address, f"{here} does not allow it: {what}{detail}")
        failed = RegistryFault(self.address, f"{here} failed: {what}{detail}", status=0)
        failed.temporary = error.code in ("ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED", "UNKNOWN", "INTERNAL")
        return failed

    def close(self) -> None:
        """Close the connection. The next call makes a new one."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _unreachable(self, detail: str) -> LazyfsError:
        if not os.path.exists(self.address):
            return RegistryUnreachable(
                self.address,
                f"there is no containerd at {self.address}",
                hint="another socket: --containerd-address or $CONTAINERD_ADDRESS",
            )
        if not os.access(self.address, os.W_OK):
            return Unauthorized(self.address, f"you may not talk to containerd at {self.address}", hint="be root")
        return RegistryUnreachable(self.address, f"containerd at {self.address} does not answer{detail}")

    def _open(self) -> grpc.Channel:
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(
                    "unix:" + self.address,
                    options=(
                        ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE),
                        ("grpc.enable_http_proxy", 0),
                        ("grpc.initial_reconnect_backoff_ms", 100),
                        ("grpc.max_reconnect_backoff_ms", 1000),
                        # A pool shared by all channels of a process would keep a closed one's connection.
                        ("grpc.use_local_subchannel_pool", 1),
                        ("grpc.default_authority", "localhost"),  # a path is none, and Go's servers refuse it
                    ),
                )
            return self._channel

    def _headers(self, lease: str) -> tuple[tuple[str, str], ...]:
        namespace = (("containerd-namespace", self.namespace),)
        return (*namespace, ("containerd-lease", lease)) if lease else namespace

    def _seconds(self, deadline: float | None) -> float:
        return self.timeout if deadline is None else max(deadline - time.monotonic(), 0.001)


def following(call: Any) -> Any:
    """Return the next answer of a stream, None at its end. Blocking. Raise Refused."""
    try:
        return next(call, None)
    except grpc.RpcError as error:
        raise refused(error) from None


def refused(error: grpc.RpcError) -> Refused:
    """Return gRPC's error as ours, with what containerd said."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    return Refused(code().name if callable(code) else "UNKNOWN", str(details() if callable(details) else error) or "")
