"""A standby has another daemon's layers open: it sees what that one does, changes nothing, is in nobody's way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lazyfs.chunks.catalog import Catalog
from lazyfs.chunks.source import LayerSource
from lazyfs.chunks.store import Store
from lazyfs.errors import StoreBroken
from lazyfs.oci import OCI_LAYER_ZSTD, Descriptor
from lazyfs.units import MiB
from tests.helpers.chunk_tables import ChunkTable, table_of


def table() -> ChunkTable:
    return table_of([100, 50], [4096], [MiB, 7])


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """The store of the daemon that serves, and that of one that follows it."""
    with ExitStack() as stack:
        stores = []
        for _ in range(2):
            catalog = Catalog(tmp_path / "catalog.db")
            stack.callback(catalog.close)
            stores.append(Store(tmp_path, 64 * MiB, catalog))
            stack.callback(stores[-1].close)
        serving, standby = stores
        serving.lock(exclusive=True)
        standby.follow()
        yield serving, standby


def files_of(root: Path, one: ChunkTable) -> dict[str, bytes]:
    directory = root / "layers" / "sha256" / one.digest[7:]
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_it_sees_what_is_written_and_evicted_meanwhile(both: tuple[Store, Store]) -> None:
    (serving, standby), one = both, table()
    theirs = serving.open_layer(one.digest, one)
    ours = standby.open_layer(one.digest, one)
    assert ours.missing(0, 5) == [0, 1, 2, 3, 4]
    assert theirs.write_run(0, one.content) == 5
    assert ours.complete and ours.read(3) == one.content[3]
    theirs.forget()
    assert ours.read(3) is None
    assert ours.missing(0, 5) == [0, 1, 2, 3, 4]
    assert ours.damaged == 0


def test_it_takes_over_what_is_there_at_the_end(both: tuple[Store, Store], tmp_path: Path) -> None:
    (serving, standby), one = both, table()
    theirs = serving.open_layer(one.digest, one)
    theirs.write(0, one.content[0])
    ours = standby.open_layer(one.digest, one)
    # Fetched whole meanwhile: another file is in the place of the one that we have open.
    whole = bytearray(one.data_size)
    for chunk, data in enumerate(one.content):
        whole[one.chunk_data_offset[chunk] : one.chunk_data_offset[chunk] + len(data)] = data
    (tmp_path / "layers" / "sha256" / one.digest[7:] / "again").write_bytes(whole)
    theirs.adopt("again")
    serving.close()
    standby.take()
    standby.lock(exclusive=True)
    assert [ours.read(chunk) for chunk in range(5)] == one.content
    assert ours.damaged == 0
    assert not standby.remove_layer(one.digest)  # it is ours now
    assert ours.forget() > 0 and ours.write_run(0, one.content) == 5 and ours.read(2) == one.content[2]


def test_it_is_in_nobodys_way(both: tuple[Store, Store], tmp_path: Path) -> None:
    (serving, standby), one = both, table()
    theirs = serving.open_layer(one.digest, one)
    theirs.write_run(0, one.content)
    before = files_of(tmp_path, one)
    ours = standby.open_layer(one.digest, one)
    assert files_of(tmp_path, one) == before
    theirs.close()
    assert serving.remove_layer(one.digest)
    assert not (tmp_path / "layers" / "sha256" / one.digest[7:]).exists()
    ours.close()


@pytest.mark.parametrize("how", ["nothing is there", "another shape"])
def test_it_makes_nothing(both: tuple[Store, Store], tmp_path: Path, how: str) -> None:
    (serving, standby), one = both, table()
    if how == "another shape":
        other = table_of([100, 50, 20], [4096])
        theirs = serving.open_layer(one.digest, other)
        theirs.write_run(0, other.content)
        before = files_of(tmp_path, one)
    with pytest.raises(StoreBroken, match="not what another daemon serves"):
        standby.open_layer(one.digest, one)
    if how == "another shape":
        assert files_of(tmp_path, one) == before
        assert [theirs.read(chunk) for chunk in range(4)] == other.content
    else:
        assert files_of(tmp_path, one) == {}


def test_a_layer_that_vanished_begins_anew_at_the_end(both: tuple[Store, Store]) -> None:
    (serving, standby), one = both, table()
    theirs = serving.open_layer(one.digest, one)
    theirs.write_run(0, one.content)
    ours = standby.open_layer(one.digest, one)
    for name in ("data", "chunks", "used"):
        os.unlink(serving.path(one.digest) / name)
    serving.close()
    standby.take()
    assert ours.missing(0, 5) == [0, 1, 2, 3, 4]
    assert ours.write_run(0, one.content) == 5 and ours.read(4) == one.content[4]


def test_a_stamp_tells_of_another_table_and_another_verdict(both: tuple[Store, Store]) -> None:
    (serving, standby), one = both, table()
    assert standby.stamp(one.digest) is None
    descriptor = Descriptor(OCI_LAYER_ZSTD, one.digest, 10)
    source = LayerSource(descriptor, "zstd:chunked", "here/image", "sha256:" + "1" * 64)
    serving.set_source(one.digest, source)
    assert standby.stamp(one.digest) is None  # no table yet
    (serving.path(one.digest) / "table").write_bytes(b"one")
    first = standby.stamp(one.digest)
    assert first is not None and first == standby.stamp(one.digest)
    serving.set_source(one.digest, source)
    second = standby.stamp(one.digest)
    assert second != first
    os.replace(_written(serving.path(one.digest) / "new"), serving.path(one.digest) / "table")
    assert standby.stamp(one.digest) not in (first, second)


def _written(path: Path) -> Path:
    path.write_bytes(b"two")
    return path
