"""Images made by lazyfs in each form, pulled by programs that are not ours: containerd, podman, buildah, skopeo.

The tree is always that of a full unpack of the source. Exceptions are podman's own, with its own images too: pulled in
parts, podman 4.3 leaves out owners, times and devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazyfs import oci
from tests.helpers import real
from tests.helpers.blobs import scan
from tests.helpers.odd import odd_tar
from tests.helpers.tars import dir_, file, hardlink, opaque, symlink, tar_of, whiteout
from tests.helpers.trees import TOC_FILES, Node, compare, snapshot

FORMS = ("zstd-chunked", "estargz", "podman")
NOT_TOLD = {"uid", "gid", "mtime_ns"}  # by podman 4.3, of what it pulls in parts
BIG = random.Random(4).randbytes(3_000_000)  # does not compress: what is moved of it shows


def odd_layer() -> bytes:
    """The odd layer without names that come twice: no podman takes such a tar, in whatever form."""
    tar = odd_tar()
    items = scan(tar)
    often = {path for path, count in Counter(item.entry.path for item in items).items() if count > 1}
    kept = (i for i in items if i.entry.path not in often and i.entry.link not in often)
    return b"".join(tar[item.start : item.end] for item in kept) + bytes(1024)


def plain_layer(big: bytes, word: bytes) -> bytes:
    """A layer that podman pulls in parts."""
    return tar_of(
        dir_("./"), dir_("./etc"), file("./etc/word", word), file("./big", big), hardlink("./again", "./big"),
        symlink("./link", "etc/word"), *(file(f"./many/{i}", b"%d" % i * i) for i in range(300)),
    )  # fmt: skip


TOP = tar_of(
    whiteout("one"), dir_("etc"), opaque("many"), file("many/only", b"one"), file("big", b"small now"), dir_("new")
)


def convert(source: str, destination: str, form: str, *more: str) -> None:
    words = ["--compat", "podman"] if form == "podman" else ["--format", form]
    command = [sys.executable, "-m", "lazyfs", "convert", source, destination, *words, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Store:
    """containers/storage in a directory of its own, for podman, buildah and skopeo alike.

    `partial`: layers are pulled in parts. Go's collector is off for such pulls: podman 4.3 drops a file that it has
    written before it sets the owner, times and mode through the descriptor. When the collector comes in between, the
    descriptor is closed ("bad file descriptor"), and podman silently pulls the whole layer.
    """

    directory: Path
    partial: bool

    def call(self, program: str, *words: str) -> str:
        """Run a program on this store."""
        environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf")}
        if self.partial:
            environment["GOGC"] = "off"
        done = subprocess.run(
            [real.tool(program), *words], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def pull(self, program: str, image: str) -> str:
        """Pull docker://IMAGE; return what the program said of it."""
        if program == "skopeo":
            words = ["--debug", "--insecure-policy", "copy", "--src-tls-verify=false"]
            return self.call(program, *words, f"docker://{image}", f"containers-storage:{image}")
        return self.call(program, "--log-level=debug", "pull", "--tls-verify=false", f"docker://{image}")

    def tree(self, image: str) -> dict[bytes, Node]:
        """The tree of a pulled image."""
        found = snapshot(self.call("podman", "image", "mount", image).strip().splitlines()[-1])
        self.call("podman", "image", "umount", image)
        return found


@contextlib.contextmanager
def storage(directory: Path, *, partial: bool) -> Iterator[Store]:
    directory.mkdir()
    told = '{enable_partial_images = "true", use_hard_links = "false", ostree_repos = ""}' if partial else "{}"
    (directory / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/root"\nrunroot = "{directory}/run"\n'
        f"[storage.options]\npull_options = {told}\n"
    )
    try:
        yield Store(directory, partial)
    finally:
        real.unmount_below(directory)


def fetched(said: str) -> list[str]:
    """What podman said of how it got each layer: in parts, whole and why, or not at all."""
    return re.findall(r'msg="((?:Retrieved partial|Failed to retrieve partial|Skipping) blob.*)"$', said, re.M)


