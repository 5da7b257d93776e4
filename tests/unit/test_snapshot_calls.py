"""The ten calls with collaborators that do as the test says: lazy layers, daemons that fail, full disks."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from lazyfs.config import Settings
from lazyfs.errors import (
    DaemonUnreachable,
    LazyfsError,
    SnapshotExists,
    SnapshotMissing,
    SnapshotUnfit,
    StoreBroken,
    StoreFull,
)
from snapshotter import schema, server, snapshotter
from snapshotter.collaborators import Collaborators
from snapshotter.directories import Directories
from snapshotter.model import REF_LABEL, Kind, LazyImage, LazyLayer, LazyOffer, LazyPlace, Mount, Shown, Usage
from snapshotter.overlay import Overlay
from snapshotter.snapshotter import Snapshotter
from snapshotter.store import Store
from tests.helpers.daemon import tmpfs
from tests.helpers.snapshotter import Refused, serving


def layer(number: int) -> LazyLayer:
    digests = [f"sha256:{number:032x}{part:032x}" for part in range(3)]
    return LazyLayer(digests[0], 100, "media", {}, digests[1], digests[2])


IMAGE = LazyImage(0, "docker://h/app:1", "sha256:" + "e" * 64, tuple(map(layer, range(3))))
CHAINS = [one.chain_id for one in IMAGE.layers]
TREE = Shown("chain", ("/run/tree",), 0o711, 5, 6)


class Others:
    """The daemon, the decider and the collector in one, as the test wants them."""

    def __init__(self) -> None:
        self.lazy = True
        self.staged = False
        self.error: LazyfsError | None = None
        self.asked: list[str] = []
        self.shown: list[LazyPlace] = []
        self.woken = 0
        self.runs = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def offer(self, key: str, parent: str, labels: Mapping[str, str]) -> LazyOffer | None:
        self.asked.append(labels[REF_LABEL])
        self.meanwhile()
        if not self.lazy or labels[REF_LABEL] not in CHAINS:
            return None
        return LazyOffer(IMAGE, CHAINS.index(labels[REF_LABEL]), {"kept": "1"}, self.staged)

    def show(self, place: LazyPlace) -> Shown:
        self.meanwhile()
        if self.error is not None:
            raise self.error
        self.shown.append(place)
        return TREE

    def usage(self, digests: Sequence[str]) -> Usage:
        if self.error is not None:
            raise self.error
        return Usage(sum(int(digest[7:39], 16) + 1 for digest in digests) * 1000, 3)

    def wake(self) -> None:
        self.woken += 1

    def run(self, deadline: float) -> None:
        self.runs += 1


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    one = Store(tmp_path / "snapshots.db")
    yield one
    one.close()


@pytest.fixture
def calls(tmp_path: Path, store: Store, others: Others) -> Snapshotter:
    directories = Directories(tmp_path)
    return Snapshotter(store, directories, Overlay(directories), others, others, others)


def extract(calls: Snapshotter, index: int, parent: str, key: str = "extract") -> list[Mount]:
    return calls.prepare(f"{key} {CHAINS[index]}", parent, {REF_LABEL: CHAINS[index], "more": "labels"})


def extract_lazily(calls: Snapshotter, index: int, parent: str, key: str = "extract") -> None:
    with pytest.raises(SnapshotExists):
        extract(calls, index, parent, key)


def found_by_containerd(calls: Snapshotter, index: int, parent: str) -> list[str]:
    """Look as containerd does after ALREADY_EXISTS."""
    found = calls.walk([f'labels."{REF_LABEL}"=={CHAINS[index]},parent=="{parent}"'])
    return [one.key for one in found if one.kind is Kind.COMMITTED and one.labels[REF_LABEL] == CHAINS[index]]


# -- extraction ------------------------------------------------------------------------------------------------------


def test_a_lazy_layer_is_committed_under_its_chain_id(calls: Snapshotter, others: Others, tmp_path: Path) -> None:
    extract_lazily(calls, 0, "")
    extract_lazily(calls, 1, CHAINS[0])
    assert found_by_containerd(calls, 1, CHAINS[0]) == [CHAINS[1]]
    assert calls.stat(CHAINS[1]).parent == CHAINS[0] and calls.stat(CHAINS[1]).labels["kept"] == "1"
    assert len(calls.walk([])) == 2 and os.listdir(tmp_path / "s") == []
    extract_lazily(calls, 1, CHAINS[0])  # another pull, which needs no network
    assert others.asked == CHAINS[:2] and others.shown == []


def test_a_layer_that_is_not_lazy_gets_ordinary_mounts(calls: Snapshotter, others: Others) -> None:
    others.lazy = False
    assert extract(calls, 0, "")[0].options == ("rw", "rbind")
    calls.commit("ns/1/base", f"extract {CHAINS[0]}", {REF_LABEL: CHAINS[0]})
    assert found_by_containerd(calls, 0, "") == ["ns/1/base"]


def test_a_chain_on_another_parent_gets_a_name_of_its_own(calls: Snapshotter, others: Others) -> None:
    """In another namespace what lies below may be an ordinary snapshot, with another name."""
    calls.prepare("p", "", {})
    calls.commit("ns2/7/base", "p", {})
    extract_lazily(calls, 0, "")
    extract_lazily(calls, 1, CHAINS[0])
    extract_lazily(calls, 1, "ns2/7/base")
    extract_lazily(calls, 1, "ns2/7/base")
    assert len(found_by_containerd(calls, 1, "ns2/7/base")) == 1 and len(found_by_containerd(calls, 1, CHAINS[0])) == 1


def test_two_pulls_of_one_layer_at_once(calls: Snapshotter, others: Others) -> None:
    barrier = threading.Barrier(4)
    others.meanwhile = lambda: barrier.wait(20)
    ends: list[BaseException] = []

    def pull(number: int) -> None:
        try:
            extract(calls, 0, "", f"pull-{number}")
        except BaseException as error:
            ends.append(error)

    threads = [threading.Thread(target=pull, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(end) for end in ends] == [SnapshotExists] * 4 and len(calls.walk([])) == 1


def test_an_extraction_on_a_parent_that_is_gone_asks_nobody(calls: Snapshotter, others: Others) -> None:
    with pytest.raises(SnapshotMissing):
        extract(calls, 1, CHAINS[0])
    assert others.asked == []


def test_a_staged_layer_is_committed_by_the_client(calls: Snapshotter, others: Others, store: Store) -> None:
    """The parallel way: no parent at Prepare, a read-only mount for "nothing to apply", the parent at Commit."""
    others.staged = True
    for index in (1, 0):
        mounts = extract(calls, index, "")
        assert "ro" in mounts[-1].options and calls.mounts(f"extract {CHAINS[index]}") == mounts
    calls.commit(CHAINS[0], f"extract {CHAINS[0]}", {REF_LABEL: CHAINS[0]})
    calls.commit(CHAINS[1], f"extract {CHAINS[1]}", {REF_LABEL: CHAINS[1]}, CHAINS[0])
    top = calls.stat(CHAINS[1])
    assert top.lazy is not None and top.lazy.index == 1 and top.parent == CHAINS[0]
    assert store.numbers() == set() and others.shown == []


# -- on lazy layers --------------------------------------------------------------------------------------------------


def test_a_container_on_a_lazy_chain(calls: Snapshotter, others: Others, tmp_path: Path) -> None:
    extract_lazily(calls, 0, "")
    extract_lazily(calls, 1, CHAINS[0])
    mounts = calls.prepare("c", CHAINS[1], {})
    assert mounts[0].type == "overlay" and "lowerdir=/run/tree" in mounts[0].options
    assert calls.mounts("c") == mounts
    assert [(place.index, place.image.reference) for place in others.shown] == [(1, IMAGE.reference)] * 2
    root = (tmp_path / "s" / str(calls.stat("c").number) / "fs").stat()
    assert (root.st_mode & 0o7777, root.st_uid, root.st_gid) == (0o711, 5, 6)
    assert calls.view("v", CHAINS[1], {})[0] == Mount("bind", "/run/tree", ("ro", "rbind"))


def test_ordinary_layers_lie_above_the_lazy_ones(calls: Snapshotter, others: Others, tmp_path: Path) -> None:
    extract_lazily(calls, 0, "")
    others.lazy = False
    extract(calls, 1, CHAINS[0])
    calls.commit(CHAINS[1], f"extract {CHAINS[1]}", {})
    below = f"{tmp_path}/s/{calls.stat(CHAINS[1]).number}/fs"
    os.chmod(below, 0o700)
    assert f"lowerdir={below}:/run/tree" in calls.prepare("c", CHAINS[1], {})[0].options
    assert os.stat(f"{tmp_path}/s/{calls.stat('c').number}/fs").st_mode & 0o777 == 0o700


def test_a_daemon_that_is_away_leaves_nothing_behind(calls: Snapshotter, others: Others, tmp_path: Path) -> None:
    extract_lazily(calls, 0, "")
    others.error = DaemonUnreachable("lazyfsd does not answer")
    for call in (calls.prepare, calls.view):
        with pytest.raises(DaemonUnreachable):
            call("c", CHAINS[0], {})
    assert len(calls.walk([])) == 1 and os.listdir(tmp_path / "s") == []
    assert calls.usage(CHAINS[0]) == Usage()  # what was known of it
    others.error = None
    assert calls.usage(CHAINS[0]) == Usage(1000, 3)
    calls.prepare("c", CHAINS[0], {})
    others.error = DaemonUnreachable("lazyfsd went away")
    assert calls.usage(CHAINS[0]) == Usage(1000, 3), "what was last known of it"


def test_one_who_waits_for_a_registry_holds_up_nobody(calls: Snapshotter, others: Others) -> None:
    extract_lazily(calls, 0, "")
    waiting, release = threading.Event(), threading.Event()
    others.meanwhile = lambda: (waiting.set(), release.wait(20))
    thread = threading.Thread(target=lambda: calls.prepare("slow", CHAINS[0], {}))
    thread.start()
    try:
        assert waiting.wait(20)
        calls.prepare("p", "", {})
        calls.commit("n", "p", {})
        calls.remove("n")
        assert [one.key for one in calls.walk([])] == [CHAINS[0]]
    finally:
        release.set()
        thread.join()
    assert calls.stat("slow").kind is Kind.ACTIVE


# -- the rest --------------------------------------------------------------------------------------------------------


def test_remove_is_quick_and_wakes_the_collector(calls: Snapshotter, others: Others, tmp_path: Path) -> None:
    calls.prepare("p", "", {})
    calls.remove("p")
    assert others.woken == 1 and len(os.listdir(tmp_path / "s")) == 1
    calls.cleanup()
    assert others.runs == 1


def test_usage_of_an_active_one_is_what_it_takes_now(calls: Snapshotter, tmp_path: Path) -> None:
    calls.prepare("p", "", {})
    before = calls.usage("p")
    (tmp_path / "s" / str(calls.stat("p").number) / "fs" / "file").write_bytes(b"x" * 100_000)
    after = calls.usage("p")
    assert after.inodes == before.inodes + 1 and after.size - before.size >= 100_000
    calls.commit("c", "p", {})
    assert calls.usage("c") == after


def test_a_committed_one_has_no_mounts(calls: Snapshotter) -> None:
    calls.prepare("p", "", {})
    calls.commit("c", "p", {})
    with pytest.raises(SnapshotUnfit):
        calls.mounts("c")


def test_a_pods_root_owns_its_directory(calls: Snapshotter, tmp_path: Path) -> None:
    labels = {"containerd.io/snapshot/uidmapping": "0:1000:10", "containerd.io/snapshot/gidmapping": "0:2000:10"}
    assert calls.prepare("p", "", labels)[0].options[:2] == ("uidmap=0:1000:10", "gidmap=0:2000:10")
    found = (tmp_path / "s" / str(calls.stat("p").number) / "fs").stat()
    assert (found.st_uid, found.st_gid) == (1000, 2000)


def test_a_disk_that_fills_up(scratch: Path, others: Others) -> None:
    """Prepare and Commit say so, leave nothing half done, and removing goes on."""
    with tmpfs(scratch / "disk", 2 << 20) as disk, contextlib.closing(Store(disk / "snapshots.db")) as store:
        directories = Directories(disk)
        calls = Snapshotter(store, directories, Overlay(directories), others, others, others)
        for number in range(20):
            calls.prepare(f"p{number}", "", {"l": "x" * 2000})
        with open(disk / "filler", "wb", buffering=0) as sink, pytest.raises(OSError, match="No space"):
            while True:
                sink.write(b"x" * 4096)
        failed = 0
        for number in range(400):
            try:
                calls.prepare(f"more{number}", "", {"l": "x" * 4000})
            except StoreFull:
                failed += 1
        assert failed
        before = {one.key for one in calls.walk([])}
        with pytest.raises(StoreFull):
            for number in range(20):
                calls.commit(f"c{number}", f"p{number}", {"l": "x" * 4000})
        assert len(calls.walk([])) == len(before)
        assert directories.strays(directories.names(), store.numbers()) == []
        for one in calls.walk([]):
            calls.remove(one.key)
        assert calls.walk([]) == []


def test_over_the_socket_errors_have_codes_and_bugs_no_details(scratch: Path, others: Others) -> None:
    def connect(settings: Settings, store: Store, directories: Directories) -> Collaborators:
        return Collaborators(others, others, others)

    with serving(scratch, connect) as client:
        with pytest.raises(Refused) as caught:
            client.prepare("k", "", {REF_LABEL: CHAINS[0]})
        assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
        others.error = DaemonUnreachable("lazyfsd does not answer")
        with pytest.raises(Refused) as caught:
            client.prepare("k", CHAINS[0])
        assert (caught.value.code, caught.value.message) == (grpc.StatusCode.UNAVAILABLE, "lazyfsd does not answer")
        others.error = None
        others.meanwhile = lambda: {}["secret internals"]
        with pytest.raises(Refused) as caught:
            client.prepare("k", CHAINS[0])
        assert caught.value.code is grpc.StatusCode.INTERNAL and "secret" not in caught.value.message
        with pytest.raises(Refused) as caught:
            client.list("name==")
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(Refused) as caught:
            client.prepare("k", "", {"label": "x" * 4096})
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_over_the_socket_what_asks_nobody_is_answered_whoever_waits(
    scratch: Path, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads of the calls that may wait for a daemon do wait for it; the collection of garbage goes on."""

    def connect(settings: Settings, store: Store, directories: Directories) -> Collaborators:
        return Collaborators(others, others, others)

    monkeypatch.setattr(server, "CALL_THREADS", 2)
    with serving(scratch, connect) as client, ThreadPoolExecutor(2) as pool:
        with pytest.raises(Refused):
            client.prepare("k", "", {REF_LABEL: CHAINS[0]})
        client.prepare("p", "")
        both, release = threading.Barrier(3), threading.Event()
        others.meanwhile = lambda: (both.wait(20), release.wait(20))
        waiting = [pool.submit(client.prepare, key, CHAINS[0]) for key in ("one", "two")]
        try:
            both.wait(20)
            client.commit("c", "p")
            assert client.update("c", {"a": "b"}).labels == {"a": "b"} == client.stat("c").labels
            client.remove("c")
            assert list(client.list()) == [CHAINS[0]]
            assert not any(one.done() for one in waiting)
        finally:
            release.set()
        assert [one.result(20)[0].type for one in waiting] == ["overlay"] * 2


