"""Commands that read whole images from a registry whose mirrors lie: the result is right, and the liars are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.cli.main import main
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import AddedImage, Fault
from tests.helpers.mirrors import Mirrors
from tests.helpers.tars import file, tar_of

TREE = tar_of(file("data", noise("mirrored commands", 400_000)))


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirrors]:
    with Mirrors(tmp_path) as running:
        for name, value in (
            ("LAZYFS_CERTS_DIR", running.certs_dir),
            ("LAZYFS_CONFIG", "/dev/null"),
            ("XDG_CACHE_HOME", tmp_path / "cache"),
            ("HOME", tmp_path),
        ):
            monkeypatch.setenv(name, str(value))
        yield running


def with_liars(mirrors: Mirrors, layer: object) -> AddedImage:
    image = mirrors.add_image("image", "latest", [layer])
    for mirror in mirrors.mirrors:
        mirror.fault(Fault.FLIP, path=image.layers[0])
    return image


@pytest.mark.parametrize("lazy", [True, False])
def test_verify(mirrors: Mirrors, capsys: pytest.CaptureFixture[str], lazy: bool) -> None:
    with_liars(mirrors, zstd_chunked_layer(TREE) if lazy else TREE)
    assert main(["verify", f"{mirrors.origin.host}/image"]) == 0
    assert "everything is what it promises" in capsys.readouterr().out


def test_verify_of_what_all_send_wrong(mirrors: Mirrors, capsys: pytest.CaptureFixture[str]) -> None:
    image = with_liars(mirrors, TREE)
    mirrors.origin.fault(Fault.FLIP, path=image.layers[0])
    assert main(["verify", f"{mirrors.origin.host}/image"]) == 6


@pytest.mark.parametrize("lazy", [True, False])
def test_convert(mirrors: Mirrors, tmp_path: Path, capsys: pytest.CaptureFixture[str], lazy: bool) -> None:
    with_liars(mirrors, zstd_chunked_layer(TREE) if lazy else TREE)
    target = f"oci:{tmp_path / 'layout'}:made"
    assert main(["convert", f"{mirrors.origin.host}/image", target]) == 0, capsys.readouterr()
    assert main(["verify", target]) == 0
