"""What lazyfs install writes, taken by the real systemd tools and the real containerd."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from lazyfs.deploy import containerd_config, installation, units
from lazyfs.deploy.containerd_config import Wanted
from lazyfs.deploy.node import Node
from lazyfs.errors import UsageError
from tests.helpers import real


def test_containerd_starts_with_it_and_cri_uses_it(tmp_path: Path) -> None:
    socket_path, main = tmp_path / "s.sock", tmp_path / "config.toml"
    main.write_text(
        f'version = 2\nroot = "{tmp_path}/root"\nstate = "{tmp_path}/state"\nimports = ["{tmp_path}/conf.d/*.toml"]\n'
        f'[grpc]\n  address = "{tmp_path}/c.sock"\n'
        '[plugins."io.containerd.grpc.v1.cri"]\n  sandbox_image = "x/pause:1"\n  restrict_oom_score_adj = true\n'
    )
    wanted = Wanted("lazyfs", socket_path, tmp_path)
    changes = containerd_config.plan(Node(), main, wanted)
    assert [change.path for change in changes] == [tmp_path / "conf.d/lazyfs.toml", main]
    for change in changes:
        Node().write(change.path, change.text.encode())
    installation.check_containerd(Node(), main, wanted)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dummy, (tmp_path / "log").open("wb") as log:
        dummy.bind(str(socket_path))
        dummy.listen()
        containerd = subprocess.Popen([real.tool("containerd"), "-c", str(main)], stdout=log, stderr=log)
        try:
            running = real.Containerd(tmp_path, tmp_path / "c.sock", tmp_path / "log", containerd.pid)
            real.wait_for_containerd(running, containerd)
            plugins = [line.split() for line in running.ctr("plugins", "ls").splitlines()]
        finally:
            real.stop(containerd)
    assert ["io.containerd.snapshotter.v1", "lazyfs", "-", "ok"] in plugins
    assert ["io.containerd.grpc.v1", "cri"] in [words[:2] for words in plugins if words and words[-1] == "ok"]


def test_a_configuration_that_containerd_reads_otherwise_is_noticed(tmp_path: Path) -> None:
    main = tmp_path / "config.toml"
    main.write_text('version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\n  snapshotter = "lazyfs"\n')
    with pytest.raises(UsageError, match="does not know the snapshotter lazyfs"):
        installation.check_containerd(Node(), main, Wanted("lazyfs", Path("/s"), Path("/r")))
    main.write_text("version = 2\nplugins = 3\n")
    with pytest.raises(UsageError, match="does not take its configuration"):
        installation.check_containerd(Node(), main, Wanted("lazyfs", Path("/s"), Path("/r")))


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name in units.NAMES:
        program = tmp_path / name.removesuffix(".service")
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        (tmp_path / name).write_text(units.text(name, tmp_path))
    words = [real.tool("systemd-analyze"), "verify", *(str(tmp_path / name) for name in units.NAMES)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
