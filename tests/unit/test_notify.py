"""systemd learns that a service is ready, and nothing breaks where there is no systemd."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lazyfs import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_reaches_the_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("\0" + name if abstract else name)
        supervisor.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        notify.tell("READY=1")
        assert supervisor.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/no/such/socket", "vsock:2:1", "relative"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.tell("READY=1")
