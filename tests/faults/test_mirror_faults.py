"""A registry with two mirrors of which one dies in mid-read, one drips and one answers wrong bytes, in any combination.

Every byte that a reader gets is right, and what bad mirrors cost it is bounded: DELAY seconds each, once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.registry.mirrored import DELAY
from tests.faults.cases import LASTING, RIGHT, Area, Case, shows
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, until
from tests.helpers.fake_registry import AddedImage, Fault
from tests.helpers.fault_bench import metrics_of
from tests.helpers.mirrors import Mirrors
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

DATA = pattern(6_000_000, 2)
SMALL = {f"s{number:02}": pattern(2000 + number, number) for number in range(20)}
SLACK = 2.0  # seconds that starting a reader on a loaded machine may take


def layer() -> LayerBlob:
    return zstd_chunked_layer(tar_of(file("data", DATA), *(file(name, data) for name, data in SMALL.items())))


# name -> what a mirror does to blobs
BAD: dict[str, dict[str, object]] = {
    "dies": {"kind": Fault.RESET, "at": 300_000},
    "drips": {"kind": Fault.DRIP, "rate": 2000},
    "lies": {"kind": Fault.FLIP},
}
PAIRS = [*itertools.permutations(BAD, 2), *((name, name) for name in BAD), *((name, "") for name in BAD)]


@pytest.fixture
def mirrors(scratch: Path) -> Iterator[Mirrors]:
    (scratch / "mirrors").mkdir()
    with Mirrors(scratch / "mirrors") as running:
        yield running


@pytest.fixture
def image(mirrors: Mirrors) -> AddedImage:
    return mirrors.add_image("image", "latest", [layer()])


@pytest.fixture
def node(scratch: Path, mirrors: Mirrors) -> Iterator[Node]:
    with Node(scratch, CERTS_DIR=str(mirrors.certs_dir), READ_TIMEOUT="20", ANSWER_TIMEOUT="10") as one:
        yield one


def spoil(mirrors: Mirrors, image: AddedImage, *words: str) -> None:
    for mirror, word in zip(mirrors.mirrors, words, strict=True):
        if word:
            mirror.fault(path=f"/blobs/{image.layers[0]}", **BAD[word])  # type: ignore[arg-type]


def sources(node: Node) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = node.status()["sources"]
    return found


@shows(
    Case(
        "network-mirrors",
        Area.NETWORK,
        "one mirror dies, drips or lies in mid-read, and the other one too",
        RIGHT,
        "`status`: source HOST: left alone, wrong answers",
    ),
)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(filter(None, pair)))
def test_every_byte_is_right_and_the_delay_bounded(
    node: Node, mirrors: Mirrors, image: AddedImage, pair: tuple[str, str]
) -> None:
    tree = node.mount(image)
    spoil(mirrors, image, *pair)
    began = time.monotonic()
    assert node.read(tree / "data") == DATA
    assert time.monotonic() - began < len(pair) * DELAY + SLACK
    began = time.monotonic()
    for name, data in SMALL.items():
        assert node.read(tree / name) == data
    assert time.monotonic() - began < len(SMALL) * 0.2 + DELAY  # they cost it once, not again and again
    assert node.layer()["quarantine"] == ""
    shown = sources(node)
    for mirror, word in zip(mirrors.mirrors, pair, strict=True):
        if word == "lies" and mirror.count(path=image.layers[0]):
            assert shown[mirror.host]["lies"] or shown[mirror.host]["state"] == "ok"


@pytest.mark.parametrize("pair", [("lies", "drips"), ("drips", "lies"), ("lies", "lies"), ("dies", "lies")])
def test_the_whole_check_ends_well(scratch: Path, mirrors: Mirrors, image: AddedImage, pair: tuple[str, str]) -> None:
    with Node(scratch, CERTS_DIR=str(mirrors.certs_dir), READ_TIMEOUT="20", BACKGROUND="1") as node:
        spoil(mirrors, image, *pair)
        tree = node.mount(image)
        assert node.read(tree / "data") == DATA
        node.until_verified(patience=60)
        assert node.layer()["quarantine"] == ""


def test_wrong_headers_never_quarantine_a_good_layer(scratch: Path, mirrors: Mirrors) -> None:
    """Bytes that no chunk digest covers: only the digest of the whole blob tells."""
    blob = layer()
    image = mirrors.add_image("image", "latest", [blob])
    before_toc = blob.payload_end - 3  # in the frame of the end of the archive

    for mirror in mirrors.mirrors:
        changed = bytearray(blob.blob)
        changed[before_toc] ^= 0xFF
        mirror.blobs[image.layers[0]] = bytes(changed)
    with Node(scratch, CERTS_DIR=str(mirrors.certs_dir), READ_TIMEOUT="20", BACKGROUND="1") as node:
        tree = node.mount(image)
        node.until_verified(patience=60)
        assert node.layer()["quarantine"] == ""
        assert node.read(tree / "data") == DATA
        assert mirrors.origin.count(path=image.layers[0]) > 0


@shows(
    Case(
        "network-all-lie",
        Area.NETWORK,
        "all sources of a blob send the same wrong bytes",
        LASTING,
        "`status`: QUARANTINED, names the origin",
        "`quarantined_layers`",
    ),
)
def test_a_blob_that_all_sources_send_wrong_is_quarantined(scratch: Path, mirrors: Mirrors) -> None:
    blob = layer()
    image = mirrors.add_image("image", "latest", [blob])
    for each in mirrors.all:
        changed = bytearray(blob.blob)
        changed[blob.payload_end - 3] ^= 0xFF
        each.blobs[image.layers[0]] = bytes(changed)
    with Node(scratch, CERTS_DIR=str(mirrors.certs_dir), READ_TIMEOUT="20", BACKGROUND="1") as node:
        node.mount(image)
        until(lambda: node.layer()["quarantine"], "the layer is quarantined", 60)
        assert mirrors.origin.host in node.layer()["quarantine"]
        assert metrics_of(node)["lazyfsd_quarantined_layers", ""] == 1


def test_a_mirror_that_lies_about_the_toc(node: Node, mirrors: Mirrors, image: AddedImage) -> None:
    for mirror in mirrors.mirrors:
        mirror.fault(Fault.FLIP, path=f"/blobs/{image.layers[0]}", at=40)
    tree = node.mount(image)
    assert node.layer()["lazy"]
    assert node.read(tree / "data") == DATA


def test_a_mirror_that_lies_about_a_plain_layer(node: Node, mirrors: Mirrors) -> None:
    image = mirrors.add_image("plain", "latest", [tar_of(file("data", DATA))])
    for mirror in mirrors.mirrors:
        mirror.fault(Fault.FLIP, path=f"/blobs/{image.layers[0]}")
    assert node.read(node.mount(image) / "data") == DATA


@shows(
    Case("network-stale-mirror", Area.NETWORK, "a mirror has an old tag, whose blobs are gone", RIGHT, "nothing"),
)
def test_a_mirror_with_a_stale_tag(node: Node, mirrors: Mirrors, image: AddedImage) -> None:
    old = mirrors.mirrors[0].add_image("image", "latest", [tar_of(file("data", b"old"))])
    for each in mirrors.all:
        each.blobs.pop(old.layers[0], None)  # collected as garbage everywhere
        each.blobs.pop(old.config, None)
    assert node.read(node.mount(image) / "data") == DATA


@shows(
    Case(
        "network-mirrors-down",
        Area.NETWORK,
        "all mirrors are down",
        RIGHT,
        "`status`: source HOST: left alone",
        "`registry_avoided`",
    ),
)
def test_all_mirrors_down_from_the_start(node: Node, mirrors: Mirrors, image: AddedImage) -> None:
    for mirror in mirrors.mirrors:
        mirror.stop_listening()
    assert node.read(node.mount(image) / "data") == DATA
    assert {sources(node)[mirror.host]["state"] for mirror in mirrors.mirrors} <= {"left alone", "being tried again"}
    assert any(metrics_of(node)["lazyfsd_registry_avoided", mirror.host] for mirror in mirrors.mirrors)


def test_the_origin_down_and_a_mirror_up(node: Node, mirrors: Mirrors, image: AddedImage) -> None:
    mirrors.origin.stop_listening()
    mirrors.mirrors[0].fault(Fault.RESET, path=f"/blobs/{image.layers[0]}", at=300_000, times=3)
    assert node.read(node.mount(image) / "data") == DATA


def test_a_rate_limit_is_told_and_the_others_go_on(node: Node, mirrors: Mirrors, image: AddedImage) -> None:
    tree = node.mount(image)
    mirrors.mirrors[0].fault(Fault.STATUS, status=429, retry_after="500")
    assert node.read(tree / "data") == DATA
    assert sources(node)[mirrors.mirrors[0].host]["state"] == "rate limited"
    text = node.lazyfs("status").stdout
    assert f"{mirrors.mirrors[0].host}: rate limited for 8 min more" in text


def test_a_mirror_that_limits_is_told_at_the_mount(node: Node, mirrors: Mirrors, image: AddedImage) -> None:
    mirrors.mirrors[0].fault(Fault.STATUS, status=429, retry_after="500")
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    assert done.returncode == 0, done.stderr
    assert f"{mirrors.mirrors[0].host} limits how often it may be asked" in done.stderr
    assert node.read(directory / "data") == DATA
