"""Images that lie: tampered TOCs and chunks, false diff IDs. Refused with a sentence, or EIO; never a wrong byte."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lazyfs import oci
from lazyfs.digest import of
from lazyfs.format.zstd_chunked import encode_tail
from tests.faults.cases import LASTING, NOTHING_SHOWN, Area, Case, shows
from tests.helpers.blobs import LayerBlob, annotated, edited, flipped, flipped_chunk, toc_entry, zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.fault_bench import metrics_of
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

GOOD = pattern(1_500_000, 1)
OTHER = pattern(1_500_000, 2)
TAR = tar_of(file("other", OTHER), file("good", GOOD))
EIO = "Input/output error"


def image_of(registry: FakeRegistry, layer: LayerBlob, diff_id: str | None = None, name: str = "image") -> AddedImage:
    rootfs = {"type": "layers", "diff_ids": [diff_id or layer.diff_id]}
    return add(registry, name, layer, rootfs=rootfs)


@shows(
    Case(
        "input-tampered-chunk",
        Area.INPUT,
        "a chunk that is not what its TOC says",
        LASTING,
        "`status`: errors DigestMismatch or FrameInvalid",
        '`errors_total{class="DigestMismatch"}`',
    ),
)
@both_drivers
def test_tampered_chunk(node: Node, registry: FakeRegistry) -> None:
    layer = flipped_chunk(zstd_chunked_layer(TAR, frame_size=0, chunk_size=2 << 20), b"other")
    tree = node.mount(image_of(registry, layer))
    assert EIO in node.read_fails(tree / "other")
    assert node.read(tree / "good") == GOOD
    errors = node.status()["errors"]
    assert errors.get("FrameInvalid", 0) + errors.get("DigestMismatch", 0) > 0


def test_toc_that_promises_another_chunk(node: Node, registry: FakeRegistry) -> None:
    def lie(toc: dict[str, Any]) -> None:
        for entry in toc["entries"]:
            if entry.get("name") == "other" and "chunkDigest" in entry:
                entry["chunkDigest"] = of(b"something else")

    tree = node.mount(image_of(registry, zstd_chunked_layer(TAR, frame_size=0, edit_toc=lie)))
    assert EIO in node.read_fails(tree / "other")
    assert node.read(tree / "good") == GOOD


@shows(
    Case(
        "input-tampered-toc",
        Area.INPUT,
        "a TOC that is not what the manifest says",
        NOTHING_SHOWN,
        "exit 6, names the TOC",
    ),
)
def test_tampered_toc(node: Node, registry: FakeRegistry) -> None:
    honest = zstd_chunked_layer(TAR)
    layer = flipped(honest, honest.payload_end + 20)
    sentence = node.refused(6, "mount", image_of(registry, layer).reference, node.new_dir())
    assert "TOC" in sentence


def test_toc_digest_of_another_toc(node: Node, registry: FakeRegistry) -> None:
    layer = annotated(zstd_chunked_layer(TAR), TOC_DIGEST=of(b"another"))
    sentence = node.refused(6, "mount", image_of(registry, layer).reference, node.new_dir())
    assert "TOC" in sentence


@pytest.mark.parametrize("size", [0, 10, 1 << 62])
def test_toc_that_breaks_the_format(node: Node, registry: FakeRegistry, size: int) -> None:
    def edit(toc: dict[str, Any]) -> None:
        if size:
            toc_entry(toc, "good")["size"] = size
        else:
            toc["entries"].append({"name": "../../etc/passwd", "type": "reg", "size": 0})

    layer = zstd_chunked_layer(TAR, edit_toc=edit)
    directory = node.new_dir()
    done = node.lazyfs("mount", image_of(registry, layer).reference, directory)
    assert done.returncode == 0, done.stderr  # the blob still has a diff ID: fetched in full and checked by that
    assert re.search(r"can.t be lazy, entry \d+ of the TOC, .*: fetched in full and checked", done.stderr), done.stderr
    assert node.read(directory / "good") == GOOD
    assert node.python("print(json.dumps(sorted(os.listdir(a[0]))))", directory) == ["good", "other"]


def quarantined(node: Node) -> str:
    found: str = until(lambda: node.layer()["quarantine"], "the check finds the layer false")
    return found


def liars() -> dict[str, tuple[LayerBlob, str | None]]:
    def setuid(toc: dict[str, Any]) -> None:
        toc_entry(toc, "good")["mode"] = 0o4755

    forged = TAR.replace(GOOD[:1000], OTHER[:1000])
    return {
        "diff ID": (zstd_chunked_layer(TAR), of(b"another layer")),
        "TOC": (zstd_chunked_layer(TAR, edit_toc=setuid), None),
        "content": (zstd_chunked_layer(TAR, frames_from=forged), None),
    }


@shows(
    Case(
        "input-liar-diff-id",
        Area.INPUT,
        "a TOC, bytes or config that agree with their digests and lie: diff ID",
        LASTING,
        "`status`: QUARANTINED, and why; mounted again: exit 6",
        "`quarantined_layers`",
        param="diff ID",
    ),
    Case(
        "input-liar-toc",
        Area.INPUT,
        "a TOC, bytes or config that agree with their digests and lie: TOC",
        LASTING,
        "`status`: QUARANTINED, and why; mounted again: exit 6",
        "`quarantined_layers`",
        param="TOC",
    ),
    Case(
        "input-liar-content",
        Area.INPUT,
        "a TOC, bytes or config that agree with their digests and lie: content",
        LASTING,
        "`status`: QUARANTINED, and why; mounted again: exit 6",
        "`quarantined_layers`",
        param="content",
    ),
)
@both_drivers
@pytest.mark.parametrize("kind", ["diff ID", "TOC", "content"])
def test_liar_is_quarantined(node: Node, registry: FakeRegistry, kind: str) -> None:
    node.settings["BACKGROUND"] = "1"
    layer, diff_id = liars()[kind]
    image = image_of(registry, layer, diff_id)
    honest = add(registry, "honest", zstd_chunked_layer(tar_of(file("f", b"honest"))))
    beside = node.mount(honest)
    directory = node.new_dir()
    done = node.lazyfs("mount", image.reference, directory)
    if done.returncode == 0:
        reason = until(
            lambda: [layer["quarantine"] for layer in node.status()["mounts"][1]["layers"] if layer["quarantine"]],
            "the check finds the layer false",
        )[0]
        assert image.layers[0][7:19] in reason or "digest" in reason, reason
        assert EIO in node.read_fails(directory / "good")
        assert "QUARANTINED" in node.lazyfs("status").stdout
        assert metrics_of(node)["lazyfsd_quarantined_layers", ""] == 1
        node.umount(directory)
    else:
        assert done.returncode == 6, done.stderr
    assert "quarantined" in node.refused(6, "mount", image.reference, node.new_dir())
    assert node.read(beside / "f") == b"honest"
    node.umount(beside)
    until(lambda: not node.processes(), "the daemon ends by itself")
    assert "quarantined" in node.refused(6, "mount", image.reference, node.new_dir())  # remembered


def test_diff_id_claimed_of_a_verified_layer(node: Node, registry: FakeRegistry) -> None:
    node.settings["BACKGROUND"] = "1"
    layer = zstd_chunked_layer(TAR)
    tree = node.mount(image_of(registry, layer))
    node.until_verified()
    liar = image_of(registry, layer, of(b"another layer"), "liar")
    assert "diff ID" in node.refused(6, "mount", liar.reference, node.new_dir())
    assert node.read(tree / "good") == GOOD  # the honest image is not punished for it


@shows(
    Case(
        "input-plain-diff-id",
        Area.INPUT,
        "a layer without a TOC whose diff ID is another one",
        NOTHING_SHOWN,
        "exit 6: “diff ID”",
    ),
)
def test_plain_layer_with_a_false_diff_id(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "plain", TAR, rootfs={"type": "layers", "diff_ids": [of(b"another")]})
    sentence = node.refused(6, "--quiet", "mount", image.reference, node.new_dir())
    assert "diff ID" in sentence
    assert node.shown() == []


def test_another_toc_of_the_same_blob_is_never_shown_what_the_kernel_kept_of_the_first(
    node: Node, registry: FakeRegistry
) -> None:
    """Two images that may be shown before their check, one after the other: the blob has both TOCs, one lies."""
    node.settings["LAZY_FROM"] = "*"

    def swap(toc: dict[str, Any]) -> None:
        one, other = toc_entry(toc, "good"), toc_entry(toc, "other")
        one["name"], other["name"] = other["name"], one["name"]

    honest = zstd_chunked_layer(TAR, frame_size=0, chunk_size=2 << 20)
    lie, told = encode_tail(edited(honest.toc, swap), honest.payload_end, 3)
    truth, told_too = encode_tail(honest.toc, honest.payload_end + len(lie), 3)
    blob = honest.blob[: honest.payload_end] + lie + truth
    liar, second = (
        dataclasses.replace(
            honest,
            blob=blob,
            annotations={
                oci.GITHUB_ZSTD_CHECKSUM: tail[oci.ZSTD_CHECKSUM],
                oci.GITHUB_ZSTD_POSITION: tail[oci.ZSTD_POSITION],
            },
        )
        for tail in (told, told_too)
    )
    node.mount(add(registry, "beside", zstd_chunked_layer(tar_of(file("f", b"keeps the daemon")))))
    tree = node.mount(add(registry, "liar", liar))
    assert node.layer(mount=1)["lazy"] and node.read(tree / "good") == OTHER
    node.umount(tree)
    until(lambda: len(node.status()["mounts"]) == 1, "the first is gone")
    tree = node.mount(add(registry, "second", second))
    assert node.layer(mount=1)["lazy"] and node.read(tree / "good") == GOOD


@pytest.mark.parametrize("listed", ["there", "here"])
def test_lazy_from_means_the_host_of_the_reference(
    node: Node, registry: FakeRegistry, scratch: Path, listed: str
) -> None:
    hosts = {"there": "registry.example", "here": registry.host}  # the reference's, and the one that answers for it
    node.settings |= {"LAZY_FROM": f"{hosts[listed]}/*", "CERTS_DIR": str(scratch / "certs.d")}
    directory = scratch / "certs.d" / "registry.example"
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(f'server = "http://{registry.host}"\n')
    add(registry, "image", zstd_chunked_layer(TAR))
    done = node.lazyfs("mount", "registry.example/image", node.new_dir())
    assert done.returncode == 0, done.stderr
    assert node.layer()["verified"] is (listed == "here")
    assert ("lazy_from does not list registry.example/image" in done.stderr) is (listed == "here")
    held = json.loads(node.lazyfs("cache", "ls", "--layers", "--json").stdout)["layers"]
    assert [layer["origin"] for layer in held] == ["registry.example/image"]


def test_lazy_from_verifies_others_first(node: Node, registry: FakeRegistry) -> None:
    node.settings["LAZY_FROM"] = "*/trusted"
    honest = zstd_chunked_layer(TAR)
    directory = node.new_dir()
    done = node.lazyfs("mount", add(registry, "stranger", honest).reference, directory)
    assert done.returncode == 0, done.stderr
    assert node.layer()["verified"] is True
    assert node.read(directory / "good") == GOOD
    fresh = zstd_chunked_layer(tar_of(file("f", pattern(100_000, 9))))
    node.mount(add(registry, "trusted", fresh))
    assert node.layer(mount=1)["verified"] is False
    liar = image_of(registry, zstd_chunked_layer(tar_of(file("f", b"lie"))), of(b"another"), "liar")
    done = node.lazyfs("mount", liar.reference, node.new_dir())
    remark, sentence = done.stderr.strip().splitlines()
    assert done.returncode == 6 and "diff ID" in sentence, done.stderr
    assert f"lazy_from does not list {registry.host}/liar" in remark
    assert node.read(directory / "other") == OTHER
