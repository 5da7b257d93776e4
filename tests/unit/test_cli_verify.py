"""`lazyfs verify`: everything that a layer promises is checked, and each way to break a promise is found and named."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lazyfs import oci
from lazyfs.cli.main import main
from lazyfs.cli.side_by_side import side_by_side
from lazyfs.cli.verify_layer import BlobReader, verify_layer
from lazyfs.errors import DigestMismatch, LazyfsError, StoreFull
from lazyfs.reference import parse
from lazyfs.registry.open import open_repository
from tests.helpers.blobs import LayerBlob, annotated, flipped, flipped_chunk, toc_entry, zstd_chunked_layer
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of

BIG = random.Random(7).randbytes(2_500_000)
TAR = tar_of(dir_("etc"), file("etc/a", b"x" * 5000), file("big", BIG), symlink("l", "etc"), hardlink("h", "etc/a"))


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as found:
        yield found


def pushed(layer: LayerBlob) -> tuple[bytes, dict[str, str], str]:
    return layer.blob, layer.annotations, layer.media_type


def config(*diff_ids: str) -> dict[str, Any]:
    return {"rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}


def verify(capsys: pytest.CaptureFixture[str], reference: str) -> tuple[int, dict[str, Any]]:
    code = main(["verify", "--json", "--platform", "linux/amd64", reference])
    return code, json.loads(capsys.readouterr().out)


def test_good_layers_of_every_kind(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    lazy = zstd_chunked_layer(TAR)
    gz = gzip.compress(TAR[:5120]) + gzip.compress(TAR[5120:])  # two members
    zst = zstandard.compress(TAR)
    image = registry.add_image(
        "app", "1", [pushed(lazy), gz, (zst, {}, oci.OCI_LAYER_ZSTD), (TAR, {}, oci.OCI_LAYER)]
    )  # fmt: skip
    code, told = verify(capsys, image.reference)
    assert (code, told["ok"]) == (0, True), told
    assert told["digest"] == image.digest
    assert [layer["ok"] for layer in told["layers"]] == [True] * 4
    assert told["layers"][0]["entries"] == len(lazy.pairs)
    assert told["layers"][0]["checked"] == [
        "blob digest", "diff ID", "TOC digest", "chunk digests", "TOC against tar",
    ]  # fmt: skip
    assert told["layers"][1]["checked"] == ["blob digest", "diff ID"]
    assert main(["verify", "--platform", "linux/amd64", image.reference]) == 0
    text = capsys.readouterr().out
    assert "4 layers" in text and text.count("  ok") == 6


def edited(edit: Callable[[dict[str, Any]], object]) -> LayerBlob:
    return zstd_chunked_layer(TAR, edit_toc=edit)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: edited(lambda toc: toc_entry(toc, "etc/a").update(mode=0o4755)), "TocMismatch"),
        (lambda: edited(lambda toc: toc["entries"].pop()), "TocMismatch"),
        (lambda: zstd_chunked_layer(TAR, frames_from=TAR.replace(b"x" * 5000, b"y" * 5000)), "DigestMismatch"),
        (lambda: annotated(zstd_chunked_layer(TAR), TOC_DIGEST="sha256:" + "1" * 64), "DigestMismatch"),
    ],
    ids=["mode", "missing", "content", "toc"],
)
def test_a_toc_that_lies_is_found(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str], make: Callable[[], LayerBlob], error: str
) -> None:
    layer = make()
    image = registry.add_image("app", "1", [pushed(layer)])
    code, told = verify(capsys, image.reference)
    assert (code, told["ok"]) == (6, False)
    assert told["layers"][0]["error"]["class"] == error


@pytest.mark.parametrize("plain", [False, True])
def test_a_diff_id_that_lies_is_found(registry: FakeRegistry, capsys: pytest.CaptureFixture[str], plain: bool) -> None:
    other = "sha256:" + "2" * 64
    layer = gzip.compress(TAR) if plain else pushed(zstd_chunked_layer(TAR))
    image = registry.add_image("app", "1", [layer], config(other))
    code, told = verify(capsys, image.reference)
    assert code == 6
    assert told["layers"][0]["error"]["class"] == "DiffIdMismatch"


@pytest.mark.parametrize("where", ["chunk", "header", "toc", "footer", "gzip"])
def test_a_flipped_byte_is_found_wherever_it_is(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """The registry keeps bad bytes under a good name: what came is blamed, not the format."""
    good = zstd_chunked_layer(TAR)
    packed = gzip.compress(TAR)
    image = registry.add_image("app", "1", [packed if where == "gzip" else pushed(good)])
    registry.blobs[image.layers[0]] = {
        "chunk": lambda: flipped_chunk(good, b"big", 1).blob,
        "header": lambda: flipped(good, 4).blob,
        "toc": lambda: flipped(good, good.payload_end + 40).blob,
        "footer": lambda: flipped(good, len(good.blob) - 20).blob,
        "gzip": lambda: packed[:600] + bytes([packed[600] ^ 1]) + packed[601:],
    }[where]()
    code, told = verify(capsys, image.reference)
    assert code == 6
    assert told["layers"][0]["error"]["class"] == "DigestMismatch"


def test_a_layer_that_is_no_tar_is_malformed_and_not_tampered_with(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = b"\x01" * 2048
    diff_id = "sha256:" + hashlib.sha256(junk).hexdigest()
    image = registry.add_image("app", "1", [(junk, {}, oci.OCI_LAYER)], config(diff_id))
    code, told = verify(capsys, image.reference)
    assert code == 7
    assert told["layers"][0]["error"]["class"] == "TarInvalid"


def test_a_broken_promise_outweighs_other_failures(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    gone, liar = gzip.compress(TAR, 1), gzip.compress(TAR, 9)
    diff_id = "sha256:" + hashlib.sha256(TAR).hexdigest()
    image = registry.add_image("app", "1", [gone, liar], config(diff_id, "sha256:" + "3" * 64))
    del registry.blobs[image.layers[0]]
    code, told = verify(capsys, image.reference)
    assert [layer["error"]["class"] for layer in told["layers"]] == ["BlobMissing", "DiffIdMismatch"]
    assert code == 6
    image = registry.add_image("app", "2", [gone], config(diff_id))
    del registry.blobs[image.layers[0]]
    assert verify(capsys, image.reference)[0] == 3


def test_a_stream_that_breaks_off_is_resumed_where_it_was(registry: FakeRegistry) -> None:
    blob = random.Random(1).randbytes(3_000_000)
    image = registry.add_image("app", "1", [(blob, {}, oci.OCI_LAYER)], config("sha256:" + "0" * 64))
    registry.fault(Fault.TRUNCATE, path="/blobs/", times=2)
    repository = open_repository(parse(image.reference))
    seen: list[int] = []
    descriptor = oci.Descriptor(oci.OCI_LAYER, image.layers[0], len(blob))
    try:
        with BlobReader(repository, descriptor, seen.append) as reader:
            assert b"".join(iter(lambda: reader.read(1 << 20), b"")) == blob
            reader.check()
    finally:
        repository.close()
    assert sum(seen) == len(blob)
    asked = [request.range for request in registry.matching("GET", "/blobs/")]
    assert len(asked) == 3 and len(set(asked)) == 3


def test_a_registry_that_keeps_failing_ends_the_check(registry: FakeRegistry) -> None:
    layer = zstd_chunked_layer(TAR)
    image = registry.add_image("app", "1", [pushed(layer)])
    repository = open_repository(parse(image.reference))
    try:
        with pytest.raises(DigestMismatch):
            registry.fault(Fault.FLIP, path="/blobs/")
            verify_layer(repository, layer.descriptor, layer.diff_id, lambda size: None)
    finally:
        repository.close()


def test_side_by_side_keeps_the_order_and_the_errors() -> None:
    def work(number: int) -> Callable[[], int]:
        def run() -> int:
            if number == 3:
                raise StoreFull("three")
            return number

        return run

    results = side_by_side([work(number) for number in range(20)], 4)
    assert [result for result in results if not isinstance(result, LazyfsError)] == [n for n in range(20) if n != 3]
    assert isinstance(results[3], StoreFull)
    assert side_by_side([], 4) == []


def test_side_by_side_raises_what_is_a_bug() -> None:
    def bug() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        side_by_side([bug], 1)
