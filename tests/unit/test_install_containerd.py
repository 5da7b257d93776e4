"""containerd's configuration gets the snapshotter, in the file where containerd will see it, and keeps all else.

Wherever a configuration can be read by this machine's containerd, its own `config dump` says what became of it.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lazyfs.deploy import containerd_config
from lazyfs.deploy.containerd_config import Change, Wanted
from lazyfs.deploy.node import Node
from lazyfs.errors import UsageError

WANTED = Wanted("lazyfs", Path("/run/lazyfs/snapshotter/snapshotter.sock"), Path("/var/lib/lazyfs"))
CRI = '[plugins."io.containerd.grpc.v1.cri"]\n  sandbox_image = "x/pause:1"\n'
CRI_RUNTIME = '[plugins."io.containerd.grpc.v1.cri".containerd]\n  default_runtime_name = "crun"\n'
IMPORTS = 'imports = ["@/conf.d/*.toml"]\n'
NODE = Node()

# name → (containerd's files, @ for their directory; the files that are to change)
VERSION_2: dict[str, tuple[dict[str, str], set[str]]] = {
    "no file": ({}, {"config.toml"}),
    "empty": ({"config.toml": ""}, {"config.toml"}),
    "a root alone": ({"config.toml": 'root = "/x"  # disk\n'}, {"config.toml"}),
    "version alone": ({"config.toml": "version = 2\n"}, {"config.toml"}),
    "CRI": ({"config.toml": "version = 2\n" + CRI + CRI_RUNTIME}, {"config.toml"}),
    "imports nothing yet": ({"config.toml": "version = 2\n" + IMPORTS}, {"conf.d/lazyfs.toml"}),
    "imports, CRI in the main file": (
        {"config.toml": "version = 2\n" + IMPORTS + CRI + CRI_RUNTIME},
        {"config.toml", "conf.d/lazyfs.toml"},
    ),
    "imports, CRI in two files": (
        {"config.toml": "version = 2\n" + IMPORTS + CRI, "conf.d/a.toml": "version = 2\n" + CRI + CRI_RUNTIME},
        {"conf.d/a.toml", "conf.d/lazyfs.toml"},
    ),
    "imports, CRI in a later file": (
        {"config.toml": "version = 2\n" + IMPORTS, "conf.d/z.toml": "version = 2\n" + CRI},
        {"conf.d/z.toml", "conf.d/lazyfs.toml"},
    ),
    "imports of single files": (
        {"config.toml": 'version = 2\nimports = ["other.toml"]\n', "other.toml": "version = 2\n" + CRI},
        {"config.toml", "other.toml"},
    ),
    "another snapshotter": (
        {
            "config.toml": "version = 2\n" + CRI + CRI_RUNTIME + '  snapshotter = "stargz"\n'
            '  disable_snapshot_annotations = true\n[proxy_plugins.stargz]\n  type="snapshot"\n  address="/s"\n'
        },
        {"config.toml"},
    ),
    "ours, elsewhere": (
        {
            "config.toml": "version = 2\n" + IMPORTS,
            "conf.d/a.toml": 'version = 2\n[proxy_plugins.lazyfs]\ntype = "snapshot"\naddress = "/old"\n',
        },
        {"conf.d/a.toml", "conf.d/lazyfs.toml"},
    ),
}


def lay(directory: Path, files: Mapping[str, str]) -> Path:
    """Write files and return the path of the main one."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("@", str(directory)), "utf-8")
    return directory / "config.toml"


def apply(changes: list[Change]) -> None:
    for change in changes:
        NODE.write(change.path, change.text.encode())


def dump(main: Path) -> dict[str, Any]:
    """Return what this machine's containerd (of version 1) reads."""
    containerd = shutil.which("containerd")
    assert containerd is not None
    done = subprocess.run([containerd, "-c", str(main), "config", "dump"], capture_output=True, check=True)
    return tomllib.loads(done.stdout.decode())


