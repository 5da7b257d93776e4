"""What a start reads first is recorded, learned by the node, and fetched ahead by the next cold start."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from lazyfs import control_client
from lazyfs.errors import UsageError
from lazyfs.format.trace import decode
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, pattern
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.tars import file, tar_of

FILES = {f"f{number:02}": pattern(100_000, number) for number in range(20)}


def layer(seed: str = "") -> LayerBlob:
    tar = tar_of(*(file(name + seed, data) for name, data in FILES.items()))
    return zstd_chunked_layer(tar, chunk_size=1 << 16, frame_size=1 << 16)


@both_drivers
def test_a_start_is_recorded_to_a_file(node: Node, registry: FakeRegistry, driver: str) -> None:
    node.settings["DRIVER"] = driver
    image = add(registry, "one", layer())
    node.mount(add(registry, "other", layer("x")))  # a daemon
    with control_client.connect(node.run_dir / "lazyfsd.sock") as daemon:
        args: dict[str, Any] = {"image": image.reference, "lease": True, "command": ["a", "b"]}
        mount = daemon.call("mount_image", trace=True, **args)
        assert node.read(Path(mount["path"]) / "f07") == FILES["f07"]
        assert node.read(Path(mount["path"]) / "f03") == FILES["f03"]
        ended = daemon.call("trace_end", mount=mount["mount"], ready=1.25)
        path = Path(ended["path"])
        trace = decode(path.read_bytes())
        with pytest.raises(UsageError, match="nothing is recorded"):
            daemon.call("trace_end", mount=mount["mount"], ready=None)
    assert path.parent == node.root / "traces" / "records"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert (ended["reads"], ended["requests"], ended["ready"]) == (len(trace.reads), len(trace.requests), 1.25)
    assert (trace.manifest, trace.layers, trace.ready) == (image.digest, image.layers, 1.25)
    assert trace.command == ("a", "b")
    found = {read.path: read for read in reversed(trace.reads)}
    assert found[b"f07"].at < found[b"f03"].at
    assert found[b"f07"].waited > 0 and trace.requests
    offsets = {read.offset for read in trace.reads if read.path == b"f07"}
    assert offsets == {0, 1 << 16}
