"""A store smaller than the image: background checks all of it and keeps what has room, and no reader loses anything."""

from __future__ import annotations

import pytest

from lazyfs.format.trace import Read, Trace, encode
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

FILES = {f"f{number:02}": pattern(500_000, number) for number in range(30)}
WANTED = "f01", "f14", "f25"
DROP = """
for name in os.listdir(a[0]):
    os.posix_fadvise(os.open(os.path.join(a[0], name), os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
"""


@pytest.mark.parametrize("traced", [False, True])
def test_background_evicts_nothing_that_was_read(node: Node, registry: FakeRegistry, traced: bool) -> None:
    node.settings |= {"DRIVER": "fuse", "PREFETCH": "1", "BACKGROUND": "1", "LEARN": "0", "READ_TIMEOUT": "30"}
    node.settings |= {"STORE_SIZE": "8MB", "MEMORY_SIZE": "0"}
    tar = tar_of(*(file(name, data) for name, data in FILES.items()))
    image = add(registry, "one", zstd_chunked_layer(tar, chunk_size=1 << 18, frame_size=1 << 18))
    if traced:
        told = Trace(image.digest, image.layers, tuple(Read(name.encode(), 0, 0, 500_000) for name in FILES))
        (node.root / "traces").mkdir(mode=0o700, parents=True)
        node.root.chmod(0o700)
        (node.root / "traces" / image.digest.removeprefix("sha256:")).write_bytes(encode(told))
    registry.rate = 4_000_000  # so that the reader comes first
    tree = node.mount(image)
    for name in WANTED:
        assert node.read(tree / name) == FILES[name]
    registry.rate = 0
    until(lambda: node.layer()["verified"], "the whole check has ended", 30)
    blob = f"/blobs/{image.layers[0]}"
    # What background could not keep crosses once more for its first reader.
    assert registry.bytes_sent(blob) <= len(registry.blobs[image.layers[0]]) + 2_000_000
    assert 5_000_000 <= node.layer()["present"] <= 8_000_000
    sent = registry.bytes_sent(blob)
    node.python(DROP, tree)
    for name in WANTED:
        assert node.read(tree / name) == FILES[name]
    assert registry.bytes_sent(blob) == sent
    for name, data in FILES.items():  # a reader has all that he wants, whatever must go for it
        assert node.read(tree / name) == data
    late = node.lazyfs("wait", image.reference)
    assert late.returncode != 0 and "is not whole, and nobody fetches it" in late.stderr
    sentence = node.refused(9, "fetch", image.reference)
    assert "takes 15.0 MB at least" in sentence and "store_size" in sentence


def test_fetch_may_take_what_background_leaves_free(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"STORE_SIZE": "3200000", "BACKGROUND": "1"}
    tar = tar_of(*(file(name, FILES[name]) for name in list(FILES)[:6]))
    image = add(registry, "one", zstd_chunked_layer(tar, chunk_size=1 << 16, frame_size=1 << 16))
    node.mount(image)
    until(lambda: node.layer()["verified"], "the whole check has ended")
    assert not node.layer()["complete"]
    done = node.lazyfs("fetch", image.reference)
    assert done.returncode == 0, done.stderr
    assert node.layer()["complete"]