@pytest.mark.parametrize(("files", "changed"), VERSION_2.values(), ids=VERSION_2)
def test_version_2(files: dict[str, str], changed: set[str], tmp_path: Path) -> None:
    main = lay(tmp_path, files)
    before = dump(main) if files else None
    changes = containerd_config.plan(NODE, main, WANTED, 1)
    assert {str(one.path.relative_to(tmp_path)) for one in changes} == changed
    apply(changes)
    after = dump(main)
    assert after["proxy_plugins"].pop("lazyfs") == {"type": "snapshot", "address": str(WANTED.address)}
    cri = after["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
    assert cri.pop("snapshotter") == "lazyfs"
    assert cri.pop("disable_snapshot_annotations") is False
    if before is not None:  # all else is as it was
        before["proxy_plugins"].pop("lazyfs", None)
        for name in ("snapshotter", "disable_snapshot_annotations"):
            before["plugins"]["io.containerd.grpc.v1.cri"]["containerd"].pop(name)
        for found in (before, after):
            found.pop("imports")
        assert after == before
    assert containerd_config.plan(NODE, main, WANTED, 1) == []
    assert containerd_config.in_force(containerd_config.read_files(NODE, main)) == ("lazyfs", True)


def test_the_default_stays(tmp_path: Path) -> None:
    main = lay(tmp_path, {"config.toml": "version = 2\n" + CRI})
    wanted = Wanted("lazy2", Path("/s.sock"), Path("/r"), default=False, remap_ids=True)
    (change,) = containerd_config.plan(NODE, main, wanted)
    added = tomllib.loads(change.text)
    assert added["proxy_plugins"]["lazy2"] == {
        "type": "snapshot", "address": "/s.sock", "capabilities": ["remap-ids"], "exports": {"root": "/r"},
    }  # fmt: skip
    assert "containerd" not in added["plugins"]["io.containerd.grpc.v1.cri"]


IMAGES = '[plugins."io.containerd.cri.v1.images"]\n  snapshotter = "overlayfs"\n  max_concurrent_downloads = 7\n'
VERSION_3: dict[str, tuple[dict[str, str], set[str]]] = {
    "no file": ({}, {"config.toml"}),
    "main": ({"config.toml": "version = 3\n" + IMAGES}, {"config.toml"}),
    "drop-in": ({"config.toml": "version = 3\n" + IMPORTS + IMAGES}, {"conf.d/lazyfs.toml"}),
    "an earlier neighbour": (
        {"config.toml": "version = 3\n" + IMPORTS, "conf.d/a.toml": "version = 3\n" + IMAGES},
        {"conf.d/lazyfs.toml"},
    ),
    "a later neighbour that would win": (
        {"config.toml": "version = 3\n" + IMPORTS, "conf.d/z.toml": "version = 3\n" + IMAGES},
        {"conf.d/lazyfs.toml", "conf.d/z.toml"},
    ),
}


@pytest.mark.parametrize(("files", "changed"), VERSION_3.values(), ids=VERSION_3)
def test_version_3(files: dict[str, str], changed: set[str], tmp_path: Path) -> None:
    main = lay(tmp_path, files)
    changes = containerd_config.plan(NODE, main, WANTED, 2)
    assert {str(one.path.relative_to(tmp_path)) for one in changes} == changed
    apply(changes)
    read = containerd_config.read_files(NODE, main)
    assert all(file.data["version"] == 3 for file in read)
    assert containerd_config.in_force(read, 2) == ("lazyfs", True)
    assert containerd_config.plan(NODE, main, WANTED, 2) == []


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"config.toml": "[plugins.cri]\nsandbox_image = 'x'\n"}, "version 1"),
        ({"config.toml": "version = 1\n"}, "version 1"),
        ({"config.toml": "version = 9\n"}, "version 9"),
        ({"config.toml": "version = 'x'\n"}, "version can't be"),
        ({"config.toml": "version = 2\nimports = 3\n"}, "imports is no list"),
        ({"config.toml": "version = 2\n{{ template }}\n"}, "no TOML"),
        ({"config.toml": "version = 2\n" + IMPORTS, "conf.d/a.toml": "version = 3\n" + IMAGES + CRI}, "of version 3"),
        ({"config.toml": "version = 2\nproxy_plugins = {}\n"}, "write this by hand"),
    ],
)
def test_what_can_not_be_edited_is_told(files: dict[str, str], why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as told:
        containerd_config.plan(NODE, lay(tmp_path, files), WANTED)
    assert why in f"{told.value.message} {told.value.hint}"


def test_imports_in_a_circle_end(tmp_path: Path) -> None:
    main = lay(tmp_path, {"config.toml": 'version = 2\nimports = ["config.toml", "@/*.toml", "none.toml"]\n'})
    assert len(containerd_config.read_files(NODE, main)) == 2


def test_a_symlink_out_of_the_node_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.toml"
    outside.write_text("version = 2\n")
    root = tmp_path / "node"
    (root / "etc/containerd").mkdir(parents=True)
    (root / "etc/containerd/config.toml").symlink_to(outside)
    with pytest.raises(UsageError, match="leads out of"):
        containerd_config.plan(Node(root), containerd_config.DEFAULT, WANTED)


def test_what_to_write_by_hand_is_in_the_source_tree_too() -> None:
    for version in (2, 3):
        example = (Path(__file__).parents[2] / "deploy" / f"containerd-v{version}.toml").read_text("utf-8")
        assert example.endswith(containerd_config.by_hand(WANTED, version))
        assert tomllib.loads(example)["proxy_plugins"]["lazyfs"]["type"] == "snapshot"
