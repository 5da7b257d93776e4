"""The records of snapshots: containerd's rules, what lazy ones add, and files that can't be used."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.errors import (
    SnapshotExists,
    SnapshotInvalid,
    SnapshotMissing,
    SnapshotUnfit,
    StoreBroken,
    StoreFull,
)
from snapshotter import schema, store_reasons
from snapshotter.model import Kind, LazyImage, LazyLayer, Usage
from snapshotter.store import Store, open_readonly
from tests.helpers.daemon import tmpfs


def layer(number: int) -> LazyLayer:
    digests = [f"sha256:{number:032x}{part:032x}" for part in range(3)]
    return LazyLayer(digests[0], 100, "media", {"b": "2", "a": "1"}, digests[1], digests[2])


IMAGE = LazyImage(0, "docker://h/app:1", "sha256:" + "e" * 64, tuple(map(layer, range(3))))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    ticks = iter(range(10**18, 2 * 10**18))
    one = Store(tmp_path / "snapshots.db", lambda: next(ticks))
    yield one
    one.close()


def committed(store: Store, name: str, parent: str = "") -> None:
    store.create(f"{name}-active", parent, Kind.ACTIVE, {})
    store.commit(name, f"{name}-active", {}, Usage(10, 1))


# -- containerd's rules ----------------------------------------------------------------------------------------------


def test_a_snapshots_life(store: Store) -> None:
    active = store.create("a", "", Kind.ACTIVE, {"l": "1", "empty": ""})
    assert (active.key, active.parent, active.kind, active.labels) == ("a", "", Kind.ACTIVE, {"l": "1"})
    assert active.created == active.updated and store.get("a") == active
    done = store.commit("c", "a", {"m": "2"}, Usage(5, 2))
    assert (done.key, done.kind, done.labels, done.number) == ("c", Kind.COMMITTED, {"m": "2"}, active.number)
    assert done.created > active.created and store.find("a") is None
    assert store.get_with_usage("c") == (done, Usage(5, 2))
    child = store.create("v", "c", Kind.VIEW, {})
    assert store.get_chain("v") == [child, done] and store.numbers() == {child.number, done.number}
    assert [one.key for one in store.walk()] == ["c", "v"]
    assert store.remove("v") == child and store.remove("c") == done and store.walk() == []


def test_numbers_are_never_given_twice(store: Store) -> None:
    first = store.create("a", "", Kind.ACTIVE, {}).number
    store.remove("a")
    assert store.create("a", "", Kind.ACTIVE, {}).number > first


def test_what_is_refused(store: Store) -> None:
    committed(store, "base")
    store.create("active", "base", Kind.ACTIVE, {})
    store.create("view", "base", Kind.VIEW, {})
    with pytest.raises(SnapshotExists):
        store.create("active", "base", Kind.VIEW, {})
    with pytest.raises(SnapshotMissing, match="parent"):
        store.create("x", "none", Kind.ACTIVE, {})
    with pytest.raises(SnapshotInvalid, match="not committed"):
        store.create("x", "active", Kind.ACTIVE, {})
    for key in ("", "k" * 5000):
        with pytest.raises(SnapshotInvalid):
            store.create(key, "", Kind.ACTIVE, {})
    with pytest.raises(SnapshotInvalid, match="4096"):
        store.create("x", "", Kind.ACTIVE, {"n": "é" * 2048})
    with pytest.raises(SnapshotInvalid):
        store.create("x", "", Kind.COMMITTED, {})
    with pytest.raises(SnapshotUnfit):
        store.commit("x", "view", {}, Usage())
    with pytest.raises(SnapshotUnfit):
        store.commit("x", "base", {}, Usage())
    with pytest.raises(SnapshotExists):
        store.commit("base", "active", {}, Usage())
    with pytest.raises(SnapshotMissing):
        store.commit("x", "none", {}, Usage())
    with pytest.raises(SnapshotUnfit, match="remove"):
        store.remove("base")
    for call in (store.get, store.get_chain, store.remove):
        with pytest.raises(SnapshotMissing):
            call("none")
    assert sorted(one.key for one in store.walk()) == ["active", "base", "view"]


def test_a_parent_at_commit_is_for_those_without(store: Store) -> None:
    committed(store, "base")
    committed(store, "other")
    store.create("free", "", Kind.ACTIVE, {})
    store.create("bound", "base", Kind.ACTIVE, {})
    with pytest.raises(SnapshotInvalid):
        store.commit("x", "bound", {}, Usage(), "other")
    with pytest.raises(SnapshotMissing):
        store.commit("x", "free", {}, Usage(), "none")
    with pytest.raises(SnapshotUnfit):
        store.commit("x", "free", {}, Usage(), "bound")
    assert store.commit("x", "free", {}, Usage(), "base").parent == "base"
    assert store.commit("y", "bound", {}, Usage(), "base").parent == "base"
    with pytest.raises(SnapshotUnfit):
        store.remove("base")


def test_labels_are_changed_whole_or_one_by_one(store: Store) -> None:
    before = store.create("a", "", Kind.ACTIVE, {"x": "1", "y": "2"})
    after = store.update("a", {"x": "9", "z": "3"}, ["labels.x", "labels.y"])
    assert after.labels == {"x": "9"} and after.updated > before.updated and after.created == before.created
    assert store.update("a", {"n": "1"}).labels == {"n": "1"}
    assert store.update("a", {"n": "2"}, ["labels"]).labels == {"n": "2"}
    for path in ("parent", "labels.", "", "name"):
        with pytest.raises(SnapshotInvalid):
            store.update("a", {}, [path])
    with pytest.raises(SnapshotMissing):
        store.update("none", {})


def test_the_directory_is_placed_within_the_transaction(store: Store) -> None:
    def fail(number: int) -> None:
        raise StoreFull("no room")

    with pytest.raises(StoreFull, match="no room"):
        store.create("a", "", Kind.ACTIVE, {}, place=fail)
    assert store.find("a") is None
    placed: list[int] = []
    assert store.create("a", "", Kind.ACTIVE, {}, place=placed.append).number == placed[0]


# -- lazy snapshots --------------------------------------------------------------------------------------------------


def test_a_lazy_snapshot_carries_its_chain_and_has_no_directory(store: Store) -> None:
    image = store.put_image(IMAGE)
    assert image.number > 0 and store.put_image(IMAGE) == image
    assert store.find_image(IMAGE.reference, IMAGE.manifest_digest) == image
    assert store.find_image("docker://h/other:1", IMAGE.manifest_digest) is None
    made = store.commit_lazy("c0", "", {"l": "1"}, image, 0, Usage(1, 1))
    assert made.lazy is not None and made.lazy.layers == IMAGE.layers[:1] and made.kind is Kind.COMMITTED
    top = store.commit_lazy("c1", "c0", {}, image, 1, Usage())
    assert store.numbers() == set() and store.get_chain("c1") == [top, made]
    with pytest.raises(SnapshotExists):
        store.commit_lazy("c1", "c0", {}, image, 1, Usage())
    with pytest.raises(SnapshotMissing):
        store.commit_lazy("c2", "none", {}, image, 2, Usage())
    with pytest.raises(SnapshotInvalid):
        store.commit_lazy("c3", "c1", {}, image, 3, Usage())


def test_a_staged_snapshot_becomes_the_lazy_one_at_commit(store: Store) -> None:
    staged = store.create("a", "", Kind.ACTIVE, {}, staged=(IMAGE, 1))
    assert staged.lazy is not None and store.numbers() == {staged.number}
    committed(store, "base")
    done = store.commit("c", "a", {}, Usage(), "base")
    assert done.lazy == staged.lazy and done.parent == "base" and staged.number not in store.numbers()


def test_who_still_needs_what(store: Store) -> None:
    image, other = store.put_image(IMAGE), store.put_image(LazyImage(0, "docker://h/b:1", "sha256:f", (layer(7),)))
    store.commit_lazy("c0", "", {}, image, 0, Usage())
    store.commit_lazy("c1", "c0", {}, image, 1, Usage())
    assert store.layers_referenced() == {one.digest for one in IMAGE.layers[:2]}
    assert store.images_unreferenced() == [other] and store.images_unreferenced(10**18) == []
    assert store.chains_in_use() == []
    committed(store, "plain", "c1")
    assert store.chains_in_use() == []
    for key in ("one", "two"):
        store.create(key, "plain", Kind.ACTIVE, {})
    assert [(place.image.number, place.index) for place in store.chains_in_use()] == [(image.number, 1)]
    store.create("view", "c0", Kind.VIEW, {})
    assert [place.index for place in store.chains_in_use()] == [0, 1]
    assert not store.drop_image(image.number) and store.drop_image(other.number)
    assert store.find_image("docker://h/b:1", "sha256:f") is None
    for key in ("one", "two", "view", "plain", "c1", "c0"):
        store.remove(key)
    assert store.layers_referenced() == set() and store.chains_in_use() == [] and store.drop_image(image.number)


def test_an_image_that_was_collected_meanwhile_is_recorded_again(store: Store) -> None:
    image = store.put_image(IMAGE)
    store.drop_image(image.number)
    made = store.commit_lazy("c0", "", {}, image, 0, Usage())
    assert made.lazy is not None and made.lazy.image.layers == IMAGE.layers


# -- reasons ---------------------------------------------------------------------------------------------------------


def test_reasons_are_bounded_and_read_beside_the_writer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_reasons, "MAX_REASONS", 3)
    for number in range(5):
        store.note_reason(f"docker://h/app:{number % 2}", f"d{number}", "k", "x" * 9999, lazy=number == 4, when=number)
    reader = open_readonly(store.path)
    try:
        assert [one.when for one in reader.reasons()] == [4, 3, 2]
        assert [one.when for one in reader.reasons("docker://h/app:0")] == [4, 2]
        assert [one.lazy for one in reader.reasons()] == [True, False, False]
        assert reader.reasons("docker://h/%") == [] and len(reader.reasons()[0].reason) < 3000
        with pytest.raises(StoreBroken):
            reader.note_reason("a", "b", "c", "d", lazy=True)
    finally:
        reader.close()


def test_text_that_is_no_unicode_is_recorded_all_the_same(store: Store) -> None:
    """An image's annotations and an error's file name may hold what SQLite refuses."""
    store.note_reason("i", "d", "k", "no file \udcff", lazy=False)
    assert store.reasons()[0].reason == "no file ?"
    odd = LazyLayer("d", 1, "m", {"a": "\ud800"}, "x", "y")
    made = store.commit_lazy("c", "", {}, LazyImage(0, "r", "d", (odd,)), 0, Usage())
    assert made.lazy is not None and made.lazy.layers == (odd,)


def test_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(StoreBroken):
        open_readonly(tmp_path / "none.db")
    assert list(tmp_path.iterdir()) == []


# -- the file --------------------------------------------------------------------------------------------------------


def test_all_survives_an_end_without_close(tmp_path: Path) -> None:
    path = tmp_path / "snapshots.db"
    first = Store(path)
    committed(first, "c")
    first.commit_lazy("l", "c", {"a": "ü"}, IMAGE, 2, Usage(3, 4))
    second = Store(path)
    assert second.walk() == first.walk() and len(second.walk()) == 2
    first.close()
    second.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_threads_do_not_disturb_each_other(store: Store) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                key = f"{number}-{turn}"
                committed(store, key)
                store.create(f"{key}-top", key, Kind.ACTIVE, {})
                store.walk()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(store.walk()) == 80


def test_a_locked_file(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = sqlite3.connect(store.path, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        assert store._connection is not None
        store._connection.execute("PRAGMA busy_timeout=50")
        with pytest.raises(StoreBroken, match="locked by another process") as caught:
            store.create("a", "", Kind.ACTIVE, {})
        assert caught.value.temporary
    finally:
        holder.close()
    store.create("a", "", Kind.ACTIVE, {})


def test_a_newer_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "snapshots.db"
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION + 2}")
    connection.close()
    before = path.read_bytes()
    for opener in (Store, open_readonly):
        with pytest.raises(StoreBroken, match="newer lazyfs"):
            opener(path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_reported_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "snapshots.db"
    one = Store(path)
    for number in range(50):
        committed(one, f"c{number}")
    one.close()
    whole = path.read_bytes()
    for damaged in (b"x" * 8192, whole[:4096] + os.urandom(len(whole) - 4096), whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(StoreBroken, match="damaged") as caught:
            Store(path)
        assert "restore it" in caught.value.hint and path.read_bytes() == damaged


def test_somebody_elses_database(tmp_path: Path) -> None:
    path = tmp_path / "snapshots.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(StoreBroken, match="another program"):
        Store(path)


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "target.db")
    with pytest.raises(StoreBroken):
        Store(tmp_path / "link.db")
    (tmp_path / "dir.db").mkdir()
    with pytest.raises(StoreBroken):
        Store(tmp_path / "dir.db")
    Store(tmp_path / "a.db").close()
    os.link(tmp_path / "a.db", tmp_path / "b.db")
    with pytest.raises(StoreBroken, match="not a file of ours"):
        Store(tmp_path / "b.db")
    assert not (tmp_path / "target.db").exists()


def test_a_full_disk_and_what_is_freed_on_it(scratch: Path) -> None:
    with tmpfs(scratch / "disk", 1 << 20) as disk:
        store = Store(disk / "snapshots.db")
        committed(store, "c")
        filler = disk / "filler"
        with open(filler, "wb", buffering=0) as sink, pytest.raises(OSError, match="No space"):
            while True:
                sink.write(b"x" * 4096)
        made = 0
        with pytest.raises(StoreFull, match="disk is full"):
            for made in range(1000):
                store.create(f"a{made}", "c", Kind.ACTIVE, {"l": "x" * 4000})
        assert [one.key for one in store.walk()] == ["c", *(f"a{number}" for number in range(made))]
        filler.unlink()
        store.create("after", "c", Kind.ACTIVE, {})
        store.close()
