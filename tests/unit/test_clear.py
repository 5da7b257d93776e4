"""What pruning chooses, held against a model; names of images and layers; what becomes of orphans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs import digest as digests
from lazyfs.chunks.catalog import Catalog, Pin
from lazyfs.chunks.census import Census, HeldImage, HeldLayer
from lazyfs.chunks.clear import Clearing, Goal, choose, find, find_layer
from lazyfs.chunks.recheck import Checked, recheck_documents
from lazyfs.chunks.stock import Stock
from lazyfs.chunks.store import Store
from lazyfs.errors import ManifestMissing, UsageError
from lazyfs.limits import MAX_PAGE
from lazyfs.oci import OCI_MANIFEST
from lazyfs.units import MiB
from tests.helpers.chunk_tables import table_of

PLATFORM = "linux/amd64"


def layer(number: int, **changes: object) -> HeldLayer:
    digest = "sha256:" + f"{number:064x}"
    plain = HeldLayer(digest, 10, 10, 10, 10, True, True, "", False, False, number, "host/name")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


LAYERS = st.lists(
    st.builds(
        layer,
        st.integers(0, 1000),
        disk=st.integers(0, 50),
        last_use=st.integers(0, 20),
        pinned=st.booleans(),
        used=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda one: one.digest,
)
GOALS = st.one_of(
    st.just(Goal()),
    st.just(Goal(everything=True)),
    st.builds(Goal, size=st.integers(0, 400)),
    st.builds(Goal, before=st.integers(0, 22)),
)


@settings(max_examples=300, deadline=None)
@given(LAYERS, GOALS, st.data())
def test_choice_holds_against_the_rules(layers: list[HeldLayer], goal: Goal, data: st.DataObject) -> None:
    known = frozenset(one.digest for one in layers if data.draw(st.booleans()))
    size = sum(one.disk for one in layers)
    chosen = choose(layers, known, size, goal)
    by_digest = {one.digest: one for one in layers}
    gone = [by_digest[digest] for digest in chosen]
    free = [one for one in layers if not one.used and not one.pinned and one.disk]
    assert len(set(chosen)) == len(chosen) and all(one in free for one in gone)
    orphans = [one for one in free if one.digest not in known]
    assert all(one in gone for one in orphans)
    rest = [one for one in free if one.digest in known]
    taken = [one for one in rest if one in gone]
    if goal.everything:
        assert taken == rest
    elif goal.before is not None:
        assert taken == [one for one in rest if one.last_use < goal.before]
    elif goal.size is not None:
        left = size - sum(one.disk for one in gone)
        assert left <= goal.size or len(gone) == len(free)
        # Nothing went that need not have: with the last one back the store would be too large again.
        if taken:
            last = max(taken, key=lambda one: (one.last_use, one.digest))
            assert left + last.disk > goal.size
        kept = [one for one in rest if one not in gone]
        assert all((a.last_use, a.digest) < (b.last_use, b.digest) for a in taken for b in kept)
    else:
        assert taken == []


IMAGE = HeldImage(
    "sha256:" + "ab" * 32, ("docker://h.example/r:1",), PLATFORM, 1, (), True, 1, 1, True, True, False, (), 1, 1
)
OTHER = dataclasses.replace(IMAGE, digest="sha256:" + "ab" * 31 + "cd", references=("docker://docker.io/library/x:2",))


def test_names() -> None:
    held = {one.digest: one for one in (layer(1), layer(2))}
    assert find("h.example/r:1", [IMAGE, OTHER], held) == [IMAGE]
    assert find("x:2", [IMAGE, OTHER], held) == [OTHER]
    assert find(IMAGE.digest, [IMAGE, OTHER], held) == [IMAGE]
    assert find(f"h.example/r@{IMAGE.digest}", [IMAGE, OTHER], held) == [IMAGE]
    assert find("sha256:" + "0" * 64, [IMAGE], {"sha256:" + "0" * 64: layer(0)}) == []
    with pytest.raises(UsageError, match="2 images"):
        find("sha256:ababab", [IMAGE, OTHER], held)
    with pytest.raises(UsageError, match="too short"):
        find("sha256:ab", [IMAGE], held)
    with pytest.raises(ManifestMissing, match="not in the store"):
        find("h.example/r:2", [IMAGE], held)
    with pytest.raises(ManifestMissing, match="has the digest"):
        find("sha256:ffffffff", [IMAGE], held)
    with pytest.raises(UsageError, match="2 layers"):
        find_layer("sha256:000000", held)


class Uses:
    def __init__(self) -> None:
        self.used: frozenset[str] = frozenset()

    def layers(self) -> frozenset[str]:
        return self.used

    def trees(self) -> frozenset[str]:
        return frozenset({"kept"})

    def mounts(self) -> dict[str, list[str]]:
        return {}


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db", now=lambda: 1_600_000_000.0)
    yield opened
    opened.close()


@pytest.fixture
def census(tmp_path: Path, catalog: Catalog) -> Iterator[Census]:
    store = Store(tmp_path, 100 * MiB, catalog)
    yield Census(store, catalog, Uses())
    store.close()


def remember(census: Census, name: str, layers: list[str]) -> str:
    """Note an image of these layers, as a mount would; return its manifest's digest."""
    catalog = census.catalog
    config = catalog.put_document(json.dumps({"config of": name}).encode())
    entries = [{"mediaType": "application/x", "digest": digest, "size": 10} for digest in layers]
    manifest = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": entries,
        "config": {"mediaType": "application/x", "digest": config, "size": 10},
    }  # fmt: skip
    digest = catalog.put_document(json.dumps(manifest).encode())
    catalog.remember_reference(f"docker://h.example/{name}:1", PLATFORM, digest)
    return digest


