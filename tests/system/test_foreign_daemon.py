"""What other users put in the way of a daemon's socket. Needs root, to be another user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs import config, control_client
from lazyfs.errors import DaemonFault, DaemonUnreachable


def test_a_run_directory_below_a_foreign_one_is_not_used(tmp_path: Path) -> None:
    # /tmp/lazyfs-UID, made by somebody else before us, holds our directory of another store.
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)
    settings = config.Settings(tmp_path / "root", foreign / "0123456789ab")
    with pytest.raises(DaemonUnreachable, match="in other users' hands"):
        control_client.prepare_run(settings)


_LISTEN = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
os.setresuid(65534, 65534, 65534)
sock.listen()  # the peer's credentials are those of this moment
print("ready", flush=True)
peer, _ = sock.accept()
peer.sendall(b'{"lazyfsd": "1", "protocol": 1, "pid": 1}' + bytes([10]))
peer.recv(1)
"""


def test_a_daemon_of_another_user_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "lazyfsd.sock"
    with subprocess.Popen([sys.executable, "-c", _LISTEN, path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        with pytest.raises(DaemonFault, match="belongs to user 65534"):
            control_client.connect(path)
