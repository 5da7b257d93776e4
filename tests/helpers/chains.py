"""The snapshotter's side of a daemon's control socket, for tests: one that runs by itself, and its calls."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyfs import oci
from lazyfs.control_client import Daemon, connect
from lazyfs.errors import DaemonUnreachable
from tests.helpers.daemon import Node, until
from tests.helpers.fake_registry import AddedImage

SMALL = 100_000  # bytes of layers that are fetched in full
DEADLINE = 10.0  # seconds


@contextlib.contextmanager
def running(node: Node) -> Iterator[Snapshotter]:
    """Run a node's daemon, as systemd would, and yield a client of it."""
    words = ["-m", "lazyfs.mount.daemon", "--root", str(node.root), "--run", str(node.run_dir)]
    path = node.run_dir / "lazyfsd.sock"
    node.run_dir.mkdir(exist_ok=True, mode=0o700)
    with open(node.run_dir / "lazyfsd.log", "ab") as log:
        process = node.spawn([sys.executable, *words], out=log)
    try:
        until(lambda: listens(path) or process.poll() is not None, "the daemon listens")
        with Snapshotter(path) as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)


def listens(path: Path) -> bool:
    """Tell whether a daemon answers: its socket has a name a moment before."""
    try:
        connect(path).close()
    except DaemonUnreachable:
        return False
    return True


class Snapshotter:
    """Makes the calls, each on a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._daemon = connect(path)

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.close()

    def again(self) -> Daemon:
        """Return a further connection."""
        return connect(self._path)

    def call(self, name: str, **args: Any) -> dict[str, Any]:
        """Make a call on the first connection, within a minute."""
        return self._daemon.call(name, timeout=60, **args)

    def resolve(self, image: AddedImage | str, **more: Any) -> list[dict[str, Any]]:
        """Return what is said of an image's layers; see `resolve_args`."""
        found: list[dict[str, Any]] = self.call("resolve_chain", **resolve_args(image, **more))["layers"]
        return found

    def mount(self, image: AddedImage, layers: list[dict[str, Any]], *, deadline: float = DEADLINE) -> dict[str, Any]:
        """Show a chain of layers, as `resolve` told of them."""
        return self.call("mount_chain", **mount_args(image, layers, deadline=deadline))


def resolve_args(
    image: AddedImage | str,
    *,
    small: int = SMALL,
    deadline: float = DEADLINE,
    digest: str | None = None,
    until: str = "",
) -> dict[str, Any]:
    """Return what `resolve_chain` takes. `until`: the chain ID of the layer that is waited for."""
    wanted = digest if digest is not None else "" if isinstance(image, str) else image.digest
    return {
        "image": image if isinstance(image, str) else image.reference,
        "manifest_digest": wanted,
        "small": small,
        "until": until,
        "deadline": deadline,
        "access": None,
    }


def mount_args(image: AddedImage, layers: list[dict[str, Any]], *, deadline: float = DEADLINE) -> dict[str, Any]:
    """Return what `mount_chain` takes."""
    names = ("digest", "size", "media_type", "annotations", "diff_id")
    return {
        "image": image.reference,
        "manifest_digest": image.digest,
        "layers": [{name: layer[name] for name in names} for layer in layers],
        "deadline": deadline,
        "access": None,
    }


def told(image: AddedImage, diff_ids: list[str]) -> list[dict[str, Any]]:
    """Return an image's layers as a snapshotter's records have them, nobody having been asked."""
    manifest = oci.parse_manifest(image.raw)
    return [
        {
            "digest": layer.digest, "size": layer.size, "media_type": layer.media_type,
            "annotations": layer.annotations, "diff_id": diff_id,
        }
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
    ]  # fmt: skip
