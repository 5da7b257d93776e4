"""Layers of other writers under a mount: read lazily, partly, wrongly, and told why when they can't be lazy."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace

import pytest

from lazyfs import oci
from lazyfs.format.entry import LANDMARK, LANDMARK_CONTENT, NO_LANDMARK
from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.blobs import LayerBlob, flipped_chunk, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.foreign import estargz_footer, estargz_layer, gzip_member, storage_layer
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of
from tests.unit.test_footer import external, legacy

BIG = pattern(5_300_001)
HOLES = b"a" * 5000 + bytes(6_000_000) + b"b" * 5000
TAR = tar_of(file("big", BIG), file("holes", HOLES), file("small", b"small\n"), file("bad", pattern(50_000, 3)))
MAKERS = {
    "estargz": lambda: estargz_layer(TAR, chunk_size=1 << 20),
    "estargz, shared members": lambda: estargz_layer(TAR, chunk_size=1 << 16, min_chunk=1 << 19),
    "containers/storage": lambda: storage_layer(TAR),
    "podman 4": lambda: storage_layer(TAR, podman4=True),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_foreign_layer_is_lazy_and_right(maker: str, node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"BACKGROUND": "false"}
    layer = MAKERS[maker]()
    tree = node.mount(add(registry, "foreign", layer).reference)
    assert node.read(tree / "small") == b"small\n"
    fetched = registry.bytes_sent(layer.digest)
    assert fetched < len(layer.blob) // 2 + len(layer.tail)
    assert node.read(tree / "holes") == HOLES
    assert node.read(tree / "big") == BIG


@pytest.mark.parametrize("maker", MAKERS)
def test_wrong_bytes_of_a_foreign_layer_are_an_error(maker: str, node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"BACKGROUND": "false"}
    good = MAKERS[maker]()
    image = add(registry, "foreign", good)
    bad = flipped_chunk(good, b"bad")
    registry.blobs[good.digest] = bad.blob
    tree = node.mount(image.reference)
    with pytest.raises(AssertionError, match="Input/output error"):
        node.read(tree / "bad")
    if maker != "estargz, shared members":
        assert node.read(tree / "big") == BIG


@pytest.mark.parametrize("footer, reason", [(external(), "in another image"), (legacy(0), "no digests")])
def test_a_refused_form_is_fetched_in_full_and_told_why(
    footer: bytes, reason: str, node: Node, registry: FakeRegistry
) -> None:
    made = estargz_layer(TAR)
    blob = gzip_member(TAR) + footer
    layer = replace(made, blob=blob, tar=TAR, frames=[(0, len(blob) - len(footer))])
    image = registry.add_image("old", "1", [(layer.blob, layer.annotations, layer.media_type)])
    for _ in range(2):  # the second time from the store
        directory = node.new_dir()
        done = node.lazyfs("mount", image.reference, directory)
        assert done.returncode == 0, done.stderr
        assert f"{reason}" in done.stderr and "fetched in full and checked" in done.stderr
        assert node.read(directory / "big") == BIG
        node.umount(directory)
    done = node.lazyfs("verify", image.reference)
    assert done.returncode == 0, done.stdout
    told = node.lazyfs("inspect", "--files", image.reference)
    assert reason in told.stdout, told.stdout


@shows(
    Case(
        "input-toc-bomb",
        Area.INPUT,
        "a TOC that unpacks to more than it may",
        RIGHT,
        "the mount says why the layer is fetched in full",
    ),
)
def test_a_toc_bomb_costs_a_full_fetch_and_no_more(node: Node, registry: FakeRegistry) -> None:
    """A TOC that is none: the layer still has a diff ID."""
    bomb = gzip.compress(bytes(20 << 20), mtime=0)
    good = estargz_layer(TAR)
    blob = good.blob[: good.payload_end] + bomb + estargz_footer(good.payload_end)
    layer: LayerBlob = replace(good, blob=blob)
    image = registry.add_image("bomb", "1", [(layer.blob, layer.annotations, oci.OCI_LAYER_GZIP)])
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    assert done.returncode == 0, done.stderr
    assert "TOC" in done.stderr
    assert node.read(directory / "big") == BIG


FRONT, REST = pattern(1_500_000, 5), pattern(3_000_000, 6)


@pytest.mark.parametrize(
    "maker", [estargz_layer, lambda tar: zstd_chunked_layer(tar, frame_size=0)], ids=["estargz", "zstd-chunked"]
)
def test_what_stands_before_the_landmark_is_fetched_ahead_and_no_more(
    maker: Callable[[bytes], LayerBlob], node: Node, registry: FakeRegistry
) -> None:
    node.settings |= {"PREFETCH": "true"}
    trees = []
    for name, mark in (("none", NO_LANDMARK), ("some", LANDMARK)):
        layer = maker(tar_of(file("front", FRONT), file(mark, LANDMARK_CONTENT), file("rest", REST)))
        trees.append(node.mount(add(registry, name, layer).reference))
    until(lambda: node.status()["bytes"]["prefetch"] >= len(FRONT), "what stands before the landmark is here")
    for tree in trees:
        assert node.read(tree / "front") == FRONT
    none, some = (mount["layers"][0]["bytes"] for mount in node.status()["mounts"])
    assert none["prefetch"] == 0 and none["demand"] >= len(FRONT), none
    assert len(FRONT) <= some["prefetch"] < len(FRONT) + len(REST) // 2 and some["demand"] == 0, some
