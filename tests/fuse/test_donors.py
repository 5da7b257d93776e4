"""What another image of the node has is copied from its layer, and not asked for again."""

from __future__ import annotations

import random

import pytest

from lazyfs.limits import MAX_EARLY_BYTES
from tests.fuse.test_traces import empty_store
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

SHARED = pattern(400_000, 1)
CHUNK = 1 << 16
FIRST = zstd_chunked_layer(
    tar_of(file("a", pattern(70_000, 2)), file("lib/shared", SHARED)), chunk_size=CHUNK, frame_size=1 << 20
)
OTHER = zstd_chunked_layer(
    tar_of(file("b", pattern(90_000, 3)), file("usr/copy", SHARED), file("c", pattern(30_000, 4))),
    chunk_size=CHUNK,
    frame_size=0,
)


def extents(blob: LayerBlob, path: bytes) -> list[tuple[int, int]]:
    """Return where the frames of a file lie, [begin, end)."""
    starts = {chunk.blob_offset for chunk in blob.chunks_of(path)}
    return [(offset, offset + size) for offset, size in blob.frames if offset in starts]


def asked(registry: FakeRegistry, digest: str) -> list[tuple[int, int]]:
    """Return the ranges of a blob that were asked for, [begin, end)."""
    out = []
    for request in registry.matching("GET", f"/blobs/{digest}"):
        begin, _, last = request.range.removeprefix("bytes=").partition("-")
        out.append((int(begin), int(last) + 1))
    return out


@pytest.mark.parametrize("driver", ["fuse", "erofs"])
def test_a_file_of_another_image_is_copied(node: Node, registry: FakeRegistry, driver: str) -> None:
    node.settings |= {"DRIVER": driver, "BACKGROUND": "1"}
    first, other = add(registry, "first", FIRST), add(registry, "other", OTHER)
    tree = node.mount(first)
    node.until_verified()
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends with what it has")
    node.settings["BACKGROUND"] = "0"
    registry.clear_log()
    tree = node.mount(other)
    assert node.read(tree / "usr/copy") == SHARED
    shared = extents(OTHER, b"usr/copy")
    assert len(shared) == -(-len(SHARED) // CHUNK)
    ranges = asked(registry, other.layers[0])
    assert [(begin, end) for begin, end in ranges if any(begin < stop and at < end for at, stop in shared)] == []
    assert registry.count("GET", f"/blobs/{first.layers[0]}") == 0
    assert node.read(tree / "b") == pattern(90_000, 3)  # nobody has that
    assert len(asked(registry, other.layers[0])) > len(ranges)


def test_what_a_trace_tells_of_is_copied_too(node: Node, registry: FakeRegistry) -> None:
    """But for the bytes that are asked for before the layer's table tells what they are."""
    shared = random.Random(1).randbytes(3 * MAX_EARLY_BYTES)
    first = add(registry, "first", zstd_chunked_layer(tar_of(file("a", b"a"), file("lib/shared", shared))))
    other = add(registry, "other", zstd_chunked_layer(tar_of(file("b", b"b"), file("usr/copy", shared))))
    node.settings |= {"BACKGROUND": "0", "PREFETCH": "1", "READ_TIMEOUT": "20"}
    tree = node.mount(other)
    assert node.read(tree / "usr/copy") == shared
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends with what it has learned")
    empty_store(node)
    node.settings["BACKGROUND"] = "1"
    tree = node.mount(first)
    node.until_verified(60)
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends with what it has")
    node.settings["BACKGROUND"] = "0"
    registry.clear_log()
    tree = node.mount(other)
    until(lambda: node.layer()["complete"], "what is not on its way is copied", 30)
    assert node.read(tree / "usr/copy") == shared
    assert registry.bytes_sent(f"/blobs/{other.layers[0]}") < 2 * MAX_EARLY_BYTES
    assert registry.count("GET", f"/blobs/{first.layers[0]}") == 0
