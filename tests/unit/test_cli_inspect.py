"""`lazyfs inspect`: what it says of an image, and that finding out costs as few requests as it claims."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lazyfs import oci
from lazyfs.cli.main import main
from tests.helpers.blobs import LayerBlob, annotated, zstd_chunked_layer
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.tars import dir_, file, symlink, tar_of

CONFIG = {
    "created": "2025-01-31T00:00:00Z",
    "config": {"User": "app", "Entrypoint": ["/bin/app", "-x"], "Env": ["PATH=/bin", "A=b"], "StopSignal": "SIGINT"},
}


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as found:
        yield found


def lazy_layer(name: str = "a") -> LayerBlob:
    return zstd_chunked_layer(tar_of(dir_("etc"), file(f"etc/{name}", b"x" * 5000), symlink("l", "etc")))


def pushed(layer: LayerBlob) -> tuple[bytes, dict[str, str], str]:
    return layer.blob, layer.annotations, layer.media_type


def inspect_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["inspect", "--json", "--platform", "linux/amd64", *argv]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_facts_and_reasons(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    good, plain = lazy_layer(), gzip.compress(tar_of(file("b", b"y")))
    untrusted = annotated(lazy_layer("c"), TOC_DIGEST=None, ZSTD_CHECKSUM=None)
    image = registry.add_image("app", "1", [pushed(good), plain, pushed(untrusted)], CONFIG)
    facts = inspect_json(capsys, image.reference)
    assert facts["digest"] == image.digest
    assert facts["index"] is None
    assert facts["platform"] == "linux/amd64"
    assert facts["size"] == len(good.blob) + len(plain) + len(untrusted.blob)
    assert facts["lazy"] is False
    assert facts["config"]["user"] == "app"
    assert facts["config"]["entrypoint"] == ["/bin/app", "-x"]
    first, second, third = facts["layers"]
    assert (first["lazy"], first["reason"], first["diff_id"]) == (True, "", good.diff_id)
    assert (second["lazy"], second["form"]) == (False, "tar+gzip")
    assert "has no TOC" in second["reason"]
    assert third["lazy"] is False and "digest" in third["reason"]
    assert "entries" not in first


def test_only_documents_are_fetched_without_files(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    image = registry.add_image("app", "1", [pushed(lazy_layer())], CONFIG)
    inspect_json(capsys, image.reference)
    assert [request.path for request in registry.requests] == ["/v2/app/manifests/1", f"/v2/app/blobs/{image.config}"]


def test_the_platform_is_chosen_from_an_index(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    amd = registry.add_image("app", "", [pushed(lazy_layer())], CONFIG)
    arm = registry.add_image("app", "", [pushed(lazy_layer("arm"))], {"architecture": "arm64", **CONFIG})
    index = registry.add_index("app", "1", {"linux/amd64": amd, "linux/arm64": arm})
    facts = inspect_json(capsys, "--platform", "linux/arm64", f"{registry.host}/app:1")
    assert facts["digest"] == arm.digest
    assert facts["index"] == {"digest": index, "platforms": ["linux/amd64", "linux/arm64"]}
    assert facts["platform"] == "linux/arm64"
    assert main(["inspect", "--platform", "linux/s390x", f"{registry.host}/app:1"]) == 3
    assert "linux/amd64, linux/arm64" in capsys.readouterr().err


def test_files_are_counted_from_verified_tocs(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    layer = lazy_layer()
    image = registry.add_image("app", "1", [pushed(layer)], CONFIG)
    (told,) = inspect_json(capsys, "--files", image.reference)["layers"]
    assert told["entries"] == len(layer.pairs)
    assert told["toc_size"] == len(layer.toc)


def test_a_toc_that_is_not_as_promised_is_told_and_exits_6(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    good, liar = lazy_layer(), annotated(lazy_layer("b"), TOC_DIGEST="sha256:" + "0" * 64)
    image = registry.add_image("app", "1", [pushed(good), pushed(liar)], CONFIG)
    assert main(["inspect", "--json", "--files", "--platform", "linux/amd64", image.reference]) == 6
    first, second = json.loads(capsys.readouterr().out)["layers"]
    assert first["lazy"] is True
    assert second["lazy"] is False and "as promised" in second["reason"]


def test_a_plain_layer_that_might_have_a_toc_is_no_fault(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYFS_ALLOW_UNVERIFIED", "true")
    plain: tuple[bytes, dict[str, str], str] = (
        zstandard.compress(tar_of(file("b", b"y" * 5000))),
        {},
        oci.OCI_LAYER_ZSTD,
    )
    untrusted = annotated(lazy_layer("c"), TOC_DIGEST=None, ZSTD_CHECKSUM=None)
    image = registry.add_image("app", "1", [plain, pushed(untrusted)], CONFIG)
    first, second = inspect_json(capsys, "--files", image.reference)["layers"]
    assert first["lazy"] is False and "footer" in first["reason"]
    assert second["lazy"] is True and second["entries"] == 3


def test_timing_counts_the_round_trips_in_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    """Challenge, token, manifest, then config and all tails at once, whatever the number of layers."""
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        layers = [lazy_layer(str(number)) for number in range(6)]
        image = registry.add_image("app", "1", [pushed(layer) for layer in layers], CONFIG)
        facts = inspect_json(capsys, "--timing", image.reference)
        assert len(facts["requests"]) == 3 + 1 + 6
        assert facts["sequential"] == 4
        assert [hop["kind"] for hop in facts["requests"]][:3] == ["challenge", "token", "manifest"]
        assert all(hop["ms"] > 0 and hop["host"] == registry.host for hop in facts["requests"])
        assert len(registry.requests) == len(facts["requests"])
        assert main(["inspect", "--timing", "--platform", "linux/amd64", image.reference]) == 0
    text = capsys.readouterr().out
    assert "10 requests, 4 round trips in sequence" in text


def test_redirects_are_hops_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeRegistry(redirect=True) as registry:
        image = registry.add_image("app", "1", [pushed(lazy_layer())], CONFIG)
        facts = inspect_json(capsys, "--timing", image.reference)
        kinds = [hop["kind"] for hop in facts["requests"]]
        assert kinds[0] == "manifest"
        assert kinds.count("redirect") == 2
        assert facts["sequential"] == 3
        assert len(kinds) == len(registry.requests) == 5


def test_the_text_names_everything(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    layer = lazy_layer()
    image = registry.add_image("app", "1", [pushed(layer), gzip.compress(tar_of(file("b", b"y")))], CONFIG)
    assert main(["inspect", "--layers", "--files", "--platform", "linux/amd64", image.reference]) == 0
    text = capsys.readouterr().out
    for word in (image.digest, image.config, layer.digest, layer.diff_id, oci.OCI_LAYER_ZSTD, "1 of them lazy",
                 "3 entries", "in full: ", "/bin/app -x", "2 variables", "SIGINT"):  # fmt: skip
        assert word in text, word


def test_hostile_config_cannot_steer_the_terminal(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    image = registry.add_image("app", "1", [], {"created": "\x1b[2J", "config": {"User": "\x1b]0;x\x07"}})
    assert main(["inspect", "--platform", "linux/amd64", image.reference]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("config", [{"config": {"Cmd": 5, "Env": "x", "ExposedPorts": 7, "Volumes": [{}], "User": []}}])
def test_config_of_wrong_types_is_no_bug_of_ours(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str], config: dict[str, Any]
) -> None:
    image = registry.add_image("app", "1", [], config)
    assert main(["inspect", "--platform", "linux/amd64", image.reference]) == 0
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code"),
    [({"kind": Fault.STATUS, "status": 401}, 4), ({"kind": Fault.STATUS, "status": 404}, 3)],
)
def test_the_registrys_refusals_have_their_codes(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str], fault: dict[str, Any], code: int
) -> None:
    image = registry.add_image("app", "1", [pushed(lazy_layer())], CONFIG)
    registry.fault(**fault)
    assert main(["inspect", image.reference]) == code
    assert capsys.readouterr().err.startswith("lazyfs: ")
