"""containerd's configuration with the snapshotter in it: what has to be set, and in which of its files.

Learned from containerd itself (1.6.20, 1.7.24, 2.1.9, `config dump`):
- Files of version 2: a plugin's table in an imported file takes the place of the whole table before, in 1.6 and 1.7.
  So what CRI is told goes into the file whose table for CRI is in force, and into the drop-in only where there is none.
- Files of version 3 are merged key by key, the later file wins.
- An import of another version than the main file makes containerd 2 forget the main file's settings for CRI.
- containerd 2 takes the snapshotter from a file of version 2 only where that has a table of runtimes, too, but always
  from a table of version 3 in such a file, which 1.x passes by. So both are written: an upgrade changes nothing.
- A file without a version is one of version 1, and 1.x also reads an empty one so.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs.deploy import toml_edit
from lazyfs.deploy.node import Node
from lazyfs.errors import UsageError
from lazyfs.limits import MAX_IMPORTS

DEFAULT = Path("/etc/containerd/config.toml")
_CRI = {2: ("plugins", "io.containerd.grpc.v1.cri"), 3: ("plugins", "io.containerd.cri.v1.images")}
_CRI_KEYS = {2: (*_CRI[2], "containerd"), 3: _CRI[3]}
_OLD = ("plugins", "disabled_plugins", "required_plugins", "proxy_plugins")  # what a version decides the meaning of
_HEAD = "# Written by `lazyfs install`; `lazyfs uninstall` takes it away.\n"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What containerd is to be told. `default`: CRI takes this snapshotter for new containers."""

    name: str
    address: Path
    root: Path  # told as exports.root: CRI measures the file system there
    default: bool = True
    remap_ids: bool = False


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One file as it is. `text` is empty where it does not exist."""

    path: Path
    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """What a file is to become."""

    path: Path
    text: str


def plan(node: Node, main: Path, wanted: Wanted, major: int = 0) -> list[Change]:
    """Return the changes that make containerd know the snapshotter; none where it does. Blocking (reads files).

    `major`: containerd's, 0 for unknown; it matters only where there is no configuration yet. Raise UsageError where a
    file can't be read, is of version 1, or is written in a way that can't be edited.
    """
    files = read_files(node, main)
    version = _version(files[0], major)
    texts = {file.path: file.text for file in files}
    new = {file.path: file for file in files}
    drop_in = _drop_in(files[0], wanted.name)
    if drop_in is not None and drop_in not in new:
        new[drop_in] = ConfigFile(drop_in, "", {})
        texts[drop_in] = ""
    ordered = _ordered(list(new.values()), drop_in)
    home = drop_in or main
    values: dict[Path, dict[toml_edit.Path, toml_edit.Value]] = {}
    proxy_home = _last_with(ordered, ("proxy_plugins", wanted.name)) or home
    values.setdefault(proxy_home, {}).update(_proxy_values(wanted))
    if wanted.default:
        for dialect in range(version, 4):
            values.setdefault(_cri_home(ordered, dialect, drop_in) or home, {}).update(_cri_values(wanted, dialect))
    changes = []
    for path, wants in values.items():
        text = texts[path]
        own = _own_version(new[path])
        if own not in (None, version) or (own is None and version == 2 and path != main and text.strip()):
            raise UsageError(
                f"{path} is of version {own or 1}, {main} of version {version}",
                hint="containerd config migrate writes them in one version",
            )
        if not text:
            text = _HEAD
        if own is None:
            wants = {("version",): version, **wants}
        try:
            after = toml_edit.set_values(text, wants, str(path))
        except UsageError as error:
            raise UsageError(error.message, hint=f"write this by hand:\n{by_hand(wanted, version)}") from None
        if after != texts[path]:
            changes.append(Change(path, after))
    return changes


def read_files(node: Node, main: Path) -> list[ConfigFile]:
    """Return the main file and what it imports, in the order in which containerd merges them. Raise UsageError."""
    found: dict[Path, ConfigFile] = {}
    waiting = [main]
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        if len(found) == MAX_IMPORTS:
            raise UsageError(f"{main} imports more than {MAX_IMPORTS} files")
        raw = node.read(path)
        try:
            text = "" if raw is None else raw.decode()
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8") from None
        found[path] = ConfigFile(path, text, toml_edit.parse(text, str(path)))
        for pattern in _imports(found[path]):
            waiting += _matches(node, pattern)
    return list(found.values())


def in_force(files: list[ConfigFile], major: int = 0) -> tuple[str, bool]:
    """Return CRI's snapshotter ("" where nothing sets one), and whether annotations reach it, as containerd merges."""
    version = _version(files[0], major)
    name, passed = "", False
    for file in files:
        table = _table(file.data, _CRI_KEYS[version])
        if version == 2 and _table(file.data, _CRI[2]) is not None:
            name, passed = "", False
        if table is not None:
            name = str(table.get("snapshotter", name))
            passed = not table.get("disable_snapshot_annotations", not passed)
    return name, passed


def grpc_address(files: list[ConfigFile]) -> str:
    """Return the socket that containerd listens on."""
    found = "/run/containerd/containerd.sock"
    for file in files:
        table = _table(file.data, ("grpc",)) or {}
        found = str(table.get("address") or found)
    return found


