"""The catalog: numbers for ever, what a restart needs, and a damaged or foreign file that stops nobody."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs import digest as digests
from lazyfs.chunks.catalog import MAX_NUMBER, Catalog, MountRecord, Pin
from lazyfs.errors import DocumentInvalid, StoreBroken, StoreFull
from lazyfs.limits import MAX_DOCUMENT
from tests.helpers.chunk_tables import table_of

LAYER = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(path: Path, clock: Clock) -> Iterator[Catalog]:
    opened = Catalog(path, documents_bound=10_000, now=clock)
    yield opened
    opened.close()


def test_numbers_begin_at_one_stay_and_lead_back(catalog: Catalog, path: Path) -> None:
    assert [catalog.number(key) for key in ("layer:a", "tree:x", "layer:a", "layer:b")] == [1, 2, 1, 3]
    assert catalog.key_of(2) == "tree:x"
    assert catalog.key_of(9) is None
    catalog.close()
    again = Catalog(path)
    assert (again.number("layer:b"), again.number("layer:c")) == (3, 4)
    again.close()


def test_numbers_are_unique_across_threads_and_connections(catalog: Catalog, path: Path) -> None:
    second = Catalog(path)
    got: list[tuple[str, int]] = []

    def work(which: Catalog, name: str) -> None:
        for index in range(15):
            for key in (f"common:{index}", f"{name}:{index}"):
                got.append((key, which.number(key)))

    threads = [
        threading.Thread(target=work, args=(which, name))
        for which, name in ((catalog, "a"), (catalog, "b"), (second, "c"), (second, "d"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    second.close()
    assert len(got) == 120
    assert len(set(got)) == 75
    assert len({number for _, number in got}) == 75


def test_number_is_committed_before_it_is_returned(catalog: Catalog, path: Path) -> None:
    number = catalog.number("layer:x")
    reader = sqlite3.connect(path)
    assert reader.execute("SELECT key FROM numbers WHERE number = ?", (number,)).fetchall() == [("layer:x",)]
    reader.close()


def test_numbers_run_out_with_a_sentence_and_nothing_is_stored(catalog: Catalog, path: Path) -> None:
    writer = sqlite3.connect(path)
    writer.execute("INSERT INTO numbers VALUES (?, 'layer:last')", (MAX_NUMBER,))
    writer.commit()
    writer.close()
    with pytest.raises(StoreFull, match="given out all its layer numbers"):
        catalog.number("layer:next")
    assert catalog.number("layer:last") == MAX_NUMBER
    assert catalog.key_of(MAX_NUMBER + 1) is None


def test_file_is_private(catalog: Catalog, path: Path) -> None:
    catalog.number("x")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_layers_keep_pin_verification_and_quarantine(catalog: Catalog, clock: Clock) -> None:
    catalog.add_layer(LAYER, 10, 100)
    catalog.pin(Pin("docker://h/r:1", "linux/amd64", OTHER), [LAYER])
    catalog.set_verified(LAYER)
    catalog.set_quarantine(OTHER, "its TOC lies")
    clock.now += 5
    catalog.add_layer(LAYER, 11, 101)
    found = catalog.layer(LAYER)
    assert found is not None
    assert (found.blob_size, found.data_size, found.pinned, found.verified) == (11, 101, True, True)
    assert found.last_use == 1_700_000_005
    assert [record.digest for record in catalog.layers()] == [LAYER, OTHER]
    assert catalog.pinned() == frozenset({LAYER})
    for digest in (LAYER, OTHER):
        catalog.remove_layer(digest)
    other = catalog.layer(OTHER)
    assert other is not None and other.quarantine == "its TOC lies"
    assert catalog.unpin(OTHER)
    catalog.remove_layer(LAYER)
    assert catalog.layer(LAYER) is None


def test_places_are_found_by_digest_until_the_layer_goes(catalog: Catalog) -> None:
    table = table_of([10, 20], [30])
    number = catalog.number(f"layer:{LAYER}")
    other = catalog.number(f"layer:{OTHER}")
    catalog.index_layer(number, table)
    catalog.index_layer(number, table)
    catalog.index_layer(other, table)
    assert catalog.places(table.chunk_digest(2)) == [(other, 2), (number, 2)]
    assert catalog.places(table.chunk_digest(2), limit=1) == [(other, 2)]
    assert catalog.places(bytes(32)) == []
    catalog.remove_layer(OTHER)
    assert catalog.places(table.chunk_digest(2)) == [(number, 2)]
    assert catalog.number(f"layer:{OTHER}") == other
    catalog.index_layer(other, table)
    assert len(catalog.places(table.chunk_digest(0))) == 2


def test_documents_are_verified_bounded_and_least_recently_used_go(catalog: Catalog, path: Path, clock: Clock) -> None:
    kept = []
    for index in range(4):
        clock.now += 1
        kept.append(catalog.put_document(bytes([index]) * 3000))
    assert catalog.document(kept[0]) is None
    clock.now += 1
    assert catalog.document(kept[1]) == bytes([1]) * 3000
    clock.now += 1
    kept.append(catalog.put_document(b"x" * 3000))
    assert [catalog.document(digest) is not None for digest in kept] == [False, True, False, True, True]
    writer = sqlite3.connect(path)
    writer.execute("UPDATE documents SET body = ? WHERE digest = ?", (b"other", kept[3]))
    writer.commit()
    writer.close()
    assert catalog.document(kept[3]) is None
    assert catalog.put_document(bytes([3]) * 3000) == kept[3]
    assert catalog.document(kept[3]) == bytes([3]) * 3000


def test_document_too_large_is_refused(catalog: Catalog) -> None:
    with pytest.raises(DocumentInvalid):
        catalog.put_document(bytes(MAX_DOCUMENT + 1))
    assert catalog.document(digests.of(b"never seen")) is None


def test_references_are_kept_by_platform(catalog: Catalog, clock: Clock) -> None:
    catalog.remember_reference("docker://h/r:1", "linux/amd64", LAYER)
    catalog.remember_reference("docker://h/r:1", "linux/arm64", OTHER)
    clock.now += 9
    catalog.remember_reference("docker://h/r:1", "linux/amd64", OTHER)
    found = catalog.last_digest("docker://h/r:1", "linux/amd64")
    assert found is not None and (found.digest, found.time) == (OTHER, 1_700_000_009)
    assert catalog.last_digest("docker://h/r:2", "linux/amd64") is None


def test_mounts_survive_a_restart_with_any_path(catalog: Catalog, path: Path) -> None:
    strange = os.fsdecode(b"/mnt/\xff caf\xc3\xa9")
    mount = MountRecord("m1", "docker://h/r:1", LAYER, strange, "rw", "/state/m1", 42, "key")
    catalog.set_mount(mount)
    catalog.close()
    again = Catalog(path)
    assert again.mounts() == [mount]
    again.remove_mount("m1")
    assert again.mounts() == []
    again.close()


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_damaged_file_is_moved_aside_with_a_warning(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        catalog = Catalog(path)
    assert catalog.number("layer:x") == 1
    catalog.close()
    assert "pins are lost" in caplog.text
    aside = [file for file in path.parent.iterdir() if ".damaged-" in file.name]
    assert [file.read_bytes() for file in aside] == [content]


def test_damage_found_at_work_is_an_error_now_and_a_new_beginning_at_the_next_start(path: Path) -> None:
    catalog = Catalog(path)
    catalog.index_layer(1, table_of([10] * 4000))
    catalog.close()
    size = path.stat().st_size
    with path.open("r+b") as handle:
        handle.seek(4096 * 12)
        handle.write(b"\xee" * (size - 4096 * 12))
    catalog = Catalog(path)
    with pytest.raises(StoreBroken, match="is damaged"):
        for chunk in range(4000):
            catalog.places(bytes([chunk % 256]) * 32)
    catalog.close()
    again = Catalog(path)
    assert again.places(bytes(32)) == []
    assert again.number("layer:x") == 1
    again.close()


def test_newer_version_is_refused_and_left_alone(path: Path) -> None:
    Catalog(path).close()
    writer = sqlite3.connect(path)
    writer.execute("UPDATE schema SET version = 4")
    writer.commit()
    writer.close()
    with pytest.raises(StoreBroken, match="newer lazyfs"):
        Catalog(path)
    assert [file.name for file in path.parent.iterdir() if "damaged" in file.name] == []


def test_link_in_its_place_is_refused_and_its_target_untouched(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    path.symlink_to(target)
    with pytest.raises(StoreBroken):
        Catalog(path)
    assert target.read_bytes() == b"precious"


def test_closed_catalog_says_so(path: Path) -> None:
    catalog = Catalog(path)
    catalog.close()
    catalog.close()
    with pytest.raises(StoreBroken, match="closed"):
        catalog.number("x")
