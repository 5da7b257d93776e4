"""A control call's own deadline: kept whatever the daemon does, and the connection is not used after it."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from lazyfs.control_client import Daemon
from lazyfs.errors import DaemonUnreachable


def test_a_call_that_is_not_answered_in_time_spends_its_connection() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Daemon(ours, {}) as daemon:
        with pytest.raises(DaemonUnreachable, match=r"did not answer slow within 0\.05 s"):
            daemon.call("slow", timeout=0.05)
        theirs.sendall(b'{"id": 1, "ok": {"late": true}}\n')
        with pytest.raises(DaemonUnreachable, match="of no use since slow was not answered"):
            daemon.call("status")


def test_remarks_do_not_lengthen_a_call() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def chat() -> None:
        while not over.wait(0.01):
            theirs.sendall(json.dumps({"id": 1, "event": {"text": "still at it"}}).encode() + b"\n")

    thread = threading.Thread(target=chat)
    with theirs, Daemon(ours, {}) as daemon:
        thread.start()
        try:
            with pytest.raises(DaemonUnreachable, match="did not answer"):
                daemon.call("slow", timeout=0.2)
        finally:
            over.set()
            thread.join()


def test_a_timeout_leaves_later_calls_alone() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Daemon(ours, {}) as daemon:
        theirs.sendall(b'{"id": 1, "ok": {"a": 1}}\n{"id": 2, "ok": {"b": 2}}\n')
        assert daemon.call("first", timeout=5) == {"a": 1}
        assert daemon.call("second") == {"b": 2}
