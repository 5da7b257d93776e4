"""Whole images: what is pushed, what is reused, and that a failure leaves nothing behind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from indexer.image import convert_image
from indexer.options import ConvertOptions
from indexer.report import Action, ConvertReport
from lazyfs import digest as digests
from lazyfs import oci, reference
from lazyfs.errors import (
    DiffIdMismatch,
    DigestMismatch,
    DocumentInvalid,
    FrameInvalid,
    LazyfsError,
    PlatformMissing,
    RegistryFault,
    TarInvalid,
    UsageError,
)
from lazyfs.format.lazy import NotLazy, toc_source
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from tests.helpers import tars
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.tars import dir_, file, sparse, tar_of

BASE = tar_of(dir_("etc"), file("etc/hosts", b"127.0.0.1 localhost\n"), file("big", bytes(range(256)) * 9000))
TOP = tar_of(file("etc/motd", b"hello"), tars.whiteout("big"))
SPARSE = tar_of(file("a", b"a"), sparse("s", [(5000, b"data")], 20_000))


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as found:
        yield found


@pytest.fixture
def options(tmp_path: Path) -> ConvertOptions:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return ConvertOptions(platform=None, scratch=scratch)


def convert(source: str, destination: str, options: ConvertOptions) -> ConvertReport:
    """Convert, and check that whatever happened no temporary file is left."""
    source_reference, destination_reference = reference.parse(source), reference.parse(destination)
    quick = OpenOptions(retry=RetryPolicy(attempts=2, first=0.0, longest=0.0))
    source_repository = open_repository(source_reference, quick)
    destination_repository = open_repository(destination_reference, quick)
    try:
        return convert_image(
            source_repository, source_reference, destination_repository, destination_reference, options
        )
    finally:
        source_repository.close()
        destination_repository.close()
        assert options.scratch is not None and list(options.scratch.iterdir()) == []


def result_of(registry: FakeRegistry, repository: str, tag: str) -> tuple[oci.Manifest, oci.ImageConfig]:
    media_type, raw = registry.manifests_of(repository)[tag]
    manifest = oci.parse_manifest(raw, media_type)
    return manifest, oci.parse_config(registry.blobs[manifest.config.digest])


def unpacked(registry: FakeRegistry, layer: oci.Descriptor) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(registry.blobs[layer.digest], read_across_frames=True) as reader:
        return reader.read()


def test_an_image_and_its_report(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [gzip.compress(BASE, mtime=0), TOP], {"config": {"Cmd": ["x"]}})
    report = convert(image.reference, f"{registry.host}/app:lazy", options)
    manifest, config = result_of(registry, "app", "lazy")
    assert config.raw == registry.blobs[image.config] and manifest.config.digest == image.config
    assert config.diff_ids == (digests.of(BASE), digests.of(TOP))
    assert manifest.media_type == oci.OCI_MANIFEST and manifest.digest == report.manifest_digest
    assert [unpacked(registry, layer) for layer in manifest.layers] == [BASE, TOP]
    for descriptor, source in zip(manifest.layers, image.layers, strict=True):
        assert descriptor.media_type == oci.OCI_LAYER_ZSTD
        assert descriptor.annotations[oci.SOURCE_LAYER].startswith(source + ";")
        assert descriptor.size == len(registry.blobs[descriptor.digest])
        assert not isinstance(toc_source(descriptor), NotLazy)
    assert [(layer.action, layer.entries, layer.diff_id_kept) for layer in report.layers] == [
        (Action.CONVERTED, 3, True), (Action.CONVERTED, 2, True)]  # fmt: skip
    told = json.loads(json.dumps(report.to_json()))
    assert told["layers"][0]["source"]["digest"] == image.layers[0] and told["manifest"] == manifest.digest
    assert told["size"] == sum(layer.size for layer in manifest.layers) and told["platform"] == "linux/amd64"
    # The config is there already, so only the layers were sent.
    assert report.pushed == report.size


def test_docker_images_become_oci_images(registry: FakeRegistry, options: ConvertOptions) -> None:
    layer: tuple[bytes, dict[str, str], str] = (gzip.compress(BASE, mtime=0), {}, oci.DOCKER_LAYER_GZIP)
    image = registry.add_image("app", "1", [layer], manifest_type=oci.DOCKER_MANIFEST)
    convert(image.reference, f"{registry.host}/app:lazy", options)
    manifest, _ = result_of(registry, "app", "lazy")
    assert (manifest.media_type, manifest.config.media_type) == (oci.OCI_MANIFEST, oci.OCI_CONFIG)
    assert manifest.layers[0].media_type == oci.OCI_LAYER_ZSTD


def test_converting_twice_gives_one_digest(registry: FakeRegistry, options: ConvertOptions, tmp_path: Path) -> None:
    image = registry.add_image("app", "1", [gzip.compress(BASE, mtime=0), TOP])
    first = convert(image.reference, f"{registry.host}/app:lazy", options)
    again = convert(image.reference, f"oci:{tmp_path}/layout:x", replace(options, jobs=7))
    forced = convert(image.reference, f"{registry.host}/app:lazy", replace(options, force=True))
    assert first.manifest_digest == again.manifest_digest == forced.manifest_digest
    assert [layer.action for layer in forced.layers] == [Action.CONVERTED] * 2 and forced.pushed == 0


def test_layers_converted_before_are_reused(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [gzip.compress(BASE, mtime=0), TOP])
    destination = f"{registry.host}/lazy:1"
    first = convert(image.reference, destination, options)
    registry.clear_log()
    second = convert(image.reference, destination, options)
    assert [layer.action for layer in second.layers] == [Action.REUSED] * 2
    assert second.manifest_digest == first.manifest_digest and second.pushed == 0
    assert not any(registry.count("GET", digest) for digest in image.layers)  # no layer was read
    # Other options are another source; a new layer is converted beside reused ones.
    other = convert(image.reference, destination, replace(options, level=5))
    assert [layer.action for layer in other.layers] == [Action.CONVERTED] * 2
    convert(image.reference, destination, options)
    newer = registry.add_image("app", "2", [gzip.compress(BASE, mtime=0), TOP, SPARSE])
    third = convert(newer.reference, destination, options)
    assert [layer.action for layer in third.layers] == [Action.REUSED, Action.REUSED, Action.CONVERTED]


def test_a_reused_layer_whose_blob_is_gone_is_converted_anew(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE])
    first = convert(image.reference, f"{registry.host}/app:lazy", options)
    del registry.blobs[first.layers[0].digest]
    second = convert(image.reference, f"{registry.host}/app:lazy", options)
    assert second.layers[0].action is Action.CONVERTED and second.manifest_digest == first.manifest_digest


def test_layers_in_the_wanted_form_are_kept(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE, TOP])
    first = convert(image.reference, f"{registry.host}/app:lazy", options)
    with FakeRegistry() as other:
        kept = convert(f"{registry.host}/app:lazy", f"{other.host}/copy:x", options)
        assert [layer.action for layer in kept.layers] == [Action.KEPT] * 2
        assert kept.manifest_digest == first.manifest_digest
        manifest, _ = result_of(other, "copy", "x")
        assert [unpacked(other, layer) for layer in manifest.layers] == [BASE, TOP]


def test_a_kept_layer_is_verified_before_it_is_pushed(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE])
    report = convert(image.reference, f"{registry.host}/app:lazy", options)
    digest = report.layers[0].digest
    blob = bytearray(registry.blobs[digest])
    blob[100] ^= 1
    registry.blobs[digest] = bytes(blob)
    with FakeRegistry() as other:
        with pytest.raises((DigestMismatch, FrameInvalid)):
            convert(f"{registry.host}/app:lazy", f"{other.host}/copy:x", options)
        assert not other.blobs and "copy" not in other.repositories


def test_a_new_diff_id_gets_a_new_config(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [SPARSE, BASE], {"config": {"Env": ["A=b"]}, "history": [{"x": 1}]})
    report = convert(image.reference, f"{registry.host}/app:lazy", options)
    manifest, config = result_of(registry, "app", "lazy")
    assert config.diff_ids == (digests.of(unpacked(registry, manifest.layers[0])), digests.of(BASE))
    before: dict[str, Any] = json.loads(registry.blobs[image.config])
    assert {**config.document, "rootfs": None} == {**before, "rootfs": None}
    assert [layer.diff_id_kept for layer in report.layers] == [False, True]
    again = convert(image.reference, f"{registry.host}/app:lazy", options)
    assert [layer.action for layer in again.layers] == [Action.REUSED] * 2
    assert again.manifest_digest == report.manifest_digest


def test_equal_layers_are_converted_once(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE, TOP, BASE])
    registry.clear_log()
    report = convert(image.reference, f"{registry.host}/app:lazy", options)
    assert report.layers[0] == report.layers[2] and registry.count("GET", image.layers[0]) == 1


def test_an_image_without_layers(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [])
    assert convert(image.reference, f"{registry.host}/app:lazy", options).layers == ()


def test_the_platform_is_chosen_from_an_index(registry: FakeRegistry, options: ConvertOptions) -> None:
    arm = registry.add_image("app", "", [TOP], {"architecture": "arm64"})
    amd = registry.add_image("app", "", [BASE])
    registry.add_index("app", "multi", {"linux/amd64": amd, "linux/arm64": arm})
    source = f"{registry.host}/app:multi"
    report = convert(source, f"{registry.host}/app:arm", replace(options, platform="linux/arm64"))
    assert report.source_manifest == arm.digest and report.platform == "linux/arm64"
    with pytest.raises(PlatformMissing):
        convert(source, f"{registry.host}/app:x", replace(options, platform="linux/s390x"))
    with pytest.raises(PlatformMissing):
        convert(amd.reference, f"{registry.host}/app:x", replace(options, platform="linux/arm64"))


def broken(registry: FakeRegistry, case: str) -> AddedImage:
    good = gzip.compress(BASE, mtime=0)
    if case == "diff ID":
        return registry.add_image("app", "1", [good], {"rootfs": {"type": "layers", "diff_ids": [digests.of(TOP)]}})
    if case == "attack":
        return registry.add_image("app", "1", [good, tar_of(file("../../etc/passwd", b"x"))])
    if case == "no tar":
        return registry.add_image("app", "1", [good, b"this is no tar at all" * 100])
    image = registry.add_image("app", "1", [good])
    if case == "tampered tar":
        registry.blobs[image.layers[0]] = gzip.compress(BASE.replace(b"hosts", b"mosts"))
    elif case == "tampered gzip":
        registry.blobs[image.layers[0]] = good[:500] + bytes([good[500] ^ 1]) + good[501:]
    return image


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("diff ID", DiffIdMismatch),
        ("attack", TarInvalid),
        ("no tar", TarInvalid),
        ("tampered tar", LazyfsError),
        ("tampered gzip", DigestMismatch),
    ],
)
def test_nothing_is_pushed_when_the_source_is_bad(
    registry: FakeRegistry, options: ConvertOptions, case: str, error: type[LazyfsError]
) -> None:
    image = broken(registry, case)
    with FakeRegistry() as destination:
        with pytest.raises(error) as caught:
            convert(image.reference, f"{destination.host}/copy:x", options)
        assert any(layer[7:19] in caught.value.message for layer in image.layers)  # which of them it was
        assert not destination.blobs and not destination.uploads and "copy" not in destination.repositories


def test_a_blob_of_the_same_size_with_other_bytes_is_a_digest_mismatch(
    registry: FakeRegistry, options: ConvertOptions
) -> None:
    image = registry.add_image("app", "1", [BASE])
    registry.blobs[image.layers[0]] = BASE.replace(b"localhost", b"evil.host")
    with pytest.raises(DigestMismatch):
        convert(image.reference, f"{registry.host}/copy:x", options)
    registry.blobs[image.layers[0]] = BASE.replace(b"hosts", b"mosts")  # breaks a header's checksum, too
    with pytest.raises(DigestMismatch):
        convert(image.reference, f"{registry.host}/copy:x", options)
    assert "copy" not in registry.repositories


def test_the_manifest_comes_last(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE, TOP])
    with FakeRegistry() as destination:
        destination.fault(Fault.STATUS, path="/blobs/", method="PUT", status=500, after=1)
        with pytest.raises(RegistryFault):
            convert(image.reference, f"{destination.host}/copy:x", options)
        assert "copy" not in destination.repositories
        destination.clear_faults()
        convert(image.reference, f"{destination.host}/copy:x", options)
        writes = [request.path for request in destination.requests if request.method == "PUT"]
        assert "/manifests/" in writes[-1] and sum("/manifests/" in path for path in writes) == 1


def test_a_source_that_breaks_off_is_resumed(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE])
    registry.fault(Fault.TRUNCATE, path=image.layers[0], method="GET", times=2)
    report = convert(image.reference, f"{registry.host}/app:lazy", options)
    assert report.layers[0].diff_id_kept and registry.count("GET", image.layers[0]) == 3


@pytest.mark.parametrize(
    ("layer_type", "config_type", "sentence"),
    [
        (oci.DOCKER_LAYER_FOREIGN, oci.OCI_CONFIG, "not distributable"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", oci.OCI_CONFIG, "not distributable"),
        ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", oci.OCI_CONFIG, "no file system layer"),
        (oci.OCI_LAYER, "application/vnd.cncf.helm.config.v1+json", "artifact"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(
    registry: FakeRegistry, options: ConvertOptions, layer_type: str, config_type: str, sentence: str
) -> None:
    image = registry.add_image("app", "1", [(BASE, {}, layer_type)])
    document = json.loads(image.raw)
    document["config"]["mediaType"] = config_type
    registry.add_manifest("app", "1", oci.OCI_MANIFEST, oci.canonical_json(document))
    with pytest.raises(DocumentInvalid, match=sentence):
        convert(image.reference, f"{registry.host}/app:lazy", options)


def test_options_out_of_range(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = registry.add_image("app", "1", [BASE])
    for bad in (replace(options, level=0), replace(options, level=23), replace(options, jobs=0)):
        with pytest.raises(UsageError):
            convert(image.reference, f"{registry.host}/app:lazy", bad)
    with pytest.raises(UsageError, match="digest"):
        convert(image.reference, f"{registry.host}/app@{image.digest}", options)
