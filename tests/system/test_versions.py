"""An upgrade and a step back: what another release wrote is used, without a byte fetched again, or is left as it is."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path

import pytest

from lazyfs import tree as trees
from lazyfs.chunks import catalog_schema, layer_files
from lazyfs.chunks import source as sources
from lazyfs.format import erofs_write
from lazyfs.format import table as tables
from snapshotter import schema
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add, both_drivers
from tests.helpers.fake_registry import AddedImage, FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

pytestmark = [pytest.mark.fuse, pytest.mark.system]

FILES = {"a": pattern(300_000), "b": pattern(5000, 2)}
_HEAD = struct.Struct("<8sI")  # magic, version


def known(node: Node, registry: FakeRegistry, driver: str) -> AddedImage:
    """An image that this node has whole. Its daemon has ended."""
    image = add(registry, "one", zstd_chunked_layer(tar_of(*(file(name, data) for name, data in FILES.items()))))
    tree = node.mount(image, "--driver", driver)
    assert {name: node.read(tree / name) for name in FILES} == FILES
    node.umount(tree)
    node.stop()
    return image


def shows(node: Node, image: AddedImage, driver: str) -> None:
    tree = node.mount(image, "--driver", driver)
    assert {name: node.read(tree / name) for name in FILES} == FILES
    node.umount(tree)


def layer_file(node: Node, name: str) -> Path:
    (found,) = (node.root / "layers" / "sha256").glob(f"*/{name}")
    return found


def write_version(path: Path, by: int) -> None:
    raw = bytearray(path.read_bytes())
    magic, version = _HEAD.unpack_from(raw)
    _HEAD.pack_into(raw, 0, magic, version + by)
    path.write_bytes(raw)


def change_state(node: Node, by: int) -> None:
    """Make all that can't be made again look as a release behind this one would leave it, with what that one added."""
    for name in ("chunks", "used"):
        write_version(layer_file(node, name), by)
    source = json.loads(layer_file(node, "source").read_text())
    source |= {"version": source["version"] + by, "added": {"by": ["the", "next", "release"]}}
    layer_file(node, "source").write_text(json.dumps(source))
    with sqlite3.connect(node.root / "catalog.db") as catalog:
        catalog.execute("UPDATE schema SET version = version + ?", (by,))
        for table in ("layers", "documents", "resolved", "mounts", "pins", "pinned", "indexed", "chunk_places"):
            catalog.execute(f"ALTER TABLE {table} ADD COLUMN added TEXT NOT NULL DEFAULT ''")
        catalog.execute("CREATE TABLE added (something TEXT)")
    catalog.close()


@both_drivers
def test_what_the_next_release_wrote_is_used(node: Node, registry: FakeRegistry, driver: str) -> None:
    image = known(node, registry, driver)
    change_state(node, 1)
    registry.clear_log()
    shows(node, image, driver)
    assert registry.bytes_sent("/blobs/") == 0
    other = add(registry, "two", zstd_chunked_layer(tar_of(file("c", pattern(9000, 3)))))
    tree = node.mount(other)  # it goes on writing, too
    assert node.read(tree / "c") == pattern(9000, 3)
    node.umount(tree)
    assert node.lazyfs("cache", "ls").returncode == 0 and node.lazyfs("cache", "prune", "--all").returncode == 0


@both_drivers
@pytest.mark.parametrize("by", [-1, 1])
def test_what_can_be_made_again_is_made_again(node: Node, registry: FakeRegistry, driver: str, by: int) -> None:
    image = known(node, registry, driver)
    write_version(layer_file(node, "table"), by)
    made = list((node.root / "trees").iterdir())
    assert made
    for path in made:
        write_version(path, by)
    registry.clear_log()
    shows(node, image, driver)
    assert registry.bytes_sent("/blobs/") == 0


def test_what_a_later_release_wrote_is_left_as_it_is(node: Node, registry: FakeRegistry) -> None:
    image = known(node, registry, "fuse")
    change_state(node, 2)
    before = layer_file(node, "chunks").read_bytes(), layer_file(node, "source").read_bytes()
    assert "was written by a newer lazyfs" in node.refused(9, "mount", image.reference, node.new_dir())
    assert (layer_file(node, "chunks").read_bytes(), layer_file(node, "source").read_bytes()) == before


@pytest.mark.parametrize(
    "versions",
    [
        {"catalog.db": catalog_schema.SCHEMA_VERSION, "chunks": layer_files.VERSION, "source": sources.VERSION},
        {"table": tables.VERSION, "trees": trees.VERSION, "erofs": erofs_write.VERSION},
        {"snapshots.db": schema.SCHEMA_VERSION},
    ],
    ids=["state", "made", "snapshots"],
)
def test_the_documentation_tells_the_versions(versions: dict[str, int]) -> None:
    """A release that raises one must say so where users look, and what the release before makes of it."""
    text = (Path(__file__).parents[2] / "docs" / "upgrading.md").read_text()
    for name, version in versions.items():
        assert f"| `{name}` | {version} |" in text, name


def test_snapshots_of_the_next_release_are_used(tmp_path: Path) -> None:
    from snapshotter.store import Kind, Store

    path = tmp_path / "snapshots.db"
    one = Store(path)
    one.create("a", "", Kind.ACTIVE, {})
    one.close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION + 1}")
        connection.execute("ALTER TABLE snapshots ADD COLUMN added TEXT NOT NULL DEFAULT ''")
    connection.close()
    again = Store(path)
    assert again.get("a").kind is Kind.ACTIVE
    again.create("b", "", Kind.ACTIVE, {})
    again.close()
