"""What nobody refers to is given back, and nothing else: the collector over a real store and a daemon of words."""

from __future__ import annotations

import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest

from lazyfs.config import Settings
from lazyfs.errors import DaemonFault
from snapshotter import collect
from snapshotter import remote as remotes
from snapshotter.collect import Collected, Collector
from snapshotter.directories import Directories, Owner
from snapshotter.model import Kind, LazyImage, LazyLayer, Usage
from snapshotter.remote import Remote
from snapshotter.store import Store
from tests.helpers.control_daemon import ControlDaemon
from tests.helpers.daemon import tmpfs, until


def sha(number: int) -> str:
    return f"sha256:{number:04x}" + "0" * 60


def image(name: str, *numbers: int) -> LazyImage:
    layers = tuple(LazyLayer(sha(one), 9, "m", {}, sha(one), sha(one)) for one in numbers)
    return LazyImage(0, f"docker://r.test/{name}:1", sha(99), layers)


class Scene:
    """A node's records, directories and daemon, with a collector that looks when it is told."""

    def __init__(self, place: Path, daemon: ControlDaemon) -> None:
        self.daemon = daemon
        self.store = Store(place / "snapshots.db")
        self.directories = Directories(place)
        settings = Settings(root=place, run=daemon.path.parent)
        self.remote = Remote(settings, start=False, in_use=self.store.chains_in_use)
        self.noted: list[Collected] = []
        self.forgotten: list[Set[str]] = []
        self.collector = Collector(self.store, self.directories, self.remote, self.noted.append, self.forgotten.append)

    def snapshot(self, key: str, parent: str = "") -> int:
        """Make an active snapshot, with its directory; return its number."""
        made = self.directories.make(Owner(), work=True)
        snapshot = self.store.create(
            key, parent, Kind.ACTIVE, {}, place=lambda number: self.directories.settle(made, number)
        )
        return snapshot.number

    def lazily(self, which: LazyImage, count: int) -> list[str]:
        """Commit the image's lowest layers; return the names of their snapshots."""
        keys = [f"{which.reference} {index}" for index in range(count)]
        for index, (key, parent) in enumerate(zip(keys, ["", *keys], strict=False)):
            self.store.commit_lazy(key, parent, {}, which, index, Usage())
        return keys

    def show(self, key: str) -> str:
        place = self.store.get(key).lazy
        assert place is not None
        return self.remote.show(place).chain

    def look(self) -> None:
        self.collector.run(time.monotonic() + 60)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too fresh to go, unless a test says so."""
    for module, names in (
        (collect, ("_FRESH", "_PULLED", "_FIRST")),
        (remotes, ("_SETTLE", "LOGIN_TOLD_TIMEOUT", "RETURN_TIMEOUT")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(collect, "_AGAIN", 0.05)


@pytest.fixture
def scene(scratch: Path) -> Iterator[Scene]:
    root = scratch / "root"
    root.mkdir(mode=0o700)
    with ControlDaemon(scratch / "run" / "lazyfsd.sock") as daemon:
        one = Scene(root, daemon)
        yield one
        one.collector.close()
        one.store.close()


def test_directories_without_a_record_go(scene: Scene, tmp_path: Path) -> None:
    kept = scene.snapshot("container")
    gone = scene.snapshot("removed")
    scene.store.remove("removed")
    top = scene.directories.top
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    (top / "new-7-7-0" / "fs").mkdir(parents=True)
    (top / "gone-7-7" / "fs" / "deep").mkdir(parents=True)
    (top / "a file").touch()
    (top / "a link").symlink_to(theirs)
    made = scene.directories.make(Owner(), work=False)  # a Prepare is about to record it
    scene.look()
    assert sorted(one.name for one in top.iterdir()) == sorted([str(kept), made]), gone
    assert (theirs / "file").exists()
    assert scene.noted[-1].directories == 5 and not scene.noted[-1].left


def test_a_number_that_was_given_again_meanwhile_is_no_stray(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    number = scene.snapshot("container")
    # As if it had been listed while an earlier one failed to be recorded.
    monkeypatch.setattr(scene.directories, "strays", lambda names, numbers: [str(number)])
    scene.look()
    assert (scene.directories.top / str(number) / "fs").is_dir()


def test_nothing_is_deleted_through_a_mount(scene: Scene, scratch: Path) -> None:
    number = scene.snapshot("removed")
    scene.store.remove("removed")
    inside = scene.directories.top / str(number) / "fs" / "with blank"
    inside.mkdir()
    with tmpfs(inside, 1 << 20):
        (inside / "precious").touch()
        scene.look()
        assert (inside / "precious").exists()
    scene.look()
    assert not inside.exists()


def test_a_chain_that_nobody_uses_is_let_go_once_it_is_settled(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = scene.lazily(image("app", 1, 2), 2)
    used, unused = scene.show(keys[1]), scene.show(keys[0])
    scene.snapshot("container", keys[1])
    monkeypatch.setattr(remotes, "_SETTLE", 60.0)
    scene.look()
    assert set(scene.daemon.chains) == {used, unused}, "somebody may be about to record what stands on it"
    monkeypatch.setattr(remotes, "_SETTLE", 0.0)
    scene.look()
    assert set(scene.daemon.chains) == {used}
    assert scene.daemon.removed == []


def test_layers_go_with_their_last_image_and_not_before(scene: Scene) -> None:
    first, second = image("first", 1, 2, 3), image("second", 1, 7)
    firsts, seconds = scene.lazily(first, 3), scene.lazily(second, 2)
    for key in reversed(firsts):
        scene.store.remove(key)
    scene.look()
    assert sorted(scene.daemon.removed) == [sha(2), sha(3)], "the base is the other image's too"
    assert scene.forgotten == [{sha(2), sha(3)}], "before they went nobody was promised them any more"
    assert scene.store.find_image(first.reference, first.manifest_digest) is None
    for key in reversed(seconds):
        scene.store.remove(key)
    scene.look()
    assert sorted(scene.daemon.removed) == [sha(1), sha(2), sha(3), sha(7)]
    assert scene.noted[-1].freed == 20 and scene.store.images_unreferenced() == []


def test_of_an_image_that_is_partly_used_the_rest_goes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = scene.lazily(image("app", 1, 2, 3), 2)  # the third one was resolved, and pulled in the ordinary way
    monkeypatch.setattr(collect, "_PULLED", 60.0)
    scene.look()
    assert scene.daemon.removed == [], "its pull may be under way"
    monkeypatch.setattr(collect, "_PULLED", 0.0)
    scene.look()
    assert scene.daemon.removed == [sha(3)]
    assert [one.key for one in scene.store.walk()] == keys


def test_an_image_that_was_just_resolved_stays(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FRESH", "_PULLED"):
        monkeypatch.setattr(collect, name, 60.0)
    scene.store.put_image(image("app", 1))
    scene.look()
    assert scene.daemon.removed == [] and len(scene.store.images_unreferenced()) == 1


def fails(args: dict[str, Any]) -> dict[str, Any]:
    raise DaemonFault("lazyfsd failed")


@pytest.mark.parametrize("call", ["chains", "unmount_chain", "remove_layers"])
def test_a_step_that_fails_stops_no_other_and_is_done_by_the_next_look(scene: Scene, call: str) -> None:
    keys = scene.lazily(image("app", 1), 1)
    scene.show(keys[0])
    scene.store.remove(keys[0])
    number = scene.snapshot("removed")
    scene.store.remove("removed")
    scene.daemon.answers[call] = fails
    scene.look()
    assert not (scene.directories.top / str(number)).exists(), "what needs no daemon is done"
    assert scene.noted[-1].failed == "lazyfsd failed" and scene.noted[-1].left
    # The image is not forgotten while its layers are there, or nobody would look at them again.
    assert scene.daemon.removed == [] and len(scene.store.images_unreferenced()) == 1
    del scene.daemon.answers[call]
    scene.look()
    assert (scene.daemon.removed, scene.daemon.chains) == ([sha(1)], {})
    assert scene.store.images_unreferenced() == []


def test_a_chain_that_stays_keeps_no_other(scene: Scene) -> None:
    keys = [*scene.lazily(image("one", 1), 1), *scene.lazily(image("two", 2), 1)]
    for key in keys:
        scene.show(key)
        scene.store.remove(key)

    def unmount(args: dict[str, Any]) -> dict[str, Any]:
        if args["chain"] == "0001":
            raise DaemonFault("lazyfsd failed")
        scene.daemon.chains.pop(args["chain"])
        return {}

    scene.daemon.answers["unmount_chain"] = unmount
    scene.look()
    assert (scene.daemon.chains, scene.daemon.removed) == ({"0001": [sha(1)]}, [sha(2)])
    assert [one.layers[0].digest for one in scene.store.images_unreferenced()] == [sha(1)]
    assert scene.noted[-1].failed and scene.noted[-1].left


def test_without_a_daemon_directories_go_all_the_same(scene: Scene) -> None:
    scene.daemon.die()
    number = scene.snapshot("removed")
    scene.store.remove("removed")
    scene.store.put_image(image("app", 1))
    scene.look()
    assert not (scene.directories.top / str(number)).exists()
    assert "no lazyfsd listens" in scene.noted[-1].failed and len(scene.store.images_unreferenced()) == 1


def test_layers_that_others_use_keep_their_record(scene: Scene) -> None:
    scene.store.put_image(image("app", 1))
    scene.daemon.kept[sha(1)] = "it is in use"
    scene.look()
    assert len(scene.store.images_unreferenced()) == 1
    scene.daemon.kept.clear()
    scene.look()
    assert scene.daemon.removed == [sha(1)] and scene.store.images_unreferenced() == []


def test_after_its_time_a_look_begins_nothing(scene: Scene) -> None:
    scene.store.put_image(image("app", 1))
    scene.collector.run(time.monotonic() - 1)
    assert scene.daemon.calls == []


def test_in_the_background_what_is_left_is_looked_at_again_and_removals_are_not_kept_waiting(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_AGAIN", 3600.0)
    keys = scene.lazily(image("app", 1), 1)
    scene.daemon.answers["chains"] = fails
    number = scene.snapshot("at the start")
    scene.store.remove("at the start")
    scene.collector.start()
    until(lambda: scene.noted, "the first look")  # it failed: the next one is an hour away
    assert not (scene.directories.top / str(number)).exists()
    scene.store.remove(keys[0])
    monkeypatch.setattr(collect, "_AGAIN", 0.05)
    scene.collector.wake()
    until(lambda: len(scene.noted) >= 3, "further looks, without being woken")
    del scene.daemon.answers["chains"]
    until(lambda: scene.daemon.removed == [sha(1)], "the layer is removed")
