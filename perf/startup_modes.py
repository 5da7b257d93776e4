"""The ways to start a workload that perf.startup compares. Each visit is one fresh node, and gives one start or two."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from perf.start import StartFailed
from perf.startup_node import Node, Scene, Start, check_cold, forget, fresh

FULL = "overlayfs"  # the reference: a full pull of the source image
FULL_WARM = "overlayfs-warm"
CONVERTED = "overlayfs-converted"  # the other reference: a full pull of the converted image, whose zstd unpacks faster
FULLS = (FULL, FULL_WARM, CONVERTED)
COLD = "cold"
TRACE = "trace"
WARM_STORE = "warm-store"
WARM = "warm"
OURS = (COLD, TRACE, WARM_STORE, WARM)
PAIRS = {FULL: (FULL, FULL_WARM), WARM_STORE: (WARM_STORE, WARM)}  # the modes of a visit that gives two
_LEAST = 50  # the part of an image that another snapshotter has to fetch: tables of contents alone are less
_WHOLE = 1800.0  # seconds for an image to be complete

Found = dict[str, Start]


def visits(modes: list[str]) -> dict[str, Callable[[Scene, Path], Found]]:
    """Return what gives these modes, by its first mode. The second argument is a directory of traces.

    A mode that is not ours is a snapshotter's name, which pulls the converted image.
    """
    found: dict[str, Callable[[Scene, Path], Found]] = {}
    for mode in modes:
        if mode in (FULL, FULL_WARM):
            found[FULL] = overlayfs
        elif mode == CONVERTED:
            found[CONVERTED] = converted
        elif mode == COLD:
            found[COLD] = cold
        elif mode == TRACE:
            found[TRACE] = with_trace
        elif mode in (WARM_STORE, WARM):
            found[WARM_STORE] = warm
        else:
            found[mode] = _other(mode)
    return found


def overlayfs(scene: Scene, traces: Path) -> Found:
    """containerd's own snapshotter: a full pull of the source image; and the same container again, all warm."""
    with fresh(scene, "overlayfs") as node:
        first = check_cold(node.run(scene.reference(lazy=False)), scene.image.source_bytes, FULL)
        node.clear_containers()
        again = node.run(scene.reference(lazy=False), pull=False)
    return {FULL: first, FULL_WARM: again}


def converted(scene: Scene, traces: Path) -> Found:
    """containerd's own snapshotter: a full pull of the converted image."""
    with fresh(scene, "overlayfs") as node:
        return {CONVERTED: check_cold(node.run(scene.reference(lazy=True)), scene.image.lazy_bytes, CONVERTED)}


def cold(scene: Scene, traces: Path) -> Found:
    """lazyfs on a node that knows nothing."""
    with fresh(scene, "lazyfs") as node:
        return {COLD: _lazily(node, scene, COLD)}


def with_trace(scene: Scene, traces: Path) -> Found:
    """lazyfs on a node that knows nothing but what a start of this image reads."""
    with fresh(scene, "lazyfs", traces) as node:
        return {TRACE: _lazily(node, scene, TRACE)}


def warm(scene: Scene, traces: Path) -> Found:
    """lazyfs with the whole image in its store and nothing in memory; and once more with all in memory."""
    image = scene.reference(lazy=True)
    with fresh(scene, "lazyfs") as node:
        _lazily(node, scene, COLD)
        _until_whole(node)
        before = _fetched(node)
        found = {}
        for mode in (WARM_STORE, WARM):
            node.clear_containers()
            if mode == WARM_STORE:
                forget(scene)
                node.new_pod()
            found[mode] = node.run(image)
        if _fetched(node) != before:
            raise StartFailed(
                f"{scene.workload.name}: a start from a whole store fetched {_fetched(node) - before} bytes"
            )
    return found


def record(scene: Scene, traces: Path) -> None:
    """Start the workload once on a node that knows nothing, and keep the traces that it learned in `traces`.

    The node is stopped when the workload is ready, so that the trace ends there. Raise StartFailed when there is none.
    """
    with fresh(scene, "lazyfs") as node:
        _lazily(node, scene, "recording")
        node.stop()  # its daemon writes what it learned
        learned = node.root / "traces"
        if not _files(learned):
            raise StartFailed(f"{scene.workload.name}: the node kept no trace of its first start in {learned}")
        shutil.copytree(learned, traces)


def _other(snapshotter: str) -> Callable[[Scene, Path], Found]:
    def start(scene: Scene, traces: Path) -> Found:
        with fresh(scene, snapshotter) as node:
            least = scene.image.lazy_bytes // _LEAST
            found = check_cold(node.run(scene.reference(lazy=True)), least, snapshotter)
            node.clear()  # a proxy's store is not this node's and would know the image the next time
            return {snapshotter: found}

    return start


def _lazily(node: Node, scene: Scene, what: str) -> Start:
    """Start the converted image. Raise StartFailed when it was not lazily, or not cold."""
    began = _fetched(node)
    start = check_cold(node.run(scene.reference(lazy=True)), 1, what)
    if _fetched(node) <= began:
        raise StartFailed(f"{scene.workload.name}: lazyfs fetched nothing for a cold start; {node.words()}")
    return start


def _fetched(node: Node) -> int:
    """Return the bytes of layers that the daemon fetched so far, for whatever reason."""
    counted = node.status()["bytes"]
    return sum(int(counted[name]) for name in ("demand", "prefetch", "background"))


def _until_whole(node: Node) -> None:
    deadline = time.monotonic() + _WHOLE
    while True:
        layers = [layer for mount in node.status()["mounts"] for layer in mount["layers"]]
        if layers and all(layer["verified"] and layer["complete"] for layer in layers):
            return
        if time.monotonic() > deadline:
            raise StartFailed(f"the image is not whole after {_WHOLE:.0f} s: {node.words()}")
        time.sleep(0.2)


def _files(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in directory.iterdir() if path.is_file() and path.stat().st_size]
    return []
