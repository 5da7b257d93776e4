"""Images made by other tools, mounted as they are: the tree is that of a full unpack of their source by umoci.

ctr-remote of stargz-snapshotter in both its formats, podman's zstd:chunked, skopeo's gzip and zstd. Each layer's whole
check ends before its image is mounted, so that an honest layer that it condemns would show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import real
from tests.helpers.blobs import scan
from tests.helpers.odd import odd_tar
from tests.helpers.tars import dir_, file, hardlink, opaque, symlink, tar_of, whiteout
from tests.helpers.trees import TOC_FILES, Node, compare, snapshot, umoci_image, umoci_unpack

ZSTD, GZIP = "zstd:chunked", "eStargz"
MADE = {
    "stargz-gzip": (GZIP, True),
    "stargz-zstd": (ZSTD, True),
    "podman-zstd-chunked": (ZSTD, True),
    "skopeo-zstd": ("tar+zstd", False),
    "skopeo-gzip": ("tar+gzip", False),
    "umoci": ("tar+gzip", False),
}


def odd_entries() -> list[bytes]:
    """The odd layer without what these tools refuse or lose: sparse files, double names, other
    encodings, attributes without a value.
    """
    tar = odd_tar()
    items = scan(tar)
    often = {path for path, count in Counter(item.entry.path for item in items).items() if count > 1}
    gone = {item.entry.path for item in items if item.sparse is not None or item.entry.path in often}
    return [
        tar[item.start : item.end]
        for item in items
        if item.entry.path not in gone
        and item.entry.link not in gone
        and "\ufffd" not in (item.entry.path + item.entry.link).decode("utf-8", "replace")
        and item.entry.path != b"etc/labelled"
    ]


BASE = tar_of(
    *odd_entries(),
    file("long", b"".join(b"%016d" % (i * i) for i in range(400_000))),  # more than a chunk of any of them
    file("zeros", b"begin" * 200 + bytes(9_000_000) + b"end" * 500),
    file("ends-in-zeros", b"data" * 9000 + bytes(50_000)),
    file("only-zeros", bytes(100_000)),
    dir_("removed"),
    file("removed/file", b"x"),
    dir_("opaque", mode=0o711),
    file("opaque/hidden", b"x"),
    *(symlink(f"links/{i:04}", "../long") for i in range(500)),
)
TOP = tar_of(
    dir_("opaque", mode=0o700), opaque("opaque"), file("opaque/shown", b"y" * 4000), whiteout("removed"),
    file("one", b"now more than one"), hardlink("two", "one"),
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A registry that holds one image as many tools made it, and the tree that it is."""

    registry: real.DockerRegistry
    full: dict[bytes, Node]
    undated: set[bytes]

    def image(self, name: str) -> str:
        return self.registry.image(f"foreign-{name}")


