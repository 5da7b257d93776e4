"""lazyfs pull and lazyfs fetch --content against containerd itself: what is there afterwards, and what is left."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lazyfs.cli.main import main
from lazyfs.containerd.client import Client, connect
from tests.faults.cases import NOTHING_SHOWN, Area, Case, shows
from tests.helpers import real
from tests.helpers.daemon import Node, tmpfs, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.fake_snapshotter import FakeSnapshotter
from tests.helpers.pattern import pattern
from tests.helpers.small_image import make_tree
from tests.helpers.tars import dir_, file, tar_of, whiteout
from tests.helpers.trees import compare, snapshot

NAMESPACE = "lazyfs"  # of tests.helpers.real.Containerd
_GZIP = 1  # quick


@dataclass(frozen=True)
class Place:
    """containerd with a lazy snapshotter, a registry, and the lazyfs commands."""

    daemon: real.Containerd
    fake: FakeSnapshotter
    registry: FakeRegistry
    node: Node
    client: Client
    base: bytes = field(repr=False)  # a tar of programs that run

    def words(self, command: str, *words: str) -> list[str]:
        return self.node.words(command, "--address", str(self.daemon.address), "--namespace", NAMESPACE, *words)

    def lazyfs(self, command: str, *words: str) -> dict[str, Any]:
        """Run a command in this process, and return its JSON."""
        code, said, errors = self._call(command, "--json", *words)
        assert code == 0, errors
        return dict(json.loads(said))

    def pull(self, image: str, snapshotter: str = "overlayfs", *words: str) -> list[str]:
        """Pull, and return how each layer came to be there."""
        return [layer["how"] for layer in self.lazyfs("pull", "--snapshotter", snapshotter, *words, image)["layers"]]

    def refused(self, code: int, command: str, *words: str) -> str:
        """Run a command that fails with `code`, and return what it says."""
        status, _, errors = self._call(command, *words)
        assert status == code, errors
        return errors

    def _call(self, command: str, *words: str) -> tuple[int, str, str]:
        where = () if "--address" in words else ("--address", str(self.daemon.address))
        which = () if "--namespace" in words else ("--namespace", NAMESPACE)
        said, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = main([command, *where, *which, *words])
        return code, said.getvalue(), errors.getvalue()

    def records(self, *snapshotters: str) -> str:
        """All that containerd knows, as text that does not depend on time."""
        said = [self.daemon.ctr("images", "ls"), self.daemon.ctr("leases", "ls")]
        for line in sorted(self.daemon.ctr("content", "ls").splitlines()[1:]):
            words = line.split()
            said.append(f"{words[0]} {sorted(words[-1].split(','))}")
        for name in snapshotters:
            said.append(self.daemon.ctr("snapshots", "--snapshotter", name, "ls"))
        return "\n".join(said)

    def clean(self) -> None:
        """Remove all images; assert that nothing is left behind them."""
        if names := self.daemon.ctr("images", "ls", "--quiet").split():
            self.daemon.ctr("images", "rm", "--sync", *names)
        assert self.daemon.ctr("leases", "ls", "--quiet") == ""
        assert self.daemon.ctr("content", "ls", "--quiet") == ""
        assert self.daemon.ctr("content", "active").count("\n") == 1
        assert self.daemon.ctr("snapshots", "ls").count("\n") == 1
        assert self.fake.snapshots == {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    scratch = tmp_path_factory.mktemp("p")
    make_tree(scratch / "tree")
    with tarfile.open(scratch / "base.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(scratch / "tree", ".")
    with (
        FakeRegistry() as registry,
        FakeSnapshotter(scratch / "s") as fake,
        real.containerd(scratch / "c", fake.config("fake") + fake.config("gone").replace("s.sock", "g")) as daemon,
    ):
        client = connect(str(daemon.address), NAMESPACE, timeout=30)
        node = Node(scratch / "n")
        node.place.mkdir()
        yield Place(daemon, fake, registry, node, client, (scratch / "base.tar").read_bytes())
        client.close()


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    yield
    place.registry.clear_faults()
    place.clean()
    place.fake.lazy.clear()
    place.fake.asked.clear()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def made(place: Place, name: str, size: int = 3 << 20) -> AddedImage:
    """An image that runs: a gzip layer, a zstd layer, and a small gzip one that removes a file."""
    layers = (
        gzip.compress(place.base, _GZIP),
        zstd(tar_of(file("big", pattern(size)), dir_("etc/"), file("etc/f1", name.encode()))),
        gzip.compress(tar_of(dir_("etc/"), whiteout("etc/plain"), file("last", b"layer"))),
    )
    return place.registry.add_image(name, "1", layers)


def test_an_ordinary_pull_leaves_what_containerds_own_does(place: Place) -> None:
    """Gzip and zstd, and an index: the same tree, records, labels and snapshots, and the container runs."""
    one = made(place, "team/one")
    other = place.registry.add_image(
        "team/one", "arm", [gzip.compress(tar_of(file("of", b"arm")))], {"architecture": "arm64"}
    )
    place.registry.add_index("team/one", "all", {"linux/arm64": other, "linux/amd64": one})
    name = one.reference.replace(":1", ":all")
    assert place.pull(name) == ["downloaded"] * 3
    ours = place.records("overlayfs")
    with place.daemon.mounted(name) as shown:
        tree = snapshot(shown)
        assert not (shown / "etc/plain").exists() and (shown / "last").read_bytes() == b"layer"
    check = place.daemon.ctr("images", "check").splitlines()[1]
    assert "complete (4/4)" in check and check.rstrip().endswith("true")
    run = ("run", "--rm", "--snapshotter", "overlayfs", name, "t", "/bin/cat", "/etc/f1")
    assert place.daemon.ctr(*run) == "team/one"
    assert place.pull(name) == ["present"] * 3
    assert place.records("overlayfs") == ours
    place.clean()
    place.daemon.pull(name)
    assert place.records("overlayfs") == ours
    with place.daemon.mounted(name) as shown:
        assert compare(tree, snapshot(shown)) == []
    place.clean()
    assert place.pull(name, "overlayfs", "--platform", "linux/arm64") == ["downloaded"]


def test_a_lazy_snapshotter_is_told_all_and_nothing_is_downloaded(place: Place, tmp_path: Path) -> None:
    one = made(place, "team/lazy")
    with tarfile.open(fileobj=None, name=str(_written(tmp_path, place.base))) as archive:
        archive.extractall(tmp_path / "base", filter="fully_trusted")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "seen").write_bytes(b"lazily")
    place.fake.lazy.update({one.layers[0]: tmp_path / "base", one.layers[1]: tmp_path / "second"})
    place.registry.clear_log()
    assert place.pull(one.reference, "fake") == ["lazy", "lazy", "downloaded"]
    assert [place.registry.count("GET", digest) for digest in one.layers] == [0, 0, 1]
    prefix = "containerd.io/snapshot/cri."
    first = place.fake.asked[0]
    assert {key[len(prefix) :]: value for key, value in first.items() if key.startswith(prefix)} == {
        "image-ref": one.reference,
        "manifest-digest": one.digest,
        "layer-digest": one.layers[0],
        "image-layers": ",".join(one.layers),
    }
    assert [labels[prefix + "layer-digest"] for labels in place.fake.asked] == list(one.layers)
    run = ("run", "--rm", "--snapshotter", "fake", one.reference, "t", "/bin/cat", "/seen", "/last")
    assert place.daemon.ctr(*run) == "lazilylayer"
    (line,) = place.daemon.ctr("images", "check", "--snapshotter", "fake").splitlines()[1:]
    assert "incomplete" in line and line.rstrip().endswith("true")
    assert place.pull(one.reference, "fake") == ["present"] * 3

    # Without its blobs it can be neither exported nor converted; what to do is said, and does it.
    archive_path = tmp_path / "exported.tar"
    with pytest.raises(real.ToolFailed, match="not found"):
        place.daemon.ctr("images", "export", archive_path, one.reference)
    inside = f"containerd://{NAMESPACE}/{one.reference}?address={place.daemon.address}"
    said = _refused_conversion(inside, tmp_path)
    assert "lazyfs fetch --content" in said
    (told,) = place.lazyfs("fetch", "--content", one.reference)["images"]
    assert told["ok"] and (told["blobs"], told["missing"]) == (4, 2)
    assert [place.registry.count("GET", digest) for digest in one.layers] == [1, 1, 1]
    (again,) = place.lazyfs("fetch", "--content", inside)["images"]
    assert (again["missing"], again["fetched"]) == (0, 0)
    unrelated = place.registry.add_image("team/brief", "1", [gzip.compress(tar_of(file("x", b"y")))])
    place.pull(unrelated.reference)
    place.daemon.ctr("images", "rm", "--sync", unrelated.reference)  # the garbage collector has been here
    place.daemon.ctr("images", "export", archive_path, one.reference)
    place.daemon.ctr("images", "push", "--plain-http", f"{place.registry.host}/other/place:1", one.reference)
    assert "complete (4/4)" in place.daemon.ctr("images", "check", "--snapshotter", "fake")
    archive_path.unlink()


def _refused_conversion(source: str, directory: Path) -> str:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main(["convert", "--work-dir", f"{directory}/work", source, f"oci:{directory}/out:x"]) == 3
    return errors.getvalue()


def _written(directory: Path, data: bytes) -> Path:
    path = directory / "base.tar"
    path.write_bytes(data)
    return path


def test_two_pulls_side_by_side_fetch_each_layer_once(place: Place) -> None:
    one = made(place, "team/twice", 4 << 20)
    place.registry.clear_log()
    place.registry.rate = 8 << 20
    try:
        words = place.words("pull", "--snapshotter", "overlayfs", one.reference)
        processes = [place.node.spawn(words) for _ in range(2)]
        place.daemon.pull(one.reference)
        done = [place.node.finish(process, 60).returncode for process in processes]
    finally:
        place.registry.rate = 0
    assert done == [0, 0]
    size = sum(len(place.registry.blobs[digest]) for digest in one.layers)
    assert sum(place.registry.bytes_sent(digest) for digest in one.layers) < size + (2 << 20)
    with place.daemon.mounted(one.reference) as shown:
        assert (shown / "big").read_bytes() == pattern(4 << 20)


@shows(
    Case(
        "processes-pull-killed",
        Area.PROCESSES,
        "`lazyfs pull` is killed (-9), or interrupted, in the middle of a layer",
        NOTHING_SHOWN,
        "the next pull goes on where that one was; no snapshot stays active",
    )
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_was_ended_goes_on_where_it_was(how: signal.Signals, place: Place) -> None:
    one = made(place, "team/ended", 8 << 20)
    big = one.layers[1]
    half = len(place.registry.blobs[big]) // 2
    place.registry.fault(Fault.STALL, path=big, method="GET", at=half, times=1)
    place.registry.clear_log()
    process = place.node.spawn(place.words("pull", "--snapshotter", "overlayfs", one.reference))
    until(lambda: place.client.content.uploaded(f"layer-{big}") > half // 2, "half of the blob has come")
    until(lambda: place.client.content.info(one.layers[0]), "the other layer has come")
    os.kill(process.pid, how)
    place.node.finish(process, 20)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "Active" not in place.daemon.ctr("snapshots", "ls")
    assert place.daemon.ctr("images", "ls", "--quiet") == ""
    place.registry.clear_log()
    assert place.pull(one.reference)[1:] == ["downloaded", "unpacked"]  # that one came meanwhile
    assert place.registry.bytes_sent(big) < half + (3 << 20)
    assert place.registry.bytes_sent(one.layers[0]) == 0
    assert "Active" not in place.daemon.ctr("snapshots", "ls")
    assert "complete (4/4)" in place.daemon.ctr("images", "check")


def test_a_connection_that_breaks_is_gone_on_with(place: Place) -> None:
    one = made(place, "team/breaks", 4 << 20)
    big = one.layers[1]
    place.registry.fault(Fault.TRUNCATE, path=big, method="GET", at=1 << 20, times=2)
    assert place.pull(one.reference) == ["downloaded"] * 3
    assert place.registry.bytes_sent(big) < len(place.registry.blobs[big]) + (3 << 20)


def test_bytes_that_are_not_what_was_promised(place: Place) -> None:
    """A blob of another digest, and a layer of another diff ID: nothing is named, nothing is left."""
    one = made(place, "team/false")
    place.registry.fault(Fault.FLIP, path=one.layers[1])
    said = place.refused(6, "pull", "--snapshotter", "overlayfs", one.reference)
    assert "damaged or tampered with" in said and one.layers[1] in said
    rootfs = {"type": "layers", "diff_ids": [one.layers[0]]}
    lies = place.registry.add_image("team/lies", "1", [gzip.compress(tar_of(file("a", b"b")))], {"rootfs": rootfs})
    assert "declares diff ID" in place.refused(6, "pull", "--snapshotter", "overlayfs", lies.reference)
    assert place.daemon.ctr("images", "ls", "--quiet") == ""


def test_one_sentence_for_each_thing_that_is_not_there(place: Place, tmp_path: Path) -> None:
    one = made(place, "team/none")
    assert "[proxy_plugins.other]" in place.refused(2, "pull", "--snapshotter", "other", one.reference)
    assert "does not reach its snapshotter gone" in place.refused(5, "pull", "--snapshotter", "gone", one.reference)
    said = place.refused(5, "pull", "--address", f"{tmp_path}/no.sock", one.reference)
    assert "there is no containerd at" in said
    assert "is not a containerd namespace" in place.refused(2, "pull", "--namespace", "a/b", one.reference)
    assert f"lazyfs pull {one.reference}" in place.refused(3, "fetch", "--content", one.reference)
    assert "in no registry" in place.refused(2, "pull", "oci:somewhere:x")
    assert "exclude each other" in place.refused(2, "fetch", "--content", "--pin", one.reference)
    place.pull(one.reference)
    said = place.refused(3, "fetch", "--content", "--namespace", "default", one.reference)
    assert f"namespace {NAMESPACE} has it" in said


def _answers(daemon: real.Containerd) -> bool:
    return subprocess.run(daemon.words("version"), check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def started_again(daemon: real.Containerd) -> Iterator[None]:
    command = [real.tool("containerd"), "--config", str(daemon.directory / "config.toml")]
    with daemon.log.open("ab") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    try:
        until(lambda: _answers(daemon), "it answers")
        yield
    finally:
        real.stop(process)


@pytest.mark.parametrize(("size", "what"), [(8 << 20, "writing blob"), (14 << 20, "unpacking layer")])
def test_a_full_disk_is_called_so_and_given_back(place: Place, tmp_path: Path, size: int, what: str) -> None:
    layers = [gzip.compress(tar_of(file("big", pattern(9 << 20))), _GZIP)]
    one = place.registry.add_image("team/full", "1", layers)
    with tmpfs(tmp_path / "d", size) as small, real.containerd(small / "c") as daemon:
        said = place.refused(9, "pull", "--address", str(daemon.address), "--snapshotter", "overlayfs", one.reference)
        assert "the disk of containerd at" in said and what in said
        for listed in (("content", "ls", "--quiet"), ("leases", "ls", "--quiet"), ("images", "ls", "--quiet")):
            assert daemon.ctr(*listed) == ""
        assert daemon.ctr("snapshots", "ls").count("\n") == 1


@shows(
    Case(
        "processes-pull-containerd-killed",
        Area.PROCESSES,
        "containerd is killed (-9) in the middle of a `lazyfs pull`",
        NOTHING_SHOWN,
        "exit 5: “does not answer”; when it is back the next pull goes on where that one was, and no lease is left",
    )
)
def test_containerd_killed_in_mid_pull(place: Place, tmp_path: Path) -> None:
    """One sentence, soon; and when it is back the pull goes on where it was."""
    one = made(place, "team/killed")
    big = one.layers[1]
    half = len(place.registry.blobs[big]) // 2
    place.registry.fault(Fault.STALL, path=big, method="GET", at=half, times=1)
    words = ("--snapshotter", "overlayfs", one.reference)
    with real.containerd(tmp_path / "c") as daemon:
        where = ("--address", str(daemon.address), "--namespace", NAMESPACE)
        client = connect(str(daemon.address), NAMESPACE, timeout=30)
        process = place.node.spawn(place.node.words("pull", *where, *words))
        until(lambda: client.content.uploaded(f"layer-{big}") > half // 2, "half of the blob has come")
        os.kill(daemon.pid, signal.SIGKILL)
        assert process.wait(20) == 5
        assert b"does not answer" in process.communicate()[1]
        client.close()
        place.registry.clear_log()
        with started_again(daemon):
            code, _, errors = place._call("pull", *where, *words)
            assert code == 0, errors
            assert place.registry.bytes_sent(big) < half + (2 << 20)
            assert "Active" not in daemon.ctr("snapshots", "ls") and daemon.ctr("leases", "ls", "--quiet") == ""
