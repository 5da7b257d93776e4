"""The daemon dies, is upgraded, or dies of one request again and again: readers go on, and nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lazyfs.container import mounts
from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers import chains
from tests.helpers.blobs import toc_entry, zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers, pattern, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.takeover import KINDS, Held, contents, held, image_of, readers, sabotaged
from tests.helpers.tars import file, tar_of

pytestmark = [pytest.mark.fuse, pytest.mark.faults]


@shows(
    Case(
        "processes-held-daemon-killed",
        Area.PROCESSES,
        "lazyfsd is killed (-9) again and again, with a holder",
        "right bytes, after some milliseconds",
        "nothing: another one takes over",
    ),
)
@both_drivers
def test_readers_do_not_notice_that_the_daemon_is_killed(node: Node, registry: FakeRegistry, driver: str) -> None:
    kinds = KINDS if driver == "fuse" else tuple(kind for kind in KINDS if kind != "direct")  # EROFS has none
    rng = random.Random(7)
    with held(node) as daemon:
        tree = node.mount(image_of(registry), "--driver", driver)
        with readers(node, tree, kinds) as results:
            for _ in range(8):
                daemon.kill()
                time.sleep(rng.choice((0.0, 0.05, 0.2, 0.5)))  # some come while the one before is still taken over
        for reading in results:
            assert reading.count and not reading.wrong, reading
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        node.umount(tree)


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


@shows(
    Case(
        "processes-held-all-killed",
        Area.PROCESSES,
        "lazyfsd, the standby and what forks them are killed (-9) at once",
        "right bytes, within a second",
        "commands wait for the next one",
    ),
)
def test_a_node_without_any_standby_comes_back(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree) as results:
            for _ in range(2):
                daemon.kill_all_at_once()
                # A command that comes now waits for the next daemon, and doesn't say that none runs.
                assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        assert not [reading.wrong for reading in results if reading.wrong]
        node.umount(tree)


@shows(
    Case(
        "processes-held-mounting",
        Area.PROCESSES,
        "lazyfsd is killed (-9) while images are mounted and unmounted, with a holder",
        "other readers: right bytes",
        "the command that was hit says so, and works when it is done again",
    ),
)
@both_drivers
def test_mounts_that_a_kill_hits_leave_nothing(node: Node, registry: FakeRegistry, driver: str) -> None:
    rng = random.Random(11)
    with held(node) as daemon:
        steady, image = (
            node.mount(image_of(registry)),
            add(registry, "two", zstd_chunked_layer(tar_of(file("a", b"a")))),
        )
        with readers(node, steady, ("held", "names")) as results:
            for _ in range(8):
                where = node.new_dir()
                mounting = node.spawn(node.words("mount", "--driver", driver, image.reference, where))
                time.sleep(rng.uniform(0.1, 0.7))
                daemon.kill()
                if node.finish(mounting, 30).returncode != 0:
                    assert node.lazyfs("mount", "--driver", driver, image.reference, where).returncode == 0
                assert node.read(where / "a") == b"a"
                leaving = node.spawn(node.words("umount", where))
                time.sleep(rng.uniform(0.1, 0.5))
                daemon.kill()
                if node.finish(leaving, 30).returncode != 0 and os.path.ismount(where):
                    node.umount(where)
        assert not [reading.wrong for reading in results if reading.wrong]
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(steady)]
        node.umount(steady)
        until(lambda: node.shown() == [], "nothing is mounted")


@shows(
    Case(
        "processes-held-spares-killed",
        Area.PROCESSES,
        "the standby, or what forks it, is killed (-9), and then lazyfsd",
        "right bytes, after some milliseconds, or within a second",
        "nothing",
    ),
)
@pytest.mark.parametrize("spare", ["standby", "template"])
def test_a_spare_process_that_dies_is_replaced(node: Node, registry: FakeRegistry, spare: str) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree, ("held", "names")) as results:
            for wait in (0.0, 1.5):
                serving, standby = daemon.pid(), daemon.standby()
                template = next(pid for pid in node.processes() if pid not in (serving, standby))
                victim = standby if spare == "standby" else template
                os.kill(victim, signal.SIGKILL)
                time.sleep(wait)
                assert daemon.pid() == serving
                assert daemon.kill() != serving
        assert not [reading.wrong for reading in results if reading.wrong]
        assert len(node.processes()) <= 3
        node.umount(tree)


_BREAKS = """
import os, sys
if "lazyfs.mount.daemon" in sys.orig_argv:
    import trio
    from lazyfs.mount import heap
    flag = os.path.join(os.path.dirname(__file__), "break")
    async def give_back():
        while not os.path.exists(flag):
            await trio.sleep(0.05)
        os.unlink(flag)
        raise RuntimeError("can't start new thread")
    heap.give_back = give_back
"""


@shows(
    Case(
        "processes-held-broken",
        Area.PROCESSES,
        "a fault of lazyfsd's own ends it, with a holder",
        "right bytes, after some milliseconds",
        "nothing: another one takes over; its log has the fault",
    ),
)
def test_a_fault_of_the_daemon_ends_in_a_hand_over(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    with sabotaged(node, tmp_path, _BREAKS) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree, ("held", "names")) as results:
            before = daemon.pid()
            (tmp_path / "break").touch()
            until(lambda: daemon.pid() != before, "another daemon serves")
        assert not [reading.wrong for reading in results if reading.wrong]
        assert [mount["dir"] for mount in node.status()["mounts"]] == [str(tree)]
        assert "another one takes over" in node.log()
        node.umount(tree)
    log = node.run_dir / "lazyfsd.log"  # what is in it was meant
    log.write_text(log.read_text(errors="replace").replace("Traceback", "traceback"))


_NO_RESEND = """
import sys
if any("lazyfs.mount.holder" in word for word in sys.orig_argv):
    from lazyfs.mount.greeting import Greeting
    Greeting.can_resend = property(lambda self: False)
