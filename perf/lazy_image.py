"""An image made of one tar, converted and mounted with the commands that users have: the scene of the measurements."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyfs import config, control_client
from perf.start import StartFailed, lazyfs, lazyfs_env, until_gone
from tests.helpers import real

ONLY_DEMAND = {"LAZYFS_BACKGROUND": "0", "LAZYFS_PREFETCH": "0"}  # nothing comes but what is read


def make(directory: Path, *tars: Path, name: str = "lazy") -> str:
    """Return the reference oci:DIR/NAME:lazy of an image whose layers are `tars`, base first, converted."""
    source = real.build_layout(directory / f"{name}-plain", "plain", list(tars))
    lazy = f"oci:{directory / name}:lazy"
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


@contextlib.contextmanager
def daemon(directory: Path, root: Path) -> Iterator[control_client.Daemon]:
    """Speak to the daemon of the store `root`, which runs."""
    settings = dataclasses.replace(config.load({"root": str(root)}), run=directory / "u")
    with control_client.open_daemon(settings, start=False) as found:
        yield found


def unpack(directory: Path, *tars: Path) -> Path:
    """Return the new directory `directory` with the tree of `tars`, which have no whiteouts."""
    directory.mkdir()
    for tar in tars:
        subprocess.run(["tar", "-xpf", tar, "-C", directory, "--exclude=./dev/*"], check=True)
    return directory


@contextlib.contextmanager
def overlay(lower: Path | str, directory: Path) -> Iterator[Path]:
    """Show an overlay over `lower`, as a container has it; its own files are kept in `directory`."""
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={lower},upperdir={directory}/upper,workdir={directory}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, directory / "merged"], check=True)
    try:
        yield directory / "merged"
    finally:
        subprocess.run(["umount", directory / "merged"], check=True)


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