def test_over_the_socket_a_locked_file_may_be_asked_again(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BUSY_TIMEOUT", 0.05)
    with serving(scratch) as client:
        client.prepare("p", "")
        with contextlib.closing(sqlite3.connect(scratch / "r" / "snapshots.db", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            for call in (
                lambda: client.prepare("more", ""),
                lambda: client.commit("c", "p"),
                lambda: client.remove("p"),
            ):
                with pytest.raises(Refused, match="is locked by another process") as caught:
                    call()
                assert caught.value.code is grpc.StatusCode.UNAVAILABLE and "\n" not in caught.value.message
            assert list(client.list()) == ["p"], "looking needs no lock"
        client.commit("c", "p")


def test_over_the_socket_a_full_disk_is_called_so(scratch: Path) -> None:
    with tmpfs(scratch / "disk", 2 << 20) as disk, serving(disk) as client:
        client.prepare("p", "")
        with open(disk / "filler", "wb", buffering=0) as sink, pytest.raises(OSError, match="No space"):
            while True:
                sink.write(b"x" * 4096)
        with pytest.raises(Refused) as caught:
            for number in range(400):
                client.prepare(f"more{number}", "", {"l": "x" * 4000})
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "free some space" in caught.value.message
        with pytest.raises(Refused) as caught:
            for number in range(400):
                client.commit(f"c{number}", "p" if not number else f"more{number - 1}", {"l": "x" * 4000})
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "\n" not in caught.value.message
        for key in client.list():
            client.remove(key)


def test_a_chain_that_was_shown_in_vain_is_looked_at(calls: Snapshotter, others: Others) -> None:
    extract_lazily(calls, 0, "")
    others.meanwhile = lambda: calls.remove(CHAINS[0])
    with pytest.raises(SnapshotMissing):
        calls.prepare("c", CHAINS[0], {})
    assert others.woken == 2, "once for the removal, and once for the chain"


def test_one_that_is_removed_while_it_is_measured_is_missing(
    calls: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(directory: str) -> Usage:
        calls.remove("p")
        raise StoreBroken(f"{directory} can't be read")

    monkeypatch.setattr(snapshotter, "disk_usage", measure)
    for call in (lambda: calls.usage("p"), lambda: calls.commit("c", "p", {})):
        calls.prepare("p", "", {})
        with pytest.raises(SnapshotMissing):
            call()