"""


def test_without_the_kernels_help_the_mount_is_a_plain_one(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    with sabotaged(node, tmp_path, _NO_RESEND) as daemon:
        tree = node.mount(image_of(registry))
        assert node.read(tree / "f1") == contents()["f1"]
        assert node.status()["daemon"]["holder"] == 0
        assert daemon.pid() == daemon.process.pid  # which would have been the holder
        assert "no holder" in node.refused(2, "upgrade")
        node.umount(tree)


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


@shows(
    Case(
        "processes-upgrade",
        Area.PROCESSES,
        "`lazyfs upgrade` puts another lazyfsd in place",
        "right bytes, after some milliseconds",
        "the command tells both processes",
    ),
)
def test_an_upgrade_changes_the_daemon_and_nothing_else(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        with readers(node, tree, ("held", "names")) as results:
            before = daemon.pid()
            done = node.lazyfs("upgrade", "--json")
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert told["before"]["pid"] == before and told["after"]["pid"] == daemon.pid() != before
            assert told["after"]["holder"] == told["before"]["holder"] != 0
        assert not [reading.wrong for reading in results if reading.wrong]
        node.umount(tree)


_BROKEN = """
import os, sys
if "lazyfs.mount.daemon" in sys.orig_argv and os.path.exists(os.path.join(os.path.dirname(__file__), "broken")):
    print("the new code can't even begin", file=sys.stderr, flush=True)
    os._exit(1)
"""


@shows(
    Case(
        "processes-broken-upgrade",
        Area.PROCESSES,
        "`lazyfs upgrade` to code that can't begin",
        "right bytes",
        "the old lazyfsd goes on; its log says why",
    ),
)
def test_code_that_cannot_begin_takes_nothing_over(node: Node, registry: FakeRegistry, tmp_path: Path) -> None:
    with sabotaged(node, tmp_path, _BROKEN) as daemon:
        tree = node.mount(image_of(registry))
        before = daemon.pid()
        (tmp_path / "broken").touch()
        with readers(node, tree, ("held", "names")) as results:
            os.kill(daemon.process.pid, signal.SIGHUP)
            until(lambda: node.log().count("can't even begin") >= 2, "it is tried again")
            assert daemon.pid() == before
            (tmp_path / "broken").unlink()
            assert node.lazyfs("upgrade").returncode == 0
        assert daemon.pid() != before
        assert not [reading.wrong for reading in results if reading.wrong]
        node.umount(tree)


def test_without_a_holder_there_is_no_upgrade(node: Node, registry: FakeRegistry) -> None:
    tree = node.mount(image_of(registry))
    assert "no holder" in node.refused(2, "upgrade")
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


@shows(
    Case(
        "processes-holder-killed",
        Area.PROCESSES,
        "the holder is killed (-9), and nobody started it that keeps its connection",
        RIGHT,
        "lazyfsd goes on; `status` names no holder, `upgrade`: exit 2",
    ),
)
def test_a_daemon_goes_on_without_its_holder(node: Node, registry: FakeRegistry) -> None:
    with held(node) as daemon:
        tree = node.mount(image_of(registry))
        serving = daemon.pid()
        daemon.process.kill()
        daemon.process.wait(10)
        assert node.read(tree / "f3") == contents()["f3"]
        until(lambda: node.status()["daemon"]["holder"] == 0, "it is told that nobody takes over from it any more")
        assert "no holder" in node.refused(2, "upgrade")
        node.umount(tree)
        os.kill(serving, signal.SIGTERM)
    assert not mounts.below(os.fsencode(node.run_dir))


DEADLY = 77_777  # bytes of the file that kills who reads it
_KILLS = f"""
import os, sys
if "lazyfs.mount.daemon" in sys.orig_argv:
    from lazyfs.chunks.read import Reader
    def begin(self, layer, row, offset, size, real=Reader.begin):
        if layer.table.size[row] == {DEADLY}:
            os.kill(os.getpid(), 11)  # as a fault of a library does; a kill by hand is no request's fault
        return real(self, layer, row, offset, size)
    Reader.begin = begin
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
@pytest.mark.parametrize("driver", ["fuse"])
def test_a_request_that_kills_each_daemon_is_refused(
    node: Node, registry: FakeRegistry, tmp_path: Path, driver: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_KILLS)
    guilty = add(registry, "bad", zstd_chunked_layer(tar_of(file("deadly", pattern(DEADLY)))))
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    with held(node, PYTHONPATH=path) as daemon:
        tree, bad = node.mount(image_of(registry)), node.mount(guilty)
        with readers(node, tree, ("held", "names")) as results:
            assert "Input/output error" in node.read_fails(bad / "deadly", timeout=60)
        assert not [reading.wrong for reading in results if reading.wrong]
        layers = {mount["dir"]: mount["layers"] for mount in node.status()["mounts"]}
        assert "ended lazyfsd several times" in layers[str(bad)][0]["quarantine"]
        assert not layers[str(tree)][0]["quarantine"]
        _stays(daemon)
        node.umount(bad)
        node.umount(tree)


def _stays(daemon: Held) -> None:
    before = daemon.pid()
    with daemon.call() as calls:
        calls.call("status")
    assert daemon.pid() == before
