"""A request that ends each daemon that gets it: refused, and nobody else waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cases import Area, Case, shows
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers
from tests.helpers.fake_registry import FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.takeover import Held, contents, image_of, readers, sabotaged
from tests.helpers.tars import file, tar_of

pytestmark = [pytest.mark.fuse, pytest.mark.faults]

_DEADLY = 77_777  # bytes of the file that kills who reads it
_KILLS = f"""
import os, sys
if "lazyfs.mount.daemon" in sys.orig_argv:
    from lazyfs.chunks.read import Reader
    def begin(self, layer, row, offset, size, real=Reader.begin):
        if layer.table.size[row] == {_DEADLY}:
            os.kill(os.getpid(), 11)  # as a fault of a library does; a kill by hand is no request's fault
        return real(self, layer, row, offset, size)
    def begin_data(self, layer, data_offset, size, real=Reader.begin_data):  # the erofs driver's
        if {_DEADLY} in layer.table.size:
            os.kill(os.getpid(), 11)
        return real(self, layer, data_offset, size)
    Reader.begin, Reader.begin_data = begin, begin_data
"""


@shows(
    Case(
        "processes-deadly-request",
        Area.PROCESSES,
        "a request that ends each lazyfsd that gets it, with a holder",
        "EIO for its reader; all others: right bytes",
        "`status`: QUARANTINED, “reading it has ended lazyfsd several times”",
        "`quarantined_layers`",
    ),
)
@both_drivers
def test_a_request_that_kills_each_daemon_is_refused(
    node: Node, registry: FakeRegistry, tmp_path: Path, driver: str
) -> None:
    guilty = add(registry, "bad", zstd_chunked_layer(tar_of(file("deadly", pattern(_DEADLY)))))
    with sabotaged(node, tmp_path, _KILLS) as daemon:
        tree, bad = (node.mount(image, "--driver", driver) for image in (image_of(registry), guilty))
        with readers(node, tree, ("held", "names")) as results:
            assert "Input/output error" in node.read_fails(bad / "deadly", timeout=60)
        assert not [reading.wrong for reading in results if reading.wrong]
        layers = {mount["dir"]: mount["layers"] for mount in node.status()["mounts"]}
        assert "ended lazyfsd several times" in layers[str(bad)][0]["quarantine"]
        assert not layers[str(tree)][0]["quarantine"]
        _stays(daemon)
        node.umount(bad)
        node.umount(tree)


@shows(
    Case(
        "processes-deadly-request-silent-registry",
        Area.PROCESSES,
        "the same, while a registry is silent",
        "others: right bytes, after 10 s at most",
        "as above",
    ),
)
def test_a_silent_image_holds_nobody_up_after_a_crash_loop(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    guilty = add(registry, "bad", zstd_chunked_layer(tar_of(file("deadly", pattern(_DEADLY)))))
    with FakeRegistry() as elsewhere, sabotaged(node, tmp_path, _KILLS) as daemon:
        silent = add(elsewhere, "silent", zstd_chunked_layer(tar_of(file("f", pattern(50_000)))))
        tree, bad, waits = node.mount(image_of(registry)), node.mount(guilty), node.mount(silent)
        elsewhere.fault(Fault.BLACK_HOLE, path=f"/blobs/{silent.layers[0]}")
        waiting = node.spawn(["cat", str(waits / "f")])
        assert "Input/output error" in node.read_fails(bad / "deadly", timeout=60)
        assert node.read(tree / "f4", timeout=30) == contents()["f4"]
        assert waiting.poll() is None, "it waits still"
        elsewhere.clear_faults()
        assert node.finish(waiting, 60).stdout == pattern(50_000)
        daemon.pid()
        for directory in (tree, bad, waits):
            node.umount(directory)


def _stays(daemon: Held) -> None:
    before = daemon.pid()
    with daemon.call() as calls:
        calls.call("status")
    assert daemon.pid() == before
