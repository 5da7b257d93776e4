"""The node's logins in the daemon: pods' images are fetched with them, whoever changes them in mid-read."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, receive_line, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

FIRST, SECOND = "first-hunter2-horse", "second-hunter2-horse"
ENTRY = "from lazyfs.mount.daemon import entry; entry()"
PARTS = [pattern(700_001, seed) for seed in range(12)]
# Reads the files one after another, and says after each that it has; goes on when told to.
READER = """
for number in range(12):
    with open(f"{a[0]}/f{number}", "rb") as handle:
        print(len(handle.read()), flush=True)
    if number == 3:
        sys.stdin.readline()
"""


@contextlib.contextmanager
def running(node: Node, home: Path) -> Iterator[None]:
    """Run the daemon as the snapshotter does: what it finds in its own environment is the node's."""
    words = [sys.executable, "-c", ENTRY, "--root", str(node.root), "--run", str(node.run_dir), "-v"]
    found = {**node.environment, "HOME": str(home), "DOCKER_CONFIG": str(home)}
    node.run_dir.mkdir()
    with (node.run_dir / "lazyfsd.log").open("wb") as log:
        daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=found, cwd="/")
    try:
        until((node.run_dir / "lazyfsd.sock").exists, "the daemon listens")
        yield
    finally:
        daemon.terminate()
        daemon.wait(20)


def ask(sock: socket.socket, name: str, **args: Any) -> dict[str, Any]:
    sock.sendall(json.dumps({"id": 1, "call": name, "args": args}).encode() + b"\n")
    while "event" in (answer := json.loads(receive_line(sock))):
        pass
    found: dict[str, Any] = answer
    return found


def call(node: Node, name: str, **args: Any) -> dict[str, Any]:
    with node.raw() as sock:
        return ask(sock, name, **args)


def mounted(node: Node, image: AddedImage) -> Path:
    """Return the tree of an image that stays mounted when the connection has gone."""
    with node.raw() as sock:
        answer = ask(sock, "mount_image", image=image.reference)["ok"]
        assert ask(sock, "attach", mount=answer["mount"], dir=answer["path"], kind="container")["ok"] == {}
        return Path(answer["path"])


def image_of(registry: FakeRegistry) -> AddedImage:
    return add(registry, "app", zstd_chunked_layer(tar_of(*(file(f"f{i}", part) for i, part in enumerate(PARTS)))))


def encoded(password: str) -> str:
    return base64.b64encode(f"alice:{password}".encode()).decode()


def tell(node: Node, registry: FakeRegistry, config: Path | None, password: str) -> None:
    """Change the login: as kubelet's next pull does, or as `docker login` does."""
    if config is None:
        login = {"host": registry.host, "repository": "app", "username": "alice", "password": password}
        assert call(node, "set_logins", logins=[login])["ok"] == {}
    else:
        config.write_text(json.dumps({"auths": {registry.host: {"auth": encoded(password)}}}))


def test_a_login_that_is_changed_in_mid_read(node: Node, tmp_path: Path) -> None:
    with running(node, tmp_path):
        read_on(node, "bearer", None)
        read_on(node, "basic", None)
        read_on(node, "bearer", tmp_path / "config.json")
        for top in (node.root, node.run_dir):
            for path in [
                path for path in top.rglob("*") if path.is_file() and node.run_dir / "mnt" not in path.parents
            ]:
                for secret in (FIRST, SECOND, *(encoded(password) for password in (FIRST, SECOND))):
                    assert secret.encode() not in path.read_bytes(), path
            others = (
                node.run_dir / "mnt",
                node.run_dir / "erofs",
                node.run_dir / "lazyfsd.log",
            )  # the log is the test's
            for path in top.rglob("*"):
                if not any(path.is_relative_to(place) for place in others):
                    assert path.lstat().st_mode & 0o077 == 0, path
        assert "ready:" in node.log()


def read_on(node: Node, auth: str, config: Path | None) -> None:
    with FakeRegistry(auth=auth, users={"alice": FIRST}) as registry:
        image = image_of(registry)
        refused = call(node, "mount_image", image=image.reference)["error"]
        assert refused["class"] == "Unauthorized" and "kubelet" in refused["hint"], refused
        tell(node, registry, config, FIRST)
        tree = mounted(node, image)
        reader = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"import sys\na = sys.argv[1:]\n{READER}", str(tree)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        assert reader.stdout is not None
        for _ in range(4):
            assert reader.stdout.readline() == b"700001\n"
        tell(node, registry, config, SECOND)
        registry.users = {"alice": SECOND}
        registry.revoke_tokens()
        done = node.finish(reader, 20)
        assert (done.returncode, done.stdout.split()) == (0, [b"700001"] * 8), done.stderr
        assert node.read(tree / "f11") == PARTS[11]


def test_reads_go_on_once_the_login_is_a_good_one_again(node: Node, tmp_path: Path) -> None:
    """Refused reads fail at once, and leave nothing behind that would keep later ones from the registry."""
    with FakeRegistry(auth="bearer", users={"alice": FIRST}) as registry, running(node, tmp_path):
        image = image_of(registry)
        tell(node, registry, None, FIRST)
        tree = mounted(node, image)
        assert node.read(tree / "f0") == PARTS[0]
        registry.users = {"alice": SECOND}
        registry.revoke_tokens()
        for number in (3, 5, 7):
            assert "Input/output error" in node.read_fails(tree / f"f{number}")
        tell(node, registry, None, SECOND)
        assert [node.read(tree / f"f{number}") for number in (3, 5, 7)] == [PARTS[3], PARTS[5], PARTS[7]]
