"""docker-archive: what docker, podman and skopeo save, as an image with a manifest made up."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.digest import of
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    FormatError,
    LazyfsError,
    ManifestMissing,
    UsageError,
)
from lazyfs.registry.local.docker_archive import DockerArchiveRepository
from lazyfs.registry.local.files import FileStream
from lazyfs.registry.local.oci_archive import OciArchiveRepository
from lazyfs.registry.local.open_local import check_destination
from tests.helpers.archives import IMAGE, LAYER, UPPER, check_image, docker_archive, image, oci_archive, opened, read
from tests.helpers.tars import dir_, file, symlink, tar_of


def test_a_docker_archive_is_an_image(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar", docker_archive(IMAGE, "app:1", "h.example/team/app:2"), "docker-archive")
    for target in ("", "docker.io/library/app:1", "h.example/team/app:2", "@0"):
        manifest = check_image(repository, target)
    assert {layer.media_type for layer in manifest.layers} == {oci.OCI_LAYER}
    again = DockerArchiveRepository(tmp_path / "a.tar")
    assert read(again, of(UPPER), 0, len(UPPER)) == UPPER  # with no manifest asked for before
    assert again.manifest(manifest.digest)[1] == manifest.raw
    for target in ("docker.io/library/app:3", "@1"):
        with pytest.raises(ManifestMissing, match="no image") as caught:
            repository.manifest(target)
        assert "docker.io/library/app:1" in caught.value.hint
    assert repository.referrers(manifest.digest) == []
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"none"), 0, 1)


def test_several_images_in_one_archive(tmp_path: Path) -> None:
    two = image(UPPER)
    listed = [
        {"Config": "a.json", "RepoTags": ["a:1"], "Layers": ["1/layer.tar", "2/layer.tar"]},
        {"Config": "b.json", "RepoTags": None, "Layers": ["3/layer.tar"]},
    ]
    raw = tar_of(
        dir_("1/"), file("1/layer.tar", LAYER), file("2/layer.tar", UPPER), symlink("3/layer.tar", "../2/layer.tar"),
        file("a.json", IMAGE.config), file("b.json", two.config), file("manifest.json", json.dumps(listed).encode()),
    )  # fmt: skip
    repository = opened(tmp_path / "a.tar", raw, "docker-archive")
    check_image(repository, "docker.io/library/a:1")
    check_image(repository, "@1", (UPPER,))
    with pytest.raises(ManifestMissing, match="holds 2 images") as caught:
        repository.manifest("")
    assert "@0 to @1" in caught.value.hint


@pytest.mark.parametrize("form", ["gzip", "zstd"])
@pytest.mark.parametrize("named", [False, True])
def test_compressed_layers_keep_their_digest(form: str, named: bool, tmp_path: Path) -> None:
    packed = gzip.compress(LAYER, mtime=0) if form == "gzip" else zstandard.ZstdCompressor().compress(LAYER)
    one = image(packed, diff_ids=[of(LAYER)])
    name = f"blobs/sha256/{of(packed)[7:]}" if named else "layer.tar.gz"
    raw = tar_of(
        file(name, packed), file("c.json", one.config),
        file("manifest.json", json.dumps([{"Config": "c.json", "Layers": [name]}]).encode()),
    )  # fmt: skip
    manifest = check_image(opened(tmp_path / "a.tar", raw, "docker-archive"), "", (packed,))
    assert manifest.layers[0].media_type == f"{oci.OCI_LAYER}+{form}"


def test_a_layer_under_many_names_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(LAYER, mtime=0) + bytes(1 << 20)
    names = [f"{number}/layer.tar" for number in range(200)]
    one = image(*[packed] * 200, diff_ids=[of(LAYER)] * 200)
    raw = tar_of(
        file("layer.tar", packed), *(symlink(name, "../layer.tar") for name in names), file("c.json", one.config),
        file("manifest.json", json.dumps([{"Config": "c.json", "Layers": names}]).encode()),
    )  # fmt: skip
    sizes: list[int] = []
    plain = FileStream.read

    def counted(stream: FileStream, size: int) -> bytes:
        data = plain(stream, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(FileStream, "read", counted)
    _, manifest = opened(tmp_path / "a.tar", raw, "docker-archive").manifest("")
    assert [layer.digest for layer in oci.parse_manifest(manifest).layers] == [of(packed)] * 200
    assert sum(sizes) < 2 * len(raw)


def test_a_layer_that_is_not_its_diff_id_is_somebody_elses_bytes(tmp_path: Path) -> None:
    """The archive claims a digest by the config; whoever reads the blob finds it false."""
    one = image(LAYER)
    raw = docker_archive(one).replace(LAYER, LAYER.replace(b"world", b"WORLD"))
    repository = opened(tmp_path / "a.tar", raw, "docker-archive")
    manifest = oci.parse_manifest(repository.manifest("")[1])
    got = read(repository, manifest.layers[0].digest, 0, len(LAYER))
    assert hashlib.sha256(got).hexdigest() != manifest.layers[0].digest[7:]


@pytest.mark.parametrize(
    "listed",
    [
        b"", b"{}", b"[]", b"[1]", b'[{"Config": 1}]', b'[{"Config": ""}]', b'[{"Config": "c.json", "Layers": "x"}]',
        b'[{"Config": "c.json", "Layers": [1]}]', b'[{"Config": "c.json", "RepoTags": [1]}]', b"[" * 100_000,
        b'[{"Config": "c.json", "Layers": []}]', b'[{"Config": "../c.json", "Layers": []}]',
        json.dumps([{"Config": "c.json", "Layers": ["x"] * 600}]).encode(),
        b'[{"Config": "gone.json", "Layers": []}]', b'[{"Config": "c.json", "Layers": ["gone"]}]',
        b'[{"Config": "manifest.json", "Layers": []}]',
    ],
)  # fmt: skip
def test_a_malformed_list_of_images(listed: bytes, tmp_path: Path) -> None:
    raw = tar_of(file("c.json", image(LAYER).config), file("manifest.json", listed))
    with pytest.raises((FormatError, ManifestMissing, BlobMissing)):
        opened(tmp_path / "a.tar", raw, "docker-archive").manifest("")


@given(st.binary(max_size=300))
def test_any_list_of_images_is_read_or_refused(listed: bytes) -> None:
    path = Path(f"/dev/shm/lazyfs-test-{os.getpid()}-{zlib.crc32(listed)}.tar")
    try:
        with pytest.raises(LazyfsError):
            opened(path, tar_of(file("manifest.json", listed)), "docker-archive").manifest("")
    finally:
        path.unlink()


def test_one_kind_of_archive_tells_of_the_other(tmp_path: Path) -> None:
    with pytest.raises(ManifestMissing) as caught:
        opened(tmp_path / "a.tar", oci_archive(v1=IMAGE), "docker-archive").manifest("")
    assert "oci-archive:" in caught.value.hint
    with pytest.raises(ManifestMissing) as caught:
        opened(tmp_path / "b.tar", docker_archive(IMAGE), "oci-archive").manifest("")
    assert "docker-archive:" in caught.value.hint


def test_a_docker_archive_is_not_written(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar", transport="docker-archive")
    calls: list[Callable[[], object]] = [
        lambda: repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER)),
        lambda: repository.push_manifest("x", oci.OCI_MANIFEST, IMAGE.manifest),
        lambda: check_destination(references.parse(f"docker-archive:{tmp_path}/a.tar:x")),
    ]
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert "oci-archive:" in caught.value.hint


def test_repositories_of_archives_hold_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    repository = OciArchiveRepository(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(oci_archive(v1=IMAGE))
    check_image(repository, "v1")
    with pytest.raises(BadAnswer):
        repository.fetch(of(LAYER), 1 << 40, 1)
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"x"), 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before
