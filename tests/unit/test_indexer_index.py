"""Whole indexes: what is converted, what is kept, what the result names, and what the user is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.documents import rewrite_index
from indexer.image import convert_image
from indexer.options import ConvertOptions, OutputForm
from indexer.plan import REFERENCE_DIGEST
from indexer.report import Action, ConvertReport
from lazyfs import oci, reference
from lazyfs.digest import EMPTY, of
from lazyfs.errors import DigestMismatch, DocumentInvalid, LazyfsError, PlatformMissing, UsageError
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.tars import dir_, file, tar_of

BASE = tar_of(dir_("etc"), file("etc/hosts", b"127.0.0.1 localhost\n"))
AMD, ARM = tar_of(file("bin/x", b"amd64")), tar_of(file("bin/x", b"arm64"))
EVERYTHING = ConvertOptions(all_platforms=True)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry(isolated=True) as found:
        yield found


def convert(source: str, destination: str, options: ConvertOptions, cache: str = "") -> ConvertReport:
    quick = OpenOptions(retry=RetryPolicy(attempts=2, first=0.0, longest=0.0))
    references = [reference.parse(text) for text in (source, destination, *filter(None, [cache]))]
    opened = [open_repository(each, quick) for each in references]
    try:
        return convert_image(opened[0], references[0], opened[1], references[1], options, *opened[2:])
    finally:
        for each in opened:
            each.close()


def attestation_for(registry: FakeRegistry, repository: str, image: AddedImage) -> dict[str, Any]:
    """What buildkit puts beside an image: a manifest for unknown/unknown with in-toto layers."""
    statement = oci.canonical_json({"subject": [{"digest": {"sha256": image.digest[7:]}}]})
    config = oci.canonical_json(
        {"architecture": "unknown", "os": "unknown", "rootfs": {"type": "layers", "diff_ids": [of(statement)]}}
    )
    for blob in (statement, config):
        registry.add_blob(blob, repository)
    manifest = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": {"mediaType": oci.OCI_CONFIG, "digest": of(config), "size": len(config)},
            "layers": [{"mediaType": "application/vnd.in-toto+json", "digest": of(statement), "size": len(statement)}],
        }
    )
    registry.add_manifest(repository, "", oci.OCI_MANIFEST, manifest)
    return {
        "mediaType": oci.OCI_MANIFEST,
        "digest": of(manifest),
        "size": len(manifest),
        "annotations": {
            REFERENCE_DIGEST: image.digest,
            "vnd.docker.reference.type": "attestation-manifest",
        },
        "platform": {"os": "unknown", "architecture": "unknown"},
    }


def add_index(registry: FakeRegistry, entries: list[dict[str, Any]], tag: str = "multi", **more: Any) -> str:
    raw = oci.canonical_json({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries, **more})
    return registry.add_manifest("app", tag, oci.OCI_INDEX, raw)


def entry_of(image: AddedImage, platform: str, **more: Any) -> dict[str, Any]:
    words = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
    return {
        "mediaType": oci.OCI_MANIFEST,
        "digest": image.digest,
        "size": len(image.raw),
        "platform": words,
        **more,
    }


def images(registry: FakeRegistry) -> tuple[AddedImage, AddedImage]:
    amd = registry.add_image("app", "", [gzip.compress(BASE, mtime=0), AMD])
    arm = registry.add_image("app", "", [gzip.compress(BASE, mtime=0), ARM], {"architecture": "arm64"})
    return amd, arm


def index_at(registry: FakeRegistry, repository: str, target: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(registry.manifests_of(repository)[target][1])
    return loaded


def test_a_whole_index_with_its_attestations(registry: FakeRegistry) -> None:
    amd, arm = images(registry)
    entries = [
        entry_of(amd, "linux/amd64", annotations={"note": "first"}),
        entry_of(arm, "linux/arm64/v8"),
        attestation_for(registry, "app", amd),
        attestation_for(registry, "app", arm),
    ]
    entries[1]["platform"] |= {"os.features": ["odd"], "os.version": "1"}
    add_index(registry, entries, annotations={"made": "by a test"}, unknown={"kept": True})
    report = convert(f"{registry.host}/app:multi", f"{registry.host}/lazy:multi", EVERYTHING)
    result = index_at(registry, "lazy", "multi")
    assert result["annotations"] == {"made": "by a test"} and result["unknown"] == {"kept": True}
    assert [entry["platform"] for entry in result["manifests"]] == [entry["platform"] for entry in entries]
    assert result["manifests"][0]["annotations"] == {"note": "first"}
    amd_result, arm_result, amd_note, arm_note = result["manifests"]
    assert {amd_result["digest"], arm_result["digest"]}.isdisjoint({amd.digest, arm.digest})
    # An attestation is the same document; what it is tied to in the index is the result.
    assert [amd_note["digest"], arm_note["digest"]] == [entries[2]["digest"], entries[3]["digest"]]
    assert amd_note["annotations"][REFERENCE_DIGEST] == amd_result["digest"]
    assert arm_note["annotations"][REFERENCE_DIGEST] == arm_result["digest"]
    for entry in result["manifests"]:
        raw = registry.manifests_of("lazy")[entry["digest"]][1]
        assert len(raw) == entry["size"]
        document = oci.parse_manifest(raw)
        for blob in (document.config, *document.layers):
            assert ("lazy", blob.digest) in registry.holds
    # The shared layer was converted once, and everything kept was taken over inside of the registry.
    assert registry.count("GET", amd.layers[0]) == 1
    assert [image.platform for image in report.images] == ["linux/amd64", "linux/arm64"]
    assert [kept.kind for kept in report.kept] == ["attestation", "attestation"] and report.mounted > 0
    assert sum("attestation" in note for note in report.notes) == 2
    told = json.loads(json.dumps(report.to_json()))
    assert {layer["platform"] for layer in told["layers"]} == {"linux/amd64", "linux/arm64"}
    assert told["manifest"] == of(registry.manifests_of("lazy")["multi"][1])
    # The tag came last of all.
    assert registry.matching("PUT")[-1].path.endswith("/manifests/multi")


def test_an_index_converted_twice_gives_one_digest_and_no_work(registry: FakeRegistry) -> None:
    amd, arm = images(registry)
    add_index(registry, [entry_of(amd, "linux/amd64"), entry_of(arm, "linux/arm64")])
    first = convert(f"{registry.host}/app:multi", f"{registry.host}/lazy:multi", EVERYTHING)
    second = convert(f"{registry.host}/app:multi", f"{registry.host}/lazy:multi", EVERYTHING)
    assert second.manifest_digest == first.manifest_digest and second.pushed == 0
    assert {layer.action for layer in second.layers} == {Action.REUSED}
    # The result converted again is the same: its layers are kept.
    third = convert(f"{registry.host}/lazy:multi", f"{registry.host}/again:multi", EVERYTHING)
    assert third.manifest_digest == first.manifest_digest and {layer.action for layer in third.layers} == {Action.KEPT}


def test_indexes_in_indexes_and_other_artifacts(registry: FakeRegistry) -> None:
    amd, arm = images(registry)
    inner = add_index(registry, [entry_of(arm, "linux/arm64")], "")
    inner_raw = registry.manifests_of("app")[inner][1]
    windows = registry.add_image(
        "app",
        "",
        [(b"not copied", {}, oci.DOCKER_LAYER_FOREIGN)],
        {"os": "windows", "rootfs": {"type": "layers", "diff_ids": [EMPTY]}},
    )
    chart = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": EMPTY, "size": 0},
            "layers": [],
        }
    )
    registry.add_blob(b"", "app")
    registry.add_manifest("app", "", oci.OCI_MANIFEST, chart)
    chart_entry = {"mediaType": oci.OCI_MANIFEST, "digest": of(chart), "size": len(chart)}
    payload = oci.canonical_json({"critical": {"image": {"docker-manifest-digest": amd.digest}}})
    for blob in (payload, b"{}"):
        registry.add_blob(blob, "app")
    signature = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": of(b"{}"), "size": 2},
            "layers": [
                {
                    "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
                    "digest": of(payload),
                    "size": len(payload),
                    "annotations": {"dev.cosignproject.cosign/signature": "MEUCIQ=="},
                }
            ],
            "subject": {"mediaType": oci.OCI_MANIFEST, "digest": amd.digest, "size": len(amd.raw)},
        }
    )
    registry.add_manifest("app", "", oci.OCI_MANIFEST, signature)
    signature_entry = {"mediaType": oci.OCI_MANIFEST, "digest": of(signature), "size": len(signature)}
    nested = {"mediaType": oci.OCI_INDEX, "digest": inner, "size": len(inner_raw)}
    add_index(
        registry,
        [entry_of(amd, "linux/amd64"), nested, entry_of(windows, "windows/amd64"), chart_entry, signature_entry],
    )
    report = convert(f"{registry.host}/app:multi", f"{registry.host}/lazy:multi", EVERYTHING)
    entries = index_at(registry, "lazy", "multi")["manifests"]
    assert [entry["digest"] for entry in entries[2:]] == [windows.digest, of(chart), of(signature)]
    assert ("lazy", of(payload)) in registry.holds, "a signature is kept as it is, and told about"
    assert any(of(signature)[7:19] in note and amd.digest[:19] in note for note in report.notes)
    nested_result = index_at(registry, "lazy", entries[1]["digest"])
    assert nested_result["manifests"][0]["digest"] == report.images[1].manifest_digest
    assert ("lazy", windows.layers[0]) not in registry.holds and ("lazy", windows.config) in registry.holds
    assert any("windows/amd64" in note and "not distributable" in note for note in report.notes)
    assert any("artifact" in note for note in report.notes)


def test_one_platform_names_the_ones_left_out(registry: FakeRegistry) -> None:
    amd, arm = images(registry)
    add_index(
        registry,
        [entry_of(amd, "linux/amd64"), entry_of(arm, "linux/arm64"), attestation_for(registry, "app", amd)],
    )
    report = convert(f"{registry.host}/app:multi", f"{registry.host}/lazy:one", ConvertOptions(platform="linux/amd64"))
    assert registry.manifests_of("lazy")["one"][0] == oci.OCI_MANIFEST
    (note,) = report.notes
    assert "linux/arm64, 1 attestation " in note and "unknown" not in note and "--all-platforms" in note


def test_what_is_kept_may_share_a_layer_with_an_image(registry: FakeRegistry) -> None:
    """The blob is needed twice then: converted, and as it is."""
    amd, _ = images(registry)
    manifest = json.loads(amd.raw)
    subject = {"mediaType": oci.OCI_MANIFEST, "digest": amd.digest, "size": len(amd.raw)}
    about = oci.canonical_json({**manifest, "artifactType": "text/x", "subject": subject})
    registry.add_manifest("app", "", oci.OCI_MANIFEST, about)
    kept = {"mediaType": oci.OCI_MANIFEST, "digest": of(about), "size": len(about)}
    add_index(registry, [entry_of(amd, "linux/amd64"), kept])
    for options in (EVERYTHING, replace(EVERYTHING, copy_referrers=True)):
        with FakeRegistry(isolated=True) as there:
            report = convert(f"{registry.host}/app:multi", f"{there.host}/lazy:multi", options)
            for digest in (*amd.layers, *(layer.digest for layer in report.layers)):
                assert of(there.blobs[digest]) == digest


def test_a_single_image_needs_no_index(registry: FakeRegistry) -> None:
    amd = registry.add_image("app", "1", [BASE])
    report = convert(amd.reference, f"{registry.host}/lazy:1", EVERYTHING)
    assert registry.manifests_of("lazy")["1"][0] == oci.OCI_MANIFEST and len(report.images) == 1


def test_indexes_that_hold_no_image_or_too_much(registry: FakeRegistry) -> None:
    amd, _ = images(registry)
    add_index(registry, [], "empty")
    with pytest.raises(DocumentInvalid, match="no image"):
        convert(f"{registry.host}/app:empty", f"{registry.host}/lazy:1", EVERYTHING)
    digest = add_index(registry, [entry_of(amd, "linux/amd64")], "deep")
    for _ in range(6):
        raw = registry.manifests_of("app")[digest][1]
        digest = add_index(registry, [{"mediaType": oci.OCI_INDEX, "digest": digest, "size": len(raw)}], "deep")
    with pytest.raises(DocumentInvalid, match="too deep"):
        convert(f"{registry.host}/app:deep", f"{registry.host}/lazy:1", EVERYTHING)
    wrong = entry_of(amd, "linux/amd64") | {"size": 5}
    add_index(registry, [wrong], "wrong")
    with pytest.raises(DocumentInvalid, match="its descriptor says 5"):
        convert(f"{registry.host}/app:wrong", f"{registry.host}/lazy:1", EVERYTHING)
    assert "lazy" not in registry.repositories


def test_nothing_is_pushed_when_one_of_the_images_is_bad(registry: FakeRegistry) -> None:
    amd, arm = images(registry)
    add_index(registry, [entry_of(amd, "linux/amd64"), entry_of(arm, "linux/arm64")])
    registry.blobs[arm.layers[1]] = ARM.replace(b"arm64", b"evil!")
    with FakeRegistry() as destination:
        with pytest.raises(DigestMismatch):
            convert(f"{registry.host}/app:multi", f"{destination.host}/lazy:1", EVERYTHING)
        assert not destination.blobs and not destination.uploads and not destination.repositories


def test_kept_blobs_are_verified_before_anything_is_pushed(registry: FakeRegistry) -> None:
    amd, _ = images(registry)
    attestation = attestation_for(registry, "app", amd)
    add_index(registry, [entry_of(amd, "linux/amd64"), attestation])
    manifest = oci.parse_manifest(registry.manifests_of("app")[attestation["digest"]][1])
    statement = manifest.layers[0].digest
    registry.blobs[statement] = bytes([registry.blobs[statement][0] ^ 1]) + registry.blobs[statement][1:]
    with FakeRegistry() as destination:
        with pytest.raises(DigestMismatch):
            convert(f"{registry.host}/app:multi", f"{destination.host}/lazy:1", EVERYTHING)
        assert not destination.blobs and not destination.uploads and not destination.repositories


# -- Docker's media types -------------------------------------------------------------------------------------------


def docker_image(registry: FakeRegistry) -> AddedImage:
    layer: tuple[bytes, dict[str, str], str] = (gzip.compress(BASE, mtime=0), {}, oci.DOCKER_LAYER_GZIP)
    return registry.add_image("app", "docker", [layer], manifest_type=oci.DOCKER_MANIFEST)


def test_docker_lists_become_oci_indexes_unless_forbidden(registry: FakeRegistry) -> None:
    image = docker_image(registry)
    registry.add_index("app", "list", {"linux/amd64": image}, docker=True)
    convert(f"{registry.host}/app:list", f"{registry.host}/lazy:oci", EVERYTHING)
    result = index_at(registry, "lazy", "oci")
    assert result["mediaType"] == oci.OCI_INDEX and result["manifests"][0]["mediaType"] == oci.OCI_MANIFEST
    stays = replace(EVERYTHING, docker=True, form=OutputForm.ESTARGZ)
    report = convert(f"{registry.host}/app:list", f"{registry.host}/lazy:docker", stays)
    result = index_at(registry, "lazy", "docker")
    assert result["mediaType"] == oci.DOCKER_INDEX and result["manifests"][0]["mediaType"] == oci.DOCKER_MANIFEST
    media_type, raw = registry.manifests_of("lazy")[result["manifests"][0]["digest"]]
    manifest = oci.parse_manifest(raw, media_type)
    assert manifest.config.media_type == oci.DOCKER_CONFIG
    assert [layer.media_type for layer in manifest.layers] == [oci.DOCKER_LAYER_GZIP]
    assert oci.TOC_DIGEST in manifest.layers[0].annotations
    assert any("annotations" in note for note in report.notes)


def test_an_oci_image_stays_one_with_docker(registry: FakeRegistry) -> None:
    amd, _ = images(registry)
    convert(amd.reference, f"{registry.host}/lazy:1", ConvertOptions(docker=True, form=OutputForm.ESTARGZ))
    assert registry.manifests_of("lazy")["1"][0] == oci.OCI_MANIFEST


@pytest.mark.parametrize("form", [OutputForm.ZSTD_CHUNKED, OutputForm.PODMAN])
def test_docker_has_no_type_for_zstd(form: OutputForm) -> None:
    with pytest.raises(UsageError, match="Docker") as caught:
        ConvertOptions(docker=True, form=form).check()
    assert "--format estargz" in caught.value.hint


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="contradict"):
        ConvertOptions(all_platforms=True, platform="linux/arm64").check()


@pytest.mark.parametrize("form", list(OutputForm))
def test_between_all_forms(registry: FakeRegistry, form: OutputForm) -> None:
    """A layer in the form that is wanted is kept; from any other form it is converted."""
    amd = registry.add_image("app", "1", [gzip.compress(BASE, mtime=0)])
    convert(amd.reference, f"{registry.host}/first:1", ConvertOptions(form=form))
    for other in OutputForm:
        report = convert(f"{registry.host}/first:1", f"{registry.host}/{other.value}:1", ConvertOptions(form=other))
        assert report.layers[0].action is (Action.KEPT if other is form else Action.CONVERTED)
        back = convert(f"{registry.host}/{other.value}:1", f"{registry.host}/back:1", ConvertOptions(form=form))
        if OutputForm.ESTARGZ not in (form, other):  # lossless both ways
            assert back.layers[0].digest == report.layers[0].source_digest, (form, other)


# -- the rewriting alone --------------------------------------------------------------------------------------------

digests_ = st.integers(0, 30).map(lambda number: of(b"%d" % number))
words = st.text(max_size=8)
entries_ = st.fixed_dictionaries(
    {"digest": digests_, "size": st.integers(0, 1 << 40), "mediaType": words},
    optional={
        "platform": st.dictionaries(words, words, max_size=3),
        "annotations": st.dictionaries(
            st.sampled_from([REFERENCE_DIGEST, "a", "b"]), st.one_of(digests_, words), max_size=3
        ),
        "artifactType": words,
        "unheard of": st.recursive(st.none() | words, st.lists, max_leaves=3),
    },
)


@given(
    st.lists(entries_, max_size=8),
    st.dictionaries(digests_, st.tuples(digests_, st.integers(0, 1 << 40)), max_size=8),
    st.booleans(),
)
def test_rewriting_changes_what_it_must_and_nothing_else(
    entries: list[dict[str, Any]], changes: dict[str, tuple[str, int]], docker: bool
) -> None:
    results = {old: oci.Descriptor(oci.OCI_MANIFEST, new, size) for old, (new, size) in changes.items()}
    source = {"schemaVersion": 2, "mediaType": oci.DOCKER_INDEX, "manifests": entries, "annotations": {"x": "y"}}
    raw = oci.canonical_json(source)
    out = json.loads(rewrite_index(raw, oci.DOCKER_INDEX, results, docker=docker))
    assert {**out, "manifests": None, "mediaType": None} == {**source, "manifests": None, "mediaType": None}
    assert out["mediaType"] == (oci.DOCKER_INDEX if docker else oci.OCI_INDEX)
    for before, after in zip(entries, out["manifests"], strict=True):
        result = results.get(before["digest"])
        if result is None:
            assert (after["digest"], after["size"]) == (before["digest"], before["size"])
        else:
            assert (after["digest"], after["size"], after["mediaType"]) == (
                result.digest, result.size, result.media_type)  # fmt: skip
        about = before.get("annotations", {}).get(REFERENCE_DIGEST)
        if about in results:
            assert after["annotations"][REFERENCE_DIGEST] == results[about].digest
        untouched = set(before) - {"digest", "size", "mediaType", "annotations"}
        assert all(after[key] == before[key] for key in untouched)
        rest = {k: v for k, v in before.get("annotations", {}).items() if k != REFERENCE_DIGEST}
        assert {k: v for k, v in after.get("annotations", {}).items() if k != REFERENCE_DIGEST} == rest


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_an_index_are_a_sentence(raw: bytes) -> None:
    with FakeRegistry() as registry:
        registry.add_manifest("app", "x", oci.OCI_INDEX, raw)
        with pytest.raises(LazyfsError):
            convert(f"{registry.host}/app:x", f"{registry.host}/lazy:x", EVERYTHING)


def test_a_platform_that_isnt_there(registry: FakeRegistry) -> None:
    amd, _ = images(registry)
    add_index(registry, [entry_of(amd, "linux/amd64")])
    with pytest.raises(PlatformMissing):
        convert(f"{registry.host}/app:multi", f"{registry.host}/x:1", ConvertOptions(platform="linux/s390x"))
