"""oci-archive: read by ranges where it lies, written whole or not at all; archives that change under the reader."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from lazyfs import oci
from lazyfs.digest import of
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DigestMismatch,
    DocumentInvalid,
    ManifestMissing,
    PushRejected,
    RegistryFault,
)
from lazyfs.registry.repository import Repository
from tests.helpers.archives import IMAGE, LAYER, UPPER, check_image, docker_archive, image, oci_archive, opened, read
from tests.helpers.tars import fifo, file, hardlink, tar_of


def test_an_oci_archive_is_read_by_name_and_digest(tmp_path: Path) -> None:
    other = image(UPPER)
    repository = opened(tmp_path / "a.tar", oci_archive(v1=IMAGE, v2=other))
    manifest = check_image(repository, "v1")
    check_image(repository, manifest.digest)
    check_image(repository, "v2", (UPPER,))
    with pytest.raises(ManifestMissing, match="several") as caught:
        repository.manifest("")
    assert "v1, v2" in caught.value.hint
    with pytest.raises(ManifestMissing, match="no image v3"):
        repository.manifest("v3")
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"none"), 0, 1)
    assert not repository.has_blob(of(b"none"))
    with pytest.raises(BadAnswer, match="it has"):
        repository.fetch(of(LAYER), len(LAYER) - 1, 2)
    assert repository.referrers(manifest.digest) == []


@pytest.mark.parametrize(
    ("compress", "name"),
    [(gzip.compress, "gzip"), (lambda raw: zstandard.ZstdCompressor().compress(raw), "zstd"), (None, "")],
)
def test_a_compressed_archive_is_refused_with_the_command_that_helps(
    compress: Callable[[bytes], bytes] | None, name: str, tmp_path: Path
) -> None:
    raw = oci_archive(v1=IMAGE)
    repository = opened(tmp_path / "a.tar", compress(raw) if compress else raw)
    if compress is None:
        check_image(repository, "")
        return
    with pytest.raises(DocumentInvalid, match=f"compressed with {name}") as caught:
        repository.manifest("v1")
    assert f"{name} -d FILE" in caught.value.hint


def push(repository: Repository, name: str, *layers: bytes) -> None:
    made = image(*layers)
    for raw in (*made.layers, made.config):
        repository.push_blob(of(raw), len(raw), io.BytesIO(raw))
    repository.push_manifest(name, oci.OCI_MANIFEST, made.manifest)
    repository.close()


def test_what_is_written_is_read_by_a_full_unpack_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "new.tar"
    push(opened(path), "v1", LAYER, UPPER)
    check_image(opened(path), "v1")
    with tarfile.open(path) as archive:
        names = archive.getnames()
        index = archive.extractfile("index.json")
        assert index is not None
        (entry,) = json.load(index)["manifests"]
        assert entry["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
        for name in names:
            if name.startswith("blobs/sha256/"):
                blob = archive.extractfile(name)
                assert blob is not None and of(blob.read())[7:] == name.rpartition("/")[2]
    assert names[:2] == ["oci-layout", "index.json"] and len(names) == 2 + 2 + 4
    assert [p.name for p in tmp_path.iterdir()] == ["new.tar"]


def test_the_same_image_gives_the_same_archive(tmp_path: Path) -> None:
    push(opened(tmp_path / "1.tar"), "v1", LAYER, UPPER)
    two = opened(tmp_path / "2.tar")
    for raw in (UPPER, IMAGE.config, LAYER):
        two.push_blob(of(raw), len(raw), io.BytesIO(raw))
    two.push_manifest("v1", oci.OCI_MANIFEST, IMAGE.manifest)
    two.close()
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_adding_keeps_what_is_there_and_a_name_moves(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(oci_archive(v1=IMAGE))
    push(opened(path), "v2", UPPER)
    push(opened(path), "v3", LAYER)
    push(opened(path), "v2", LAYER, UPPER)
    repository = opened(path)
    for name, layers in (("v1", (LAYER, UPPER)), ("v2", (LAYER, UPPER)), ("v3", (LAYER,))):
        check_image(repository, name, layers)


def test_nothing_shows_before_the_name_and_nothing_is_left_without_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    repository = opened(path)
    assert repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER))
    assert not repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER))
    assert repository.has_blob(of(LAYER)) and read(repository, of(LAYER), 5, 20) == LAYER[5:25]
    assert not path.exists()
    repository.close()
    assert not repository.has_blob(of(LAYER)) and list(tmp_path.iterdir()) == []


def test_wrong_bytes_are_not_taken(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar")
    for raw in (LAYER[:-1], LAYER[:-1] + b"x"):
        with pytest.raises(PushRejected):
            repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(raw))
    assert not repository.has_blob(of(LAYER))
    with pytest.raises(PushRejected):
        repository.push_manifest(of(b"other"), oci.OCI_MANIFEST, IMAGE.manifest)
    repository.close()


@pytest.mark.parametrize(
    "there", [docker_archive(IMAGE, "app"), tar_of(file("oci-layout", b"{}"), hardlink("x", "oci-layout"))]
)
def test_an_archive_of_another_kind_is_not_added_to(there: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(there)
    repository = opened(path)
    with pytest.raises(PushRejected):  # before any work was done
        repository.push_blob(of(b"new"), 3, io.BytesIO(b"new"))
    assert path.read_bytes() == there


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            push(opened(path), f"v{number}", tar_of(file(f"f{number}", b"x" * number)))
        except PushRejected as error:  # too many others replaced it meanwhile: told, not lost
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repository = opened(path)
    for number in range(4 if not failures else 0):
        check_image(repository, f"v{number}", (tar_of(file(f"f{number}", b"x" * number)),))
    assert not failures


def test_no_place_to_write_is_one_sentence(tmp_path: Path) -> None:
    repository = opened(tmp_path / "missing" / "a.tar")
    with pytest.raises(RegistryFault, match="No such file") as caught:
        repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER))
    assert not caught.value.temporary


def test_referrers_are_listed_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    push(opened(path), "v1", LAYER)
    subject = oci.parse_manifest(opened(path).manifest("v1")[1])
    config = b"{}"
    about = oci.canonical_json(
        {
            "schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "artifactType": "application/spdx+json",
            "config": oci.Descriptor("application/vnd.oci.empty.v1+json", of(config), 2).to_json(), "layers": [],
            "subject": oci.Descriptor(oci.OCI_MANIFEST, subject.digest, len(subject.raw)).to_json(),
        }
    )  # fmt: skip
    repository = opened(path)
    repository.push_blob(of(config), 2, io.BytesIO(config))
    repository.push_manifest(of(about), oci.OCI_MANIFEST, about)
    repository.close()
    (found,) = opened(path).referrers(subject.digest)
    assert (found.digest, found.artifact_type) == (of(about), "application/spdx+json")
    check_image(opened(path), "", (LAYER,))  # the only image stays the only one


# -- archives that change under the reader -----------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_an_archive_that_is_replaced_never_gives_other_bytes(transport: str, tmp_path: Path) -> None:
    make = (lambda one: oci_archive(v1=one)) if transport == "oci-archive" else docker_archive
    path = tmp_path / "a.tar"
    repository = opened(path, make(IMAGE), transport)
    check_image(repository, "")
    with repository.fetch(of(LAYER), 0, len(LAYER)) as stream:
        assert stream.read(10) == LAYER[:10]
        fresh = tmp_path / "new.tar"
        fresh.write_bytes(make(image(UPPER)))
        fresh.rename(path)
        rest = b"".join(iter(lambda: stream.read(1 << 20), b""))
    assert LAYER[:10] + rest == LAYER  # who reads on has the old file
    with pytest.raises(BlobMissing):
        repository.fetch(of(LAYER), 0, 10)
    check_image(repository, "", (UPPER,))
    path.unlink()
    with pytest.raises(BlobMissing):
        repository.fetch(of(UPPER), 0, 1)
    with pytest.raises(ManifestMissing):
        repository.manifest("")


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_an_archive_cut_short(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    raw = oci_archive(v1=IMAGE) if transport == "oci-archive" else docker_archive(IMAGE)
    repository = opened(path, raw, transport)
    check_image(repository, "")
    with repository.fetch(of(LAYER), 0, len(LAYER)) as stream:
        os.truncate(path, 2000)
        with pytest.raises(BadAnswer, match="shorter"):
            while stream.read(1 << 20):
                pass
    for call in (lambda: repository.fetch(of(LAYER), 0, 1), lambda: repository.manifest("")):
        with pytest.raises(DocumentInvalid, match="cut short"):
            call()


def test_damaged_documents_are_noticed(tmp_path: Path) -> None:
    raw = oci_archive(v1=IMAGE)
    for part in (IMAGE.manifest, IMAGE.config):
        bad = part.replace(b"linux", b"Linux").replace(b"schemaVersion", b"schemaversion")
        repository = opened(tmp_path / "a.tar", raw.replace(part, bad))
        with pytest.raises(DigestMismatch):
            check_image(repository, "v1")


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_what_is_no_file_is_refused_and_blocks_nobody(transport: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", tmp_path / "none" / "none"):
        with pytest.raises(ManifestMissing):
            opened(path, transport=transport).manifest("")


def test_a_member_that_is_no_file(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar", tar_of(fifo("index.json")))
    with pytest.raises(ManifestMissing):
        repository.manifest("")