@pytest.fixture(scope="module")
def made(docker_registry: real.DockerRegistry, containerd: real.Containerd) -> Made:
    place = docker_registry.log.parent.parent / "foreign"  # podman takes no run directory of over 50 characters
    place.mkdir()
    layout = umoci_image(place, BASE, TOP)
    source = f"{docker_registry.host}/foreign-umoci:latest"
    real.copy_image(f"oci:{layout}:latest", f"docker://{source}")
    containerd.ctr("images", "pull", "--plain-http", source)
    for name, flags in (("stargz-gzip", ()), ("stargz-zstd", ("--zstdchunked",))):
        target = f"{docker_registry.host}/foreign-{name}:latest"
        remote = ("ctr-remote", "--address", containerd.address, "--namespace", "lazyfs", "image")
        real.call(*remote, "optimize", "--no-optimize", "--oci", *flags, source, target)
        real.call(*remote, "push", "--plain-http", target)
    real.call("skopeo", "--insecure-policy", "copy", "--dest-decompress", f"oci:{layout}:latest", f"dir:{place}/plain")
    for form in ("gzip", "zstd"):
        target = f"docker://{docker_registry.host}/foreign-skopeo-{form}:latest"
        skopeo = ("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "--dest-compress-format", form)
        forgetful(place, " ".join((*skopeo, f"dir:{place}/plain", target)))
    podman = f"podman --root {place}/storage --runroot {place}/run --storage-driver vfs --cgroup-manager cgroupfs"
    target = f"docker://{docker_registry.host}/foreign-podman-zstd-chunked:latest"
    forgetful(
        place,
        f"{podman} pull --quiet --tls-verify=false {source}",
        "rm -f /var/lib/containers/cache/*",
        f"{podman} push --quiet --tls-verify=false --compression-format zstd:chunked {source} {target}",
    )
    full = snapshot(umoci_unpack(layout, "latest", place / "full"))
    named = {item.entry.path for tar in (BASE, TOP) for item in scan(tar)}
    return Made(docker_registry, full, {b"", *(name for name in full if name not in named)})


def forgetful(place: Path, *commands: str) -> None:
    """Run commands that don't see what containers' tools remember of this machine: they would reuse a gzip blob."""
    (place / "cache").mkdir(exist_ok=True)
    hide = f"mkdir -p /var/lib/containers/cache && mount --bind {place}/cache /var/lib/containers/cache"
    end = f"rm -f {place}/cache/*"
    real.call("unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join((hide, *commands, end)))


class Lazyfs:
    """The command line on a store of its own; no layer is trusted before its whole check."""

    def __init__(self, place: Path) -> None:
        self._environment = {
            **os.environ, "LAZYFS_ROOT": f"{place}/store", "LAZYFS_RUN": f"{place}/run", "LAZYFS_LAZY_FROM": "nobody/*",
        }  # fmt: skip

    def run(self, *words: str | Path) -> str:
        command = [sys.executable, "-m", "lazyfs", *map(str, words)]
        done = subprocess.run(
            command, env=self._environment, check=False, capture_output=True, text=True, timeout=real.RUN
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    @contextmanager
    def mounted(self, image: str, place: Path) -> Iterator[str]:
        place.mkdir()
        said = self.run("mount", image, place)
        try:
            yield said
        finally:
            self.run("umount", place)


@pytest.fixture
def lazyfs(scratch: Path) -> Iterator[Lazyfs]:
    yield Lazyfs(scratch)
    deadline = time.monotonic() + 60
    while real.mounts_below(scratch):  # the daemon ends by itself, soon after its last mount
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", MADE)
def test_the_tree_is_that_of_a_full_unpack(name: str, made: Made, lazyfs: Lazyfs, scratch: Path) -> None:
    form, is_lazy = MADE[name]
    told = json.loads(lazyfs.run("inspect", "--files", "--json", made.image(name)))["layers"]
    assert [(layer["form"], layer["lazy"]) for layer in told] == [(form, is_lazy)] * 2
    assert "everything is what it promises" in lazyfs.run("verify", made.image(name))
    with lazyfs.mounted(made.image(name), scratch / "mnt") as said:
        assert f"{2 if is_lazy else 0} of 2 layers lazy" in said
        seen = snapshot(scratch / "mnt")
    rounded = name.startswith("stargz")  # times to whole seconds
    found = compare(seen, made.full, undated=made.undated, ignore=TOC_FILES, whole_seconds=rounded)
    assert not found, "\n".join(found)
    assert not TOC_FILES & seen.keys() and len(seen) > 600


def test_two_makers_images_side_by_side_end_verified_whole(made: Made, lazyfs: Lazyfs, scratch: Path) -> None:
    with lazyfs.mounted(made.image("stargz-gzip"), scratch / "one"):
        snapshot(scratch / "one")
        with lazyfs.mounted(made.image("stargz-zstd"), scratch / "two"):
            seen = snapshot(scratch / "two")
            status = json.loads(lazyfs.run("status", "--json"))
        assert not compare(seen, made.full, undated=made.undated, ignore=TOC_FILES, whole_seconds=True)
    assert all(layer["verified"] for mount in status["mounts"] for layer in mount["layers"])
