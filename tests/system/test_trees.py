"""What `lazyfs mount` shows by each driver, held against a full unpack of the source image by umoci, as root."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers import real
from tests.helpers.blobs import scan
from tests.helpers.odd import odd_tar
from tests.helpers.tars import dir_, file, hardlink, opaque, symlink, tar_of, whiteout
from tests.helpers.trees import compare, snapshot, umoci_image, umoci_unpack

DEADLINE = 120.0  # seconds that a command may take on a busy machine

BASE = (
    dir_("./", mode=0o755),
    dir_("kept", mode=0o750, mtime_ns=1_500_000_000_000_000_001),
    file("kept/old", b"old", uid=7),
    file("kept/removed", b"x"),
    dir_("opaque", mode=0o711),
    file("opaque/hidden", b"hidden"),
    file("opaque/sub/hidden", b"hidden"),
    dir_("gone"),
    file("gone/with/all", b"x"),
    dir_("again", mode=0o700, uid=5),
    file("again/hidden", b"x"),
    file("pair-1", b"one of three", mode=0o640),
    hardlink("pair-2", "pair-1"),
    hardlink("kept/pair-3", "pair-1"),
    symlink("to-kept", "kept"),
    symlink("absolute", "/kept"),
    file("becomes-a-directory", b"x"),
    dir_("becomes-a-file"),
    file("becomes-a-file/x", b"x"),
    symlink("becomes-a-directory-too", "kept"),
    file("rewritten", b"first", mode=0o600),
)
TOP = (
    dir_("./", mode=0o711, mtime_ns=1_600_000_000_000_000_009),
    whiteout("kept/removed"),
    file("kept/new", b"new"),
    dir_("opaque", mode=0o711),
    opaque("opaque"),
    file("opaque/shown", b"shown"),
    whiteout("gone"),
    whiteout("never-there"),
    whiteout("again"),
    dir_("again", mode=0o755),
    file("again/shown", b"y"),
    whiteout("pair-2"),
    dir_("becomes-a-directory"),
    file("becomes-a-directory/x", b"x"),
    file("becomes-a-file", b"now a file"),
    dir_("becomes-a-directory-too"),
    file("becomes-a-directory-too/x", b"x"),
    file("rewritten", b"second", mode=0o644),
    file("to-kept/through-a-link", b"placed by a symlink of the lower layer"),
    file("absolute/through-another", b"and by an absolute one"),
    file("own/link", b"two names in the top layer"),
    hardlink("own/link-2", "own/link"),
)


class Lazyfs:
    """The command line on a store of its own."""

    def __init__(self, place: Path) -> None:
        ours = {"ROOT": f"{place}/store", "RUN": f"{place}/run", "DAEMON_LINGER": "0.2"}
        self._environment = {**os.environ, **{f"LAZYFS_{name}": value for name, value in ours.items()}}

    def run(self, *words: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "lazyfs", *map(str, words)],
            env=self._environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def mounted(self, image: str, place: Path) -> Iterator[dict[str, Path]]:
        """Show an image by both drivers."""
        shown: dict[str, Path] = {}
        try:
            for driver in ("fuse", "erofs"):
                (at := place.with_name(f"{place.name}-{driver}")).mkdir()
                self.run("mount", "--driver", driver, image, at)
                shown[driver] = at
            yield shown
        finally:
            for at in shown.values():
                self.run("umount", at)


@pytest.fixture
def lazyfs(scratch: Path) -> Iterator[Lazyfs]:
    yield Lazyfs(scratch)
    deadline = time.monotonic() + DEADLINE
    while real.mounts_below(scratch):  # the daemon ends by itself, soon after its last mount
        assert time.monotonic() < deadline
        time.sleep(0.05)


def implied(*tars: bytes) -> set[bytes]:
    """Directories that no entry names: their times are those of the unpacking."""
    named: set[bytes] = set()
    seen: set[bytes] = set()
    for tar in tars:
        for item in scan(tar):
            named.add(item.entry.path)
            above = item.entry.path.rpartition(b"/")[0]
            while above:
                seen.add(above)
                above = above.rpartition(b"/")[0]
    return seen - named


def test_one_layer_with_everything(lazyfs: Lazyfs, scratch: Path) -> None:
    tar = odd_tar()
    check(lazyfs, scratch, tar)


def test_two_layers(lazyfs: Lazyfs, scratch: Path) -> None:
    check(lazyfs, scratch, tar_of(*BASE), tar_of(*TOP))


def check(lazyfs: Lazyfs, scratch: Path, *tars: bytes) -> None:
    """Compare lazy, plain and unpacked trees of an image with these layers."""
    layout = umoci_image(scratch, *tars)
    full = snapshot(umoci_unpack(layout, "latest", scratch / "full"))
    undated = implied(*tars)
    lazyfs.run("convert", f"oci:{layout}:latest", f"oci:{scratch}/lazy:latest")
    for name, image in (("lazy", f"oci:{scratch}/lazy:latest"), ("plain", f"oci:{layout}:latest")):
        with lazyfs.mounted(image, scratch / f"mnt-{name}") as shown:
            for driver, place in shown.items():
                differences = compare(snapshot(place), full, undated={b"", *undated})
                assert not differences, f"{name} by {driver}:\n" + "\n".join(differences)


def test_through_a_registry(lazyfs: Lazyfs, scratch: Path, docker_registry: real.DockerRegistry) -> None:
    tars = tar_of(*BASE), tar_of(*TOP)
    layout = umoci_image(scratch, *tars)
    full = snapshot(umoci_unpack(layout, "latest", scratch / "full"))
    image = docker_registry.image("trees", "lazy")
    lazyfs.run("convert", f"oci:{layout}:latest", image)
    with lazyfs.mounted(image, scratch / "mnt") as shown:
        for place in shown.values():
            assert not compare(snapshot(place), full, undated={b"", *implied(*tars)})
