"""What a daemon was about when it died: the next one knows it, and goes on with it."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import Area, Case, shows
from tests.helpers import chains
from tests.helpers.blobs import toc_entry, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.takeover import contents, held, image_of
from tests.helpers.tars import file, tar_of

pytestmark = [pytest.mark.fuse, pytest.mark.faults]


@shows(
    Case(
        "processes-held-written",
        Area.PROCESSES,
        "the same, under a writable mount",
        "right bytes, and what was written",
        "nothing",
    ),
)
def test_what_is_written_over_an_image_survives(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry), "--rw")
        node.python("open(a[0], 'w').write('ours')", tree / "new")
        daemon.kill()
        assert node.read(tree / "new") == b"ours" and node.read(tree / "f1") == contents()["f1"]
        node.umount(tree)
        assert node.status()["mounts"] == []


def test_the_standby_is_in_nobodys_way(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        image = image_of(registry)
        tree = node.mount(image)
        node.read(tree / "f1")
        before = daemon.standby()
        node.umount(tree)
        done = node.lazyfs("cache", "rm", image.reference)  # at once, while the standby has the layer open still
        assert done.returncode == 0, done.stderr
        tree = node.mount(image)  # with other files in the places of those that it has open
        assert node.read(tree / "f2") == contents()["f2"]
        assert daemon.kill() == before
        assert node.read(tree / "f2") == contents()["f2"] and node.read(tree / "f3") == contents()["f3"]
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        node.umount(tree)
        until(lambda: not node.status()["mounts"], "nothing is shown")


def test_a_verdict_reaches_the_standby(node: Node, registry: FakeRegistry) -> None:
    honest = zstd_chunked_layer(tar_of(file("f", pattern(300_000)), file("su", b"x")))
    false = zstd_chunked_layer(
        tar_of(file("f", pattern(300_000)), file("su", b"x")),
        edit_toc=lambda toc: toc_entry(toc, "su").update(mode=0o4755),
    )
    good, bad = add(registry, "good", honest), add(registry, "bad", false)
    with held(node, LAZYFS_BACKGROUND="1") as daemon:
        shown, wrong = node.mount(good), node.mount(bad)

        def verdicts() -> dict[str, dict[str, Any]]:
            return {mount["dir"]: mount["layers"][0] for mount in node.status()["mounts"]}

        until(lambda: verdicts()[str(wrong)]["quarantine"] and verdicts()[str(shown)]["verified"], "both are checked")
        daemon.standby()
        daemon.kill()
        assert verdicts()[str(wrong)]["quarantine"] and verdicts()[str(shown)]["verified"]
        assert "Input/output error" in node.read_fails(wrong / "f")
        assert node.read(shown / "f") == pattern(300_000)
        node.umount(shown)
        node.umount(wrong)


def test_what_was_begun_in_the_background_goes_on(node: Node, registry: FakeRegistry) -> None:
    with held(node, LAZYFS_BACKGROUND="1", LAZYFS_BACKGROUND_RATE="200k") as daemon:
        tree = node.mount(image_of(registry, large=random.Random(1).randbytes(2_000_000)))
        standby = daemon.standby()
        assert not node.layer()["verified"]
        assert daemon.kill() == standby
        node.until_verified(60)
        node.umount(tree)


def test_what_a_client_leased_goes_with_the_client(node: Node, registry: FakeRegistry) -> None:
    lease = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from lazyfs.control_client import connect\n"
        "daemon = connect(Path(sys.argv[2]))\n"
        "daemon.call('mount_image', image=sys.argv[3], lease=True); print('leased', flush=True); time.sleep(600)\n"
    )
    with held(node) as daemon:
        place = [str(Path(__file__).parents[2]), str(node.run_dir / "lazyfsd.sock"), image_of(registry).reference]
        client = node.spawn([sys.executable, "-c", lease, *place])
        assert client.stdout is not None and client.stdout.readline() == b"leased\n"
        daemon.kill()
        assert len(node.status()["mounts"]) == 1
        client.kill()
        client.communicate(timeout=10)
        until(lambda: not node.status()["mounts"], "what was leased has gone")


def test_chains_survive(node: Node, registry: FakeRegistry) -> None:
    image = image_of(registry)
    with held(node) as daemon, chains.Snapshotter(node.run_dir / "lazyfsd.sock") as client:
        shown = client.mount(image, client.resolve(image))
        daemon.kill()
        assert node.read(Path(shown["lowerdirs"][0]) / "f2") == contents()["f2"]
        with chains.Snapshotter(node.run_dir / "lazyfsd.sock") as again:
            assert [chain["chain"] for chain in again.call("chains")["chains"]] == [shown["chain"]]
            again.call("unmount_chain", chain=shown["chain"])
            assert again.call("chains")["chains"] == []
