"""Files of trees and of their images: made again whenever they are gone, and bounded in number and size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazyfs.child import Builder
from lazyfs.errors import StoreFull
from lazyfs.format import erofs_write
from lazyfs.format.entry import Kind
from lazyfs.mount import planting
from lazyfs.mount.forest import Planted
from lazyfs.mount.planting import IMAGE, Planting
from tests.helpers.entries import entry
from tests.helpers.layer_tables import tree_at

KEY = "a" * 64


@pytest.fixture
def builder() -> Iterator[Builder]:
    made = Builder()
    yield made
    made.close()


def planting_at(directory: Path, builder: Any) -> Planting:
    preparer = SimpleNamespace(builder=builder, tree_number=lambda key: 9)
    nothing: Any = None
    return Planting(directory, nothing, nothing, nothing, preparer, nothing)  # type: ignore[arg-type]


@pytest.fixture
def layers(tmp_path: Path) -> list[Any]:
    """The layers of a tree, as `Planting` sees them."""
    tree, tables = tree_at(tmp_path, [[entry(b"d", Kind.DIR), entry(b"d/a")], [entry(b"b")]])
    tree.close()
    return [SimpleNamespace(table=table, number=number) for number, table in enumerate(tables, 1)]


@pytest.mark.parametrize("lost", ["absent", "damaged"])
def test_an_image_is_made_of_a_tree_whose_file_is_lost(
    tmp_path: Path, builder: Builder, layers: list[Any], lost: str
) -> None:
    """Many other trees came since: its file made room, while it was served."""
    directory = tmp_path / "trees"
    one = planting_at(directory, builder)
    prepared: Any = [SimpleNamespace(layer=layer) for layer in layers]
    tree, number = one._open_tree(KEY, prepared)
    planted = Planted(number, KEY.encode(), tree, tuple(layers))
    if lost == "absent":
        (directory / KEY).unlink()
    else:
        (directory / KEY).write_bytes(b"no tree")
    path, devices = one.ensure_image(planted)
    erofs_write.check(path, KEY)
    assert (path, devices) == (directory / f"{KEY}{IMAGE}", [])
    tree.close()


def test_a_tree_is_shown_without_the_image_that_finds_no_room(tmp_path: Path, layers: list[Any]) -> None:
    class Full(Builder):
        def run(self, job: dict[str, Any], *, timeout: float = 60) -> None:
            if "erofs" in job:
                raise StoreFull("no room for it")
            super().run(job, timeout=timeout)

    builder = Full()
    one = planting_at(tmp_path / "trees", builder)
    one.with_images = lambda: True
    prepared: Any = [SimpleNamespace(layer=layer) for layer in layers]
    tree, _ = one._open_tree(KEY, prepared)
    assert tree.find(b"d/a") is not None
    tree.close()
    builder.close()


def test_the_newest_files_stay_within_both_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "trees"
    directory.mkdir()
    for age in range(6):
        path = directory / f"{age}"
        path.write_bytes(bytes(100))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    monkeypatch.setattr(planting, "MAX_TREES", 5)
    planting._make_room(directory)
    assert sorted(os.listdir(directory)) == ["0", "1", "2", "3", "4"]
    monkeypatch.setattr(planting, "MAX_TREE_BYTES", 350)
    planting._make_room(directory)
    assert sorted(os.listdir(directory)) == ["0", "1", "2"]
