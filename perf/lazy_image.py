"""An image made of one tar, converted and mounted with the commands that users have: the scene of the measurements."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf.start import StartFailed, lazyfs, lazyfs_env, until_gone
from tests.helpers import real


def make(directory: Path, tar: Path) -> str:
    """Return the reference oci:DIR:lazy of an image whose only layer is `tar`, converted."""
    source = real.build_layout(directory / "plain", "plain", [tar])
    lazy = f"oci:{directory / 'lazy'}:lazy"
    command(directory, directory / "convert", {}, "convert", source, lazy)
    return lazy


def command(directory: Path, root: Path, settings: dict[str, str], *words: str) -> str:
    """Run `lazyfs` with the store `root` to its end and return its stdout. `settings` are LAZYFS_… variables.

    Raise StartFailed with its words.
    """
    done = subprocess.run(
        lazyfs(root, *words),
        check=False,
        capture_output=True,
        text=True,
        timeout=1800,
        env=lazyfs_env(directory) | settings,
    )
    if done.returncode:
        raise StartFailed(f"lazyfs {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def mounted(directory: Path, root: Path, image: str, settings: dict[str, str]) -> Iterator[Path]:
    """Mount `image` with the store `root` at a directory, yield it, unmount and wait until the daemon is gone."""
    target = directory / "tree"
    target.mkdir(exist_ok=True)
    command(directory, root, settings, "mount", image, str(target))
    try:
        yield target
    finally:
        command(directory, root, settings, "umount", str(target))
        until_gone(root)


def status(directory: Path, root: Path) -> dict[str, Any]:
    """Return what `lazyfs status --json` says now."""
    answer: dict[str, Any] = json.loads(command(directory, root, {}, "status", "--json"))
    return answer


def layers(layout: Path) -> list[dict[str, Any]]:
    """Return the layer descriptors of the only image in an OCI layout."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    found: list[dict[str, Any]] = manifest["layers"]
    return found