def still_naming(node: Node, known: Iterable[Path], left: Iterable[Path], address: Path) -> list[Path]:
    """Return those files of `left` by which CRI takes the snapshotter at `address`, whatever name `known` gives it.

    Files that are no TOML are passed over. Blocking. Raise UsageError where a file can't be read.
    """
    found = {path: _loose(node, path) for path in (*known, *left)}
    names = {
        name
        for data in found.values()
        for name in _table(data, ("proxy_plugins",)) or {}
        if (_table(data, ("proxy_plugins", name)) or {}).get("address") == str(address)
    }
    return [
        path
        for path in left
        if any((_table(found[path], keys) or {}).get("snapshotter") in names for keys in _CRI_KEYS.values())
    ]


def by_hand(wanted: Wanted, version: int) -> str:
    """Return what an admin has to write where the files can't be edited."""
    text = f"version = {version}\n"
    values: dict[toml_edit.Path, toml_edit.Value] = dict(_proxy_values(wanted))
    if wanted.default:
        for dialect in range(version, 4):
            values.update(_cri_values(wanted, dialect))
    return toml_edit.set_values(text, values, "the configuration")


def _proxy_values(wanted: Wanted) -> dict[toml_edit.Path, toml_edit.Value]:
    table = ("proxy_plugins", wanted.name)
    values: dict[toml_edit.Path, toml_edit.Value] = {(*table, "type"): "snapshot"}
    values[(*table, "address")] = str(wanted.address)
    if wanted.remap_ids:
        values[(*table, "capabilities")] = ["remap-ids"]
    values[(*table, "exports", "root")] = str(wanted.root)  # 1.6 knows no exports, and passes them by
    return values


def _cri_values(wanted: Wanted, version: int) -> dict[toml_edit.Path, toml_edit.Value]:
    table = _CRI_KEYS[version]
    return {(*table, "snapshotter"): wanted.name, (*table, "disable_snapshot_annotations"): False}


def _loose(node: Node, path: Path) -> Mapping[str, Any]:
    try:
        return toml_edit.parse((node.read(path) or b"").decode("utf-8", "replace"), str(path))
    except UsageError:
        return {}


def _version(main: ConfigFile, major: int) -> int:
    version = _own_version(main)
    if version is None and not any(name in main.data for name in _OLD):
        return 3 if major >= 2 else 2
    if version not in _CRI:
        raise UsageError(
            f"{main.path} is of version {version or 1}; 2 and 3 can be edited",
            hint="containerd config migrate writes it in a newer version",
        )
    return version


def _own_version(file: ConfigFile) -> int | None:
    version = file.data.get("version")
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise UsageError(f"{file.path}: version can't be {version!r}")
    return version


def _imports(file: ConfigFile) -> list[str]:
    """Return absolute paths and patterns. A relative one begins at its file; see `_drop_in` for 1.6."""
    return [os.path.normpath(file.path.parent / pattern) for pattern in _patterns(file)]


def _patterns(file: ConfigFile) -> list[str]:
    imports = file.data.get("imports", [])
    if not isinstance(imports, list):
        raise UsageError(f"{file.path}: imports is no list")
    return [str(pattern) for pattern in imports]


def _matches(node: Node, pattern: str) -> list[Path]:
    if "*" not in pattern:
        return [Path(pattern)]
    root = node.root.resolve()
    found = glob.glob(glob.escape(str(root)).rstrip("/") + pattern, include_hidden=True)
    return [Path("/") / Path(path).relative_to(root) for path in sorted(found)]


def _drop_in(main: ConfigFile, name: str) -> Path | None:
    """Return a file of our own that the main file imports, or None where its imports name none.

    A relative pattern doesn't count: 1.6 starts it where containerd was started, later ones at the file.
    """
    for pattern in _patterns(main):
        directory, base = os.path.split(pattern)
        if (
            os.path.isabs(pattern)
            and "*" in base
            and "*" not in directory
            and fnmatch.fnmatchcase(f"{name}.toml", base)
        ):
            return Path(os.path.normpath(directory)) / f"{name}.toml"
    return None


def _ordered(files: list[ConfigFile], drop_in: Path | None) -> list[ConfigFile]:
    """Put a drop-in that doesn't exist yet where containerd will merge it: among its neighbours by name."""
    if drop_in is None or files[-1].path != drop_in or files[-1].text:
        return files
    *others, ours = files
    after = [i for i, file in enumerate(others) if i and file.path.parent == drop_in.parent and file.path > drop_in]
    at = after[0] if after else len(others)
    return [*others[:at], ours, *others[at:]]


def _last_with(files: list[ConfigFile], table: tuple[str, ...]) -> Path | None:
    found = [file.path for file in files if _table(file.data, table) is not None]
    return found[-1] if found else None


def _cri_home(files: list[ConfigFile], version: int, drop_in: Path | None) -> Path | None:
    if version == 2:
        return _last_with(files, _CRI[2])
    paths = [file.path for file in files]
    if drop_in is None:
        return _last_with(files, _CRI[3])
    return _last_with(files[paths.index(drop_in) + 1 :], _CRI[3])


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    at: Any = data
    for part in path:
        at = at.get(part) if isinstance(at, dict) else None
    return at if isinstance(at, dict) else None