@dataclass(frozen=True)
class Made:
    """A registry with the sources and what convert made of them, and the source's tree as containerd unpacks it."""

    registry: real.DockerRegistry
    containerd: real.Containerd
    tree: dict[bytes, Node]

    def moved(self, repository: str) -> list[int]:
        """Bytes of blobs that containers/image fetched from a repository, an answer each."""
        pattern = rf'"GET /v2/{repository}/blobs/\S+ HTTP/1.1" 20[06] (\d+) "" "containers/'
        return [int(size) for size in re.findall(pattern, self.registry.log.read_text())]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    directory = tmp_path_factory.mktemp("interop")
    tars = {"odd": (odd_layer(), TOP), "one": (plain_layer(BIG, b"word"),)}
    changed = bytearray(BIG)
    changed[1_234_567] ^= 1
    tars["two"] = (plain_layer(bytes(changed), b"another word"),)
    with real.docker_registry(directory / "registry") as registry, real.containerd(directory / "c") as containerd:
        for name, layers in tars.items():
            paths = []
            for number, tar in enumerate(layers):
                paths.append(directory / f"{name}-{number}.tar")
                paths[-1].write_bytes(tar)
            source = real.build_layout(directory / "layout", name, paths)
            real.copy_image(source, registry.image(name, "source"))
            for form in FORMS if name == "odd" else ("podman",):
                convert(source, registry.image(name, form), form)
        (directory / "list").write_text("/etc/acl\n/bin/su-again\n")
        source = registry.image("odd", "source")
        convert(source, registry.image("odd", "prefetch"), "estargz", "--prefetch", str(directory / "list"))
        containerd.pull(source.removeprefix("docker://"))
        with containerd.mounted(source.removeprefix("docker://")) as path:
            tree = snapshot(path)
        yield Made(registry, containerd, tree)


def undated(tree: dict[bytes, Node]) -> set[bytes]:
    """Directories that no entry names have the time of the unpacking."""
    named = {item.entry.path for tar in (odd_layer(), TOP, plain_layer(b"", b"")) for item in scan(tar)}
    return {name for name, node in tree.items() if name not in named and node.nlink == 0} | {b""}


def differences(want: dict[bytes, Node], got: dict[bytes, Node], **more: set[str]) -> list[str]:
    return compare(want, got, ignore=TOC_FILES, undated=undated(want), **more)


@pytest.mark.parametrize("form", [*FORMS, "prefetch"])
def test_containerd_unpacks_the_same_tree(made: Made, form: str) -> None:
    image = f"{made.registry.host}/odd:{form}"
    made.containerd.pull(image)
    with made.containerd.mounted(image) as path:
        assert differences(made.tree, snapshot(path)) == []


@pytest.mark.parametrize("program", ["podman", "buildah", "skopeo"])
def test_programs_of_containers_storage_unpack_the_same_tree(made: Made, program: str, tmp_path: Path) -> None:
    want = None
    with storage(tmp_path / "store", partial=False) as store:
        for form in ("source", *FORMS):
            image = f"{made.registry.host}/odd:{form}"
            store.pull(program, image)
            tree = store.tree(image)
            want = want or tree
            assert differences(want, tree) == [], form


@pytest.mark.parametrize("form", ["zstd-chunked", "estargz"])
def test_forms_that_are_not_podmans_are_pulled_whole_by_it(made: Made, form: str, tmp_path: Path) -> None:
    image = f"{made.registry.host}/odd:{form}"
    with storage(tmp_path / "store", partial=True) as store, storage(tmp_path / "other", partial=False) as other:
        said = fetched(store.pull("podman", image))
        assert said and all(line.startswith("Failed to retrieve partial blob") for line in said), said
        other.pull("podman", f"{made.registry.host}/odd:source")
        assert differences(other.tree(f"{made.registry.host}/odd:source"), store.tree(image)) == []


def test_podman_moves_only_what_changed(made: Made, tmp_path: Path) -> None:
    one, two = (f"{made.registry.host}/{name}:podman" for name in ("one", "two"))
    with storage(tmp_path / "store", partial=True) as store, storage(tmp_path / "other", partial=False) as other:
        for image in (one, two):
            said = fetched(store.pull("podman", image))
            assert [line.partition(" sha256:")[0] for line in said] == ["Retrieved partial blob"], said
        for image in (one, two):
            other.pull("podman", image)
            found = differences(other.tree(image), store.tree(image), without=NOT_TOLD)
            assert [line for line in found if not line.startswith("'/': mode")] == []  # podman's own choice
    raw = real.call("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{two}")
    layer = oci.parse_manifest(raw.encode(), oci.OCI_MANIFEST).layers[0]
    toc_size = int(layer.annotations[oci.GITHUB_ZSTD_POSITION].split(":")[1])
    moved = made.moved("two")
    moved.remove(layer.size)  # by the other store
    # The configs, the TOC, and then one chunk of 256 KiB and a word: of 3 MB.
    assert toc_size in moved and sum(moved) - toc_size < 300_000 < layer.size / 10, moved


@pytest.mark.parametrize("form", ["estargz", "prefetch"])
def test_stargz_tools_find_the_toc(made: Made, form: str) -> None:
    image = f"{made.registry.host}/odd:{form}"
    words = ["ctr-remote", "--address", str(made.containerd.address), "--namespace", "lazyfs"]
    real.call(*words, "image", "rpull", "--plain-http", "--snapshotter", "overlayfs", image)
    raw = real.call("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{image}")
    for layer in json.loads(raw)["layers"]:
        told = real.call(*words, "image", "get-toc-digest", layer["digest"]).strip()
        assert told == layer["annotations"][oci.TOC_DIGEST]
