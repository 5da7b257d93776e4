"""Referrers and cross-repository mounts: registries with and without the API, and layouts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import oci, reference
from lazyfs.digest import EMPTY, of
from lazyfs.errors import DocumentInvalid
from lazyfs.limits import MAX_LAYERS
from lazyfs.registry.config.access import Access
from lazyfs.registry.local.layout import LayoutRepository
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.referrers import described, fallback_tag, listed_with
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.referrers import KEEPERS, QUICK, SUBJECT, kept_by, opened_at


def referring(kind: str, subject: oci.Descriptor = SUBJECT) -> bytes:
    return oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "artifactType": kind,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": EMPTY, "size": 0},
            "layers": [],
            "subject": subject.to_json(),
            "annotations": {"made": "by a test"},
        }
    )


@pytest.fixture(params=KEEPERS)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    with kept_by(request.param, tmp_path) as found:
        yield found


def test_what_was_pushed_with_a_subject_is_listed(repository: Repository) -> None:
    assert repository.referrers(SUBJECT.digest) == []
    for kind in ("a/sbom", "a/signature", "a/sbom"):
        raw = referring(kind)
        repository.push_manifest(of(raw), oci.OCI_MANIFEST, raw)
    found = repository.referrers(SUBJECT.digest)
    assert sorted(entry.artifact_type for entry in found) == ["a/sbom", "a/signature"]
    assert all(entry.annotations == {"made": "by a test"} for entry in found)
    assert {entry.digest for entry in found} == {of(referring("a/sbom")), of(referring("a/signature"))}
    assert repository.referrers(of(b"another image")) == []


def test_the_fallback_tag_is_kept_only_where_it_is_needed() -> None:
    raw = referring("a/sbom")
    for api in (False, True):
        with FakeRegistry(referrers=api) as registry:
            opened = opened_at(registry)
            opened.push_manifest(of(raw), oci.OCI_MANIFEST, raw)
            assert (fallback_tag(SUBJECT.digest) in registry.manifests_of("app")) is not api
            opened.close()


def test_pages_are_followed_to_the_end_and_no_further() -> None:
    first = listed_with([], described(oci.OCI_MANIFEST, referring("a/one"))[1])  # type: ignore[index]
    with FakeRegistry() as registry:
        opened = opened_at(registry)
        # A page for every page: the list ends at a bound.
        registry.pages = (first, f'</v2/app/referrers/{SUBJECT.digest}?n=1>; rel="next"')
        assert 1 < len(opened.referrers(SUBJECT.digest)) <= 1000
        assert registry.count("GET", "/referrers/") < 50
        opened.close()


@pytest.mark.parametrize("status", [400, 404, 405])
def test_registries_that_dont_know_the_address(status: int) -> None:
    with FakeRegistry(referrers=True) as registry:
        registry.fault(Fault.STATUS, path="/referrers/", status=status)
        opened = opened_at(registry)
        assert opened.referrers(SUBJECT.digest) == []
        assert registry.count("GET", fallback_tag(SUBJECT.digest)) == 1
        opened.close()


def test_the_only_image_stays_the_only_one_beside_its_sbom(tmp_path: Path) -> None:
    layout = LayoutRepository(tmp_path)
    image = oci.canonical_json(
        {"schemaVersion": 2, "config": {"mediaType": oci.OCI_CONFIG, "digest": EMPTY, "size": 0}, "layers": []}
    )
    layout.push_manifest("v1", oci.OCI_MANIFEST, image)
    sbom = referring("a/sbom", oci.Descriptor(oci.OCI_MANIFEST, of(image), len(image)))
    layout.push_manifest(of(sbom), oci.OCI_MANIFEST, sbom)
    assert layout.manifest("")[1] == image
    assert [entry.artifact_type for entry in layout.referrers(of(image))] == ["a/sbom"]
    # A listed manifest that is gone refers to nothing.
    (tmp_path / "blobs/sha256" / of(sbom)[7:]).unlink()
    assert layout.referrers(of(image)) == []
    assert json.loads((tmp_path / "index.json").read_text())["manifests"][1]["artifactType"] == "a/sbom"


def test_a_list_has_an_end() -> None:
    many = [oci.Descriptor(oci.OCI_MANIFEST, of(b"%d" % n), 1) for n in range(MAX_LAYERS)]
    with pytest.raises(DocumentInvalid, match="already has"):
        listed_with(many, SUBJECT)


@pytest.mark.parametrize("subject", ["x", [1], {"digest": "sha256:0"}, {"digest": EMPTY, "size": -1}])
def test_a_malformed_subject_is_a_sentence(subject: object) -> None:
    with pytest.raises(DocumentInvalid, match="subject"):
        described(oci.OCI_MANIFEST, oci.canonical_json({"subject": subject}))


# -- mounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["", "bearer"])
def test_a_blob_is_mounted_from_another_repository(auth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeRegistry(isolated=True, auth=auth, users={"u": "p"}) as registry:
        login = {"auths": {registry.host: {"username": "u", "password": "p"}}}
        (tmp_path / "config.json").write_text(json.dumps(login))
        options = OpenOptions(retry=QUICK, access=Access(auth_files=(tmp_path / "config.json",)))
        digest = registry.add_blob(b"layer", "team/base")
        here, there = (
            open_repository(reference.parse(f"{registry.host}/{name}:1"), options) for name in ("app", "team/base")
        )
        assert there.has_blob(digest) and not here.has_blob(digest)
        assert here.mount_blob(digest, 5, there) and here.has_blob(digest)
        assert registry.count("PUT") == 0
        if auth:
            asked = [request.path for request in registry.matching("GET", "/token")]
            assert any("app%3Apull%2Cpush" in path and "team%2Fbase%3Apull" in path for path in asked)
        # What isn't there can't be mounted, and the upload that the registry begins instead is given up.
        assert not here.mount_blob(of(b"nothing"), 7, there)
        assert registry.count("DELETE") == 1 and not registry.uploads
        assert here.push_blob(of(b"nothing"), 7, io.BytesIO(b"nothing"))
        for each in (here, there):
            each.close()


def test_nothing_is_asked_where_a_mount_makes_no_sense(tmp_path: Path) -> None:
    with FakeRegistry() as registry, FakeRegistry() as other:
        here = opened_at(registry)
        elsewhere = open_repository(reference.parse(f"{other.host}/base:1"), OpenOptions(retry=QUICK))
        layout = LayoutRepository(tmp_path)
        assert not here.mount_blob(EMPTY, 0, elsewhere)
        assert not here.mount_blob(EMPTY, 0, here)
        assert not here.mount_blob(EMPTY, 0, layout) and not layout.mount_blob(EMPTY, 0, here)
        assert not registry.requests and not other.requests
        here.close()
        elsewhere.close()


def test_a_token_endpoint_that_gives_no_wider_tokens(tmp_path: Path) -> None:
    with FakeRegistry(isolated=True, auth="bearer", users={"u": "p"}) as registry:
        login = {"auths": {registry.host: {"username": "u", "password": "p"}}}
        (tmp_path / "config.json").write_text(json.dumps(login))
        digest = registry.add_blob(b"layer", "base")
        options = OpenOptions(retry=QUICK, access=Access(auth_files=(tmp_path / "config.json",)))
        here, there = (
            open_repository(reference.parse(f"{registry.host}/{name}:1"), options) for name in ("app", "base")
        )
        assert not here.has_blob(digest)
        registry.fault(Fault.STATUS, path="scope=repository%3Abase%3Apull", status=403)
        assert here.mount_blob(digest, 5, there)  # the fake looks at the upload's own repository only
        assert here.push_blob(of(b"new"), 3, io.BytesIO(b"new"))
        for each in (here, there):
            each.close()
