"""Images in archives and in containerd, made and used by skopeo, podman, umoci and ctr: the same trees everywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.containerd.client import Client, connect
from lazyfs.containerd.images import Image
from lazyfs.digest import of
from lazyfs.errors import BlobMissing, LazyfsError, ManifestMissing, PushRejected, RegistryError
from lazyfs.registry.local.containerd_store import ContainerdRepository
from lazyfs.registry.open import open_repository
from lazyfs.registry.resolve import resolve_image
from tests.helpers import archives, real
from tests.helpers.daemon import Node, until
from tests.helpers.small_image import make_layout, make_tree
from tests.helpers.tars import file, tar_of
from tests.helpers.trees import TOC_FILES, compare, snapshot

NAME = "registry.example/team/small:1"
NAMESPACE = "lazyfs"  # of tests.helpers.real.Containerd
SLOW = {"BACKGROUND": "1", "READ_TIMEOUT": "10"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    """A tree of programs that run, and a file of a size to be read in parts."""
    root = place / "tree"
    make_tree(root)
    (root / "big").write_bytes(b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(64 << 10)))
    return root


@pytest.fixture(scope="module")
def layout(tree: Path, place: Path) -> str:
    """The tree as an image in an OCI layout: oci:DIR:small."""
    return make_layout(tree, place / "layout", {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]})


def skopeo(source: str, destination: str, *options: str) -> None:
    real.call("skopeo", "--insecure-policy", "copy", "--quiet", *options, source, destination)


@pytest.fixture(scope="module")
def podman(place: Path) -> Iterator[list[str]]:
    # podman takes no run directory of over 50 characters.
    with tempfile.TemporaryDirectory(prefix="lazyfs-test-", dir="/var/tmp") as run:
        yield ["podman", "--root", f"{place}/podman", "--runroot", run, "--storage-driver", "vfs"]


@pytest.fixture(scope="module")
def archive(layout: str, place: Path, podman: list[str]) -> dict[str, str]:
    """The image in archives, by who made them."""
    made = {
        "skopeo oci-archive": f"oci-archive:{place}/skopeo-oci.tar:{NAME}",
        "skopeo docker-archive": f"docker-archive:{place}/skopeo-docker.tar:{NAME}",
        "lazyfs oci-archive": f"oci-archive:{place}/lazyfs.tar:lazy",
        "podman docker-archive": f"docker-archive:{place}/podman-docker.tar",
        "podman oci-archive": f"oci-archive:{place}/podman-oci.tar",
    }
    skopeo(layout, made["skopeo oci-archive"])
    skopeo(layout, made["skopeo docker-archive"])
    node = Node(place / "archives")
    node.place.mkdir()
    done = node.lazyfs("convert", layout, made["lazyfs oci-archive"])
    assert done.returncode == 0, done.stderr
    real.call(*podman, "pull", "--quiet", made["skopeo docker-archive"].rpartition(":" + NAME)[0])
    for kind in ("docker", "oci"):
        path = place / f"podman-{kind}.tar"
        real.call(*podman, "save", "--quiet", "--format", f"{kind}-archive", "--output", path, NAME)
    return made


@pytest.fixture(scope="module")
def daemon(archive: dict[str, str]) -> Iterator[real.Containerd]:
    """containerd with the image as NAME."""
    with real.containerd(Path(archive["lazyfs oci-archive"][len("oci-archive:") :]).parent / "c") as running:
        running.ctr("images", "import", "--no-unpack", archive["skopeo oci-archive"].split(":")[1])
        yield running


def reference(daemon: real.Containerd, name: str = NAME) -> str:
    return f"containerd://{NAMESPACE}/{name}?address={daemon.address}"


def opened(daemon: real.Containerd, name: str = NAME) -> ContainerdRepository:
    found = open_repository(references.parse(reference(daemon, name)))
    assert isinstance(found, ContainerdRepository)
    return found


@pytest.fixture
def client(daemon: real.Containerd) -> Iterator[Client]:
    found = connect(str(daemon.address), NAMESPACE, timeout=30)
    yield found
    found.close()


def same_tree(tree: Path, shown: Path) -> None:
    assert compare(snapshot(tree), snapshot(shown), ignore=TOC_FILES, whole_seconds=True) == []


# -- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        "skopeo oci-archive", "skopeo docker-archive", "lazyfs oci-archive", "podman docker-archive",
        "podman oci-archive",
    ],
)  # fmt: skip
def test_an_archive_mounts_as_it_unpacks(made: str, archive: dict[str, str], tree: Path, tmp_path: Path) -> None:
    with Node(tmp_path, **SLOW) as node:
        done = node.lazyfs("verify", archive[made])
        assert done.returncode == 0, done.stderr
        shown = node.mount(archive[made])
        same_tree(tree, shown)
        node.umount(shown)


def test_a_relative_path_and_a_container(archive: dict[str, str], tmp_path: Path) -> None:
    os.link(archive["lazyfs oci-archive"].split(":")[1], tmp_path / "a.tar")
    with Node(tmp_path / "node") as node:
        node.place.mkdir()
        done = subprocess.run(
            node.words("run", "--rm", "oci-archive:a.tar", "/bin/cat", "/etc/plain"),
            cwd=tmp_path, env=node.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "no program\n"), done.stderr


def test_what_lazyfs_archives_others_read(archive: dict[str, str], tree: Path, podman: list[str], place: Path) -> None:
    path = archive["lazyfs oci-archive"].split(":")[1]
    skopeo(archive["lazyfs oci-archive"], f"oci:{place}/copied:x")
    real.call("tar", "-tf", path)
    image = real.call(*podman, "pull", "--quiet", f"oci-archive:{path}").strip()
    same_tree(tree, Path(real.call(*podman, "image", "mount", image).strip()))
    real.call(*podman, "image", "umount", image)


def test_an_archive_replaced_while_it_is_mounted(archive: dict[str, str], tree: Path, tmp_path: Path) -> None:
    """Bytes that are not here yet: an error, and never those of another archive."""
    path = tmp_path / "a.tar"
    path.write_bytes(Path(archive["lazyfs oci-archive"].split(":")[1]).read_bytes())
    with Node(tmp_path / "node") as node:
        node.place.mkdir()
        shown = node.mount(f"oci-archive:{path}:lazy")
        assert node.read(shown / "etc/plain") == b"no program\n"
        good = path.read_bytes()
        other = tmp_path / "other.tar"
        other.write_bytes(archives.oci_archive(lazy=archives.image(tar_of(file("x", b"y")))))
        other.rename(path)
        assert "Input/output error" in node.read_fails(shown / "big")
        path.write_bytes(good[: len(good) // 2])
        assert "Input/output error" in node.read_fails(shown / "big")
        path.write_bytes(bytes(byte ^ 0xFF for byte in good))
        assert "Input/output error" in node.read_fails(shown / "big")
        path.unlink()
        assert "Input/output error" in node.read_fails(shown / "big")
        path.write_bytes(good)
        assert node.read(shown / "big") == (tree / "big").read_bytes()
        node.umount(shown)


def test_bytes_of_an_archive_rewritten_in_place(archive: dict[str, str], tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    good = Path(archive["lazyfs oci-archive"].split(":")[1]).read_bytes()
    path.write_bytes(good)
    with tarfile.open(path) as opened_tar:
        largest = max(opened_tar.getmembers(), key=lambda member: member.size)
    with Node(tmp_path / "node") as node:
        node.place.mkdir()
        shown = node.mount(f"oci-archive:{path}:lazy")
        with path.open("r+b") as rewritten:
            rewritten.seek(largest.offset_data)
            rewritten.write(os.urandom(largest.size))
        assert "Input/output error" in node.read_fails(shown / "big")
        node.umount(shown)


def test_one_sentence_for_each_wrong_archive(archive: dict[str, str], tmp_path: Path) -> None:
    node = Node(tmp_path)
    good = Path(archive["skopeo oci-archive"].split(":")[1])
    real.call("cp", good, tmp_path / "a.tar")
    real.call("gzip", tmp_path / "a.tar")
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:5000])
    assert "gzip -d FILE" in node.refused(7, "inspect", f"oci-archive:{tmp_path}/a.tar.gz")
    assert "cut short" in node.refused(7, "verify", f"docker-archive:{tmp_path}/cut.tar")
    assert "there is no file" in node.refused(3, "inspect", f"oci-archive:{tmp_path}/none.tar")
    assert "docker save" in node.refused(2, "inspect", "docker-daemon:app:1")
    refused = node.refused(2, "convert", archive["skopeo oci-archive"], f"docker-archive:{tmp_path}/x.tar")
    assert "oci-archive:FILE:REF" in refused


# -- containerd ------------------------------------------------------------------------------------------------------


def test_convert_within_containerd_and_start_there(
    daemon: real.Containerd, archive: dict[str, str], tree: Path, client: Client, tmp_path: Path
) -> None:
    node = Node(tmp_path)
    lazy = NAME + "-lazy"
    for expected in ("converted", "reused"):
        done = node.lazyfs("convert", "--json", reference(daemon), reference(daemon, lazy))
        assert done.returncode == 0, done.stderr
        assert {layer["action"] for layer in json.loads(done.stdout)["layers"]} == {expected}
    assert node.lazyfs("verify", reference(daemon, lazy)).returncode == 0
    assert client.leases.ids() == []  # nothing but the image itself keeps its content
    daemon.ctr("images", "remove", "--sync", NAME)  # waits for the garbage collector
    with pytest.raises(ManifestMissing):
        opened(daemon).manifest(NAME)
    daemon.ctr("images", "import", "--no-unpack", archive["skopeo oci-archive"].split(":")[1])
    with daemon_mounted(daemon, lazy) as shown:
        same_tree(tree, shown)
    image = client.images.get(lazy)
    assert image is not None
    manifest = oci.parse_manifest(opened(daemon, lazy).manifest(lazy)[1])
    info = client.content.info(manifest.digest)
    assert info is not None and info.labels == {
        "containerd.io/gc.ref.content.config": manifest.config.digest,
        **{f"containerd.io/gc.ref.content.l.{n}": layer.digest for n, layer in enumerate(manifest.layers)},
    }


def daemon_mounted(daemon: real.Containerd, name: str) -> contextlib.AbstractContextManager[Path]:
    """Unpack an image as its runtime would, and mount it."""
    exported = daemon.directory / "exported.tar"
    daemon.ctr("images", "export", exported, name)
    daemon.ctr("images", "import", exported)  # unpacks with overlayfs
    return daemon.mounted(name)


def test_an_image_in_containerd_mounts_and_runs(daemon: real.Containerd, tree: Path, tmp_path: Path) -> None:
    with Node(tmp_path, **SLOW) as node:
        shown = node.mount(reference(daemon))
        same_tree(tree, shown)
        node.umount(shown)
        done = node.lazyfs(
            "run", "--rm", "--containerd-address", daemon.address, "--containerd-namespace", NAMESPACE,
            f"containerd:{NAME}", "/bin/cat", "/etc/plain",
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "no program\n"), done.stderr
        said = node.refused(3, "inspect", f"containerd:{NAME}?address={daemon.address}")
        assert f"namespace {NAMESPACE} has it: containerd://{NAMESPACE}/{NAME}" in said
        said = node.refused(3, "inspect", reference(daemon, "registry.example/none:1"))
        assert "has no image registry.example/none:1" in said
        done = node.lazyfs("doctor", "--json", reference(daemon))
        states = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
        assert states["registry"] == states["image"] == states["ranges"] == "ok"


def test_content_that_containerd_does_not_have(daemon: real.Containerd, client: Client, tmp_path: Path) -> None:
    """As after a lazy pull, or one of another platform: the image is named, its layer is not there."""
    made = archives.image(tar_of(file("only", b"here")))
    raw = made.manifest
    for blob in (made.config, raw):
        client.content.write(of(blob), len(blob), io.BytesIO(blob), labels={"containerd.io/gc.root": "now"})
    client.images.put(Image("registry.example/part:1", oci.Descriptor(oci.OCI_MANIFEST, of(raw), len(raw))))
    repository = opened(daemon, "registry.example/part:1")
    manifest = oci.parse_manifest(repository.manifest("registry.example/part:1")[1])
    assert not repository.has_blob(manifest.layers[0].digest)
    with repository.fetch(manifest.layers[0].digest, 0, 10) as stream, pytest.raises(BlobMissing) as caught:
        stream.read(10)
    assert "pulled lazily" in caught.value.hint
    said = Node(tmp_path).refused(3, "convert", reference(daemon, "registry.example/part:1"), f"oci:{tmp_path}/out:x")
    assert "does not have blob" in said and "pulled lazily" in said
    gone = oci.canonical_json({"schemaVersion": 2, "config": {}})
    client.images.put(Image("registry.example/gone:1", oci.Descriptor(oci.OCI_MANIFEST, of(gone), len(gone))))
    with pytest.raises(ManifestMissing, match="does not have blob"):
        repository.manifest("registry.example/gone:1")
    repository.close()


def test_an_upload_that_broke_off_is_gone_on_with(daemon: real.Containerd, client: Client) -> None:
    blob = os.urandom(5 << 20)

    class Breaks(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 3 << 20:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(LazyfsError, match="Input/output error"):
        client.content.write(of(blob), len(blob), Breaks(blob))
    asked = io.BytesIO(blob)
    sent: list[int] = []
    original = asked.read
    asked.read = lambda size=-1: (sent.append(asked.tell()), original(size))[1]  # type: ignore[method-assign]
    lease = client.leases.create(lifetime=60)
    until(lambda: client.content.write(of(blob), len(blob), asked, lease=lease) or True, "the upload's lock is gone")
    info = client.content.info(of(blob))
    assert info is not None and info.size == len(blob)
    assert not client.content.write(of(blob), len(blob), io.BytesIO(blob), lease=lease)
    client.leases.hold(lease, of(blob))
    client.leases.hold(lease, of(blob))  # once more is no error
    with client.content.read(of(blob), 1 << 20, 3 << 20) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == blob[1 << 20 : 4 << 20]
    client.leases.delete(lease)
    client.leases.delete(lease)  # once more is no error


def test_other_bytes_than_promised_are_refused(client: Client, daemon: real.Containerd) -> None:
    blob = os.urandom(2 << 20)
    for wrong in (blob[:-1] + b"x", blob[:-1], b""):
        with pytest.raises(PushRejected):
            client.content.write(of(blob), len(blob), io.BytesIO(wrong))
        assert client.content.info(of(blob)) is None
    lease = client.leases.create(lifetime=60)
    assert client.content.write(of(blob), len(blob), io.BytesIO(blob), lease=lease)
    client.leases.delete(lease)


def test_a_manifest_whose_blobs_are_missing_is_not_named(daemon: real.Containerd, client: Client) -> None:
    made = archives.image(tar_of(file("never", b"pushed")))
    repository = opened(daemon)
    with pytest.raises(PushRejected, match="which the manifest names"):
        repository.push_manifest("registry.example/never:1", oci.OCI_MANIFEST, made.manifest)
    repository.close()
    assert client.images.get("registry.example/never:1") is None
    assert client.leases.ids() == []


def test_what_is_pushed_and_never_named_is_collected(daemon: real.Containerd, client: Client) -> None:
    blob = os.urandom(1 << 20)
    repository = opened(daemon)
    assert repository.push_blob(of(blob), len(blob), io.BytesIO(blob))
    client.images.put(Image("registry.example/brief:1", oci.Descriptor(oci.OCI_MANIFEST, of(blob), len(blob))))
    daemon.ctr("images", "remove", "--sync", "registry.example/brief:1")  # waits for the garbage collector
    assert repository.has_blob(of(blob))
    repository.close()
    until(lambda: client.content.info(of(blob)) is None, "containerd has collected the blob", 60)


def test_content_of_another_namespace_is_taken_over(daemon: real.Containerd, client: Client, tmp_path: Path) -> None:
    there = f"containerd://elsewhere/{NAME}?address={daemon.address}"
    source = opened(daemon)
    destination = open_repository(references.parse(there))
    layer = oci.parse_manifest(source.manifest(NAME)[1]).layers[0]
    assert not destination.has_blob(layer.digest)
    assert destination.mount_blob(layer.digest, layer.size, source)
    assert destination.has_blob(layer.digest)
    assert not destination.mount_blob(of(b"nowhere"), 7, source)
    destination.close()
    source.close()


def test_containerd_stopped_in_the_middle(archive: dict[str, str], tree: Path, tmp_path: Path, place: Path) -> None:
    """A reader gets an error in time, and the right bytes once containerd is back."""
    with real.containerd(place / "d") as running:
        running.ctr("images", "import", "--no-unpack", archive["lazyfs oci-archive"].split(":")[1])
        (name,) = [image.name for image in connect(str(running.address), NAMESPACE, timeout=30).images.find()]
        repository = opened(running, name)
        layer = oci.parse_manifest(repository.manifest(name)[1]).layers[0]
        with Node(tmp_path) as node:
            shown = node.mount(reference(running, name))
            assert node.read(shown / "etc/plain") == b"no program\n"
            with repository.fetch(layer.digest, 0, layer.size, deadline=time.monotonic() + 5) as stream:
                assert stream.read(1)
                os.kill(running.pid, signal.SIGSTOP)
                try:
                    began = time.monotonic()
                    assert "Input/output error" in node.read_fails(shown / "big")
                    assert time.monotonic() - began < 15
                    with pytest.raises(RegistryError):
                        repository.manifest(name, deadline=time.monotonic() + 1)
                finally:
                    os.kill(running.pid, signal.SIGCONT)
            assert node.read(shown / "big") == (tree / "big").read_bytes()
            node.umount(shown)
        repository.close()


@pytest.mark.parametrize("where", ["containerd", "oci-archive"])
def test_an_index_with_all_its_images(where: str, daemon: real.Containerd, client: Client, tmp_path: Path) -> None:
    """Manifests by digest first, the index by name last; each platform is there, and kept."""
    name = "registry.example/many:1"
    text = reference(daemon, name) if where == "containerd" else f"oci-archive:{tmp_path}/a.tar:{name}"
    repository = open_repository(references.parse(text))
    entries = []
    for architecture in ("amd64", "arm64"):
        made = archives.image(tar_of(file("of", architecture.encode())))
        for blob in (*made.layers, made.config):
            repository.push_blob(of(blob), len(blob), io.BytesIO(blob))
        repository.push_manifest(of(made.manifest), oci.OCI_MANIFEST, made.manifest)
        platform = {"os": "linux", "architecture": architecture}
        entries.append(oci.Descriptor(oci.OCI_MANIFEST, of(made.manifest), len(made.manifest), platform=platform))
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [entry.to_json() for entry in entries]}
    repository.push_manifest(name, oci.OCI_INDEX, oci.canonical_json(index))
    repository.close()
    if where == "containerd":
        client.images.put(Image("registry.example/brief:2", entries[0]))
        daemon.ctr("images", "remove", "--sync", "registry.example/brief:2")  # the garbage collector has been here
        info = client.content.info(of(oci.canonical_json(index)))
        assert info is not None
        assert sorted(info.labels) == ["containerd.io/gc.ref.content.m.0", "containerd.io/gc.ref.content.m.1"]
    repository = open_repository(references.parse(text))
    for entry, architecture in zip(entries, ("amd64", "arm64"), strict=True):
        found = resolve_image(repository, references.parse(text), f"linux/{architecture}")
        assert found.digest == entry.digest
        (layer,) = found.manifest.layers
        with repository.fetch(layer.digest, 0, layer.size) as stream:
            assert b"of" in stream.read(layer.size)
    repository.close()
