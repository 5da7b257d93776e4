"""OCI and Docker documents: what is read from good ones, and that bad ones are refused before anyone relies on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import oci
from lazyfs.digest import of
from lazyfs.errors import DocumentInvalid, PlatformMissing
from lazyfs.limits import MAX_BLOB, MAX_DOCUMENT, MAX_LAYERS

D = of(b"x")
DESCRIPTOR: dict[str, Any] = {"mediaType": oci.OCI_LAYER_GZIP, "digest": D, "size": 5}


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {**DESCRIPTOR, "mediaType": oci.OCI_CONFIG},
        "layers": [DESCRIPTOR],
    }
    return json.dumps({**document, **changes}).encode()


def index(*platforms: str) -> oci.Index:
    entries = [
        {**DESCRIPTOR, "digest": of(text.encode()),
         "platform": dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))}
        for text in platforms
    ]  # fmt: skip
    return oci.parse_index(json.dumps({"schemaVersion": 2, "manifests": entries}).encode())


def test_a_manifest_is_read_and_keeps_its_bytes() -> None:
    raw = manifest(annotations={"a": "b"}, subject=DESCRIPTOR)
    found = oci.parse_manifest(raw)
    assert (found.media_type, found.raw, found.digest) == (oci.OCI_MANIFEST, raw, of(raw))
    assert found.config.media_type == oci.OCI_CONFIG
    assert found.layers == (oci.Descriptor(oci.OCI_LAYER_GZIP, D, 5),)
    assert found.annotations == {"a": "b"}
    assert found.subject is not None
    assert found.subject.digest == D


def test_the_media_type_may_come_from_the_header_alone() -> None:
    document = json.loads(manifest())
    del document["mediaType"]
    assert oci.parse_manifest(json.dumps(document).encode(), oci.DOCKER_MANIFEST).media_type == oci.DOCKER_MANIFEST


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000, manifest(schemaVersion=1), manifest(layers=None),
        manifest(layers={}), manifest(layers=[DESCRIPTOR] * (MAX_LAYERS + 1)), manifest(config=None),
        manifest(mediaType="text/html"), manifest(mediaType=5),
        manifest(annotations={"a": 1}), manifest(annotations=[]),
        manifest(layers=[{**DESCRIPTOR, "size": -1}]), manifest(layers=[{**DESCRIPTOR, "size": "5"}]),
        manifest(layers=[{**DESCRIPTOR, "size": True}]), manifest(layers=[{**DESCRIPTOR, "size": MAX_BLOB + 1}]),
        manifest(layers=[{**DESCRIPTOR, "size": 1.5}]), manifest(layers=[{**DESCRIPTOR, "digest": "sha256:../x"}]),
        manifest(layers=[{**DESCRIPTOR, "digest": D.upper()}]), manifest(layers=[{**DESCRIPTOR, "digest": 5}]),
        manifest(layers=[{**DESCRIPTOR, "digest": D + "\n"}]), manifest(layers=[{**DESCRIPTOR, "mediaType": 5}]),
        manifest(layers=["x"]), manifest(layers=[DESCRIPTOR, {**DESCRIPTOR, "size": 6}]), b" " * (MAX_DOCUMENT + 1),
    ],
)  # fmt: skip
def test_a_bad_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(DocumentInvalid):
        oci.parse_manifest(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["config", "layers", "manifests", "digest", "size", "platform", "rootfs", "diff_ids"]),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_gets_past_the_parsers_with_another_error(value: object) -> None:
    raw = json.dumps(value).encode()
    for parse in (oci.parse_manifest, oci.parse_index, oci.parse_config):
        try:
            parse(raw)
        except DocumentInvalid:
            continue


def test_an_index_is_told_from_a_manifest() -> None:
    assert oci.is_index(oci.DOCKER_INDEX, b"")
    assert not oci.is_index(oci.DOCKER_MANIFEST, b"")
    assert oci.is_index("application/json", b'{"manifests": []}')
    assert not oci.is_index("", manifest())


@pytest.mark.parametrize(
    ("platforms", "wanted", "expected"),
    [
        (["linux/amd64", "linux/arm64"], "linux/arm64", "linux/arm64"),
        (["linux/arm64/v8"], "linux/arm64", "linux/arm64/v8"),
        (["linux/arm64"], "linux/arm64/v8", "linux/arm64"),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7", "linux/arm/v7"),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm", "linux/arm/v6"),
        (["unknown/unknown", "linux/amd64"], "linux/amd64", "linux/amd64"),
        (["windows/amd64", "linux/amd64"], "linux/amd64", "linux/amd64"),
    ],
)
def test_the_platform_is_chosen(platforms: list[str], wanted: str, expected: str) -> None:
    assert oci.choose(index(*platforms), wanted).digest == of(expected.encode())


def test_a_platform_that_is_not_there() -> None:
    with pytest.raises(PlatformMissing) as caught:
        oci.choose(index("linux/amd64", "unknown/unknown", "linux/arm/v7"), "linux/riscv64")
    assert caught.value.available == ["linux/amd64", "linux/arm/v7"]
    with pytest.raises(PlatformMissing):
        oci.choose(index("linux/arm/v6"), "linux/arm/v7")


def test_an_only_entry_without_platform_serves_all() -> None:
    only = oci.parse_index(json.dumps({"schemaVersion": 2, "manifests": [DESCRIPTOR]}).encode())
    assert oci.choose(only, "linux/s390x").digest == D


def test_a_config_is_read() -> None:
    raw = json.dumps(
        {"os": "linux", "architecture": "amd64", "config": {"Env": ["A=b"]}, "rootfs": {"diff_ids": [D]}}
    ).encode()
    config = oci.parse_config(raw)
    assert (config.os, config.architecture, config.variant, config.diff_ids) == ("linux", "amd64", "", (D,))
    assert config.process == {"Env": ["A=b"]}
    assert config.digest == of(raw)
    assert oci.parse_config(b'{"rootfs": {"diff_ids": []}, "config": null}').process == {}


@pytest.mark.parametrize("rootfs", [None, [], {}, {"diff_ids": None}, {"diff_ids": ["x"]}, {"diff_ids": [5]}])
def test_a_config_without_diff_ids_is_refused(rootfs: object) -> None:
    with pytest.raises(DocumentInvalid):
        oci.parse_config(json.dumps({"rootfs": rootfs}).encode())


def test_chain_ids_follow_the_specification() -> None:
    a, b, c = of(b"a"), of(b"b"), of(b"c")
    ab = of(f"{a} {b}".encode())
    assert oci.chain_ids((a, b, c)) == [a, ab, of(f"{ab} {c}".encode())]
    assert oci.chain_ids(()) == []


def test_equal_documents_have_equal_bytes() -> None:
    assert (
        oci.canonical_json({"b": 1, "a": "ü"}) == oci.canonical_json({"a": "ü", "b": 1}) == '{"a":"ü","b":1}'.encode()
    )


def test_a_descriptor_is_written_as_it_was_read() -> None:
    value = {**DESCRIPTOR, "annotations": {"a": "b"}, "platform": {"os": "linux"}, "urls": ["https://h/x"]}
    assert oci.parse_descriptor(value, "it").to_json() == value
