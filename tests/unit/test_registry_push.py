"""Uploads to a registry, and OCI layout directories, which are written and read through the same calls."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from lazyfs import oci, reference
from lazyfs.digest import EMPTY, of
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DigestMismatch,
    DocumentInvalid,
    ManifestMissing,
    PushRejected,
    RegistryFault,
    UsageError,
)
from lazyfs.limits import MAX_DOCUMENT
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.local.layout import LayoutRepository
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault, Request, Rule

BLOB = os.urandom(700_000)
MANIFEST = oci.canonical_json(
    {
        "schemaVersion": 2,
        "config": {"mediaType": oci.OCI_CONFIG, "digest": EMPTY, "size": 0},
        "layers": [],
    }
)


class Unseekable(io.BytesIO):
    """A pipe, as far as the uploader can tell."""

    def seekable(self) -> bool:
        return False


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture(params=["registry", "layout"])
def repository(request: pytest.FixtureRequest, registry: FakeRegistry, tmp_path: Path) -> Iterator[Repository]:
    text = f"{registry.host}/team/app:v1" if request.param == "registry" else f"oci:{tmp_path}/new/layout:v1"
    opened = open_repository(reference.parse(text), OpenOptions(retry=RetryPolicy(attempts=3, first=0.001)))
    yield opened
    opened.close()


@pytest.fixture
def remote(registry: FakeRegistry) -> Iterator[Repository]:
    opened = open_repository(
        reference.parse(f"{registry.host}/team/app:v1"), OpenOptions(retry=RetryPolicy(attempts=3, first=0.001))
    )
    yield opened
    opened.close()


@pytest.fixture
def layout(tmp_path: Path) -> LayoutRepository:
    return LayoutRepository(tmp_path / "layout")


def fetched(repository: Repository, digest: str, blob_offset: int, size: int) -> bytes:
    with repository.fetch(digest, blob_offset, size) as stream:
        return b"".join(iter(lambda: stream.read(100_000), b""))


# -- both -----------------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_read_back(repository: Repository) -> None:
    assert not repository.has_blob(of(BLOB))
    assert repository.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    assert repository.has_blob(of(BLOB))
    assert fetched(repository, of(BLOB), 0, len(BLOB)) == BLOB
    assert fetched(repository, of(BLOB), 123_456, 7) == BLOB[123_456:123_463]
    assert fetched(repository, of(BLOB), 5, 0) == b""
    repository.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)
    assert repository.manifest("v1") == (oci.OCI_MANIFEST, MANIFEST)
    assert repository.manifest(of(MANIFEST))[1] == MANIFEST


def test_what_is_there_is_not_sent_again(repository: Repository) -> None:
    class Unreadable(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise AssertionError("the source was read")

    repository.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    assert not repository.push_blob(of(BLOB), len(BLOB), Unreadable())


def test_an_empty_blob(repository: Repository) -> None:
    assert repository.push_blob(EMPTY, 0, io.BytesIO(b""))
    assert repository.has_blob(EMPTY)


@pytest.mark.parametrize("source", [io.BytesIO, Unseekable])
def test_a_source_is_read_from_where_it_stands(repository: Repository, source: type[BinaryIO]) -> None:
    file = source(b"skipped" + BLOB + b"not sent")  # type: ignore[call-arg]
    file.read(7)
    assert repository.push_blob(of(BLOB), len(BLOB), file)
    assert fetched(repository, of(BLOB), 0, len(BLOB)) == BLOB


def test_other_bytes_than_promised_are_rejected(repository: Repository) -> None:
    with pytest.raises(PushRejected):
        repository.push_blob(of(b"other"), len(BLOB), io.BytesIO(BLOB))
    assert not repository.has_blob(of(b"other"))


def test_a_source_that_is_too_short_is_noticed(repository: Repository) -> None:
    with pytest.raises((PushRejected, UsageError)):
        repository.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB[:-1]))
    assert not repository.has_blob(of(BLOB))


def test_a_manifest_under_a_foreign_digest_is_rejected(repository: Repository) -> None:
    with pytest.raises(PushRejected):
        repository.push_manifest(of(b"other"), oci.OCI_MANIFEST, MANIFEST)


# -- the registry ---------------------------------------------------------------------------------------------------


def test_a_blob_takes_three_requests(remote: Repository, registry: FakeRegistry) -> None:
    remote.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    assert [(r.method, r.received) for r in registry.requests] == [("HEAD", 0), ("POST", 0), ("PUT", len(BLOB))]


@pytest.mark.parametrize("kind", [Fault.REFUSE, Fault.STATUS])
@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT"])
def test_an_upload_is_tried_again_from_the_start(
    remote: Repository, registry: FakeRegistry, kind: Fault, method: str
) -> None:
    registry.fault(kind, method=method, times=2)
    file = io.BytesIO(b"skipped" + BLOB)
    file.seek(7)
    assert remote.push_blob(of(BLOB), len(BLOB), file)
    assert registry.blobs[of(BLOB)] == BLOB


@pytest.mark.parametrize("times", [1, 2])
def test_an_upload_that_breaks_off_goes_on_where_it_was(remote: Repository, registry: FakeRegistry, times: int) -> None:
    registry.resumable = True
    registry.fault(Fault.STATUS, method="PUT", times=times)
    file = io.BytesIO(b"skipped" + BLOB)
    file.seek(7)
    assert remote.push_blob(of(BLOB), len(BLOB), file)
    assert registry.blobs[of(BLOB)] == BLOB
    sent = [request.received for request in registry.matching("PUT")]
    assert sent == [len(BLOB) >> turn for turn in range(times + 1)]
    assert registry.count("POST") == 1
    assert registry.matching("PUT")[1].headers["content-range"] == f"{len(BLOB) // 2}-{len(BLOB) - 1}"


def test_an_upload_whose_kept_part_is_wrong_starts_again(remote: Repository, registry: FakeRegistry) -> None:
    registry.resumable = True
    rule = registry.fault(Fault.STATUS, method="PUT", times=1)

    def spoil(request: Request) -> Rule | None:
        if request.method == "GET" and rule.hits:
            (session,) = registry.uploads
            registry.uploads[session][0] ^= 1
        return None

    registry.faults.append(spoil)
    assert remote.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    assert registry.blobs[of(BLOB)] == BLOB and registry.count("POST") == 2


def test_a_pipe_is_sent_once(remote: Repository, registry: FakeRegistry) -> None:
    rule = registry.fault(Fault.STATUS, method="PUT", status=503)
    with pytest.raises(RegistryFault) as caught:
        remote.push_blob(of(BLOB), len(BLOB), Unseekable(BLOB))
    assert not caught.value.temporary
    assert rule.hits == 1


def test_what_the_registry_says_is_passed_on(remote: Repository, registry: FakeRegistry) -> None:
    registry.fault(Fault.STATUS, method="PUT", path="/manifests/", status=400)
    with pytest.raises(PushRejected, match=r"status 400.*fake registry: FAULT"):
        remote.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)


def test_a_registry_that_stores_something_else_is_noticed(remote: Repository, registry: FakeRegistry) -> None:
    registry.fault(Fault.REDIRECT, method="PUT", path="/manifests/v1", location="/v2/team/app/blobs/uploads/none")
    with pytest.raises((PushRejected, BadAnswer)):
        remote.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)


# -- the layout -----------------------------------------------------------------------------------------------------


def test_a_layout_is_one_that_others_read(layout: LayoutRepository) -> None:
    layout.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    layout.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)
    assert json.loads((layout.path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert (layout.path / "blobs" / "sha256" / of(BLOB)[7:]).read_bytes() == BLOB
    index = json.loads((layout.path / "index.json").read_text())
    assert index["schemaVersion"] == 2
    assert index["manifests"] == [
        {
            "mediaType": oci.OCI_MANIFEST,
            "digest": of(MANIFEST),
            "size": len(MANIFEST),
            "annotations": {"org.opencontainers.image.ref.name": "v1"},
        }
    ]
    assert sorted(p.name for p in layout.path.rglob(".*")) == []


def test_a_ref_moves_and_others_stay(layout: LayoutRepository) -> None:
    other = MANIFEST + b"\n"
    layout.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)
    layout.push_manifest("v2", oci.OCI_MANIFEST, MANIFEST)
    layout.push_manifest("v1", oci.OCI_MANIFEST, other)
    assert layout.manifest("v1")[1] == other
    assert layout.manifest("v2")[1] == MANIFEST


def test_no_ref_means_the_only_image(layout: LayoutRepository) -> None:
    layout.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)
    assert layout.manifest("")[1] == MANIFEST
    layout.push_manifest("v2", oci.OCI_MANIFEST, MANIFEST + b" ")
    with pytest.raises(ManifestMissing, match="several") as caught:
        layout.manifest("")
    assert "v1, v2" in caught.value.hint
    with pytest.raises(ManifestMissing, match="no image v3"):
        layout.manifest("v3")


def test_parallel_writers_lose_no_ref(layout: LayoutRepository) -> None:
    threads = [
        threading.Thread(target=layout.push_manifest, args=(f"v{n}", oci.OCI_MANIFEST, MANIFEST)) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(layout.manifest(f"v{n}")[1] == MANIFEST for n in range(12))


def test_a_strangers_layout(layout: LayoutRepository) -> None:
    with pytest.raises(ManifestMissing):
        layout.manifest("v1")
    layout.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    layout.push_manifest("v1", oci.OCI_MANIFEST, MANIFEST)
    blobs = layout.path / "blobs" / "sha256"
    descriptor = oci.Descriptor(oci.OCI_CONFIG, of(BLOB), len(BLOB))

    (blobs / of(BLOB)[7:]).write_bytes(b"something else")
    with pytest.raises(DigestMismatch):
        layout.blob(descriptor)
    with pytest.raises(BadAnswer, match="it has 14"):
        layout.fetch(of(BLOB), 10, 5)

    (blobs / of(MANIFEST)[7:]).unlink()
    with pytest.raises(ManifestMissing):
        layout.manifest("v1")

    (blobs / of(BLOB)[7:]).unlink()
    os.mkfifo(blobs / of(BLOB)[7:])  # opening it must not block
    with pytest.raises(BlobMissing, match="not a regular file"):
        layout.fetch(of(BLOB), 0, 1)
    assert not layout.has_blob(of(BLOB))

    with (layout.path / "index.json").open("wb") as huge:
        huge.truncate(MAX_DOCUMENT + 1)
    with pytest.raises(DocumentInvalid, match="more than"):
        layout.manifest("v1")


@pytest.mark.parametrize("digest", ["sha256:../../../../etc/passwd", "sha512:" + "0" * 128, "", "sha256:" + "0" * 63])
def test_a_digest_is_never_a_path(layout: LayoutRepository, digest: str) -> None:
    for call in (lambda: layout.fetch(digest, 0, 1), lambda: layout.has_blob(digest)):
        with pytest.raises(DocumentInvalid):
            call()


def test_a_file_that_shrinks_under_the_reader(layout: LayoutRepository) -> None:
    layout.push_blob(of(BLOB), len(BLOB), io.BytesIO(BLOB))
    with layout.fetch(of(BLOB), 0, len(BLOB)) as stream:
        stream.read(10)
        os.truncate(layout.path / "blobs" / "sha256" / of(BLOB)[7:], 100)
        stream.read(1 << 20)
        with pytest.raises(BadAnswer, match="shorter"):
            stream.read(1 << 20)