def fill(census: Census, seed: int) -> str:
    table = table_of([50_000], seed=seed)
    opened = census.store.open_layer(table.digest, table)
    assert opened.write_run(0, table.content) == 1
    opened.close()
    census.catalog.add_layer(table.digest, 100, table.data_size)
    return table.digest


def test_documents_and_trees_go_with_their_images(census: Census, tmp_path: Path) -> None:
    shared, own, kept = (fill(census, seed) for seed in range(3))
    first, second = remember(census, "first", [shared, own]), remember(census, "second", [shared, kept])
    index = {"schemaVersion": 2, "manifests": [{"mediaType": OCI_MANIFEST, "digest": first, "size": 1}]}
    both = {**index, "manifests": [*index["manifests"], {"mediaType": OCI_MANIFEST, "digest": second, "size": 1}]}  # type: ignore[misc]
    lost, still = (census.catalog.put_document(json.dumps(one).encode()) for one in (index, both))
    (tmp_path / "trees").mkdir()
    for name in ("kept", "gone"):
        (tmp_path / "trees" / name).touch()
    done = Clearing(census).remove(["h.example/first:1"])
    assert (done.layers, done.kept, done.trees) == ([own], {shared: "another image has it too"}, 1)
    assert done.documents == 3  # manifest, config, and the index of nothing else
    left = census.catalog.documents()
    assert first not in left and lost not in left and {second, still} <= set(left)
    assert [path.name for path in (tmp_path / "trees").iterdir()] == ["kept"]
    assert census.store.digests() == sorted([shared, kept])


def test_used_layers_are_emptied_only_with_force(census: Census) -> None:
    digest = fill(census, 1)
    remember(census, "image", [digest])
    assert isinstance(census.uses, Uses)
    census.uses.used = frozenset({digest})
    assert Clearing(census).prune(Goal(everything=True)).layers == []
    assert Clearing(census).remove(["h.example/image:1"]).kept == {digest: "it is in use"}
    remember(census, "image", [digest])
    done = Clearing(census).remove(["h.example/image:1"], force=True)
    assert (done.dropped, done.layers) == ([digest], []) and done.freed >= 50_000


def test_held_layers_are_not_evicted(census: Census) -> None:
    digest = fill(census, 1)
    census.store.budget.bound = 1000
    with census.store.hold([digest]), census.store.hold([digest]):
        assert census.store.evictor.run() == 0
    assert census.store.held() == frozenset()
    census.store.budget.set_used(60_000, census.store.budget.written)
    assert census.store.evictor.run() > 40_000


def test_damaged_documents_are_found(census: Census, tmp_path: Path) -> None:
    import sqlite3

    manifest = remember(census, "image", [])
    writer = sqlite3.connect(tmp_path / "catalog.db")
    writer.execute("UPDATE documents SET body = ? WHERE digest = ?", (b"else", manifest))
    writer.commit()
    writer.close()
    done = Checked()
    recheck_documents(census, done)
    assert done.documents == [manifest] and not done.clean
    (image,) = census.images()
    assert (image.known, image.complete, image.layers) == (False, False, ())


def test_lists_come_in_pages_that_fit_a_message(census: Census) -> None:
    for number in range(260):
        layers = [digests.of(bytes([number % 256, number // 256, one])) for one in range(40)]
        remember(census, f"image{number}", layers)
    stock, seen, pages = Stock(census), [], 0
    more = True
    while more:
        answer = stock.images(seen[-1] if seen else "")
        assert len(json.dumps(answer)) < 2 * MAX_PAGE
        seen += [image["digest"] for image in answer["images"]]
        more, pages = answer["more"], pages + 1
    assert seen == sorted(set(seen)) and len(seen) == 260 and pages > 1


def test_pins_of_what_is_not_here_are_listed(census: Census) -> None:
    digest = "sha256:" + "9" * 64
    census.catalog.pin(Pin("docker://h.example/r:1", PLATFORM, digest), [digest])
    (image,) = census.images()
    assert (image.pinned, image.complete, image.references) == (True, False, ("docker://h.example/r:1",))
    assert Clearing(census).prune(Goal(everything=True)).images == []
    assert Clearing(census).unpin([digest]) == [digest]
    with pytest.raises(ManifestMissing):
        Clearing(census).unpin([digest])
