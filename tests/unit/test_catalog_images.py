"""The catalog's images: what references led to, pins that persist, and files that an older version wrote."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs import digest as digests
from lazyfs.chunks.catalog import Catalog, MountRecord, Pin

LAYER = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
IMAGE = "sha256:" + "c" * 64
NEXT = "sha256:" + "d" * 64
PLATFORM = "linux/amd64"

# What version 1 wrote, to the letter: files like this lie on nodes.
_FIRST = """
CREATE TABLE schema (version INTEGER NOT NULL);
CREATE TABLE numbers (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
CREATE TABLE layers (
    digest TEXT PRIMARY KEY, blob_size INTEGER NOT NULL, data_size INTEGER NOT NULL, last_use INTEGER NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0, verified INTEGER NOT NULL DEFAULT 0, quarantine TEXT NOT NULL DEFAULT '');
CREATE TABLE chunk_places (
    digest BLOB NOT NULL, number INTEGER NOT NULL, chunk INTEGER NOT NULL,
    PRIMARY KEY (digest, number, chunk)) WITHOUT ROWID;
CREATE TABLE indexed (number INTEGER PRIMARY KEY);
CREATE TABLE documents (
    digest TEXT PRIMARY KEY, body BLOB NOT NULL, size INTEGER NOT NULL, last_use INTEGER NOT NULL);
CREATE TABLE resolved (
    reference TEXT NOT NULL, platform TEXT NOT NULL, digest TEXT NOT NULL, time INTEGER NOT NULL,
    PRIMARY KEY (reference, platform));
CREATE TABLE mounts (
    id TEXT PRIMARY KEY, image TEXT NOT NULL, manifest_digest TEXT NOT NULL, dir BLOB NOT NULL, kind TEXT NOT NULL,
    state_dir BLOB NOT NULL, pid INTEGER NOT NULL, tree_key TEXT NOT NULL);
INSERT INTO schema VALUES (1);
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(tmp_path: Path, clock: Clock) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db", documents_bound=10_000, now=clock)
    yield opened
    opened.close()


def test_a_file_of_version_1_keeps_everything_and_its_pins(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    writer = sqlite3.connect(path)
    writer.executescript(_FIRST)
    body = b'{"a": 1}'
    writer.execute("INSERT INTO numbers VALUES (1, ?)", (f"layer:{LAYER}",))
    writer.execute("INSERT INTO layers VALUES (?, 10, 100, 5, 1, 1, '')", (LAYER,))
    writer.execute("INSERT INTO layers VALUES (?, 20, 200, 6, 0, 0, 'its TOC lies')", (OTHER,))
    writer.execute("INSERT INTO documents VALUES (?, ?, ?, 7)", (digests.of(body), body, len(body)))
    writer.execute("INSERT INTO resolved VALUES ('docker://h/r:1', ?, ?, 8)", (PLATFORM, IMAGE))
    writer.execute("INSERT INTO mounts VALUES ('m', 'i', ?, X'2f', 'ro', X'', 9, 'k')", (IMAGE,))
    writer.execute("INSERT INTO chunk_places VALUES (X'00112233445566778899aabbccddeeff', 1, 3)")
    writer.commit()
    writer.close()
    for _ in range(2):  # the second time there is nothing left to do
        catalog = Catalog(path)
        layers = {record.digest: record for record in catalog.layers()}
        assert (layers[LAYER].pinned, layers[LAYER].verified, layers[LAYER].last_use) == (True, True, 5)
        assert (layers[OTHER].pinned, layers[OTHER].quarantine) == (False, "its TOC lies")
        assert catalog.pinned() == {LAYER}
        assert catalog.number(f"layer:{LAYER}") == 1
        assert catalog.document(digests.of(body)) == body
        (named,) = catalog.named_images()
        assert (named.reference, named.digest, named.time, named.last_use) == ("docker://h/r:1", IMAGE, 8, 8)
        assert catalog.mounts() == [MountRecord("m", "i", IMAGE, "/", "ro", "", 9, "k")]
        assert catalog.places(bytes.fromhex("00112233445566778899aabbccddeeff") + bytes(16)) == [(1, 3)]
        catalog.close()
    catalog = Catalog(path)
    assert catalog.unpin(LAYER) and catalog.pinned() == frozenset()
    catalog.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    writer = sqlite3.connect(path)
    writer.executescript(_FIRST + "CREATE TABLE pins (something INTEGER);")  # in the way of the one to come
    writer.execute("INSERT INTO layers VALUES (?, 10, 100, 5, 1, 1, '')", (LAYER,))
    writer.commit()
    writer.close()
    Catalog(path).close()  # begins anew: such a file is no catalog of ours
    (aside,) = [file for file in tmp_path.iterdir() if ".damaged-" in file.name and file.suffix != ".db-wal"][:1]
    reader = sqlite3.connect(aside)
    assert reader.execute("SELECT version FROM schema").fetchall() == [(1,)]
    assert reader.execute("SELECT digest, pinned FROM layers").fetchall() == [(LAYER, 1)]
    reader.close()


def test_pins_survive_a_restart_and_go_with_unpin(catalog: Catalog, tmp_path: Path) -> None:
    catalog.pin(Pin("docker://h/r:1", PLATFORM, IMAGE), [IMAGE, LAYER])
    catalog.close()
    again = Catalog(tmp_path / "catalog.db")
    assert again.pins() == [Pin("docker://h/r:1", PLATFORM, IMAGE)]
    assert again.pinned() == {IMAGE, LAYER}
    assert again.unpin(IMAGE)
    assert not again.unpin(IMAGE)
    assert (again.pins(), again.pinned()) == ([], frozenset())
    again.close()


def test_a_reference_pins_what_it_is_now(catalog: Catalog) -> None:
    catalog.pin(Pin("docker://h/r:1", PLATFORM, IMAGE), [IMAGE, LAYER])
    catalog.pin(Pin("docker://h/r:1", "linux/arm64", NEXT), [NEXT, OTHER])
    catalog.pin(Pin("docker://h/r:1", PLATFORM, NEXT), [NEXT, OTHER])
    assert catalog.pinned() == {NEXT, OTHER}
    catalog.pin(Pin("docker://h/r:2", PLATFORM, IMAGE), [IMAGE, LAYER])
    catalog.pin(Pin("docker://h/r:1", PLATFORM, IMAGE), [IMAGE, LAYER])
    assert catalog.pinned() == {IMAGE, LAYER, NEXT, OTHER}  # arm64 keeps the other


def test_documents_of_pinned_images_stay_whatever_comes(catalog: Catalog, clock: Clock) -> None:
    raw = b"manifest" * 100
    digest = catalog.put_document(raw)
    catalog.pin(Pin("docker://h/r:1", PLATFORM, digest), [digest])
    for index in range(20):
        clock.now += 1
        catalog.put_document(bytes([index]) * 3000)
    assert catalog.document(digest) == raw
    assert len(catalog.documents()) <= 4
    catalog.remove_documents([digest])
    assert catalog.document(digest) is None


def test_looking_at_a_document_is_no_use_of_it(catalog: Catalog, clock: Clock) -> None:
    digest = catalog.put_document(b"document")
    clock.now += 9
    assert catalog.document(digest, note=False) == b"document"
    assert catalog.documents() == {digest: 1_700_000_000}
    assert catalog.document(digest) == b"document"
    assert catalog.documents() == {digest: 1_700_000_009}


def test_names_tell_when_they_were_used_and_are_forgotten_with_their_image(catalog: Catalog, clock: Clock) -> None:
    for name in ("docker://h/r:1", "docker://h/r:2"):
        catalog.remember_reference(name, PLATFORM, IMAGE)
    catalog.remember_reference("docker://h/r:3", PLATFORM, NEXT)
    clock.now += 5
    catalog.note_use("docker://h/r:2", PLATFORM)
    found = catalog.named_images()
    assert [(each.reference, each.last_use - each.time) for each in found] == [
        ("docker://h/r:2", 5), ("docker://h/r:1", 0), ("docker://h/r:3", 0),
    ]  # fmt: skip
    catalog.pin(Pin("docker://h/r:1", PLATFORM, IMAGE), [IMAGE])
    catalog.forget_image(IMAGE)
    assert [each.reference for each in catalog.named_images()] == ["docker://h/r:3"]
    assert catalog.pinned() == frozenset()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 4), st.frozensets(st.integers(0, 5), max_size=4)),
        max_size=15,
    )
)
def test_pins_are_what_a_model_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, int, frozenset[int]]]
) -> None:
    catalog = Catalog(tmp_path_factory.mktemp("catalog") / "catalog.db")
    model: dict[int, int] = {}  # reference → image
    contents: dict[int, frozenset[int]] = {}
    for pins, reference, image, layers in steps:
        if pins:
            layers = contents.setdefault(image, layers) if image in model.values() else layers
            contents[image] = layers
            model[reference] = image
            catalog.pin(Pin(f"r{reference}", PLATFORM, f"i{image}"), [f"l{layer}" for layer in layers])
        else:
            assert catalog.unpin(f"i{image}") == (image in model.values())
            model = {name: kept for name, kept in model.items() if kept != image}
        assert {(int(p.reference[1:]), int(p.image[1:])) for p in catalog.pins()} == set(model.items())
        assert catalog.pinned() == {f"l{layer}" for image in model.values() for layer in contents[image]}
    catalog.close()
